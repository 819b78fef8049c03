"""Where b_dec starts: the middle of the data."""

from __future__ import annotations

import torch
from torch import Tensor

from microtome import _check
from microtome._seed import generator
from microtome.sae.config import TrainConfig
from microtome.sae.sae import SAE
from microtome.sae.source import ActivationSource


def geometric_median(x: Tensor, *, max_iterations: int = 100, tolerance: float = 1e-7) -> Tensor:
    """The point with the least sum of distances to the rows of x, by Weiszfeld's iteration.

        y <- sum_i x_i / |x_i - y|  /  sum_i 1 / |x_i - y|

    Args:
        x: [n, d], n at least 1.
        max_iterations: where to stop at the latest.
        tolerance: stop when y moves less than this, relative to the mean distance.

    Returns:
        [d] float64. Unlike the mean it is hardly moved by a few rows of massive norm.

    Deterministic. Source: Weiszfeld 1937; for b_dec, Bricken et al. 2023.

    Example:
        >>> import torch
        >>> geometric_median(torch.tensor([[0.0], [1.0], [100.0]])).round().item()
        1.0
    """
    x = x.double()
    y = x.mean(0)
    for _ in range(max_iterations):
        distances = (x - y).norm(dim=1)
        scale = float(distances.mean())
        if scale == 0:
            break
        weights = 1 / distances.clamp_min(1e-9 * scale)  # a row at y itself would weigh infinitely
        moved = (weights[:, None] * x).sum(0) / weights.sum()
        step = float((moved - y).norm())
        y = moved
        if step < tolerance * scale:
            break
    return y


@torch.no_grad()
def start_b_dec_(sae: SAE, source: ActivationSource, config: TrainConfig) -> None:
    """Set b_dec from a seeded sample of rows, unless it is set already or the config says "keep".

    Raises:
        NonFiniteError: sampled rows hold NaN or infinity; the message names them.
    """
    if config.b_dec_init == "keep" or bool(sae.b_dec.any()):
        return
    rows = torch.arange(len(source))
    if len(source) > config.init_rows:
        g = generator(config.seed, "b_dec")
        rows = torch.randint(len(source), (config.init_rows,), generator=g).unique()
    sample = source.rows(rows)
    bad = (~torch.isfinite(sample)).any(-1).nonzero().flatten().cpu()
    if len(bad):
        _check.rows("train", "activations", rows[bad])
    middle = geometric_median(sample) if config.b_dec_init == "geometric_median" else sample.mean(0)
    sae.b_dec.copy_(middle)
