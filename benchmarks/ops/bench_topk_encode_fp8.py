"""topk_encode_fp8 beside topk_encode and torch. Off a GPU with e4m3 products both do the same.

`python -m benchmarks.ops.bench_topk_encode_fp8 [CASE ...]`
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn.functional import linear

from benchmarks.inputs import gaussian
from benchmarks.side_by_side import Contest, main
from microtome.ops import screen_weights, topk_encode, topk_encode_fp8
from microtome.testing import BENCH_CASES, Case


def encode(case: Case) -> Contest:
    """Both with the encoder's screen at hand, as in training."""
    i = gaussian(case)
    screens = {kind: screen_weights(i.W_enc, kind) for kind in ("auto", "fp8")}
    weights = (i.x, i.W_enc, i.b_enc, i.b_dec)

    def largest(x: Tensor, W: Tensor, b: Tensor, centre: Tensor) -> torch.return_types.topk:
        return linear(x - centre, W, b).topk(case.k)

    return Contest(
        ways={
            "topk_encode_fp8": lambda: topk_encode_fp8(*weights, k=case.k, screen=screens["fp8"]),
            "topk_encode": lambda: topk_encode(*weights, k=case.k, screen=screens["auto"]),
            "torch: product, topk": lambda: largest(*weights),
        },
        unit=("x W_enc^T", lambda: i.x @ i.W_enc.T),
        plain=largest(*weights)[0],
        exact=largest(*(t.double() for t in weights))[0],
        picked=lambda answer: answer[0],
        figures={"n": case.n, "d": case.d, "f": case.f, "k": case.k},
    )


CASES = {case.name: functools.partial(encode, case) for case in BENCH_CASES[:1]}

if __name__ == "__main__":
    main("topk_encode_fp8", CASES)
