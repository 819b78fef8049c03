"""coalition_gram beside a design matrix and a product in torch, made each time or given.

`python -m benchmarks.ops.bench_coalition_gram [CASE ...]`
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from benchmarks.side_by_side import Contest, main
from microtome._seed import generator
from microtome.ops import coalition_gram


def design(coalitions: Tensor, p: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """[K, p + 1], the constant first."""
    player = torch.arange(p)
    bits = coalitions[:, player // 64] >> (player % 64) & 1
    return torch.cat([torch.ones(len(bits), 1), bits], 1).to(dtype)


def products(z: Tensor, weights: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """The Gram matrices and moments of a design matrix."""
    weighted = [(z * w[:, None]).T for w in weights]
    gram = torch.stack([zw @ z for zw in weighted])
    if len(weights) == 1:
        return gram, weighted[0] @ values
    return gram, torch.stack([zw @ v for zw, v in zip(weighted, values, strict=True)])


def fits(K: int, p: int, e: int, o: int, shared: bool) -> Contest:
    """e regressions on K coalitions."""
    g = generator(0, K, p, e)
    coalitions = torch.randint(-(2**63), 2**63 - 1, (K, (p + 63) // 64), generator=g)
    weights = torch.rand(1 if shared else e, K, generator=g).double()
    values = torch.randn(e, K, o, generator=g).double()
    z = design(coalitions, p)
    coarse = (t.float() for t in (z, weights, values))
    return Contest(
        ways={
            "coalition_gram": lambda: coalition_gram(coalitions, weights, values, p),
            "bits, then products": lambda: products(design(coalitions, p), weights, values),
        },
        unit=("products, design given", lambda: products(z, weights, values)),
        plain=products(*coarse)[0],
        exact=products(z, weights, values)[0],
        picked=lambda answer: answer[0],
        figures={"coalitions": K, "players": p, "explicands": e, "outputs": o},
    )


CASES = {
    "lime-5000": functools.partial(fits, 5000, 30, 1, 1, False),
    "lime-5000-16": functools.partial(fits, 5000, 30, 16, 1, False),
    "kernel-2108": functools.partial(fits, 2108, 30, 1, 1, True),
    "kernel-2108-256": functools.partial(fits, 2108, 30, 256, 1, True),
    "image-1000": functools.partial(fits, 1000, 50, 1, 1000, True),
    "pixels-784": functools.partial(fits, 3616, 784, 1, 10, True),
}

if __name__ == "__main__":
    main("coalition_gram", CASES)
