"""sparse_decode of rows of any length beside the dense product with the decoder.

`python -m benchmarks.ops.bench_sparse_decode_csr [CASE ...]`
"""

from __future__ import annotations

import functools

from torch import Tensor

from benchmarks.harness import Subject
from benchmarks.inputs import Inputs, gaussian
from benchmarks.side_by_side import Contest, main, subject
from microtome import SparseCode
from microtome.ops import batch_topk_encode, sparse_decode
from microtome.testing import BENCH_CASES, Case


def code_of(i: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Values, indices and offsets of a BatchTopK code."""
    return batch_topk_encode(i.x, i.W_enc, i.b_enc, i.b_dec, k=i.case.k)[:3]


def decode(i: Inputs) -> Contest:
    """The reconstruction of a BatchTopK code."""
    case, (values, indices, offsets) = i.case, code_of(i)
    dense = SparseCode(values, indices, case.f, offsets).to_dense()
    return Contest(
        ways={
            "sparse_decode": lambda: sparse_decode(values, indices, i.W_dec, i.b_dec, offsets),
            "torch: dense product": lambda: dense @ i.W_dec + i.b_dec,
        },
        unit=("x W_enc^T", lambda: i.x @ i.W_enc.T),
        plain=dense @ i.W_dec + i.b_dec,
        exact=dense.double() @ i.W_dec.double() + i.b_dec.double(),
        picked=lambda out: out,
        figures={"n": case.n, "d": case.d, "f": case.f, "k": case.k},
    )


def prepare(i: Inputs) -> Subject:
    """The same for the harness."""
    values, indices, offsets = code_of(i)
    run = lambda: sparse_decode(values, indices, i.W_dec, i.b_dec, offsets)  # noqa: E731
    return subject(run, lambda: decode(i))


def of_case(case: Case) -> Contest:
    """The same on Gaussian inputs."""
    return decode(gaussian(case))


OPS = {"sparse_decode_csr": prepare}
CASES = {case.name: functools.partial(of_case, case) for case in BENCH_CASES}

if __name__ == "__main__":
    main("sparse_decode_csr", CASES)
