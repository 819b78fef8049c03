"""Parts of a model as players: every coalition against a forward with hooks, and the estimators."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import microtome as mt
from microtome.errors import ArgumentError, NonFiniteError, ShapeError, SiteError
from microtome.models import ToyConfig, ToyModel
from microtome.patching import Write, kl_divergence, logit_difference, loss, naive_sweep
from microtome.shapley import MeanGame, adaptive, parts, permutation
from microtome.shapley.parts_game import PartsGame
from microtome.testing import families
from microtome.testing.patching import changed, everything, last_difference

pytest.importorskip("transformers", reason="transformers is not installed")

CLEAN = families.tokens(2, 6)
CORRUPTED = changed(CLEAN, (0, 1), (1, 3))
METRIC = logit_difference(3, 5)
MASK = torch.tensor([[0, 1, 1, 1, 1, 0], [0, 0, 1, 1, 1, 1]])
EVERYONE = torch.arange(2)


def difference(logits: Tensor) -> Tensor:
    """METRIC, of all logits."""
    return logits[:, -1, 3] - logits[:, -1, 5]


def coalitions(p: int) -> Tensor:
    """All of them, [2^p, p]."""
    return torch.tensor(list(itertools.product([False, True], repeat=p)))


@pytest.fixture(scope="module")
def gpt2() -> nn.Module:
    return families.in_float64("gpt2")


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    return families.in_float64("llama")


def writes(game: PartsGame, present: Tensor, of: Callable[[int], Write]) -> list[list[Write]]:
    """The absent players of each coalition as writes."""
    return [[of(j) for j in (~row).nonzero().flatten().tolist()] for row in present]


def head(game: PartsGame, **write: Any) -> Callable[[int], Write]:
    view = game.players.view
    return lambda j: Write(f"z.{view['layer'][j]}", heads=view["unit"][j], **write)


def apart(found: Tensor, wanted: Tensor) -> float:
    """Of values [b, K, 1] from naive scores [K, b], over the largest of these."""
    return float((found[..., 0].T - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("engine", ["native", "blocks", "forwards"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3", "gpt_neox"])
def test_every_coalition_of_heads_is_a_forward_with_hooks(name: str, engine: str) -> None:
    model = families.in_float64(name)
    game = parts.heads(
        model, CLEAN, CORRUPTED, METRIC, heads=[(0, 1), (2, 0), (0, 3), (1, 2)], engine=engine
    )
    assert game.players.names == ("L0H1", "L2H0", "L0H3", "L1H2")
    present = coalitions(4)
    wanted = naive_sweep(model, CLEAN, CORRUPTED, difference, writes(game, present, head(game)))
    assert apart(game.value(present, EVERYONE), wanted) < 1e-9
    empty, full = game.ends()
    assert torch.allclose(empty[:, 0, 0], wanted[0], atol=1e-12)
    assert torch.allclose(full[:, 0], wanted[-1], atol=1e-12)


@pytest.mark.parametrize("absent", ["zero", "mean-position"])
@pytest.mark.parametrize("engine", ["native", "blocks"])
def test_absent_heads_can_be_zero_or_a_mean(llama: nn.Module, absent: str, engine: str) -> None:
    game = parts.heads(
        llama, CLEAN, None, METRIC, layers=[1, 2], heads=[0, 3], absent=absent, engine=engine
    )
    write: dict[str, Any] = {"op": "mean" if absent == "mean-position" else "zero"}
    present = coalitions(4)
    cells = writes(game, present, head(game, **write))
    wanted = naive_sweep(llama, CLEAN, CLEAN, difference, cells)
    assert apart(game.value(present, EVERYONE), wanted) < 1e-9


def test_a_mean_is_over_the_positions_that_count_of_all_prompts(llama: nn.Module) -> None:
    game = parts.heads(
        llama, CLEAN, CORRUPTED, METRIC, heads=[(1, 2)], absent="mean", attention_mask=MASK
    )
    z = mt.capture(llama, "z.1", CORRUPTED, attention_mask=MASK)["z.1"][:, :, 2]
    mean = z[MASK.bool()].mean(0)
    padded = lambda logits: logits[EVERYONE, [4, 5], 3] - logits[EVERYONE, [4, 5], 5]  # noqa: E731
    cell = [Write("z.1", heads=2, value=mean)]
    wanted = naive_sweep(llama, CLEAN, None, padded, [cell], attention_mask=MASK)
    assert torch.allclose(game.ends()[0][:, 0, 0], wanted[0], atol=1e-12)


@pytest.mark.parametrize("engine", ["native", "blocks"])
@pytest.mark.parametrize("metric", [difference, everything, last_difference])
def test_any_metric_and_padding(llama: nn.Module, engine: str, metric: Any) -> None:
    mask = MASK if metric is everything else torch.tensor([[0, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])

    def counted(logits: Tensor) -> Tensor:
        return metric(torch.where(mask.bool()[..., None], logits, 0.0))

    game = parts.heads(
        llama, CLEAN, CORRUPTED, counted, heads=[(0, 0), (1, 1), (2, 3)], attention_mask=mask,
        engine=engine,
    )  # fmt: skip
    present = coalitions(3)
    cells = writes(game, present, head(game))
    wanted = naive_sweep(llama, CLEAN, CORRUPTED, counted, cells, attention_mask=mask)
    assert apart(game.value(present, EVERYONE), wanted) < 1e-9


@pytest.mark.parametrize("name", ["gpt2", "gemma3", "gpt_neox"])
@pytest.mark.parametrize("engine", ["native", "blocks"])
def test_blocks_and_neurons_are_players_too(name: str, engine: str) -> None:
    model = families.in_float64(name)
    game = parts.layers(model, CLEAN, CORRUPTED, METRIC, engine=engine)
    sites = game.players.names
    assert sites[:2] == ("attn_out.0", "mlp_out.0")
    present = coalitions(6)[::3]
    cells = writes(game, present, lambda j: Write(sites[j]))
    wanted = naive_sweep(model, CLEAN, CORRUPTED, difference, cells)
    assert apart(game.value(present, EVERYONE), wanted) < 1e-9

    some = [(1, 4), (1, 0), (2, 7), (0, 39)]
    game = parts.neurons(model, CLEAN, CORRUPTED, METRIC, neurons=some, engine=engine)
    present = coalitions(4)
    cells = writes(game, present, lambda j: Write(f"neurons.{some[j][0]}", units=some[j][1]))
    wanted = naive_sweep(model, CLEAN, CORRUPTED, difference, cells)
    assert apart(game.value(present, EVERYONE), wanted) < 1e-9


def test_all_neurons_of_all_layers_in_random_coalitions(gpt2: nn.Module) -> None:
    game = parts.neurons(gpt2, CLEAN, None, METRIC, absent="zero")
    assert len(game.players) == 3 * 96
    present = torch.rand(5, 288, generator=torch.Generator().manual_seed(0)) < 0.5
    cells = [
        [
            Write(f"neurons.{layer}", op="zero", units=(~row[layer]).nonzero().flatten().tolist())
            for layer in range(3)
        ]
        for row in present.unflatten(1, (3, 96))
    ]
    wanted = naive_sweep(gpt2, CLEAN, None, difference, cells)
    assert apart(game.value(present, EVERYONE), wanted) < 1e-9


class Relu(nn.Module):
    """An autoencoder without jumps, so that rounding cannot change which features are active."""

    def __init__(self, d: int, f: int) -> None:
        super().__init__()
        self.W_dec = nn.Parameter(torch.randn(f, d, generator=torch.Generator().manual_seed(0)))

    def encode(self, x: Tensor) -> Tensor:
        return (x @ self.W_dec.T.to(x) / 4).relu()


@pytest.mark.parametrize("engine", ["native", "blocks"])
@pytest.mark.parametrize("absent", ["resample", "zero", "mean"])
def test_absent_features_are_taken_out_of_what_the_run_itself_has(
    llama: nn.Module, engine: str, absent: str
) -> None:
    sae, sites = Relu(24, 12).double(), ["resid_mid.0", "mlp_out.1", "resid_post.2"]
    ids = [[3, 1], [0], [7, 11]]
    other = None if absent == "zero" else CORRUPTED
    game = parts.features(
        llama, [sae] * 3, sites, CLEAN, other, METRIC, features=ids, absent=absent, engine=engine
    )
    assert game.players.names[2:] == ("mlp_out.1 f0", "resid_post.2 f7", "resid_post.2 f11")
    held = mt.capture(llama, sites, CORRUPTED)
    present = coalitions(5)
    wanted = []
    for row in present:
        inside, patches = iter(row), []
        for site, features in zip(sites, ids, strict=True):
            absentees = [f for f in features if not next(inside)]
            new = sae.encode(held[site])[..., absentees]
            new = {"resample": new, "zero": 0.0 * new, "mean": new.mean((0, 1)).expand_as(new)}

            def visit(x: Tensor, at: list[int] = absentees, new: Tensor = new[absent]) -> Tensor:
                return x + (new - sae.encode(x)[..., at]) @ sae.W_dec[at]

            patches.append((site, visit))
        with torch.no_grad():
            wanted.append(difference(mt.patching.run_patched(llama, CLEAN, patches)))
    assert apart(game.value(present, EVERYONE), torch.stack(wanted)) < 1e-9


def test_without_ids_the_features_that_move_the_stream_most_play(llama: nn.Module) -> None:
    sae = Relu(24, 12).double()
    game = parts.features(llama, sae, "resid_pre.1", CLEAN, CORRUPTED, METRIC, top=4)
    x, y = (mt.capture(llama, "resid_pre.1", run)["resid_pre.1"] for run in (CLEAN, CORRUPTED))
    moved = (sae.encode(y) - sae.encode(x)).abs().sum((0, 1)) * sae.W_dec.norm(dim=1)
    assert game.players.names == tuple(f"f{j}" for j in sorted(moved.argsort()[-4:].tolist()))


def test_sampled_values_agree_with_enumeration(gpt2: nn.Module) -> None:
    game = parts.heads(gpt2, CLEAN, CORRUPTED, METRIC, layers=[0, 2])
    values = game.value(coalitions(8), EVERYONE)[..., 0].reshape(2, *[2] * 8)
    exact = torch.zeros(2, 8, dtype=torch.float64)
    for j in range(8):
        marginal = values.select(j + 1, 1) - values.select(j + 1, 0)
        size = coalitions(7).sum(1)
        weight = 1 / (8 * torch.exp(torch.lgamma(torch.tensor(8.0)) - torch.lgamma(size + 1.0)
                                    - torch.lgamma(8.0 - size))).double()  # fmt: skip
        exact[:, j] = (marginal.reshape(2, -1) * weight).sum(1)
    found = permutation(game, n_permutations=64)
    assert ((found.values - exact).abs() <= 4 * found.stderr + 1e-7).all()
    found.check_additivity()
    mean = permutation(MeanGame(game), n_permutations=64)
    assert torch.allclose(mean.values[0], found.values.mean(0))
    best = adaptive(MeanGame(game), k=1, max_evaluations=4000)
    assert best.top(1)[0]["player"] == found.names[int(exact.mean(0).abs().argmax())]


def test_results_do_not_depend_on_memory(gpt2: nn.Module) -> None:
    present = torch.rand(40, 12, generator=torch.Generator().manual_seed(0)) < 0.5
    wanted = parts.heads(gpt2, CLEAN, CORRUPTED, METRIC).value(present, EVERYONE)
    small = parts.heads(gpt2, CLEAN, CORRUPTED, METRIC, memory=1 << 20)
    small._runs.at_once = 7
    assert torch.allclose(small.value(present, EVERYONE), wanted, rtol=1e-12)
    one = small.value(present, torch.tensor([1]))
    assert torch.allclose(one[0], wanted[1], rtol=1e-12)


@pytest.mark.parametrize("engine", ["native", "blocks"])
def test_coalitions_that_lack_nobody_or_late_players_only(gpt2: nn.Module, engine: str) -> None:
    game = parts.heads(gpt2, CLEAN, CORRUPTED, METRIC, engine=engine)
    present = torch.ones(2, 12, dtype=torch.bool)
    assert torch.equal(game.value(present, EVERYONE), game.ends()[1][:, None].expand(2, 2, 1))
    present[1, 11] = False
    cells = writes(game, present, head(game))
    wanted = naive_sweep(gpt2, CLEAN, CORRUPTED, difference, cells)
    assert apart(game.value(present, EVERYONE), wanted) < 1e-9
    assert game.value(present[:0], EVERYONE).shape == (2, 0, 1)


def test_prompts_that_do_not_differ_have_no_effects(gpt2: nn.Module) -> None:
    same = CLEAN.clone()
    same[1] = CORRUPTED[1]
    found = permutation(parts.heads(gpt2, CLEAN, same, METRIC), n_permutations=2)
    assert bool((found.values[0] == 0).all())
    assert bool((found.values[1] != 0).any())


def test_metrics_may_read_the_corrupted_run_or_every_position() -> None:
    model = ToyModel(ToyConfig(num_hidden_layers=2, hidden_size=16, vocab_size=50)).double()
    toward = parts.heads(model, CLEAN, CORRUPTED, kl_divergence("corrupted"))
    plain = parts.heads(model, CORRUPTED, CLEAN, kl_divergence("clean"))
    assert float(toward.ends()[1].min()) > 0
    assert torch.allclose(plain.ends()[1], torch.zeros(2, 1).double(), atol=1e-12)
    whole = parts.heads(model, CLEAN, CORRUPTED, loss(CLEAN))
    cells = [[Write(f"z.{layer}") for layer in range(2)]]

    def naive_loss(logits: Tensor) -> Tensor:
        logp = logits[:, :-1].log_softmax(-1)
        return -logp.gather(2, CLEAN[:, 1:, None])[..., 0].mean(1)

    wanted = naive_sweep(model, CLEAN, CORRUPTED, naive_loss, cells)
    assert torch.allclose(whole.ends()[0][:, 0, 0], wanted[0], atol=1e-12)


def test_bf16_differences_stay_near_float32() -> None:
    model = families.build("gpt2")
    present = torch.rand(20, 12, generator=torch.Generator().manual_seed(0)) < 0.5
    exact, fast = (
        parts.heads(model, CLEAN, CORRUPTED, METRIC, precision=p).value(present, EVERYONE)
        for p in ("fp32", "delta-bf16")
    )
    assert 0 < float((fast - exact).abs().max()) < 0.03 * float(exact.max() - exact.min())


@pytest.mark.parametrize("engine", ["native", "blocks", "forwards"])
def test_no_hook_stays_even_after_an_error(gpt2: nn.Module, engine: str) -> None:
    def hooks() -> list[Any]:
        return [
            (m._forward_hooks, m._forward_pre_hooks, m.__dict__.get("forward"))
            for m in gpt2.modules()
            if m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__
        ]

    before, fails = hooks(), False

    def failing(logits: Tensor) -> Tensor:
        return logits[:, -1, 3] * (torch.nan if fails else 1.0)

    game = parts.heads(gpt2, CLEAN, CORRUPTED, failing, engine=engine)
    nobody = torch.zeros(1, 12, dtype=torch.bool)
    game.value(nobody, EVERYONE)
    fails = True
    with pytest.raises(NonFiniteError, match=r"with 12 of 12 players absent \(L0H0, L0H1, L0H2"):
        game.value(nobody, EVERYONE)
    assert hooks() == before


HEADS = ("model", "clean", "corrupted", "metric")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"corrupted": None}, ArgumentError,
         "absent='resample' takes values from the corrupted run, got corrupted=None. Pass corr"),
        ({"heads": [4]}, ArgumentError, "heads: heads lie between 0 and 3, got head 4."),
        ({"heads": [(3, 0)]}, ArgumentError, "heads: layers lie between 0 and 2, got layer 3."),
        ({"heads": [(0, 1), (0, 1)]}, ArgumentError, r"named twice, \(0, 1\). Name each"),
        ({"heads": [(0, 1)], "layers": [0]}, ArgumentError, r"or pairs \(layer, head\). Pass"),
        ({"layers": []}, ArgumentError, "layers is an empty list. Name at least one, or leave"),
        ({"absent": "noise"}, ArgumentError, "heads: absent must be one of"),
        ({"metric": lambda logits: logits.mean()}, ShapeError, "must return one number for each"),
        ({"metric": lambda logits: torch.rand(len(logits))}, ArgumentError,
         "the metric gives different answers to the same logits"),
        ({"metric": lambda logits: logits[:, -1, 3] * torch.nan}, NonFiniteError,
         "the metric is NaN for prompt 0 of the clean run"),
        ({"metric": lambda logits: logits[:, -1, 3] * torch.inf}, NonFiniteError,
         "infinite for prompt 0 of the clean run, so that no difference can be taken"),
        ({"corrupted": CORRUPTED[:, :4]}, ShapeError, "clean has 6 tokens and corrupted 4"),
    ],
)  # fmt: skip
def test_messages(
    gpt2: nn.Module, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    given = {"model": gpt2, "clean": CLEAN, "corrupted": CORRUPTED, "metric": METRIC} | change
    wanted = [given.pop(name) for name in HEADS]
    with pytest.raises(error, match=message):
        parts.heads(*wanted, **given)


def test_messages_of_features_and_of_sites_that_are_not_there(gpt2: nn.Module) -> None:
    sae = Relu(24, 12).double()
    call = lambda sae, at, **more: parts.features(  # noqa: E731
        gpt2, sae, at, CLEAN, CORRUPTED, METRIC, **more
    )
    with pytest.raises(ShapeError, match=r"the autoencoder has d=8, but resid_pre.1 has d=24"):
        call(Relu(8, 12), "resid_pre.1")
    with pytest.raises(SiteError, match=r"no site 'resid_pre.7'; the model has resid_pre.0 ... r"):
        call(sae, "resid_pre.7")
    with pytest.raises(ArgumentError, match="2 sites, 1 autoencoders and 2 lists"):
        call([sae], ["resid_pre.1", "mlp_out.1"])
    with pytest.raises(ArgumentError, match=r"name at least one feature of resid_pre\.1, and e"):
        call(sae, "resid_pre.1", features=[1, 1])
    with pytest.raises(ArgumentError, match="n_features"):
        call(sae, "resid_pre.1", features=[12])
    with pytest.raises(ArgumentError, match=r"no feature of resid_pre\.1 changes when it is a"):
        parts.features(gpt2, sae, "resid_pre.1", CLEAN, CLEAN, METRIC)
    parallel = families.build("gpt_neox")
    with pytest.raises(SiteError, match="has no resid_mid: its attention and MLP run in parallel"):
        parts.features(parallel, sae, "resid_mid.1", CLEAN, CORRUPTED, METRIC)
