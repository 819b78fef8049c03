"""Samples that switch features on and off: equal ones, their weights and equations."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from microtome.lime.equations import Equations, from_coalitions
from microtome.lime.kernels import Distance, Kernel, binary_distances, distances_of, weights_of
from microtome.shapley.coalitions import pack


def first_of_equal(on: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows [K, p] bool without repeats, in the order of their first occurrence.

    Returns:
        first: [U], a row for each different one; which: [K], its place in first, for every row.
    """
    packed = np.packbits(on, axis=1)
    key = packed.view([("", packed.dtype, packed.shape[1])]).ravel()
    _, first, which = np.unique(key, return_index=True, return_inverse=True)
    order = first.argsort()
    return first[order], order.argsort()[which.ravel()]


def answered(which: np.ndarray, known: int) -> np.ndarray:
    """The start of `which` [K] that the first `known` different rows answer: all, as a rule."""
    unknown = which >= known
    return which[: int(unknown.argmax())] if unknown.any() else which


def mask_distances(op: str, on: np.ndarray, distance: Distance, scale: float) -> np.ndarray:
    """[K] distances of samples [K, p] bool from the one with all on, times `scale`."""
    p = on.shape[1]
    if isinstance(distance, str) and distance in ("euclidean", "cosine"):
        return scale * binary_distances(distance, p)[on.sum(1)]
    return scale * distances_of(op, distance, on.astype(float), np.ones(p))


def equations_of(
    op: str, on: np.ndarray, values: Tensor, kernel: Kernel, distance: Distance, scale: float
) -> Equations:
    """Of samples [K, p] bool and the explicand before them; values [K + 1, o]."""
    every = np.concatenate([np.ones_like(on[:1]), on])
    weights = weights_of(op, kernel, mask_distances(op, every, distance, scale))
    return from_coalitions(
        pack(torch.from_numpy(every)), torch.from_numpy(weights), values, on.shape[1]
    )
