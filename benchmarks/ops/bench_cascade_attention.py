"""Both attention ops beside torch's attention over prefix and suffix joined, with a mask.

`python -m benchmarks.ops.bench_cascade_attention [CASE ...]`
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention

from benchmarks.side_by_side import Contest, main
from microtome._seed import generator
from microtome.ops import cascade_attention, swap_key_attention

CHECKED = 8  # tokens compared with float64


@dataclass(frozen=True)
class Sweep:
    """`copies` rows for each start: what a layer of a patching sweep attends to.

    Attributes:
        h: query heads.
        hk: key heads.
        dh: width of a head.
        t: positions of the base run.
        starts: where the rows begin.
        copies: rows for each start, as many as layers entered.
        last_only: one query a row, as in the last layer.
    """

    h: int
    hk: int
    dh: int
    t: int
    starts: tuple[int, ...]
    copies: int
    last_only: bool = False

    def contest(self) -> Contest:
        """Rows of one start have one length, so torch takes them as one batch without padding."""
        g = generator(0, "cascade")
        h, hk, dh, t = self.h, self.hk, self.dh, self.t
        lengths = [t - start for start in self.starts for _ in range(self.copies)]
        T = sum(lengths)
        product = torch.randn(T, (h + 2 * hk) * dh, generator=g)  # q, k and v of one product
        q, k, v = product.split([h * dh, hk * dh, hk * dh], 1)
        q, k, v = q.view(T, h, dh), k.view(T, hk, dh), v.view(T, hk, dh)
        k_base, v_base = torch.randn(2, 1, t, hk, dh, generator=g)
        rows, positions, at, q_at = [], [], 0, 0
        for length in lengths:
            queries = 1 if self.last_only else length
            rows.append((0, t - length, at, length, q_at, queries))
            positions.append(torch.arange(t - queries, t))
            at, q_at = at + length, q_at + queries
        where = torch.cat(positions).int()
        if self.last_only:
            last = torch.tensor([row[2] + row[3] - 1 for row in rows])
            q = q[last]
        tables = torch.tensor(rows, dtype=torch.int32), where, torch.zeros(1, dtype=torch.int32)
        ours = functools.partial(cascade_attention, scale=dh**-0.5)
        arguments = (q, k, v, k_base, v_base, *tables)
        weights = [torch.randn(o, i, generator=g) for o, i in self.layer]
        inputs = {i: torch.randn(T, i, generator=g) for _, i in self.layer}
        picked = torch.linspace(0, len(where) - 1, CHECKED).long()
        pick = lambda answer: answer[picked]  # noqa: E731
        return Contest(
            ways={
                "cascade_attention": lambda: ours(*arguments)[0],
                "join + sdpa + mask": lambda: self.joined(*arguments[:5]),
            },
            unit=("the layer's products", lambda: [linear(inputs[w.shape[1]], w) for w in weights]),
            plain=pick(self.joined(*arguments[:5])),
            exact=pick(self.joined(*(x.double() for x in arguments[:5]))),
            picked=pick,
            figures={
                "rows": len(rows),
                "tokens": T,
                "GFLOP": 4e-9 * h * dh * float((where.double() + 1).sum()),
            },
        )

    @property
    def layer(self) -> tuple[tuple[int, int], ...]:
        """(out, in) of a layer's four products: q, k and v, output, and an MLP four times wide."""
        d = self.h * self.dh
        return ((d + 2 * self.hk * self.dh, d), (d, d), (4 * d, d), (d, 4 * d))

    def joined(self, q: Tensor, k: Tensor, v: Tensor, k_base: Tensor, v_base: Tensor) -> Tensor:
        """Torch's way: for each start, the prefix repeated for its rows, joined, and a mask."""
        out, at, q_at = [], 0, 0
        for start in self.starts:
            n, length = self.copies, self.t - start
            queries = 1 if self.last_only else length

            def heads(x: Tensor, first: int, count: int, n: int = n) -> Tensor:
                return x[first : first + n * count].unflatten(0, (n, count)).transpose(1, 2)

            keys, values = (
                torch.cat(
                    [base[:, :start].transpose(1, 2).expand(n, -1, -1, -1), heads(own, at, length)],
                    dim=2,
                )
                for base, own in ((k_base, k), (v_base, v))
            )
            mask = torch.arange(self.t) <= torch.arange(self.t - queries, self.t)[:, None]
            z = scaled_dot_product_attention(
                heads(q, q_at, queries), keys, values, mask, enable_gqa=self.h != self.hk
            )
            out.append(z.transpose(1, 2).flatten(0, 1))
            at, q_at = at + n * length, q_at + n * queries
        return torch.cat(out)


