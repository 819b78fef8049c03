"""Links as shap has them, and games of weighted background rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from microtome.errors import ArgumentError
from microtome.shapley.coalitions import MEAN
from microtome.shapley.game import Game, GameOver
from microtome.shapley.link import Link

_STEP = 1e-4  # shap's own, for the slope of a link


def tensor_link(op: str, link: Any) -> Link | None:
    """A link as a function of tensors; None for the identity.

    Args:
        op: name for messages.
        link: a function of arrays (shap.links.logit), "identity", "logit" or None.

    Raises:
        ArgumentError: it is none of these.
    """
    if link is None or link == "identity" or getattr(link, "__name__", "") == "identity":
        return None
    if (isinstance(link, str) and link == "logit") or type(link).__name__ == "LogitLink":
        return clipped_logit
    if type(link).__name__ == "IdentityLink":
        return None
    if not callable(link):
        msg = f"{op}: link must be 'identity', 'logit' or a function of arrays, got {link!r}."
        raise ArgumentError(msg)

    def linked(values: Tensor) -> Tensor:
        return torch.from_numpy(np.asarray(link(values.numpy()), dtype=np.float64))

    return linked


def clipped_logit(values: Tensor) -> Tensor:
    """log(v / (1 - v)) with v kept 1e-15 away from 0 and 1."""
    return torch.logit(values, eps=1e-15)


def linear_weights(values: Tensor, link: Callable[[Tensor], Tensor]) -> Tensor:
    """Weights [n, o] of background rows that linearise a link.

    With them mean(w * link(v)) = link(mean(v)) over the background's own values, and a model that
    is additive behind the link stays so over several background rows. Their mean is 1.

    Args:
        values: [n, o], the model's answers to the background rows.
        link: as from `tensor_link`.
    """
    mean = values.mean(0)
    at = link(mean)
    slope = (link(mean + _STEP) - at) / _STEP
    rise = link(values) - at
    weights = slope * (values - mean) / rise
    weights = torch.where(rise == 0, torch.ones_like(weights), weights)
    return weights * (len(weights) / weights.sum(0))


class WeightedGame(GameOver):
    """A game whose background rows count unequally, and on the scale of a link.

    v(S) = mean over b of weights_b link(v_b(S)), so that every background row is still a game of
    its own.

    Args:
        game: the game.
        weights: [n] or [n, o] with mean 1.
        link: or None for the identity.
    """

    def __init__(self, game: Game, weights: Tensor, link: Link | None) -> None:
        super().__init__(game)
        self.link = link
        self.weights = weights if weights.dim() == 2 else weights[:, None]

    def ends(self) -> tuple[Tensor, Tensor]:
        empty, full = self.game.ends()
        return self._linked(empty) * self.weights, self._linked(full)

    def values(self, ranks: Tensor, spans: Tensor, who: Tensor) -> Tensor:
        n, K = self.backgrounds, len(spans)
        if n == 1 or not bool((spans[:, 0] == MEAN).any()):
            behind = spans[:, 0].long().clamp(min=0)
            return self._linked(self.game.values(ranks, spans, who)) * self.weights[behind]
        each = spans.repeat_interleave(n, 0)
        each[:, 0] = torch.arange(n, dtype=spans.dtype).repeat(K)
        values = self._linked(self.game.values(ranks, each, who)).unflatten(1, (K, n))
        return (values * self.weights).mean(2)

    def _linked(self, values: Tensor) -> Tensor:
        return values if self.link is None else self.link(values)
