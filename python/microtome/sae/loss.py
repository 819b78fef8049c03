"""The training loss: its normalisation, and which latents AuxK calls on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from microtome._reading import Reading
from microtome.errors import NonFiniteError
from microtome.ops import synchronize
from microtome.sae.config import TrainConfig


@dataclass(frozen=True)
class Losses:
    """The numbers of one step.

    Attributes:
        fvu: fraction of variance unexplained on the batch: sum of squared errors / total variance.
        auxk: AuxK before its coefficient; 0 when no latent is dead.
        loss: fvu + coefficient * auxk.
        l0: mean number of values above zero in a row.
        dead: [f] bool, the latents that count as dead after the step, where the SAE is.
        lr: the learning rate of the step.
    """

    fvu: float
    auxk: float
    loss: float
    l0: float
    dead: Tensor
    lr: float

    @property
    def dead_fraction(self) -> float:
        """Dead latents, of all. Reads them only now: on a GPU that waits for the step to end."""
        return int(self.dead.sum()) / len(self.dead)


class LateLosses(Losses):
    """`Losses` of a step that a GPU may still be taking: it is waited for where one is first read.

    Args:
        sums: squared error, values above zero, and AuxK's squared error.
        scale: of the squared errors.
        weight: of AuxK.
        sse: squared errors of the rows, to name one that overflowed.
        aux_sse: the same of AuxK.
        dead: as in `Losses`; `lr` too.

    Raises:
        NonFiniteError: by the first number read, if the loss overflowed; `late` on a GPU, where
            the step has been taken.
    """

    sums: Reading
    scale: float
    weight: float
    sse: Tensor
    aux_sse: Tensor

    def __init__(
        self,
        sums: Reading,
        scale: float,
        weight: float,
        sse: Tensor,
        aux_sse: Tensor,
        dead: Tensor,
        lr: float,
    ) -> None:
        given = {
            "sums": sums, "scale": scale, "weight": weight, "sse": sse, "aux_sse": aux_sse,
            "dead": dead, "lr": lr,
        }  # fmt: skip
        for name, value in given.items():
            object.__setattr__(self, name, value)
        if not sums.late:
            self.settle()

    def settle(self) -> None:
        """Read the numbers, waiting for them if need be."""
        error, active, aux = self.sums.read()
        fvu, auxk = error * self.scale, aux * self.scale
        for loss, sse in ((fvu, self.sse), (fvu + self.weight * auxk, self.aux_sse)):
            try:
                check_finite(loss, sse)
            except NonFiniteError as found:
                found.late = self.sums.late
                raise
        numbers = {"fvu": fvu, "auxk": auxk, "loss": loss, "l0": active / max(1, len(self.sse))}
        for name, value in numbers.items():
            object.__setattr__(self, name, value)

    def __getattr__(self, name: str) -> float:
        """A number that nobody has read yet."""
        if name not in ("fvu", "auxk", "loss", "l0"):
            raise AttributeError(name)
        self.settle()
        return float(self.__dict__[name])


@dataclass(frozen=True)
class DeadSet:
    """The dead latents of a step, and how AuxK weighs them.

    Attributes:
        latents: their numbers, ascending, [n_dead] int64.
        k: how many of them reconstruct each row.
        weight: auxk_coefficient * min(n_dead / k_aux, 1), so that a handful of dead latents cannot
            dominate.
    """

    latents: Tensor
    k: int
    weight: float


def dead_set(
    since_fired: Tensor, d: int, config: TrainConfig, n_dead: int | None = None
) -> DeadSet | None:
    """The dead latents, or None when AuxK has nothing to do.

    `n_dead` is how many there are, where it is known: then a GPU is not waited for.
    """
    if config.auxk_coefficient == 0 or n_dead == 0:
        return None
    dead = since_fired >= config.dead_after_tokens
    if n_dead is None:
        latents = dead.nonzero().flatten()
    else:
        latents = torch.nonzero_static(dead, size=n_dead).flatten()
    n_dead = len(latents)
    if n_dead == 0:
        return None
    return DeadSet(latents, *aux_share(n_dead, d, config))


def aux_share(n_dead: int, d: int, config: TrainConfig) -> tuple[int, float]:
    """How many of n_dead dead latents reconstruct a row, and AuxK's weight; see `DeadSet`."""
    k_aux = config.k_aux or max(1, d // 2)
    return min(k_aux, n_dead), config.auxk_coefficient * min(n_dead / k_aux, 1.0)


def total_variance(x: Tensor) -> float:
    """Sum of squared distances of the rows from their mean, sum_i |x_i - mean|^2, never zero.

    A batch of one row, or of equal rows, has no variance to speak of: its energy sum_i |x_i|^2
    stands in, and 1 where that is zero too.
    """
    return variance_of(*map(float, variance_sums(x)), x.dtype)


def variance_sums(x: Tensor) -> tuple[Tensor, Tensor]:
    """sum_i |x_i - mean|^2 and sum_i |x_i|^2, left where x is."""
    return (x - x.mean(0)).square().sum(), x.square().sum()


def variance_of(variance: float, energy: float, dtype: torch.dtype) -> float:
    """`total_variance` from its two sums."""
    # Equal rows differ from their rounded mean by about eps |x| each.
    if variance > 16 * torch.finfo(dtype).eps ** 2 * energy:
        return variance
    return energy if energy > 0 else 1.0


def check_finite(loss: float, sse: Tensor) -> None:
    """Raise NonFiniteError, naming the rows, before an overflowed loss can reach the weights."""
    if loss - loss == 0:  # false for NaN and infinity
        return
    synchronize(sse.device)  # a GPU's own finding says which input it was
    bad = (~torch.isfinite(sse)).nonzero().flatten()[:5].tolist()
    where = f" in row {', '.join(map(str, bad))}" if bad else ""
    msg = f"the loss is {loss}: the squared error overflows{where}. Scale the activations down or "
    msg += "drop these rows."
    raise NonFiniteError(msg)
