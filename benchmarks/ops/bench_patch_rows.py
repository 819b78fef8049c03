"""patch_rows beside base[index] and index_put, as one would write it in torch.

`python -m benchmarks.ops.bench_patch_rows [CASE ...]`
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from benchmarks.side_by_side import Contest, main
from microtome._seed import generator
from microtome.ops import REPLACE, patch_rows


def whole_tokens(t: int, d: int, layers: int) -> Contest:
    """The residual sweep: every (layer, position) is a row that replaces its first token."""
    g = generator(0, "tokens")
    starts = torch.arange(t).repeat_interleave(layers)
    rows = torch.stack([torch.zeros_like(starts), starts, torch.full_like(starts, t)], 1).int()
    n, T = len(rows), int((t - starts).sum())
    base, sources = torch.randn(1, t, d, generator=g), torch.randn(t, d, generator=g)
    table = torch.stack(
        [
            torch.arange(n), starts, torch.zeros(n), torch.full((n,), d), starts,
            torch.full((n,), REPLACE),
        ],
        1,
    ).int()  # fmt: skip
    return _contest(base, sources, rows, table, T)


def heads(t: int, h: int, dh: int, layers: int) -> Contest:
    """The head sweep: every (layer, head) is a whole run with that head's columns replaced."""
    g = generator(0, "heads")
    n, d = layers * h, h * dh
    rows = torch.tensor([[0, 0, t]], dtype=torch.int32).repeat(n, 1)
    base, sources = torch.randn(1, t, d, generator=g), torch.randn(t, d, generator=g)
    row = torch.arange(n).repeat_interleave(t)
    position = torch.arange(t).repeat(n)
    low = row % h * dh
    table = torch.stack(
        [row, position, low, low + dh, position, torch.full_like(row, REPLACE)], 1
    ).int()
    return _contest(base, sources, rows, table, n * t)


def _contest(base: Tensor, sources: Tensor, rows: Tensor, table: Tensor, T: int) -> Contest:
    lengths = (rows[:, 2] - rows[:, 1]).long()
    place = lengths.cumsum(0) - lengths  # [n]: of each row's first token
    index = torch.cat([torch.arange(start, stop) for _, start, stop in rows.tolist()])  # [T]
    row, position, lo, hi, source, _ = table.long().unbind(1)
    token = place[row] + position - rows[row, 1]
    columns = lo[:, None] + torch.arange(int((hi - lo)[0]))
    factors = torch.ones(len(table))

    def torch_way() -> Tensor:
        out = base[0, index]
        return out.index_put_((token[:, None], columns), sources[source[:, None], columns])

    exact = base[0, index].double()
    exact[token[:, None], columns] = sources[source[:, None], columns].double()
    still = torch.empty(T, base.shape[2])

    def copied() -> Tensor:
        return torch.index_select(base[0], 0, index, out=still)

    return Contest(
        ways={
            "patch_rows": lambda: patch_rows(base, sources, rows, table, factors, T),
            "base[index], index_put": torch_way,
        },
        unit=("index_select into a buffer", copied),
        plain=torch_way(),
        exact=exact,
        picked=lambda answer: answer,
        figures={"rows": len(rows), "tokens": T, "MB": 4e-6 * T * base.shape[2]},
    )


CASES = {
    "residual-64": functools.partial(whole_tokens, 64, 768, 12),
    "residual-16": functools.partial(whole_tokens, 16, 768, 12),
    "heads-64": functools.partial(heads, 64, 12, 64, 12),
}

if __name__ == "__main__":
    main("patch_rows", CASES)
