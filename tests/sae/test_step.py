"""One fused step against autograd of the written-out loss, in float64."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from microtome import SAE, TopK, TrainConfig, _check, _pending
from microtome.errors import NonFiniteError
from microtome.ops import _sae_update_inputs
from microtome.sae import step as step_module
from microtome.sae.loss import dead_set, total_variance
from microtome.sae.step import FusedStep
from microtome.sae.unfused import UnfusedStep

N, D, F, K = 40, 10, 32, 4
NAMES = ("W_enc", "b_enc", "W_dec", "b_dec")


def make(center: bool, dtype: torch.dtype = torch.float64) -> SAE:
    sae = SAE(D, F, TopK(K), center=center, seed=5).to(dtype)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        sae.W_enc += 0.3 * torch.randn(F, D, generator=g, dtype=dtype)
        sae.b_enc -= 1.5 + torch.rand(F, generator=g, dtype=dtype)
        sae.b_dec += torch.randn(D, generator=g, dtype=dtype)
    return sae


def rows(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(N, D, generator=torch.Generator().manual_seed(2), dtype=dtype)


def written_out(sae: SAE, x: Tensor, dead: Tensor, k_aux: int, coefficient: float) -> Tensor:
    """The loss with every pre-activation formed, by operations that autograd knows."""
    z = (x - sae.b_dec if sae.center else x) @ sae.W_enc.T + sae.b_enc
    values, indices = z.topk(K)
    assert (values < 0).any(), "the data must exercise the ReLU"
    code = torch.zeros_like(z).scatter(1, indices, values.relu())
    x_hat = code @ sae.W_dec + sae.b_dec
    variance = (x - x.mean(0)).square().sum()
    loss = (x - x_hat).square().sum() / variance
    if len(dead):
        z_dead = z[:, dead]
        k = min(k_aux, len(dead))
        values, indices = z_dead.topk(k)
        code = torch.zeros_like(z_dead).scatter(1, indices, values.relu())
        e = (x - x_hat).detach()
        aux = (code @ sae.W_dec[dead] - e).square().sum() / variance
        loss = loss + coefficient * min(len(dead) / k_aux, 1) * aux
    return loss


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("n_dead", [0, 3, 12])
@pytest.mark.parametrize("k_aux", [None, 7])
def test_a_fused_step_follows_every_gradient_of_the_written_out_loss(center, n_dead, k_aux):
    sae, x = make(center), rows()
    dead = torch.arange(F)[1 : 1 + 2 * n_dead : 2]
    expected = written_out(sae, x, dead, k_aux or D // 2, 0.25)
    gradients = dict(
        zip(NAMES, torch.autograd.grad(expected, sae.parameters_in_order), strict=True)
    )
    before = {name: getattr(sae, name).detach().clone() for name in NAMES}
    if n_dead:
        assert gradients["W_enc"][dead].norm() > 1e-3

    config = TrainConfig(
        steps=1, lr=1.0, optimizer="sgd", beta1=0.0, auxk_coefficient=0.25, k_aux=k_aux
    )
    step = FusedStep(sae, config)
    step.since_fired[dead] = config.dead_after_tokens
    losses = step.take(x, 1.0, 1)

    assert losses.loss == pytest.approx(float(expected.detach()), rel=1e-12)
    assert (losses.auxk > 0) == (n_dead > 0)
    W, g = before["W_dec"], gradients["W_dec"]
    g = g - (g * W).sum(1, keepdim=True) / W.square().sum(1, keepdim=True) * W
    moved = {name: before[name] - gradients[name] for name in NAMES}
    moved["W_dec"] = (W - g) / (W - g).norm(dim=1, keepdim=True)
    for name in NAMES:
        torch.testing.assert_close(
            getattr(sae, name).detach(), moved[name], rtol=1e-10, atol=1e-12, msg=name
        )


def test_auxk_moves_the_encoder_of_a_latent_that_the_main_code_never_selects():
    def moved(coefficient: float) -> float:
        sae = make(True)
        with torch.no_grad():
            sae.b_enc[:] = 5.0
            sae.b_enc[9] = 0.5
        before = sae.W_enc[9].clone()
        config = TrainConfig(
            steps=1, lr=1.0, optimizer="sgd", beta1=0.0, auxk_coefficient=coefficient
        )
        step = FusedStep(sae, config)
        step.since_fired[9] = config.dead_after_tokens
        step.take(rows(), 1.0, 1)
        return float((sae.W_enc[9] - before).detach().norm())

    assert moved(0.0) == 0.0
    assert moved(1 / 32) > 1e-6


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd", "signsgd"])
def test_every_fused_optimizer_lowers_the_loss(name, data):
    sae = SAE(12, 48, TopK(3))
    lr = {"sgd": 0.02, "signsgd": 3e-3}.get(name, 1e-2)
    step = FusedStep(sae, TrainConfig(steps=40, lr=lr, optimizer=name, auxk_coefficient=0.0))
    losses = [step.take(data[:200], 1.0, s).loss for s in range(1, 41)]
    assert losses[-1] < 0.8 * losses[0]
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(48))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("center", [True, False])
def test_the_unfused_path_with_torch_adam_matches_the_fused_one_over_30_steps(center, dtype):
    settings = {"steps": 30, "lr": 1e-3, "dead_after_tokens": 3 * N}
    fused, plain = make(center, dtype), make(center, dtype)
    one = FusedStep(fused, TrainConfig(optimizer="adam", **settings))
    two = UnfusedStep(plain, TrainConfig(optimizer=torch.optim.Adam, **settings))
    g = torch.Generator().manual_seed(3)
    saw_aux = False
    for s in range(1, 31):
        x = torch.randn(N, D, generator=g, dtype=dtype)
        a, b = one.take(x, 1.0, s), two.take(x, 1.0, s)
        saw_aux |= a.auxk > 0
        assert (a.l0, a.dead_fraction, a.lr) == (b.l0, b.dead_fraction, b.lr)
        assert a.loss == pytest.approx(b.loss, rel=1e-9 if dtype == torch.float64 else 1e-4)
    assert saw_aux
    assert torch.equal(one.since_fired, two.since_fired)
    tolerance = 1e-9 if dtype == torch.float64 else 2e-5
    for name in NAMES:
        difference = (getattr(fused, name) - getattr(plain, name)).abs().max()
        assert difference < tolerance, f"{name}: {difference:.2e}"


def test_clipping_bounds_the_gradient_that_the_optimizer_sees():
    sae = make(True)
    config = TrainConfig(steps=1, optimizer=torch.optim.SGD, lr=1.0, max_grad_norm=1e-3)
    UnfusedStep(sae, config).take(rows(), 1.0, 1)
    total = torch.stack([p.grad.norm() for p in sae.parameters()]).norm()
    assert float(total) == pytest.approx(1e-3, rel=1e-3)


def test_the_step_after_a_fused_step_uses_the_refreshed_screen():
    sae, x = make(True, torch.float32), rows(torch.float32)
    step = FusedStep(sae, TrainConfig(steps=2, lr=1e-2))
    step.take(x, 1.0, 1)
    kept = sae.screen()
    fresh = make(True, torch.float32)
    fresh.load_state_dict(sae.state_dict())
    rebuilt = fresh.screen()
    assert torch.equal(kept.shadow, rebuilt.shadow)
    assert torch.equal(sae.encode(x).indices, fresh.encode(x).indices)


def test_a_batch_without_variance_does_not_divide_by_zero():
    assert total_variance(torch.full((4, 2), 3.0)) == 72.0
    assert total_variance(torch.tensor([[3.0, 4.0]])) == 25.0
    assert total_variance(torch.zeros(4, 2)) == 1.0
    assert total_variance(torch.tensor([[0.0], [2.0]])) == 2.0
    for x in (torch.ones(1, D), torch.full((6, D), 0.1), torch.zeros(3, D)):
        for config in (TrainConfig(steps=1), TrainConfig(steps=1, optimizer=torch.optim.Adam)):
            sae = make(True, torch.float32)
            kind = FusedStep if config.fused else UnfusedStep
            assert kind(sae, config).take(x, 1.0, 1).loss < float("inf")
            assert all(bool(torch.isfinite(p).all()) for p in sae.parameters())


@pytest.mark.parametrize("optimizer", ["adam", torch.optim.Adam])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_a_bad_row_is_named_and_changes_nothing(optimizer, value):
    sae, x = make(True, torch.float32), rows(torch.float32)
    x[7] = value
    config = TrainConfig(steps=1, optimizer=optimizer)
    step = (FusedStep if config.fused else UnfusedStep)(sae, config)
    before = copy_of(sae)
    with pytest.raises(NonFiniteError, match=r"row 7|overflows"):
        step.take(x, 1.0, 1)
    assert all(torch.equal(a, b) for a, b in zip(before, sae.parameters(), strict=True))
    assert int(step.since_fired.sum()) == 0


def test_auxk_teaches_dead_latents_the_residual(data):
    def share(steps: int, coefficient: float) -> float:
        sae, x = SAE(12, 48, TopK(2), seed=4), data[:200]
        config = TrainConfig(steps=steps, lr=5e-3, auxk_coefficient=coefficient)
        step = FusedStep(sae, config)
        for s in range(1, steps + 1):
            step.since_fired[24:] = config.dead_after_tokens
            losses = step.take(x, 1.0, s)
        return losses.auxk / losses.fvu

    assert share(1, 1.0) > 1  # at first they make it worse
    assert share(80, 1.0) < 0.8 * share(80, 1e-9)


def copy_of(sae: SAE) -> list[Tensor]:
    return [p.detach().clone() for p in sae.parameters()]


def test_a_latent_is_dead_after_so_many_rows_without_firing():
    since = torch.tensor([0, 9, 10, 11])
    config = TrainConfig(steps=1, dead_after_tokens=10, auxk_coefficient=0.5)
    dead = dead_set(since, 8, config)
    assert dead.latents.tolist() == [2, 3]
    assert (dead.k, dead.weight) == (2, 0.25)
    assert dead_set(since[:2], 8, config) is None
    assert dead_set(since, 8, TrainConfig(steps=1, auxk_coefficient=0.0)) is None
    assert dead_set(since, 1, config).k == 1


def test_firing_resets_the_count_of_rows_since():
    sae, x = make(True), rows()
    step = FusedStep(sae, TrainConfig(steps=1))
    fired = torch.zeros(F, dtype=torch.bool)
    code = sae.encode(x)
    fired[code.indices[code.values > 0].long()] = True
    step.take(x, 1.0, 1)
    assert torch.equal(step.since_fired == 0, fired)
    assert set(step.since_fired[~fired].tolist()) <= {N}


class Readings(TorchDispatchMode):
    """Counts what makes Python wait for a GPU: numbers read back, sizes that depend on data."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        masks = [i for i in args[1] if i is not None and i.dtype == torch.bool] if (
            name in ("index", "index_put_") and len(args) > 1
        ) else []  # fmt: skip
        if masks or name in ("_local_scalar_dense", "nonzero", "unique2", "masked_select"):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("by_products", [True, False])
