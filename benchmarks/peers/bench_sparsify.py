"""eai-sparsify: its SparseCoder, stepped as its trainer does, with torch's Adam; AuxK off."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.checks import check_code, check_decode
from benchmarks.harness import Subject
from benchmarks.inputs import Inputs
from benchmarks.step import LEARNING_RATE


def coder(weights: tuple[Tensor, ...], k: int) -> Any:
    """A SparseCoder that holds these weights."""
    from sparsify import SparseCoder, SparseCoderConfig

    f, d = weights[0].shape
    sae = SparseCoder(d, SparseCoderConfig(num_latents=f, k=k), dtype=torch.float32)
    with torch.no_grad():
        for parameter, weight in zip(
            (sae.encoder.weight, sae.encoder.bias, sae.W_dec, sae.b_dec), weights, strict=True
        ):
            parameter.copy_(weight)
    return sae


def encode(inputs: Inputs) -> Subject:
    """SparseCoder.encode; it returns activations after the ReLU."""
    sae = coder(inputs.weights, inputs.case.k)

    @torch.no_grad()
    def run() -> Any:
        return sae.encode(inputs.x)

    def check() -> dict[str, Any]:
        out = run()
        return check_code(inputs, out.top_acts, out.top_indices, relu=True)

    return Subject(run, check)


def decode(inputs: Inputs) -> Subject:
    """SparseCoder.decode."""
    sae = coder(inputs.weights, inputs.case.k)
    with torch.no_grad():
        values, indices, _ = sae.encode(inputs.x)

    @torch.no_grad()
    def run() -> Any:
        return sae.decode(values, indices)

    return Subject(run, lambda: check_decode(run(), values, indices, inputs.W_dec, inputs.b_dec))


def _stepper(weights: tuple[Tensor, ...], k: int) -> tuple[Any, Any]:
    sae = coder(weights, k)
    optimizer = torch.optim.Adam(sae.parameters(), lr=LEARNING_RATE)

    def step(x: Tensor) -> None:
        sae.set_decoder_norm_to_unit_norm()
        sae(x).fvu.backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()

    return sae, step


def whole_step(inputs: Inputs) -> Subject:
    """The step on the timed activations, and the FVU after training."""
    _, step = _stepper(inputs.weights, inputs.case.k)

    def train(steps: int) -> Any:
        sae, fresh = _stepper(inputs.initial, inputs.case.k)
        for i in range(steps):
            fresh(inputs.batch(i))
        sae.set_decoder_norm_to_unit_norm()
        return sae.encoder.weight, sae.encoder.bias, sae.W_dec, sae.b_dec

    return Subject(lambda: step(inputs.x), train=train)


OPS = {"topk_encode": encode, "sparse_decode": decode, "step": whole_step}
