"""The shapes of input that the attention ops are tested and measured on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from microtome._seed import generator


@dataclass(frozen=True)
class AttentionCase:
    """One input to cascade_attention.

    Attributes:
        name: shown by pytest and in benchmark tables.
        h: query heads.
        hk: key heads.
        dh: width of a query and key.
        dv: width of a value.
        b: base runs; 0 for none.
        t: positions of a base run.
        rows: (example, start, kv_count, q_count) of each run; the queries are spread over its
            positions, the last one always among them.
        first: the first position that is no padding, for each base run; () for 0.
        softcap: bound on the scores, 0 for none.
        window: keys that a query sees, 0 for all.
        kind: "gaussian"; "huge" (scores up to some ten thousands); "packed" (q, k and v are views
            of one product, the base has gaps between its tokens); "reversed" (rows are packed from
            the last to the first).
    """

    name: str
    h: int
    hk: int
    dh: int
    dv: int
    b: int
    t: int
    rows: tuple[tuple[int, int, int, int], ...]
    first: tuple[int, ...] = ()
    softcap: float = 0.0
    window: int = 0
    kind: str = "gaussian"

    def inputs(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
        """q, k, v, k_base, v_base, rows, q_positions, first, by cascade_attention's names."""
        g = generator(seed, self.name)
        h, hk, dh, dv, b, t = self.h, self.hk, self.dh, self.dv, self.b, self.t
        draw = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
        table, positions, T, Tq = [], [torch.empty(0)], 0, 0
        order = list(enumerate(self.rows))
        for r, (example, start, keys, queries) in order[:: -1 if self.kind == "reversed" else 1]:
            table.append((r, (example, start, T, keys, Tq, queries)))
            spread = torch.randperm(max(keys - 1, 0), generator=g)[: max(queries - 1, 0)]
            last = torch.full((min(queries, 1),), keys - 1)
            positions.append(start + torch.cat([spread, last]).sort().values)
            T, Tq = T + keys, Tq + queries
        rows = torch.tensor([row for _, row in sorted(table)], dtype=torch.int32).reshape(-1, 6)
        where = torch.cat(positions).to(torch.int32)  # [Tq]
        q, k, v = draw(Tq, h, dh), draw(T, hk, dh), draw(T, hk, dv)
        k_base, v_base = draw(b, t, hk, dh), draw(b, t, hk, dv)
        if self.kind == "huge":
            q, k, k_base = q * 100, k * 100, k_base * 100
        if self.kind == "packed":
            flat = torch.cat([q.flatten(1), k.flatten(1), v.flatten(1)], 1).to(dtype)
            q, k, v = flat.split([h * dh, hk * dh, hk * dv], 1)
            q, k, v = q.view(T, h, dh), k.view(T, hk, dh), v.view(T, hk, dv)
            both = torch.cat([k_base.flatten(2), v_base.flatten(2)], 2).to(dtype)
            k_base, v_base = both.split([hk * dh, hk * dv], 2)
            k_base, v_base = k_base.view(b, t, hk, dh), v_base.view(b, t, hk, dv)
        floats = {"q": q, "k": k, "v": v, "k_base": k_base, "v_base": v_base}
        first = torch.tensor(self.first or (0,) * b, dtype=torch.int32)
        return {
            **{name: tensor.to(dtype) for name, tensor in floats.items()},
            "rows": rows,
            "q_positions": where,
            "first": first,
        }

    @property
    def options(self) -> dict[str, float]:
        """scale, softcap and window, by cascade_attention's names."""
        return {"scale": self.dh**-0.5, "softcap": self.softcap, "window": self.window}


