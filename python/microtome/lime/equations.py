"""The weighted normal equations of many explicands: all that a fit needs to know of its samples."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from microtome.ops import coalition_gram


@dataclass(frozen=True, eq=False)
class Equations:
    """Centred sums over the samples of e explicands with p features and o outputs, float64.

    With weights w_k that sum to W, features z_k and values y_k of sample k:

    Attributes:
        gram: [e, p, p], sum_k w_k (z_k - mean z)(z_k - mean z)^T.
        moments: [e, p, o], sum_k w_k (z_k - mean z)(y_k - mean y).
        total: [e, o], sum_k w_k (y_k - mean y)^2.
        mean_z, mean_y: [e, p] and [e, o], weighted means.
        origin: [e, p], the explicand in the coordinates of z.
    """

    gram: Tensor
    moments: Tensor
    total: Tensor
    mean_z: Tensor
    mean_y: Tensor
    origin: Tensor


def from_coalitions(words: Tensor, weights: Tensor, values: Tensor, p: int) -> Equations:
    """Of one explicand whose samples switch features on and off; all on is the explicand.

    Args:
        words: [K, w] int64, coalitions.pack: which features are on.
        weights: [K] float64.
        values: [K, o] float64; the first is the explicand's.
        p: features.
    """
    # Values relative to the explicand's: a constant function gives exact zeros, a large offset
    # costs no digits.
    first = values[0]
    values = values - first
    gram, moments = coalition_gram(words, weights[None], values[None], p)
    W = gram[:, :1, 0]
    mean_z, mean_y = gram[:, 0, 1:] / W, moments[:, 0] / W
    square = (weights @ values.square())[None]
    centred = gram[:, 1:, 1:] - gram[:, 1:, :1] * mean_z[:, None]
    second = gram.diagonal(dim1=1, dim2=2)[:, 1:]
    return Equations(
        *_without_constants(
            centred, moments[:, 1:] - gram[:, 1:, :1] * mean_y[:, None], 1e-13 * second
        ),
        (square - W * mean_y.square()).clamp(min=0),
        mean_z,
        mean_y + first,
        torch.ones(1, p, dtype=torch.float64),
    )


def from_rows(z: Tensor, weights: Tensor, values: Tensor) -> Equations:
    """Of one explicand whose samples are rows of numbers.

    Args:
        z: [K, p] float64; the first row is the explicand.
        weights: [K] float64.
        values: [K, o] float64.
    """
    W = weights.sum()
    first = values[0]
    values = values - first
    mean_z, mean_y = weights @ z / W, weights @ values / W
    origin = z[0]
    z, values = z - mean_z, values - mean_y
    weighted = z * weights[:, None]
    gram = weighted.T @ z
    return Equations(
        *_without_constants(
            (gram.tril() + gram.tril(-1).T)[None],
            (weighted.T @ values)[None],
            1e-24 * W * mean_z.square()[None],
        ),
        (weights @ values.square())[None],
        mean_z[None],
        (mean_y + first)[None],
        origin[None],
    )


def _without_constants(gram: Tensor, moments: Tensor, least: Tensor) -> tuple[Tensor, Tensor]:
    """Zero where a feature's variance is below `least` [e, p], that is, nothing but rounding."""
    varies = gram.diagonal(dim1=1, dim2=2) > least
    if bool(varies.all()):
        return gram, moments
    gram = gram * (varies[:, :, None] & varies[:, None])
    return gram, moments * varies[:, :, None]


def stack(parts: list[Equations]) -> Equations:
    """Of all explicands of a list that have the same number of features."""
    if len(parts) == 1:
        return parts[0]
    names = ("gram", "moments", "total", "mean_z", "mean_y", "origin")
    return Equations(*(torch.cat([getattr(part, name) for part in parts]) for name in names))