@pytest.mark.parametrize("n_dead", [0, 3])
def test_a_fused_step_waits_for_nothing_but_what_was_known_when_it_began(
    monkeypatch, gpu, n_dead, by_products
):
    monkeypatch.setattr(step_module, "worthwhile", lambda *_: by_products)
    sae, x = make(True, torch.float32), rows(torch.float32)
    expected = FusedStep(make(True, torch.float32), TrainConfig(steps=2))
    step = FusedStep(sae, TrainConfig(steps=2))
    for one in (step, expected):
        one.since_fired[:n_dead] = one.config.dead_after_tokens
    # What the ops themselves look at has tests of its own.
    monkeypatch.setattr(_check, "readable", lambda tensor: False)
    monkeypatch.setattr(
        _sae_update_inputs, "check_contents", lambda c, x, aux, extra, f: (c, aux, extra, None)
    )
    with Readings() as readings:
        losses = step.take(x, 1.0, 1)
    assert readings.seen == []
    waited = [event.waited for event in gpu.events]
    assert sum(waited) == 1
    assert waited[-1] == 0  # the losses
    assert losses.l0 > 0  # waits
    assert sum(event.waited for event in gpu.events) == 2
    monkeypatch.setattr(_pending, "gpu", _pending.Gpu())
    at_once = expected.take(x, 1.0, 1)
    assert (losses.fvu, losses.auxk, losses.loss, losses.l0) == (
        at_once.fvu, at_once.auxk, at_once.loss, at_once.l0
    )  # fmt: skip
    assert (losses.auxk > 0) == (n_dead > 0)


def test_a_loss_that_overflowed_on_a_gpu_is_raised_by_the_next_step(gpu):
    sae, x = make(True, torch.float32), rows(torch.float32)
    step = FusedStep(sae, TrainConfig(steps=2))
    losses = step.take(x * 1e25, 1.0, 1)
    with pytest.raises(NonFiniteError, match="the squared error overflows in row 0") as raised:
        step.take(x, 1.0, 2)
    assert raised.value.late
    with pytest.raises(NonFiniteError, match="the loss is"):
        losses.loss  # noqa: B018
