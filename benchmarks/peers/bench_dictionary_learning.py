"""dictionary_learning: AutoEncoderTopK under its own TopKTrainer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.checks import check_code, check_decode
from benchmarks.harness import Subject
from benchmarks.inputs import Inputs
from benchmarks.step import LEARNING_RATE

# Step 0 would replace b_dec by the geometric median; past 1000 the trainer also tracks its
# threshold.
LATE, EARLY = 2000, 1


def trainer_of(weights: tuple[Tensor, ...], k: int) -> Any:
    """Its TopKTrainer, holding these weights, without learning-rate warm-up."""
    from dictionary_learning.trainers.top_k import TopKTrainer

    W_enc, b_enc, W_dec, b_dec = weights
    f, d = W_enc.shape
    trainer = TopKTrainer(
        steps=10**6,
        activation_dim=d,
        dict_size=f,
        k=k,
        layer=0,
        lm_name="none",
        lr=LEARNING_RATE,
        warmup_steps=0,
        device="cpu",
    )
    ae = trainer.ae
    with torch.no_grad():
        for parameter, weight in zip(
            (ae.encoder.weight, ae.encoder.bias, ae.decoder.weight, ae.b_dec),
            (W_enc, b_enc, W_dec.T, b_dec),
            strict=True,
        ):
            parameter.copy_(weight)
    return trainer


def encode(inputs: Inputs) -> Subject:
    """AutoEncoderTopK.encode; it returns the dense code [n, f]."""
    ae = trainer_of(inputs.weights, inputs.case.k).ae

    @torch.no_grad()
    def run() -> Tensor:
        return ae.encode(inputs.x)

    return Subject(run, lambda: check_code(inputs, *run().topk(inputs.case.k), relu=True))


def decode(inputs: Inputs) -> Subject:
    """AutoEncoderTopK.decode of the dense code."""
    ae = trainer_of(inputs.weights, inputs.case.k).ae
    with torch.no_grad():
        dense = ae.encode(inputs.x)
    values, indices = dense.topk(inputs.case.k)

    @torch.no_grad()
    def run() -> Tensor:
        return ae.decode(dense)

    return Subject(run, lambda: check_decode(run(), values, indices, inputs.W_dec, inputs.b_dec))


def whole_step(inputs: Inputs) -> Subject:
    """The step on the timed activations, and the FVU after training."""
    trainer = trainer_of(inputs.weights, inputs.case.k)

    def train(steps: int) -> Any:
        fresh = trainer_of(inputs.initial, inputs.case.k)
        for i in range(steps):
            fresh.update(EARLY + i, inputs.batch(i))
        ae = fresh.ae
        return ae.encoder.weight, ae.encoder.bias, ae.decoder.weight.T.contiguous(), ae.b_dec

    return Subject(lambda: trainer.update(LATE, inputs.x), train=train)


OPS = {"topk_encode": encode, "sparse_decode": decode, "step": whole_step}
