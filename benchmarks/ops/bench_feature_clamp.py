"""feature_clamp beside the whole SAE, run with the features set, and beside their rows by torch.

`python -m benchmarks.ops.bench_feature_clamp [CASE ...]`
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn.functional import linear

from benchmarks.inputs import gaussian
from benchmarks.side_by_side import Contest, main
from microtome._seed import generator
from microtome.ops import feature_clamp
from microtome.testing import BENCH_CASES, Case


def steer(case: Case, m: int) -> Contest:
    """A ReLU SAE, m of whose features are set; its error stays."""
    i, g = gaussian(case), generator(0, "feature_clamp", m)
    features = torch.randperm(case.f, generator=g)[:m]
    targets = 3.0 * torch.rand(m, generator=g)

    def whole() -> Tensor:
        code = linear(i.x - i.b_dec, i.W_enc, i.b_enc).relu()
        changed = code.index_copy(1, features, targets.expand(case.n, m))
        return i.x - linear(code, i.W_dec.T) + linear(changed, i.W_dec.T)

    def rows(x: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor) -> Tensor:
        a = linear(x - b_dec, W_enc[features], b_enc[features]).relu()
        return x + (targets.to(x.dtype) - a) @ W_dec[features]

    def by_rows() -> Tensor:
        return rows(i.x, i.W_enc, i.b_enc, i.W_dec, i.b_dec)

    ways = {
        "feature_clamp": lambda: feature_clamp(
            i.x, features, targets, i.W_enc, i.b_enc, i.b_dec, i.W_dec
        ),
        "torch: the features' rows": by_rows,
    }
    return Contest(
        ways=ways,
        unit=("the SAE, decoded twice", whole),
        plain=by_rows(),
        exact=rows(*(t.double() for t in (i.x, i.W_enc, i.b_enc, i.W_dec, i.b_dec))),
        picked=lambda answer: answer,
        figures={"n": case.n, "d": case.d, "f": case.f, "m": m},
    )


CASES = {
    f"{case.name} {m}": functools.partial(steer, case, m)
    for case in BENCH_CASES[:1]
    for m in (1, 16)
}

if __name__ == "__main__":
    main("feature_clamp", CASES)
