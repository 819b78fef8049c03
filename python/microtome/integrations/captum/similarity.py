"""How much a perturbed example counts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from microtome import _check
from microtome.errors import ArgumentError

if TYPE_CHECKING:
    from microtome.integrations.captum.game import ForwardGame

_SMALL = 1e-8  # below it a norm counts as this


class ExpKernel:
    """exp(-distance^2 / (2 width^2)) of a perturbed example to the original.

    Args:
        distance_mode: "cosine", 1 less the cosine of all inputs strung together, or "euclidean".
        kernel_width: in units of the distance.
    """

    def __init__(self, distance_mode: str = "cosine", kernel_width: float = 1.0) -> None:
        op = "get_exp_kernel_similarity_function"
        _check.one_of(op, "distance_mode", distance_mode, ("cosine", "euclidean"))
        if not kernel_width > 0:
            msg = f"{op}: kernel_width must be positive, got kernel_width={kernel_width}."
            raise ArgumentError(msg)
        self.distance_mode, self.kernel_width = distance_mode, kernel_width

    def __call__(self, original: Any, perturbed: Any, sample: Any = None, **kwargs: Any) -> float:
        """The weight of one perturbed example, called as captum's functions are."""
        x, z = (
            torch.cat([t.flatten().double() for t in (a if isinstance(a, tuple) else (a,))])
            for a in (original, perturbed)
        )
        return float(self._kernel(x @ x, x @ z, z @ z))

    def of_game(self, game: ForwardGame, inside: Tensor, who: Tensor) -> Tensor:
        """[e', K]: weights of samples [K, p], from each player's share of the products alone."""
        p = len(game.players)
        parts = torch.zeros(3, game.explicands, p, dtype=torch.float64)  # x.x, x.b, b.b
        for x, base, held in zip(game.x, game.base, game.asked.players, strict=True):
            x, base = x.double().cpu(), base.double().cpu()
            for share, product in zip(parts, (x * x, x * base, base * base), strict=True):
                rows = product.expand(len(x), -1)
                at = held.expand(len(x), -1)
                by_row = torch.zeros(len(x), p, dtype=torch.float64).scatter_add_(1, at, rows)
                share += by_row.sum(0) if game.whole else by_row
        xx, xb, bb = parts[:, who]
        present = inside.double().T
        return self._kernel(
            xx.sum(1, keepdim=True),
            xx @ present + xb @ (1 - present),
            xx @ present + bb @ (1 - present),
        )

    def _kernel(self, xx: Tensor, xz: Tensor, zz: Tensor) -> Tensor:
        if self.distance_mode == "cosine":
            norms = xx.sqrt().clamp(min=_SMALL) * zz.sqrt().clamp(min=_SMALL)
            squared = (1 - xz / norms).square()
        else:
            squared = (xx - 2 * xz + zz).clamp(min=0.0)
        return torch.exp(-squared / (2 * self.kernel_width**2))


def get_exp_kernel_similarity_function(
    distance_mode: str = "cosine", kernel_width: float = 1.0
) -> ExpKernel:
    """captum's function of this name; see `ExpKernel`."""
    return ExpKernel(distance_mode, kernel_width)
