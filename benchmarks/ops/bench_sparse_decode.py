"""sparse_decode on a code of the timed activations."""

from __future__ import annotations

from torch import Tensor

from benchmarks.checks import check_decode
from benchmarks.harness import Subject
from benchmarks.inputs import Inputs
from microtome.ops import sparse_decode, topk_encode


def code_of(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """values [n, k] after the ReLU and indices [n, k] int32 of the timed activations."""
    values, indices, _ = topk_encode(
        inputs.x, inputs.W_enc, inputs.b_enc, inputs.b_dec, k=inputs.case.k
    )
    return values.relu(), indices


def decode(inputs: Inputs) -> Subject:
    """The reconstruction of a code of the timed activations."""
    values, indices = code_of(inputs)

    def run() -> Tensor:
        return sparse_decode(values, indices, inputs.W_dec, inputs.b_dec)

    return Subject(run, lambda: check_decode(run(), values, indices, inputs.W_dec, inputs.b_dec))


OPS = {"sparse_decode": decode}
