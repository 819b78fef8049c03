"""random_ranks beside torch's random keys, sorted twice, which any cut of a batch would change.

`python -m benchmarks.ops.bench_random_ranks [CASE ...]`
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from benchmarks.side_by_side import Contest, main
from microtome.ops import random_ranks


def orders(s: int, p: int) -> Contest:
    """Orders of p players for s samples. What is checked is that every one is a permutation."""
    samples, still = torch.arange(s), torch.empty(s, p, dtype=torch.int32)
    every = torch.arange(p, dtype=torch.float32).expand(s, p)

    def torch_way() -> Tensor:
        return torch.rand(s, p).argsort(-1).argsort(-1).int()

    return Contest(
        ways={
            "random_ranks": lambda: random_ranks(samples, p, 7),
            "torch: rand, argsort twice": torch_way,
        },
        unit=("one number to each place", lambda: still.fill_(1)),
        plain=every,
        exact=every.double(),
        picked=lambda ranks: ranks.sort(-1).values.float(),
        figures={"samples": s, "players": p, "MB": 1e-6 * still.nbytes},
    )


CASES = {
    "table": functools.partial(orders, 20000, 30),
    "pixels": functools.partial(orders, 1000, 784),
    "many": functools.partial(orders, 100, 4096),
}

if __name__ == "__main__":
    main("random_ranks", CASES)
