"""shapley_reduce beside gathers in torch, and beside a sum of the values, which reads them once.

`python -m benchmarks.ops.bench_shapley_reduce [CASE ...]`
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from benchmarks.side_by_side import Contest, main
from microtome._seed import generator
from microtome.ops import shapley_reduce


def gathered(values: Tensor, ranks: Tensor) -> tuple[Tensor, Tensor]:
    """Paired walks, as one writes them in torch, in the dtype of values."""
    p = ranks.shape[3]
    steps = values.diff(dim=4)  # [e, S, U, A, 2 p, o]
    gains = (steps[..., :p, :] - steps[..., p:, :]) / 2
    index = ranks.long()[None, ..., None].expand(gains.shape)
    units = gains.gather(4, index).mean(3)  # [e, S, U, p, o]
    mean = units.mean(2)
    return mean, (units - mean[:, :, None]).square().sum(2)


def paired(e: int, S: int, U: int, p: int, o: int) -> Contest:
    """Units of one paired order."""
    g = generator(0, e, S, U, p, o)
    values = torch.randn(e, S, U, 1, 2 * p + 1, o, generator=g)
    ranks = torch.rand(S, U, 1, p, generator=g).argsort(-1).int()
    return Contest(
        ways={
            "shapley_reduce": lambda: shapley_reduce(values, ranks, True),
            "diff, gather in float64": lambda: gathered(values.double(), ranks),
        },
        unit=("values.sum()", values.sum),
        plain=gathered(values, ranks)[0],
        exact=gathered(values.double(), ranks)[0],
        picked=lambda answer: answer[0],
        figures={"orders": e * S * U, "players": p, "MB": 1e-6 * values.nbytes},
    )


CASES = {
    "one-background": functools.partial(paired, 1, 1, 10, 30, 1),
    "table-100": functools.partial(paired, 1, 100, 10, 30, 1),
    "explicands-64": functools.partial(paired, 64, 100, 2, 30, 1),
    "classes-10": functools.partial(paired, 1, 100, 2, 784, 10),
}

if __name__ == "__main__":
    main("shapley_reduce", CASES)
