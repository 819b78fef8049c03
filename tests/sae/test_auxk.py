"""AuxK by products, beside AuxK by entries."""

import pytest
import torch

from microtome import SAE, TopK, TrainConfig
from microtome.sae import auxk
from microtome.sae import step as step_module
from microtome.sae.loss import DeadSet
from microtome.sae.step import FusedStep
from microtome.sae.weights import Weights

N, D, F, K = 50, 12, 64, 4


def make(dtype: torch.dtype = torch.float64) -> SAE:
    sae = SAE(D, F, TopK(K), seed=3).to(dtype)
    g = torch.Generator().manual_seed(4)
    with torch.no_grad():
        sae.W_enc += 0.3 * torch.randn(F, D, generator=g, dtype=dtype)
        sae.b_enc -= torch.rand(F, generator=g, dtype=dtype)
    return sae


def rows(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(N, D, generator=torch.Generator().manual_seed(5), dtype=dtype)


def stepped(
    monkeypatch: pytest.MonkeyPatch, products: bool, dead: torch.Tensor, **settings: object
) -> tuple[SAE, FusedStep, float]:
    monkeypatch.setattr(step_module, "worthwhile", lambda *_: products)
    sae = make()
    config = TrainConfig(steps=3, dead_after_tokens=10**6, **settings)  # type: ignore[arg-type]
    step = FusedStep(sae, config)
    losses = None
    for s in (1, 2, 3):
        step.since_fired.zero_()
        step.since_fired[dead] = 10**6
        losses = step.take(rows(), 1.0, s)
    assert losses is not None
    return sae, step, losses.auxk


@pytest.mark.parametrize("rowsparse", [False, True])
@pytest.mark.parametrize("k_aux", [3, None])  # fewer than the dead latents, and all of them
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_products_take_the_step_that_entries_take(monkeypatch, optimizer, k_aux, rowsparse):
    dead = torch.tensor([1, 5, 6, 30, 63])
    settings = {"optimizer": optimizer, "k_aux": k_aux, "rowsparse": rowsparse, "lr": 1e-2}
    one, first, loss = stepped(monkeypatch, False, dead, **settings)
    other, second, theirs = stepped(monkeypatch, True, dead, **settings)
    assert loss > 0
    assert theirs == pytest.approx(loss, rel=1e-12)
    for a, b in zip(one.parameters_in_order, other.parameters_in_order, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    for a, b in zip(first.moments, second.moments, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-14)


def test_blocks_of_rows_add_up_to_the_whole(monkeypatch):
    sae, x = make(), rows()
    dead = DeadSet(torch.tensor([0, 7, 20]), 2, 1.0)
    residual = rows().flip(0)
    whole, errors = auxk.by_products(Weights(sae), x, residual, dead, 0.5)
    monkeypatch.setattr(auxk, "BLOCK_BYTES", 7 * 3 * 8)
    parts, again = auxk.by_products(Weights(sae), x, residual, dead, 0.5)
    torch.testing.assert_close(errors, again)
    assert torch.equal(whole.place, parts.place)
    for name in ("W_enc", "b_enc", "W_dec"):
        torch.testing.assert_close(getattr(whole, name), getattr(parts, name))


def test_a_dead_latent_that_no_row_uses_has_no_row_of_gradients():
    sae, x = make(), rows()
    with torch.no_grad():
        sae.b_enc[7] = -100.0
    found, _ = auxk.by_products(Weights(sae), x, x, DeadSet(torch.tensor([3, 7]), 2, 1.0), 1.0)
    assert found.place[3] == 0
    assert (found.place >= 0).sum() == 1


def test_autocast_changes_nothing():
    found = []
    for within in (False, True):
        sae = make(torch.float32)
        step = FusedStep(sae, TrainConfig(steps=1, dead_after_tokens=10**6, lr=1e-2))
        step.since_fired[[3, 7, 9]] = 10**6
        with torch.autocast("cpu", torch.bfloat16, enabled=within):
            step.take(rows(torch.float32), 1.0, 1)
        found.append([p.detach().clone() for p in sae.parameters_in_order])
    assert all(map(torch.equal, *found))


def test_products_are_for_few_latents():
    assert auxk.worthwhile(DeadSet(torch.arange(1024), 4, 1.0), 16384)
    assert not auxk.worthwhile(DeadSet(torch.arange(1025), 4, 1.0), 16384)