def causal(h: int, dh: int, t: int) -> Contest:
    """A base run: plain causal attention of one row, without a prefix."""
    sweep = Sweep(h, h, dh, t, (0,), 1)
    contest = sweep.contest()
    q, k, v = torch.randn(3, 1, h, t, dh, generator=generator(0, "causal"))
    row = torch.tensor([[0, 0, 0, t, 0, t]], dtype=torch.int32)
    where, first = torch.arange(t, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    packed = [x[0].transpose(0, 1).contiguous() for x in (q, k, v)]
    none = packed[1][None, :0]

    def ours() -> Any:
        return cascade_attention(*packed, none, none, row, where, first, scale=dh**-0.5)[0]

    def peer(*x: Tensor) -> Tensor:
        return scaled_dot_product_attention(*x, is_causal=True)[0].transpose(0, 1)

    contest.ways = {"cascade_attention": ours, "sdpa, is_causal": lambda: peer(q, k, v)}
    contest.plain = contest.picked(peer(q, k, v))
    contest.exact = contest.picked(peer(q.double(), k.double(), v.double()))
    return contest


def swapped(h: int, dh: int, t: int) -> Contest:
    """The layer that rows enter: one position's query, key and value replaced, for each position.

    The peers attend anew: ours from the position on, torch over a copy of the base run.
    """
    g = generator(0, "swapped")
    sweep = Sweep(h, h, dh, t, tuple(range(t)), 1)
    contest = sweep.contest()
    q, k, v = torch.randn(3, 1, t, h, dh, generator=g)
    new = torch.randn(3, t, h, dh, generator=g)
    rows = torch.tensor([(0, p, t) for p in range(t)], dtype=torch.int32)
    first, scale = torch.zeros(1, dtype=torch.int32), dh**-0.5
    whole = torch.tensor([[0, 0, 0, t, 0, t]], dtype=torch.int32)
    where = torch.arange(t, dtype=torch.int32)
    base = (q[0], k[0], v[0], k[:, :0], v[:, :0], whole, where, first)
    z, lse = (part[None] for part in cascade_attention(*base, scale=scale))
    total = t * (t + 1) // 2
    # The same rows as cascade_attention takes them: every token's q, k and v from the position on.
    packed = []
    for x, put in zip((q, k, v), new, strict=True):
        runs = [torch.cat([put[p : p + 1], x[0, p + 1 :]]) for p in range(t)]
        packed.append(torch.cat(runs))
    starts = rows[:, 1].long()
    at = (t - starts).cumsum(0) - (t - starts)
    table = torch.stack([starts * 0, starts, at, t - starts, at, t - starts], 1).int()
    positions = torch.cat([torch.arange(p, t) for p in range(t)]).int()

    def ours() -> Tensor:
        return swap_key_attention(z, lse, q, k, v, *new, rows, first, scale, total=total)

    def anew() -> Tensor:
        return cascade_attention(*packed, k, v, table, positions, first, scale=scale)[0]

    contest.ways = {
        "swap_key_attention": ours,
        "cascade_attention": anew,
        "join + sdpa + mask": lambda: sweep.joined(*packed, k, v),
    }
    contest.plain = contest.picked(sweep.joined(*packed, k, v))
    contest.exact = contest.picked(sweep.joined(*(x.double() for x in (*packed, k, v))))
    return contest


CASES = {
    "gpt2-64": Sweep(12, 12, 64, 64, tuple(range(16, 64)), 12).contest,
    "gpt2-64-last": Sweep(12, 12, 64, 64, tuple(range(16, 64)), 12, last_only=True).contest,
    "gpt2-16": Sweep(12, 12, 64, 16, tuple(range(4, 16)), 12).contest,
    "gpt2-16-first": Sweep(12, 12, 64, 16, tuple(range(16)), 1).contest,
    "gpt2-1024": Sweep(12, 12, 64, 1024, tuple(range(256, 1024, 64)), 1).contest,
    "gqa-64": Sweep(9, 3, 64, 64, tuple(range(16, 64)), 12).contest,
    "swap-64": functools.partial(swapped, 12, 64, 64),
    "causal-1024": functools.partial(causal, 12, 64, 1024),
}

if __name__ == "__main__":
    main("cascade_attention", CASES)
