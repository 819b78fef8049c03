"""SAELens: TopKTrainingSAE under its own SAETrainer; its sparse codes fail on CPU, so dense."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.checks import check_code, check_decode
from benchmarks.harness import Subject
from benchmarks.inputs import Inputs
from benchmarks.step import LEARNING_RATE


def model(weights: tuple[Tensor, ...], k: int) -> Any:
    """A TopKTrainingSAE that holds these weights, transposed to its layout."""
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig

    W_enc, b_enc, W_dec, b_dec = weights
    f, d = W_enc.shape
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=d, d_sae=f, k=k))
    with torch.no_grad():
        for parameter, weight in zip(
            (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec),
            (W_enc.T, b_enc, W_dec, b_dec),
            strict=True,
        ):
            parameter.copy_(weight)
    return sae


def encode(inputs: Inputs) -> Subject:
    """TopKTrainingSAE.encode; it returns the dense code [n, f]."""
    sae = model(inputs.weights, inputs.case.k)

    @torch.no_grad()
    def run() -> Tensor:
        return sae.encode(inputs.x)

    return Subject(run, lambda: check_code(inputs, *run().topk(inputs.case.k), relu=True))


def decode(inputs: Inputs) -> Subject:
    """TopKTrainingSAE.decode of the dense code."""
    sae = model(inputs.weights, inputs.case.k)
    with torch.no_grad():
        dense = sae.encode(inputs.x)
    values, indices = dense.topk(inputs.case.k)

    @torch.no_grad()
    def run() -> Tensor:
        return sae.decode(dense)

    return Subject(run, lambda: check_dense_decode(run(), values, indices, inputs))


def check_dense_decode(
    out: Tensor, values: Tensor, indices: Tensor, inputs: Inputs
) -> dict[str, Any]:
    """A dense decode sums f terms, most of them zero, in BLAS order: the same rule holds."""
    return check_decode(out, values, indices, inputs.W_dec, inputs.b_dec)


def trainer_of(sae: Any, n: int) -> Any:
    """Its SAETrainer with constant learning rate, no logging and no dead-latent loss."""
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    never = 10**9
    config = SAETrainerConfig(
        n_checkpoints=0,
        checkpoint_path=None,
        save_final_checkpoint=False,
        total_training_samples=never,
        device="cpu",
        autocast=False,
        lr=LEARNING_RATE,
        lr_end=LEARNING_RATE,
        lr_scheduler_name="constant",
        lr_warm_up_steps=0,
        adam_beta1=0.9,
        adam_beta2=0.999,
        lr_decay_steps=0,
        n_restart_cycles=1,
        train_batch_size_samples=n,
        dead_feature_window=never,
        feature_sampling_window=never,
        logger=LoggingConfig(log_to_wandb=False),
    )
    return SAETrainer(cfg=config, sae=sae, data_provider=iter([]))


def whole_step(inputs: Inputs) -> Subject:
    """The step on the timed activations, and the FVU after training."""
    trainer = trainer_of(model(inputs.weights, inputs.case.k), inputs.case.n)

    def train(steps: int) -> Any:
        sae = model(inputs.initial, inputs.case.k)
        fresh = trainer_of(sae, inputs.case.n)
        for i in range(steps):
            fresh.step(inputs.batch(i))
        # It never renormalises the decoder but selects by z |w_dec| and divides again: folding is
        # exact.
        norm = sae.W_dec.detach().norm(dim=1)
        return sae.W_enc.T * norm[:, None], sae.b_enc * norm, sae.W_dec / norm[:, None], sae.b_dec

    return Subject(lambda: trainer.step(inputs.x), train=train)


OPS = {"topk_encode": encode, "sparse_decode": decode, "step": whole_step}
