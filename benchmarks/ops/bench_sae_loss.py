"""sae_loss: decode, squared error and the gradient of the values, in one pass."""

from __future__ import annotations

from torch import Tensor

from benchmarks.checks import check_loss
from benchmarks.harness import Subject
from benchmarks.inputs import Inputs
from benchmarks.ops.bench_sparse_decode import code_of
from microtome.ops import sae_loss


def loss(inputs: Inputs) -> Subject:
    """The loss of a code of the timed activations, with its gradients."""
    values, indices = code_of(inputs)
    rest = (inputs.x, values, indices, inputs.W_dec, inputs.b_dec)

    def run() -> tuple[Tensor, Tensor, Tensor]:
        return sae_loss(*rest)

    return Subject(run, lambda: check_loss(run(), *rest))


OPS = {"sae_loss": loss}
