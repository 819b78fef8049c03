"""Attributions: against exact patches, finite differences, gradients by hand and path integrals."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn

from microtome.models import ToyConfig, ToyModel, capture, splice
from microtome.models.capture import call
from microtome.patching import attribute, faithfulness, kl_divergence, logit_difference, sweep
from microtome.patching.cells import AXES
from microtome.patching.naive import Write, naive_sweep
from microtome.testing import families

CLEAN = torch.tensor([[7, 1, 2, 3, 4, 5, 6, 9], [8, 6, 5, 4, 3, 2, 1, 9]])
CORRUPTED = CLEAN.clone()
CORRUPTED[0, 3], CORRUPTED[1, 1] = 40, 41
METRIC = logit_difference([11, 12], [13, 14])
BY_UNIT = ("position", "head"), ("position", "neuron"), ("position",)


@dataclass
class Output:
    logits: Tensor


class _Block(nn.Module):
    """Adds a linear map of the stream and of the mean of what came before."""

    def __init__(self, d: int, in_place: bool) -> None:
        super().__init__()
        self.own, self.past, self.in_place = nn.Linear(d, d), nn.Linear(d, d), in_place

    def forward(self, x: Tensor) -> Tensor:
        seen = x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]
        added = self.own(x) + self.past(seen)
        return x.add_(added) if self.in_place else x + added


class Linear(nn.Module):
    """A model in which every effect is linear, so that attributions are exact."""

    def __init__(self, in_place: bool = False) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.embed = nn.Embedding(50, 12)
            self.blocks = nn.ModuleList(_Block(12, in_place) for _ in range(3))
            self.head = nn.Linear(12, 50)

    def forward(self, ids: Tensor) -> Output:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return Output(self.head(x))


def toy(**sizes: int) -> ToyModel:
    small = {"vocab_size": 64, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3}
    return ToyModel(ToyConfig(**{**small, **sizes}))


def unit_axes(site: str) -> tuple[str, ...]:
    """The finest axes without the source position."""
    return next(axes for axes in BY_UNIT if axes in AXES[site])


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize("site", ["resid_pre", "resid_post"])
def test_it_is_exact_where_the_model_is_linear(site: str, direction: str, in_place: bool) -> None:
    model = Linear(in_place)
    got = attribute(model, CLEAN, CORRUPTED, METRIC, site, direction=direction, progress=False)
    exact = sweep(
        Linear(), CLEAN, CORRUPTED, METRIC, site, direction=direction, engine="forwards",
        progress=False,
    )  # fmt: skip
    torch.testing.assert_close(got.by_prompt.float(), exact.by_prompt, rtol=0, atol=1e-5)
    torch.testing.assert_close(got.scores.float(), exact.scores, rtol=0, atol=1e-5)
    assert torch.equal(got.written, exact.written)
    for mine, other in ((got.clean, exact.clean), (got.corrupted, exact.corrupted)):
        torch.testing.assert_close(mine.float(), other)
    found = got.against(exact)
    assert min(found.pearson, found.spearman, found.overlap) > 0.999
    assert found.max_error < 1e-5


def test_it_is_exact_where_only_a_linear_map_follows() -> None:
    model = toy()
    model.ln_f = nn.Identity()
    got = attribute(model, CLEAN, CORRUPTED, METRIC, "resid_post", layers=[2], progress=False)
    exact = sweep(
        model, CLEAN, CORRUPTED, METRIC, "resid_post", layers=[2], engine="forwards", progress=False
    )
    torch.testing.assert_close(got.by_prompt.float(), exact.by_prompt, rtol=0, atol=1e-5)
    assert float(exact.effect().abs().max()) > 0.1


FAMILIES = ("gpt2", "llama", "gemma2", "gemma3", "qwen3", "gpt_neox", "gpt_neox_sequential", "bert")


@pytest.mark.parametrize("name", FAMILIES)
def test_every_site_of_every_family_is_what_a_small_step_says(name: str) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    model = families.build(name).double()
    clean, corrupted = families.tokens(2, 6), families.tokens(2, 6)
    corrupted[:, 2] = torch.tensor([5, 9])
    step = 0.02  # as small as norms and softmaxes in float32 allow; the formula is of fourth order
    for site in [site for site in AXES if (name, site) != ("gpt_neox", "resid_mid")]:
        axes = ("layer", *unit_axes(site))
        got = attribute(model, clean, corrupted, METRIC, site, axes=axes, progress=False)
        effect = (got.by_prompt - got.unpatched)[1]  # of layer 1: [positions, units, b]
        largest = effect.sum(-1).abs().flatten().argmax()
        position, *unit = (int(i) for i in torch.unravel_index(largest, effect.shape[:-1]))
        here, there = (capture(model, f"{site}.1", run)[f"{site}.1"] for run in (corrupted, clean))
        change = (there - here).transpose(1, 2) if site == "pattern" else there - here
        change = change[(slice(None), position, *unit)]  # of the cell
        name_of_unit = "units" if site == "neurons" else "heads"
        write = Write(
            f"{site}.1", positions=position, op="add", value=change,
            **dict.fromkeys([name_of_unit] if unit else [], unit[0] if unit else None),
        )  # fmt: skip
        cells = [[replace(write, factor=step * n)] for n in (1, -1, 2, -2)]
        up, down, up2, down2 = naive_sweep(model, corrupted, None, measure, cells)
        slope = (8 * (up - down) - (up2 - down2)) / (12 * step)
        torch.testing.assert_close(effect[(position, *unit)], slope, rtol=3e-3, atol=1e-5)


def measure(logits: Tensor) -> Tensor:
    """METRIC by hand."""
    rows = torch.arange(2)
    return logits[rows, -1, [11, 12]] - logits[rows, -1, [13, 14]]


def test_it_is_the_gradient_that_hooks_give_by_hand() -> None:
    model = toy()
    kept: dict[str, Tensor] = {}

    def keep(name: str):
        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            kept[name] = args[0] if name.startswith(("resid", "z", "neurons")) else output
            kept[name].retain_grad()

        return hook

    for layer, block in enumerate(model.h):
        block.register_forward_hook(keep(f"resid_pre.{layer}"))
        block.attn.c_attn.register_forward_hook(keep(f"qkv.{layer}"))
        block.attn.c_proj.register_forward_hook(keep(f"z.{layer}"))
        block.mlp[2].register_forward_hook(keep(f"neurons.{layer}"))
    measure(model(CLEAN).logits)
    clean = dict(kept)
    measure(model(CORRUPTED).logits).sum().backward()
    by_hand = {n: ((clean[n] - kept[n]) * kept[n].grad).detach() for n in kept}
    for block in model.h:
        for module in block.modules():
            module._forward_hooks.clear()

    def layers(name: str) -> Tensor:  # [layers, b, t, w]
        return torch.stack([by_hand[f"{name}.{layer}"] for layer in range(3)])

    def heads(x: Tensor) -> Tensor:  # [layers, b, t, heads]
        return x.unflatten(-1, (3, 8)).sum(-1)

    expected = {
        "resid_pre": layers("resid_pre").sum(-1).transpose(1, 2),
        "z": heads(layers("z")).sum(2).transpose(1, 2),
        "q": heads(layers("qkv")[..., :24]).sum(2).transpose(1, 2),
        "v": heads(layers("qkv")[..., 48:]).sum(2).transpose(1, 2),
        "neurons": layers("neurons").sum(2).transpose(1, 2),
    }
    for site, right in expected.items():
        got = attribute(model, CLEAN, CORRUPTED, METRIC, site, progress=False)
        effect = (got.by_prompt - got.unpatched).float()
        torch.testing.assert_close(effect, right, rtol=1e-4, atol=1e-6, msg=site)


def test_axes_restrict_and_order_the_same_numbers() -> None:
    model = toy()
    run = lambda site, **how: attribute(  # noqa: E731
        model, CLEAN, CORRUPTED, METRIC, site, progress=False, **how
    )
    whole = run("z", axes=("layer", "position", "head"))
    part = run("z", axes=("head", "position"), layers=[2, 1], heads=[1, 0], positions=[7, 3, 5])
    assert part.axes == ("layer", "head", "position")
    assert part.values == ((2, 1), (1, 0), (7, 3, 5))
    picked = whole.by_prompt[[2, 1]][:, [7, 3, 5]][:, :, [1, 0]].transpose(1, 2)
    torch.testing.assert_close(part.by_prompt, picked)
    assert torch.equal(part.written, whole.written[[2, 1]][:, [7, 3, 5]][:, :, [1, 0]].mT)
    by_head, alone = run("z"), run("z", axes=("layer",))
    torch.testing.assert_close(by_head.effect(), whole.effect().sum(1))
    torch.testing.assert_close(alone.effect(), whole.effect().sum((1, 2)))
    entries = run("pattern", axes=("layer", "head", "position", "source"))
    torch.testing.assert_close(run("pattern").effect(), entries.effect().sum((2, 3)))
    later = torch.ones(8, 8).triu(1).bool()
    assert not entries.written[..., later].any()
    assert not entries.effect()[..., later].any()
    columns = run("neurons", axes=("layer", "position", "neuron"))
    torch.testing.assert_close(run("neurons").effect(), columns.effect().sum(1))


@pytest.mark.parametrize("site", AXES)
def test_what_is_written_is_what_a_sweep_writes(site: str) -> None:
    model = toy()
    got = attribute(model, CLEAN, CORRUPTED, METRIC, site, progress=False)
    exact = sweep(model, CLEAN, CORRUPTED, METRIC, site, progress=False)
    assert torch.equal(got.written, exact.written)
    assert not got.effect()[got.written == 0].any()
    assert (got.base, got.values, got.axes) == (exact.base, exact.values, exact.axes)


def test_many_steps_add_up_to_the_whole_difference_at_every_layer() -> None:
    model = toy()
    got = attribute(model, CLEAN, CORRUPTED, METRIC, steps=48, progress=False)
    whole = (got.clean - got.corrupted).expand(3, 2)
    summed = (got.by_prompt - got.unpatched).sum(1)
    torch.testing.assert_close(summed, whole, rtol=0, atol=1e-3)
    one = attribute(model, CLEAN, CORRUPTED, METRIC, progress=False)
    assert float(((one.by_prompt - one.unpatched).sum(1) - whole).abs().max()) > 0.05


@pytest.mark.parametrize("site", ["z", "q", "pattern", "resid_mid", "neurons"])
def test_many_steps_add_up_to_the_patch_of_the_whole_site(site: str) -> None:
    model = toy()
    got = attribute(model, CLEAN, CORRUPTED, METRIC, site, steps=48, progress=False)
    exact = sweep(model, CLEAN, CORRUPTED, METRIC, site, axes=("layer",), progress=False)
    summed = got.effect().flatten(1).sum(1)
    torch.testing.assert_close(summed.float(), exact.effect(), rtol=0, atol=1e-3)


def test_two_steps_are_the_mean_of_two_gradients_on_the_line() -> None:
    model = toy()
    got = attribute(model, CLEAN, CORRUPTED, METRIC, "z", layers=[1], steps=2, progress=False)
    clean, corrupted = (capture(model, "z.1", run)["z.1"] for run in (CLEAN, CORRUPTED))
    expected = torch.zeros(3, 2)
    for part in (0.25, 0.75):
        point = (corrupted + part * (clean - corrupted)).requires_grad_()
        with splice(model, "z.1", lambda _, point=point: point):
            value = measure(call(model, CORRUPTED, None).logits).sum()
        (grad,) = torch.autograd.grad(value, point)
        expected += ((clean - corrupted) * grad).sum((1, 3)).T / 2  # [heads, b]
    torch.testing.assert_close((got.by_prompt - got.unpatched)[0].float(), expected)


def test_steps_in_several_batches_give_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    model, how = toy(), {"steps": 5, "progress": False}
    together = attribute(model, CLEAN, CORRUPTED, METRIC, "k", **how)
    monkeypatch.setattr("microtome.patching.passes.TOKENS", 2 * CLEAN.numel())
    apart, again = (attribute(model, CLEAN, CORRUPTED, METRIC, "k", **how) for _ in range(2))
    torch.testing.assert_close(apart.scores, together.scores)
    assert torch.equal(apart.scores, again.scores)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("site", ["resid_pre", "z", "pattern"])
def test_padding_on_either_side_changes_nothing(site: str, steps: int) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    model = families.build("llama")
    clean, corrupted = families.tokens(2, 6), families.tokens(2, 6)
    corrupted[:, 2] = torch.tensor([5, 9])
    axes = ("layer", *unit_axes(site)) if site != "pattern" else ("layer", "head")
    run = lambda *prompts, **how: attribute(  # noqa: E731
        model, *prompts, logit_difference(11, 13), site, axes=axes, steps=steps, progress=False,
        **how,
    )  # fmt: skip
    plain = run(clean, corrupted)
    pad = torch.zeros(2).long()
    rows = [
        torch.stack([torch.cat((pad, x[0])), torch.cat((x[1], pad))]) for x in (clean, corrupted)
    ]
    padded = run(*rows, attention_mask=(rows[0] != 0).long())
    torch.testing.assert_close(padded.unpatched, plain.unpatched, rtol=1e-4, atol=1e-5)
    effect, right = ((x.by_prompt - x.unpatched) for x in (padded, plain))
    if "position" in axes:
        assert not effect[:, :2, ..., 0].any()
        assert not effect[:, 6:, ..., 1].any()
        effect = torch.stack((effect[:, 2:, ..., 0], effect[:, :6, ..., 1]), -1)
    torch.testing.assert_close(effect, right, rtol=1e-3, atol=1e-5)


def test_a_callable_metric_and_a_reference_run_are_differentiated_too() -> None:
    model = toy()
    built_in = attribute(model, CLEAN, CORRUPTED, METRIC, progress=False)
    own = attribute(model, CLEAN, CORRUPTED, measure, progress=False)
    torch.testing.assert_close(own.by_prompt, built_in.by_prompt)
    assert own.metric == "measure"
    found = attribute(model, CLEAN, CORRUPTED, kl_divergence("clean"), progress=False)
    assert float(found.clean.abs().max()) < 1e-6
    exact = sweep(model, CLEAN, CORRUPTED, kl_divergence("clean"), progress=False)
    assert found.against(exact).pearson > 0.7
    # Against its own run the gradient starts at zero, and a line sees what follows.
    metric = kl_divergence("corrupted")
    along = attribute(model, CLEAN, CORRUPTED, metric, steps=24, progress=False)
    whole = sweep(model, CLEAN, CORRUPTED, metric, axes=("layer",), progress=False)
    torch.testing.assert_close(along.effect().sum(1).float(), whole.effect(), rtol=0, atol=1e-3)


def test_a_check_is_the_exact_sweep_of_some_cells() -> None:
    model = toy()
    how = {"axes": ("layer", "position", "head"), "progress": False}
    exact = sweep(model, CLEAN, CORRUPTED, METRIC, "z", **how)
    everything = attribute(model, CLEAN, CORRUPTED, METRIC, "z", check=500, **how)
    assert everything.check is not None
    full = everything.against(exact)
    assert everything.check.cells == full.cells == int((exact.written > 0).sum())
    assert everything.check.pearson == pytest.approx(full.pearson, abs=1e-5)
    assert everything.check.max_error == pytest.approx(full.max_error, abs=1e-5)
    some = attribute(model, CLEAN, CORRUPTED, METRIC, "z", check=4, **how).check
    assert some is not None
    assert (some.cells, some.k) == (8, 4)
    for cell in some.worst:
        at = (cell["layer"], cell["position"], cell["head"])
        assert cell["exact"] == pytest.approx(float(exact.effect()[at]), abs=1e-5)
        assert cell["estimate"] == pytest.approx(float(everything.effect()[at]), abs=1e-6)
    assert attribute(model, CLEAN, CORRUPTED, METRIC, "z", check=4, **how).check == some
    other = attribute(model, CLEAN, CORRUPTED, METRIC, "z", check=4, seed=1, **how).check
    assert other != some


def test_the_estimate_is_compared_with_the_sweep_it_stands_for() -> None:
    model = toy()
    got = attribute(model, CLEAN, CORRUPTED, METRIC, "v", progress=False)
    exact = sweep(model, CLEAN, CORRUPTED, METRIC, "v", progress=False)
    assert got.against(exact, k=3) == faithfulness(got, exact, k=3)
    assert got.against(exact).pearson > 0.9
