"""What is chosen where the processor has AMX, by itself, gives the answers that the docs claim.

Where there is none, a build that emulates CUDA emulates the tile unit as well.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import microtome as mt
from microtome import _native, cli
from microtome.ops import screen_weights, topk_encode
from microtome.ops.screen_weights import best_kind
from microtome.patching import logit_difference, sweep
from microtome.testing import has_level

pytestmark = pytest.mark.skipif(not has_level("amx"), reason="this processor has no amx")


@pytest.fixture(autouse=True)
def _on_amx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MICROTOME_CPU_ISA", "amx")


def test_info_says_which_unit_it_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    emulated = _native.emulates_amx()
    assert cli.main(["info"]) == 0
    assert ("in use: amx (emulated, as" in capsys.readouterr().out) == emulated
    monkeypatch.delenv("MICROTOME_CPU_ISA")
    assert (_native.isa() == "amx") != emulated  # it is never chosen by itself
    assert not _native.emulates_amx()
    assert cli.main(["info"]) == 0
    assert "emulated" not in capsys.readouterr().out


def test_the_screen_is_in_bf16_and_its_answers_those_of_integers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    g = torch.Generator().manual_seed(0)
    x, W_enc = torch.randn(70, 200, generator=g), torch.randn(5000, 200, generator=g)
    answers = []
    for level, kind in (("amx", "bf16"), ("avx512", "q15")):
        monkeypatch.setenv("MICROTOME_CPU_ISA", level)
        screen = screen_weights(W_enc)
        assert best_kind() == screen.kind == kind
        answers.append(topk_encode(x, W_enc, k=24, screen=screen))
    assert all(map(torch.equal, answers[0][:2], answers[1][:2]))
    # bf16 screens less sharply, by no more than this.
    bf16, q15 = (float(candidates.float().mean()) for _, _, candidates in answers)
    assert 24 <= q15 < bf16 < 2 * 24


def test_training_gives_the_bits_of_avx512(monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(0)
    acts = torch.randn(600, 40, generator=g)
    trained = []
    for level in ("amx", "avx512"):
        monkeypatch.setenv("MICROTOME_CPU_ISA", level)
        sae = mt.SAE(d_model=40, n_features=512, activation=mt.TopK(8), seed=0)
        mt.train(sae, acts, mt.TrainConfig(steps=12, batch_size=64), progress=False)
        trained.append(sae.state_dict())
    assert all(torch.equal(value, trained[1][name]) for name, value in trained[0].items())


def test_differences_in_bf16_err_by_less_than_half_a_percent_of_the_effects_range() -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    # Layers of GPT-2 small, two of its twelve, and fewer words.
    config = transformers.GPT2Config(
        vocab_size=500, n_layer=2, n_positions=16, bos_token_id=None, eos_token_id=None
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.GPT2LMHeadModel(config).eval()
    clean = torch.randint(500, (4, 8), generator=torch.Generator().manual_seed(8))
    corrupted = clean.clone()
    corrupted[:, 2] = (clean[:, 2] + 250) % 500
    for site in ("resid_pre", "z"):
        exact, fast = (
            sweep(
                model, clean, corrupted, logit_difference(11, 12), site,
                engine="native", precision=precision, progress=False,
            ).by_prompt.flatten(0, -2)
            for precision in ("fp32", "delta-bf16")
        )  # fmt: skip
        ranges = exact.max(0).values - exact.min(0).values
        off = (exact - fast).abs()[exact != exact[0]]  # where the patch does something
        # Of a typical prompt's range: one whose logits hardly differ has the error of the others.
        assert 0 < off.square().mean().sqrt() <= 0.005 * ranges.median()
        assert off.max() <= 0.015 * ranges.median()


@pytest.fixture
def _one_thread() -> Iterator[None]:
    """Products this small are slower on many threads, and far slower on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def breast_cancer() -> tuple[nn.Sequential, Tensor, Tensor]:
    """A 30-128-128-1 network on scikit-learn's table, 100 background rows, 4 to explain."""
    datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn is not installed")
    table = datasets.load_breast_cancer(return_X_y=True)
    rows, labels = (torch.from_numpy(part).float() for part in table)
    rows = (rows - rows.mean(0)) / rows.std(0)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    train, test = order[:469], order[469:]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Linear(30, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 1)
        )
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    for _ in range(400):
        optimizer.zero_grad()
        answers = net(rows[train])[:, 0]
        nn.functional.binary_cross_entropy_with_logits(answers, labels[train]).backward()
        optimizer.step()
    return net.eval().requires_grad_(False), rows[test[:4]], rows[train[:100]]


@pytest.mark.usefixtures("_one_thread")
def test_auto_takes_bf16_products_states_their_shift_and_errs_by_three_percent_at_most() -> None:
    net, x, background = breast_cancer()

    def values(precision: str, **budget: Any) -> mt.shapley.ShapleyValues:
        return mt.shapley.permutation(
            net, x, background, precision=precision, progress=False, **budget
        )

    exact = values("fp32", n_permutations=100, seed=7)
    # At once; and in rounds that are never good enough.
    for budget in ({"max_evaluations": 61_000}, {"n_permutations": 8, "target_error": 1e-6}):
        auto, plain = (values(precision, **budget) for precision in ("auto", "fp32"))
        text = r"; bf16 products, shift at most (.*)% of the standard error$"
        found = re.search(text, auto.note)
        assert found, auto.note
        stated = float(found[1]) / 100
        assert stated < 0.15
        # Both walk the same orders, so they differ by the shift alone.
        shift = (auto.values - plain.values).square().mean(1).sqrt()
        assert ((shift > 0) & (shift <= stated * auto.stderr.square().mean(1).sqrt())).all()
        if "max_evaluations" in budget:
            wrong = (auto.values - exact.values).square().mean().sqrt()
            assert wrong <= 0.03 * exact.values.square().mean().sqrt()


@pytest.mark.usefixtures("_one_thread")
def test_auto_goes_back_to_float32_where_the_shift_would_show() -> None:
    # bf16 rounds all these weights down, so it shifts every walk alike; and no walk differs.
    x, background = torch.tensor([[1.0, 2.0, 4.0]]), torch.zeros(20, 3)
    net = nn.Sequential(nn.Linear(3, 4), nn.Identity(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 1))
    with torch.no_grad():
        for layer in net[::2]:
            layer.weight.fill_(1 + 0.4 * 2**-7)
            layer.bias.zero_()
    found = [
        mt.shapley.permutation(net, x, background, precision=precision, progress=False)
        for precision in ("auto", "fp32", "bf16")
    ]
    assert torch.equal(found[0].values, found[1].values)
    assert not torch.equal(found[0].values, found[2].values)
    assert "bf16" not in found[0].note
    assert "as demanded" in found[2].note
