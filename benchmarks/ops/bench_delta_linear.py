"""delta_linear beside torch's products: `python benchmarks/ops/bench_delta_linear.py`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import linear

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.linear import Comparison, copies_of, main
from microtome._seed import generator
from microtome.ops import delta_linear, pack_weights

BASES = 72  # rows of the base run: one prompt of 72 tokens


def prepare(T: int, i: int, o: int, copies: int) -> Comparison:
    """Ours does all of it; "torch bf16" and "torch fp32" are the products alone, without a base."""
    g = generator(0, "delta_linear")
    x_base, W = torch.randn(BASES, i, generator=g), torch.randn(o, i, generator=g) / i**0.5
    index = torch.randint(0, BASES, (T,), generator=g, dtype=torch.int32)
    x = x_base[index] + 0.1 * torch.randn(T, i, generator=g)
    y_base = linear(x_base, W)
    packed, weights = copies_of(pack_weights(W, "bf16"), copies), copies_of(W, copies)
    half, x16 = copies_of(W.bfloat16(), copies), x.bfloat16()

    def eager(W16: Tensor) -> Tensor:
        return y_base[index] + linear((x - x_base[index]).bfloat16(), W16).float()

    rounded = (x - x_base[index]).bfloat16()
    exact = y_base[index].double() + linear(rounded.double(), half[0].double())
    return Comparison(
        {
            "delta_linear": lambda k: delta_linear(x, x_base, y_base, index, packed[k], o),
            "the same in torch": lambda k: eager(half[k]),
            "torch bf16": lambda k: linear(x16, half[k]),
            "torch fp32": lambda k: linear(x, weights[k]),
        },
        exact,
        y_base[index] + linear(rounded.float(), half[0].float()),
    )


if __name__ == "__main__":
    sys.exit(main("delta_linear", prepare))
