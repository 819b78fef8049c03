"""The learning rate over a run."""

from __future__ import annotations

from microtome.sae.config import TrainConfig


def lr_factor(config: TrainConfig, step: int) -> float:
    """The learning rate of a step as a fraction of its peak.

        warm-up: step / warmup_steps, at most 1
        linear decay: (total + 1 - step) / (decay_fraction * total), at most 1

    Args:
        config: the run's settings.
        step: 1 for the first.

    Returns:
        The product of both. The last step still moves: the line reaches zero one step after it.

    Example:
        >>> config = TrainConfig(steps=10, warmup_steps=2, decay_fraction=0.5)
        >>> [lr_factor(config, s) for s in (1, 2, 6, 7, 10)]
        [0.5, 1.0, 1.0, 0.8, 0.2]
    """
    total = config.total_steps
    warm = min(1.0, step / config.warmup_steps) if config.warmup_steps else 1.0
    span = config.decay_fraction * total
    if config.decay == "constant" or span == 0:
        return warm
    return warm * min(1.0, (total + 1 - step) / span)
