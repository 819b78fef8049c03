"""Training with products in bfloat16: ends where float32 does, resumes to the bit, is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from microtome import SAE, TopK, TrainConfig, train
from microtome.errors import ArgumentError, CheckpointError, DtypeError, NonFiniteError
from microtome.ops import sae_loss, topk_encode, use_backend
from microtome.sae.step import FusedStep
from microtome.sae.weights import NarrowWeights


def config(**settings: object) -> TrainConfig:
    return TrainConfig(**{"steps": 12, "batch_size": 50, "precision": "bfloat16", **settings})  # type: ignore[arg-type]


def state_of(step: FusedStep) -> list[Tensor]:
    kept = [*step.sae.parameters_in_order, *step.moments, *(step.weights.copies or ())]
    return [t.detach().clone() for t in kept if t is not None]


@pytest.mark.parametrize("center", [True, False])
def test_a_step_multiplies_bfloat16_copies_and_moves_float32_parameters(
    data: Tensor, center: bool
) -> None:
    x, sae = data[:64], SAE(12, 48, TopK(3), center=center)
    with torch.no_grad():
        sae.b_dec.copy_(x.mean(0))
    step = FusedStep(sae, config(auxk_coefficient=0.0))
    with torch.no_grad():
        target = (x - sae.b_dec).bfloat16()
        seen = target if center else x.bfloat16()
        values, indices, _ = topk_encode(
            seen, sae.W_enc.bfloat16(), sae.b_enc.bfloat16(), k=sae.activation.k
        )
        sse, _, _ = sae_loss(target, values.relu(), indices, sae.W_dec.bfloat16())
    losses = step.take(x, 1.0, 1)
    variance = (x - x.mean(0)).square().sum()
    assert losses.fvu == pytest.approx(float(sse.sum() / variance), rel=1e-6)
    assert all(p.dtype == torch.float32 for p in sae.parameters())
    copies = step.weights.copies
    assert copies is not None
    for copy, p in zip(copies, (sae.W_enc, sae.W_dec), strict=True):
        assert torch.equal(copy, p.bfloat16())


def test_rows_in_bfloat16_are_taken_as_they_are(data: Tensor) -> None:
    x = data[:64].bfloat16()
    answers = []
    for rows in (x, x.float()):
        step = FusedStep(SAE(12, 48, TopK(3)), config())
        answers.append((step.take(rows, 1.0, 1), state_of(step)))
    (one, state), (two, other) = answers
    assert (one.fvu, one.l0) == (two.fvu, two.l0)
    assert all(map(torch.equal, state, other))


def test_copies_are_made_anew_where_the_parameters_changed_otherwise(data: Tensor) -> None:
    sae = SAE(12, 48, TopK(3))
    weights = NarrowWeights(sae)
    first = weights.decoder()
    assert weights.decoder() is first
    with torch.no_grad():
        sae.W_dec.mul_(3.0)
    assert torch.equal(weights.decoder(), sae.W_dec.bfloat16())
    assert torch.equal(weights.encoder()[0], sae.W_enc.bfloat16())


def test_auxk_teaches_dead_latents_the_residual_in_bfloat16(data: Tensor) -> None:
    sae, x = SAE(12, 48, TopK(2), seed=4), data[:200]
    settings = config(lr=5e-3, auxk_coefficient=1.0)
    step = FusedStep(sae, settings)
    before, shares = sae.W_enc[40].detach().clone(), []
    for s in range(1, 81):
        step.since_fired[24:] = settings.dead_after_tokens
        losses = step.take(x, 1.0, s)
        shares.append(losses.auxk / losses.fvu)
    assert shares[0] > 1  # at first they make it worse
    assert shares[-1] < 0.8
    assert not torch.equal(sae.W_enc[40], before)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("settings", [{}, {"moments": "int8", "rowsparse": True}], ids=str)
def test_a_resumed_run_ends_with_the_bits_of_one_that_went_through(
    data: Tensor, tmp_path: Path, backend: str, settings: dict[str, object]
) -> None:
    chosen = config(lr=5e-3, checkpoint_every=5, dead_after_tokens=200, **settings)

    def run() -> Tensor:
        with use_backend(backend):
            sae = SAE(12, 48, TopK(3))
            train(sae, data, chosen, out=tmp_path, progress=False)
        return torch.cat([p.detach().flatten() for p in sae.parameters_in_order])

    whole = run()
    shutil.rmtree(tmp_path / "checkpoints" / "step_12")
    assert torch.equal(run(), whole)
    with pytest.raises(CheckpointError, match="precision was 'bfloat16', is None"):
        train(SAE(12, 48, TopK(3)), data, TrainConfig(**{**vars(chosen), "precision": "float32"}),
              out=tmp_path, progress=False)  # fmt: skip


def test_a_bad_row_changes_nothing(data: Tensor) -> None:
    x = data[:40].clone()
    x[7] = float("nan")
    step = FusedStep(SAE(12, 48, TopK(3)), config())
    before = state_of(step)
    with pytest.raises(NonFiniteError, match="row 7"):
        step.take(x, 1.0, 1)
    assert all(map(torch.equal, before, state_of(step)[: len(before)]))


def test_a_float32_run_is_written_as_before_there_was_a_choice() -> None:
    assert "precision" not in TrainConfig(steps=3).what_is_computed()
    assert config().what_is_computed()["precision"] == "bfloat16"
    assert TrainConfig.from_dict(config().to_dict()) == config()
    assert TrainConfig.from_dict({"steps": 3}).precision == "float32"


def test_a_precision_that_is_not_there_or_not_fused_or_without_float32_weights_is_refused() -> None:
    with pytest.raises(
        ArgumentError, match="precision must be one of 'float32', 'bfloat16', got 'fp8'"
    ):
        config(precision="fp8")
    with pytest.raises(ArgumentError, match="precision is of the fused optimizers; pass optimizer"):
        config(optimizer=torch.optim.Adam)
    with pytest.raises(
        DtypeError,
        match=r"^train: precision='bfloat16' keeps float32 parameters beside their copies, got an "
        r"SAE in float64\. Call sae\.float\(\)\.$",
    ):
        FusedStep(SAE(12, 48, TopK(3)).double(), config())
