"""The sizes and shapes of input every SAE op is tested and measured on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from microtome._seed import generator


@dataclass(frozen=True)
class Case:
    """One input to the SAE ops.

    Attributes:
        name: shown by pytest and in benchmark tables.
        n: rows.
        d: model width.
        f: features.
        k: active per row.
        kind: "gaussian"; "ties" (small integers, duplicate features); "dense" (feature 0 fires on
            every row); "massive" (two coordinates 1000 times the rest, as in real residual
            streams); "strided" (x and W_dec are views with a stride).
    """

    name: str
    n: int
    d: int
    f: int
    k: int
    kind: str = "gaussian"

    def inputs(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
        """x [n, d], W_enc, b_enc, W_dec of unit rows, b_dec, values [n, k], indices [n, k].

        The code is a valid one: indices differ within a row, values are not negative and some are
        zero.
        """
        g = generator(seed, self.name)
        n, d, f, k = self.n, self.d, self.f, self.k
        if self.kind == "ties":
            draw = lambda *shape: torch.randint(-2, 3, shape, generator=g).float()  # noqa: E731
        else:
            draw = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
        x, W_enc, b_enc, b_dec = draw(n, d), draw(f, d), draw(f), draw(d)
        if self.kind == "ties" and f > 1:
            W_enc[f // 2 :] = W_enc[: f - f // 2]
            b_enc[f // 2 :] = b_enc[: f - f // 2]
        if self.kind == "massive":
            x[:, : min(2, d)] *= 1000.0
        W_dec = torch.nn.functional.normalize(torch.randn(f, d, generator=g), dim=1)
        indices = (
            torch.argsort(torch.rand(n, f, generator=g), dim=1)[:, :k]
            if n
            else torch.empty(0, k).long()
        )
        if self.kind == "dense" and n:
            indices[:, 0] = torch.where((indices == 0).any(1), indices[:, 0], 0)
        values = torch.randn(n, k, generator=g).relu()
        if self.kind == "strided":
            x = torch.cat([x, x], dim=1)[:, ::2].contiguous().repeat_interleave(2, dim=1)[:, ::2]
            W_dec = W_dec.t().contiguous().t()
        floats = {
            "x": x,
            "W_enc": W_enc,
            "b_enc": b_enc,
            "W_dec": W_dec,
            "b_dec": b_dec,
            "values": values,
        }
        return {**{name: t.to(dtype) for name, t in floats.items()}, "indices": indices}


CASES = (
    Case("tiny", 1, 1, 1, 1),
    Case("one_row", 1, 19, 37, 5),
    Case("small", 7, 16, 32, 4),
    Case("odd", 13, 33, 65, 7),
    Case("k_is_f", 5, 24, 12, 12),
    Case("empty", 0, 16, 32, 4),
    Case("ties", 9, 16, 64, 10, "ties"),
    Case("dense", 300, 20, 40, 3, "dense"),
    Case("massive", 33, 70, 300, 8, "massive"),
    Case("strided", 6, 18, 30, 3, "strided"),
    Case("medium", 130, 96, 1000, 16),
)

# (n, d, f, k) of the published tables.
BENCH_CASES = (
    Case("A", 1024, 768, 24576, 32),
    Case("B", 2048, 512, 16384, 64),
    Case("C", 1024, 1024, 65536, 32),
)
