"""jump_relu's gradient of the threshold beside that of a dense mask of the window.

`python -m benchmarks.ops.bench_jump_relu [CASE ...]`
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from benchmarks.inputs import gaussian
from benchmarks.ops.bench_threshold_encode import threshold_of
from benchmarks.side_by_side import Contest, main
from microtome._csr import rows_of
from microtome.ops import jump_relu, threshold_encode
from microtome.testing import BENCH_CASES, Case


def sparsity(case: Case, bandwidth: float) -> Contest:
    """The gradient of the sum of L0, forward and backward, the codes being there already."""
    i = gaussian(case)
    theta = threshold_of(i)
    code, window, _ = threshold_encode(
        i.x, i.W_enc, i.b_enc, i.b_dec, threshold=theta, bandwidth=bandwidth
    )
    # Pre-activations of just this window: no rounding of a product decides who is in it.
    z = (theta + bandwidth).expand(case.n, case.f).clone()
    inside = window.indices.long()
    z[rows_of(window.offsets, len(inside)), inside] = theta[inside]

    def ours() -> Tensor:
        with torch.enable_grad():
            learned = theta.clone().requires_grad_()
            l0 = jump_relu(code, window, learned, bandwidth).l0
            return torch.autograd.grad(l0.sum(), learned)[0]

    def dense() -> Tensor:
        return ((z - theta).abs() < bandwidth / 2).sum(0) / -bandwidth

    return Contest(
        ways={"jump_relu": ours, "torch: dense mask": dense},
        unit=("x W_enc^T", lambda: i.x @ i.W_enc.T),
        plain=dense(),
        exact=dense().double(),
        picked=lambda answer: answer,
        figures={
            "n": case.n, "d": case.d, "f": case.f, "entries": code.values.numel(),
            "in the window": window.values.numel(),
        },
    )  # fmt: skip


CASES = {case.name: functools.partial(sparsity, case, 0.1) for case in BENCH_CASES}

if __name__ == "__main__":
    main("jump_relu", CASES)
