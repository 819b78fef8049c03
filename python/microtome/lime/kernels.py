"""How far a sample is from the input, and how much it counts in the fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from microtome.errors import ArgumentError, PackageError, ShapeError

Kernel = Callable[[np.ndarray], Any]
Distance = str | Callable[[np.ndarray, np.ndarray], Any]


def exponential(width: float) -> Kernel:
    """The kernel exp(-d^2 / (2 width^2)) of distances d.

    Raises:
        ArgumentError: the width is not positive.
    """
    if not width > 0:
        msg = f"exponential: width must be positive, got width={width}."
        raise ArgumentError(msg)
    scale = -0.5 / float(width) ** 2
    return lambda d: np.exp(scale * np.square(d))


def kernel_of(op: str, kernel: Kernel | None, width: float | None, default: float) -> Kernel:
    """The user's kernel, or the exponential one of this width.

    Raises:
        ArgumentError: both are given, or the kernel is no function.
    """
    if kernel is None:
        return exponential(default if width is None else width)
    if width is not None or not callable(kernel):
        msg = (
            f"{op}: kernel must be a function of distances that returns weights, and then "
            f"kernel_width is left out; got kernel={kernel!r}, kernel_width={width}."
        )
        raise ArgumentError(msg)
    return kernel


def weights_of(op: str, kernel: Kernel, distances: np.ndarray) -> np.ndarray:
    """[K] float64 weights of distances [K].

    Raises:
        ShapeError: the kernel returns another number of weights.
        ArgumentError: a weight is negative or NaN, or all are zero.
    """
    weights = np.asarray(kernel(distances), dtype=np.float64)
    if weights.shape != distances.shape:
        msg = (
            f"{op}: kernel must return one weight for each distance, {list(distances.shape)}, got "
            f"shape {list(weights.shape)}."
        )
        raise ShapeError(msg)
    if not (weights >= 0).all():
        msg = f"{op}: kernel returned weights that are negative or NaN (least {weights.min()})."
        raise ArgumentError(msg)
    if not weights.any():
        msg = f"{op}: kernel gives every sample the weight 0. Widen it (kernel_width)."
        raise ArgumentError(msg)
    return weights


def binary_distances(distance: str, p: int) -> np.ndarray:
    """[p + 1] distances of samples from the input by how many of p features they keep.

    All features on is the input. The Euclidean distance is then sqrt(off), the cosine distance
    1 - sqrt(on / p).
    """
    on = np.arange(p + 1.0)
    return np.sqrt(p - on) if distance == "euclidean" else 1 - np.sqrt(on / p)


def distances_of(op: str, distance: Distance, z: np.ndarray, origin: np.ndarray) -> np.ndarray:
    """[K] distances of rows z [K, p] from the row origin [p].

    Args:
        op: name for messages.
        distance: "euclidean", "cosine", a function (z, origin) -> [K], or any metric that
            scikit-learn's pairwise_distances knows.
        z: the rows.
        origin: the input, in the same coordinates.

    Raises:
        ShapeError: a function returns another number of distances.
        ArgumentError: an unknown metric. PackageError: it needs scikit-learn.
    """
    if callable(distance):
        found = np.asarray(distance(z, origin), dtype=np.float64)
    elif distance == "euclidean":
        apart = z - origin
        found = np.sqrt(np.einsum("kp,kp->k", apart, apart))
    elif distance == "cosine":
        length = np.sqrt(np.einsum("kp,kp->k", z, z)) * np.sqrt(origin @ origin)
        found = 1 - (z @ origin) / np.where(length > 0, length, 1)
    else:
        found = _sklearn_distances(op, distance, z, origin)
    if found.shape != z.shape[:1]:
        msg = (
            f"{op}: distance must return one number for each of {len(z)} rows, got shape "
            f"{list(found.shape)}."
        )
        raise ShapeError(msg)
    return found


def _sklearn_distances(op: str, metric: str, z: np.ndarray, origin: np.ndarray) -> np.ndarray:
    try:
        from sklearn.metrics import pairwise_distances
    except ImportError as error:
        msg = (
            f"{op}: distance={metric!r} is computed by scikit-learn, which is not there ({error}). "
            "Install it (pip install scikit-learn), or use 'euclidean', 'cosine' or a function."
        )
        raise PackageError(msg) from error
    try:
        return pairwise_distances(z, origin[None], metric=metric).ravel()
    except ValueError as error:
        msg = (
            f"{op}: distance must be 'euclidean', 'cosine', a function or a metric of "
            f"scikit-learn, got {metric!r} ({error})."
        )
        raise ArgumentError(msg) from error
