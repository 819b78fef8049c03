"""sparse_decode of rows of any length beside the dense product with the decoder.

`python -m benchmarks.ops.bench_sparse_decode_csr [CASE ...]`
"""

from __future__ import annotations

import functools

from benchmarks.inputs import gaussian
from benchmarks.side_by_side import Contest, main
from microtome import SparseCode
from microtome.ops import batch_topk_encode, sparse_decode
from microtome.testing import BENCH_CASES, Case


def decode(case: Case) -> Contest:
    """The reconstruction of a BatchTopK code."""
    i = gaussian(case)
    values, indices, offsets, _ = batch_topk_encode(i.x, i.W_enc, i.b_enc, i.b_dec, k=case.k)
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


CASES = {case.name: functools.partial(decode, case) for case in BENCH_CASES}

if __name__ == "__main__":
    main("sparse_decode_csr", CASES)
