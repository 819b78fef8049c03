"""threshold_encode beside torch's product and comparison, for ReLU-like codes of k entries a row.

`python -m benchmarks.ops.bench_threshold_encode [CASE ...]`
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from benchmarks.inputs import Inputs, gaussian
from benchmarks.side_by_side import Contest, main
from microtome.ops import threshold_encode
from microtome.testing import BENCH_CASES, Case


def dense(i: Inputs, threshold: Tensor) -> tuple[Tensor]:
    """The dense JumpReLU code, [n, f]."""
    z = linear(i.x - i.b_dec, i.W_enc, i.b_enc)
    return (z * (z > threshold),)


def strongest(answer: Any) -> Tensor:
    """The largest values, in descending order."""
    values: Tensor = answer[0][0] if isinstance(answer[0], tuple) else answer[0]
    return values.flatten().topk(1000).values


def encode(case: Case, bandwidth: float) -> Contest:
    """The encoder of a JumpReLU SAE whose threshold leaves about k entries a row."""
    i = gaussian(case)
    wide = linear(i.x.double() - i.b_dec.double(), i.W_enc.double(), i.b_enc.double())
    border = float(wide[:32].flatten().topk(32 * case.k).values[-1])
    threshold = torch.full((case.f,), border)
    return Contest(
        ways={
            "threshold_encode": lambda: threshold_encode(
                i.x, i.W_enc, i.b_enc, i.b_dec, threshold=threshold, bandwidth=bandwidth
            ),
            "torch: product, comparison": lambda: dense(i, threshold),
        },
        unit=("x W_enc^T", lambda: i.x @ i.W_enc.T),
        plain=strongest(dense(i, threshold)),
        exact=wide.flatten().topk(1000).values,
        picked=strongest,
        figures={"n": case.n, "d": case.d, "f": case.f, "k": case.k, "bandwidth": bandwidth},
    )


CASES = {
    f"{case.name}{suffix}": functools.partial(encode, case, bandwidth)
    for case in BENCH_CASES
    for suffix, bandwidth in (("", 0.0), (" window", 0.1))
}

if __name__ == "__main__":
    main("threshold_encode", CASES)