@dataclass(frozen=True)
class SwapCase:
    """One input to swap_key_attention: a causal base run, and rows that replace one position each.

    Attributes:
        name: shown by pytest.
        h: query heads.
        hk: key heads.
        dh: width of a query and key.
        dv: width of a value.
        b: base runs.
        t: positions.
        rows: (example, position, stop).
        first: the first position that is no padding, for each base run; () for 0.
        softcap: bound on the scores, 0 for none.
        window: keys that a query sees, 0 for all.
        kind: "gaussian"; "peaked" (most queries put most of their weight on one key); "huge"
            (scores up to some ten thousands); "packed" (views with gaps between tokens).
    """

    name: str
    h: int
    hk: int
    dh: int
    dv: int
    b: int
    t: int
    rows: tuple[tuple[int, int, int], ...]
    first: tuple[int, ...] = ()
    softcap: float = 0.0
    window: int = 0
    kind: str = "gaussian"

    def inputs(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
        """q, k_base, v_base, q_new, k_new, v_new, rows, first; z and lse are computed."""
        g = generator(seed, self.name)
        h, hk, dh, dv, b, t, n = self.h, self.hk, self.dh, self.dv, self.b, self.t, len(self.rows)
        draw = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
        floats = {
            "q": draw(b, t, h, dh),
            "k_base": draw(b, t, hk, dh),
            "v_base": draw(b, t, hk, dv),
            "q_new": draw(n, h, dh),
            "k_new": draw(n, hk, dh),
            "v_new": draw(n, hk, dv),
        }
        factor = {"huge": 100.0, "peaked": 2.0}.get(self.kind, 1.0)
        for name in ("q", "k_base", "q_new", "k_new"):
            floats[name] *= factor
        if self.kind == "packed":
            floats = {name: torch.cat([x, x], 1)[:, : x.shape[1]] for name, x in floats.items()}
        return {
            **{name: tensor.to(dtype) for name, tensor in floats.items()},
            "rows": torch.tensor(self.rows, dtype=torch.int32).reshape(-1, 3),
            "first": torch.tensor(self.first or (0,) * b, dtype=torch.int32),
        }

    def causal(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """The arguments with which cascade_attention computes the base run's z and lse."""
        q, k, v = inputs["q"], inputs["k_base"], inputs["v_base"]
        b, t = q.shape[:2]
        rows = [[e, 0, e * t, t, e * t, t] for e in range(b)]
        return {
            "q": q.flatten(0, 1),
            "k": k.flatten(0, 1),
            "v": v.flatten(0, 1),
            "k_base": k[:, :0],
            "v_base": v[:, :0],
            "rows": torch.tensor(rows, dtype=torch.int32).reshape(-1, 6),
            "q_positions": torch.arange(t, dtype=torch.int32).repeat(b),
            "first": inputs["first"],
        }

    @property
    def options(self) -> dict[str, float]:
        """scale, softcap and window."""
        return {"scale": self.dh**-0.5, "softcap": self.softcap, "window": self.window}


_STAIRS = tuple((r % 2, 3 * r + 1, 20 - 3 * r, 20 - 3 * r) for r in range(6))
_PADDED = ((0, 2, 8, 8), (1, 5, 3, 3), (1, 11, 9, 9))

ATTENTION_CASES = (
    AttentionCase("tiny", 1, 1, 1, 1, 1, 1, ((0, 0, 1, 1),)),
    AttentionCase("one_token_rows", 2, 2, 8, 8, 2, 9, tuple((p % 2, p, 1, 1) for p in range(10))),
    AttentionCase("stairs", 4, 4, 16, 16, 2, 21, _STAIRS),
    AttentionCase("grouped", 6, 2, 16, 24, 2, 21, _STAIRS),
    AttentionCase("one_key_head", 5, 1, 64, 64, 1, 40, ((0, 33, 30, 30), (0, 0, 7, 7))),
    AttentionCase("odd", 3, 1, 67, 5, 1, 17, ((0, 9, 8, 8), (0, 16, 1, 1), (0, 17, 3, 2))),
    AttentionCase("wide", 2, 2, 130, 96, 1, 50, ((0, 45, 20, 20),)),
    AttentionCase("window_of_one", 2, 1, 8, 8, 2, 21, _STAIRS, window=1),
    AttentionCase("window", 4, 2, 8, 8, 2, 21, _STAIRS, window=5),
    AttentionCase("softcap", 4, 2, 32, 32, 2, 21, _STAIRS, softcap=1.5),
    AttentionCase(
        "padded", 2, 2, 16, 16, 2, 12, ((0, 2, 8, 8), (1, 5, 3, 3), (1, 11, 9, 9)), (4, 7)
    ),
    AttentionCase("causal", 2, 2, 16, 16, 0, 0, ((0, 0, 40, 40), (0, 0, 19, 19))),
    AttentionCase("causal_padded", 2, 1, 16, 16, 2, 0, ((0, 5, 9, 9), (1, 0, 8, 8)), (5, 2)),
    AttentionCase("few_queries", 4, 2, 16, 16, 2, 30, ((0, 9, 20, 1), (1, 29, 4, 2), (0, 3, 9, 0))),
    AttentionCase("empty", 2, 2, 16, 16, 1, 5, ()),
    AttentionCase("no_queries", 2, 2, 16, 16, 1, 5, ((0, 3, 2, 0), (0, 5, 0, 0))),
    AttentionCase("huge", 2, 2, 16, 16, 2, 21, _STAIRS, kind="huge"),
    AttentionCase("huge_softcap", 2, 2, 16, 16, 2, 21, _STAIRS, softcap=30.0, kind="huge"),
    AttentionCase("packed", 4, 2, 24, 16, 2, 21, _STAIRS, kind="packed"),
    AttentionCase("reversed", 2, 2, 16, 16, 2, 21, _STAIRS, kind="reversed"),
    AttentionCase("long", 2, 1, 32, 32, 1, 700, ((0, 640, 50, 50), (0, 300, 70, 9)), window=300),
)

_SWAPS = ((0, 0, 20), (1, 3, 20), (1, 19, 20), (0, 7, 7), (0, 7, 15), (1, 12, 19))

SWAP_CASES = (
    SwapCase("tiny", 1, 1, 1, 1, 1, 1, ((0, 0, 1),)),
    SwapCase("every_position", 4, 4, 16, 16, 1, 24, tuple((0, p, 24) for p in range(24))),
    SwapCase("grouped", 6, 2, 64, 64, 2, 20, _SWAPS),
    SwapCase("odd", 3, 1, 67, 5, 2, 20, _SWAPS),
    SwapCase("window", 4, 2, 16, 16, 2, 20, _SWAPS, window=4),
    SwapCase("window_of_one", 2, 2, 16, 16, 2, 20, _SWAPS, window=1),
    SwapCase("softcap", 4, 2, 32, 32, 2, 20, _SWAPS, softcap=1.5),
    SwapCase("padded", 2, 1, 16, 16, 2, 20, _SWAPS, (5, 13)),
    SwapCase("empty", 2, 2, 16, 16, 1, 5, ()),
    SwapCase("peaked", 4, 2, 64, 64, 2, 20, _SWAPS, kind="peaked"),
    SwapCase("huge", 2, 2, 16, 16, 2, 20, _SWAPS, kind="huge"),
    SwapCase("packed", 4, 2, 24, 16, 2, 20, _SWAPS, kind="packed"),
    SwapCase("long", 2, 1, 32, 32, 1, 500, ((0, 1, 500), (0, 250, 500), (0, 480, 490))),
)
