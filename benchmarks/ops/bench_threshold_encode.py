"""threshold_encode beside torch's product and comparison, for ReLU-like codes of k entries a row.

`python -m benchmarks.ops.bench_threshold_encode [CASE ...]`
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from benchmarks.harness import Subject
from benchmarks.inputs import Inputs, gaussian
from benchmarks.side_by_side import Contest, main, subject
from microtome.ops import threshold_encode
from microtome.testing import BENCH_CASES, Case


def dense(i: Inputs, threshold: Tensor) -> tuple[Tensor]:
    """The dense JumpReLU code, [n, f]."""
    z = linear(i.x - i.b_dec, i.W_enc, i.b_enc)
    return (z * (z > threshold),)


def strongest(answer: Any, many: int) -> Tensor:
    """The largest values, in descending order."""
    values: Tensor = answer[0][0] if isinstance(answer[0], tuple) else answer[0]
    return values.flatten().topk(many).values


def threshold_of(i: Inputs) -> Tensor:
    """[f], all alike, such that about k entries a row lie above it."""
    z = linear(i.x[:32].double() - i.b_dec.double(), i.W_enc.double(), i.b_enc.double())
    border = float(z.flatten().topk(len(z) * i.case.k).values[-1])
    return torch.full((i.case.f,), border)


def encode(i: Inputs, bandwidth: float) -> Contest:
    """The encoder of a JumpReLU SAE."""
    case, threshold = i.case, threshold_of(i)
    many = min(1000, case.n * case.k // 2)
    wide = linear(i.x.double() - i.b_dec.double(), i.W_enc.double(), i.b_enc.double())
    return Contest(
        ways={
            "threshold_encode": lambda: threshold_encode(
                i.x, i.W_enc, i.b_enc, i.b_dec, threshold=threshold, bandwidth=bandwidth
            ),
            "torch: product, comparison": lambda: dense(i, threshold),
        },
        unit=("x W_enc^T", lambda: i.x @ i.W_enc.T),
        plain=strongest(dense(i, threshold), many),
        exact=wide.flatten().topk(many).values,
        picked=lambda answer: strongest(answer, many),
        figures={"n": case.n, "d": case.d, "f": case.f, "k": case.k, "bandwidth": bandwidth},
    )


def prepare(i: Inputs) -> Subject:
    """The same for the harness, without a window."""
    threshold = threshold_of(i)
    run = lambda: threshold_encode(i.x, i.W_enc, i.b_enc, i.b_dec, threshold=threshold)  # noqa: E731
    return subject(run, lambda: encode(i, 0.0))


def of_case(case: Case, bandwidth: float) -> Contest:
    """The same on Gaussian inputs."""
    return encode(gaussian(case), bandwidth)


OPS = {"threshold_encode": prepare}
CASES = {
    f"{case.name}{suffix}": functools.partial(of_case, case, bandwidth)
    for case in BENCH_CASES
    for suffix, bandwidth in (("", 0.0), (" window", 0.1))
}

if __name__ == "__main__":
    main("threshold_encode", CASES)
