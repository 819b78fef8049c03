"""packed_linear beside torch's linear: `python benchmarks/ops/bench_packed_linear.py`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch.nn.functional import linear

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.linear import Comparison, copies_of, main
from microtome._seed import generator
from microtome.ops import pack_weights, packed_linear


def prepare(T: int, i: int, o: int, copies: int) -> Comparison:
    """Both with a bias, alone and with a second term, as an attention or MLP output has it."""
    g = generator(0, "packed_linear")
    x, W = torch.randn(T, i, generator=g), torch.randn(o, i, generator=g) / i**0.5
    bias, add = torch.randn(o, generator=g), torch.randn(T, o, generator=g)
    weights, packed = copies_of(W, copies), copies_of(pack_weights(W), copies)
    half, x16, bias16 = copies_of(W.bfloat16(), copies), x.bfloat16(), bias.bfloat16()
    return Comparison(
        {
            "packed_linear": lambda k: packed_linear(x, packed[k], o, bias),
            "torch fp32": lambda k: linear(x, weights[k], bias),
            "packed_linear with add": lambda k: packed_linear(x, packed[k], o, bias, add),
            "torch fp32, then add": lambda k: linear(x, weights[k], bias) + add,
            "torch bf16": lambda k: linear(x16, half[k], bias16),
        },
        linear(x.double(), W.double(), bias.double()),
        linear(x, W, bias),
    )


if __name__ == "__main__":
    sys.exit(main("packed_linear", prepare))
