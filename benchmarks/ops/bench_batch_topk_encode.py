"""batch_topk_encode beside torch's product and a flat top k of it, as BatchTopK trainers run them.

`python -m benchmarks.ops.bench_batch_topk_encode [CASE ...]`
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor
from torch.nn.functional import linear

from benchmarks.harness import Subject
from benchmarks.inputs import Inputs, gaussian
from benchmarks.side_by_side import Contest, main, subject
from microtome.ops import batch_topk_encode
from microtome.testing import BENCH_CASES, Case


def flat(i: Inputs) -> tuple[Tensor, Tensor]:
    """Values and places of the n*k largest of the [n, f] pre-activations."""
    z = linear(i.x - i.b_dec, i.W_enc, i.b_enc)
    values, places = z.flatten().topk(i.case.n * i.case.k, sorted=False)
    return values, places


def largest(answer: tuple[Any, ...]) -> Tensor:
    """The values, in descending order."""
    values: Tensor = answer[0]
    return values.sort(descending=True).values


def ours(i: Inputs) -> Any:
    """Our answer."""
    return batch_topk_encode(i.x, i.W_enc, i.b_enc, i.b_dec, k=i.case.k)


def encode(i: Inputs) -> Contest:
    """The encoder of a BatchTopK SAE."""
    case = i.case
    wide = linear(i.x.double() - i.b_dec.double(), i.W_enc.double(), i.b_enc.double())
    return Contest(
        ways={
            "batch_topk_encode": lambda: ours(i),
            "torch: product, flat top k": lambda: flat(i),
        },
        unit=("x W_enc^T", lambda: i.x @ i.W_enc.T),
        plain=largest(flat(i)),
        exact=wide.flatten().topk(case.n * case.k).values,
        picked=largest,
        figures={"n": case.n, "d": case.d, "f": case.f, "k": case.k},
    )


def prepare(i: Inputs) -> Subject:
    """The same for the harness."""
    return subject(lambda: ours(i), lambda: encode(i))


def of_case(case: Case) -> Contest:
    """The same on Gaussian inputs."""
    return encode(gaussian(case))


CASES = {case.name: functools.partial(of_case, case) for case in BENCH_CASES}
OPS = {"batch_topk_encode": prepare}

if __name__ == "__main__":
    main("batch_topk_encode", CASES)
