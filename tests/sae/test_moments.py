"""Moments in bfloat16 and 8 bits, and products in bfloat16, train as float32 does."""

import functools
import math
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from microtome import SAE, TopK, TrainConfig, train
from microtome._seed import generator
from microtome.errors import ArgumentError, CheckpointError
from microtome.ops import UpdateRule, moments_for, use_backend
from microtome.ops import _sae_update_states as states
from microtome.sae import files
from microtome.sae.step import FusedStep

D, F, K, N, STEPS = 136, 224, 8, 128, 200  # rows of 136 are a block of 128 and one of 8


def anisotropic(seed: int) -> Tensor:
    """[3000, 136] sums of directions; columns differ in size, two as a model's massive ones do."""
    g = generator(seed, "anisotropic")
    directions = torch.nn.functional.normalize(torch.randn(200, D, generator=g), dim=1)
    size = torch.exp(torch.randn(D, generator=g))
    size[3], size[77] = 30 * size[3], 100 * size[77]
    often = torch.logspace(-0.8, -2.8, 200)
    code = torch.rand(3000, 200, generator=g) * (torch.rand(3000, 200, generator=g) < often)
    x = (code @ directions + 0.02 * torch.randn(3000, D, generator=g)) * size
    return x / x.std()


def fvu_after(seed: int, **settings: str) -> float:
    """Fraction of variance unexplained over all rows after STEPS steps."""
    x, order = anisotropic(seed), generator(seed, "order")
    torch.manual_seed(seed)
    sae = SAE(D, F, TopK(K))
    with torch.no_grad():
        sae.b_dec.copy_(x.mean(0))
    config = TrainConfig(steps=STEPS, batch_size=N, lr=1e-3, auxk_coefficient=0.0, **settings)
    stepper = FusedStep(sae, config)
    for step in range(1, STEPS + 1):
        stepper.take(x[torch.randint(0, len(x), (N,), generator=order)], 1.0, step)
    with torch.no_grad():
        rest = sae.decode(sae.encode(x)) - x
    return float(rest.square().sum() / (x - x.mean(0)).square().sum())


@functools.cache
def with_float32(seed: int) -> float:
    return fvu_after(seed)


def drift(**settings: str) -> float:
    """By how much log FVU differs from float32's, the mean of two runs."""
    return sum(math.log(fvu_after(seed, **settings) / with_float32(seed)) for seed in (0, 1)) / 2


@pytest.mark.parametrize(
    "settings", [{"moments": "bfloat16"}, {"moments": "int8"}, {"precision": "bfloat16"}], ids=str
)
def test_training_ends_where_it_does_in_float32(settings: dict[str, str]) -> None:
    assert abs(drift(**settings)) < 0.02


def test_the_comparison_sees_what_rounding_to_nearest_does(monkeypatch: pytest.MonkeyPatch) -> None:
    # A second moment near its code then never moves: a thousandth is less than half a step.
    nearest = 0x8000_8000
    monkeypatch.setattr(states, "words", lambda _, rows, d: torch.full((len(rows), d), nearest))
    assert abs(drift(moments="int8")) > 0.05


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("moments", ["bfloat16", "int8"])
def test_a_resumed_run_ends_with_the_bits_of_one_that_went_through(
    data: Tensor, tmp_path: Path, moments: str, backend: str
) -> None:
    config = TrainConfig(steps=12, batch_size=50, lr=5e-3, checkpoint_every=5, moments=moments)

    def run() -> Tensor:
        with use_backend(backend):
            sae = SAE(12, 48, TopK(3))
            train(sae, data, config, out=tmp_path, progress=False)
        return torch.cat([p.detach().flatten() for p in sae.parameters_in_order])

    whole = run()
    shutil.rmtree(tmp_path / "checkpoints" / "step_12")
    assert torch.equal(run(), whole)
    stored = files.read_safetensors(tmp_path / "checkpoints" / "step_12" / "training.safetensors")
    assert stored["m.W_enc"].dtype == getattr(torch, moments)
    assert stored["m.b_enc"].dtype == torch.float32
    with pytest.raises(CheckpointError, match=f"moments was '{moments}', is None"):
        train(SAE(12, 48, TopK(3)), data, TrainConfig(**{**vars(config), "moments": "float32"}),
              out=tmp_path, progress=False)  # fmt: skip


def test_the_settings_of_a_float32_run_are_those_of_runs_before_there_was_a_choice() -> None:
    config = TrainConfig(steps=3)
    assert "moments" not in config.what_is_computed()
    assert TrainConfig.from_dict({"steps": 3}) == config
    other = TrainConfig(steps=3, moments="int8")
    assert other.what_is_computed()["moments"] == "int8"
    assert TrainConfig.from_dict(other.to_dict()) == other


def test_moments_that_are_not_there_or_not_fused_are_refused() -> None:
    allowed = "'float32', 'bfloat16', 'int8'"
    with pytest.raises(ArgumentError, match=f"moments must be one of {allowed}, got 'fp8'"):
        TrainConfig(steps=1, moments="fp8")
    with pytest.raises(ArgumentError, match="moments is of the fused optimizers; pass"):
        TrainConfig(steps=1, optimizer=torch.optim.Adam, moments="int8")
    params = (torch.zeros(2, 3), torch.zeros(2), torch.zeros(2, 3), torch.zeros(3))
    with pytest.raises(ArgumentError, match=f"^moments_for: state must be one of {allowed}, got"):
        moments_for(params, UpdateRule(), "fp8")
