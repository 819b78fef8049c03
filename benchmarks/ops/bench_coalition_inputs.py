"""coalition_inputs beside a mask and torch.where, and beside a copy of as many bytes.

`python -m benchmarks.ops.bench_coalition_inputs [CASE ...]`
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from benchmarks.side_by_side import Contest, main
from microtome._seed import generator
from microtome.ops import coalition_inputs


def walks(m: int, n: int, orders: int, p: int = 0) -> Contest:
    """Walks of paired spans along `orders` orders, each over every one of n background rows."""
    g = generator(0, m, n)
    players = p or m
    x, background = torch.randn(1, m, generator=g), torch.randn(n, m, generator=g)
    ranks = torch.rand(orders, players, generator=g).argsort(1).int()
    t = torch.arange(players + 1)
    zero, full = torch.zeros_like(t), torch.full_like(t, players)
    spans = torch.cat([torch.stack([zero, t], 1), torch.stack([t, full], 1)])  # [2 p + 2, 2]
    grid = torch.cartesian_prod(torch.arange(orders), torch.arange(n), torch.arange(len(spans)))
    order, behind, span = grid.unbind(1)
    rows = torch.stack([torch.zeros_like(order), behind, order, *spans[span].unbind(1)], 1).int()
    player = torch.randint(0, p, (m,), generator=g).int() if p else None

    def torch_way() -> Tensor:
        place, lo, hi = ranks[order], rows[:, 3, None], rows[:, 4, None]
        present = (place >= lo) & (place < hi)
        return torch.where(present if player is None else present[:, player], x, background[behind])

    answer = torch_way()
    still = torch.empty_like(answer)
    return Contest(
        ways={
            "coalition_inputs": lambda: coalition_inputs(x, background, ranks, rows, player),
            "torch.where": torch_way,
        },
        unit=("copy_ into a buffer", lambda: still.copy_(answer)),
        plain=answer,
        exact=answer.double(),
        picked=lambda got: got,
        figures={"rows": len(rows), "columns": m, "MB": 1e-6 * answer.nbytes},
    )


CASES = {
    "table-1": functools.partial(walks, 30, 1, 10),
    "table-100": functools.partial(walks, 30, 100, 10),
    "pixels-10": functools.partial(walks, 784, 10, 1),
    "superpixels": functools.partial(walks, 3 * 64 * 64, 1, 4, 50),
}

if __name__ == "__main__":
    main("coalition_inputs", CASES)
