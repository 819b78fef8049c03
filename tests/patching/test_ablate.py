"""Ablations against the naive sweep: zeros, means, other prompts, given vectors, sums, scales."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from microtome.models import capture
from microtome.patching import Sweep, ablate, logit_difference
from microtome.patching.naive import Write, naive_sweep
from microtome.testing import families
from microtome.testing.patching import apart, everything, naive_twin

pytest.importorskip("transformers", reason="transformers is not installed")

TOKENS = families.tokens(2, 5)
OTHERS = families.tokens(5, 5)[2:]
ENGINES = ("native", "blocks")
# site, axes: with and without positions, heads, neurons
GRIDS = (
    ("resid_mid", ("layer", "position")),
    ("resid_post", ("layer",)),
    ("z", ("layer", "head")),
    ("v", ("layer", "position", "head")),
    ("neurons", ("layer", "position")),
)


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    return families.in_float64("llama")


def run(model: nn.Module, site: str, axes: tuple[str, ...], **how: object) -> Sweep:
    return ablate(
        model, how.pop("tokens", TOKENS), everything, site, axes=axes, progress=False, **how
    )


def with_values(
    model: nn.Module, found: Sweep, value: Callable[[str], Tensor], op: str = "replace", **write
) -> Tensor:
    """The naive twin where each site's value is a vector [h, d_head] or [d]."""
    cells = []
    for cell in itertools.product(*found.values):
        at = dict(zip(found.axes, cell, strict=True))
        name = f"{found.site}.{at['layer']}"
        v = value(name)
        v = v[at["head"]] if "head" in at else v
        cells.append([Write(name, at.get("position"), at.get("head"), op=op, value=v, **write)])
    scores = naive_sweep(model, TOKENS, None, everything, cells)
    return scores.unflatten(0, [len(v) for v in found.values])


@pytest.mark.parametrize("engine", ENGINES)
def test_zeros(llama, engine):
    for site, axes in (*GRIDS, ("pattern", ("layer", "head")), ("mlp_out", ("layer", "position"))):
        found = run(llama, site, axes, engine=engine)
        assert apart(found, naive_twin(llama, found, TOKENS, None, everything, op="zero")) < 1e-9
        assert found.base == "clean"
        assert found.corrupted.numel() == 0
        assert torch.equal(found.unpatched, found.clean)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("op", ["replace", "add"])
def test_the_mean_over_all_positions(llama, engine, op):
    factor = {"factor": -0.7} if op == "add" else {}
    for reference in (None, OTHERS):
        prompts = TOKENS if reference is None else reference
        for site, axes in GRIDS:
            how = {"value": "mean", "reference": reference, "op": op, "engine": engine}
            found = run(llama, site, axes, **how, **factor)

            def mean(name: str, prompts: Tensor = prompts) -> Tensor:
                return capture(llama, name, prompts)[name].mean((0, 1))

            assert apart(found, with_values(llama, found, mean, op, **factor)) < 1e-9, site


@pytest.mark.parametrize("engine", ENGINES)
def test_the_mean_over_prompts_at_the_same_position(llama, engine):
    for site, axes in GRIDS:
        found = run(llama, site, axes, value="mean-position", reference=OTHERS[:2], engine=engine)
        wanted = naive_twin(llama, found, TOKENS, OTHERS[:2], everything, op="mean")
        assert apart(found, wanted) < 1e-9, site
        found = run(llama, site, axes, value="mean-position", engine=engine)
        assert apart(found, naive_twin(llama, found, TOKENS, TOKENS, everything, op="mean")) < 1e-9


@pytest.mark.parametrize("engine", ENGINES)
def test_resampling_takes_another_prompt(llama, engine):
    for site, axes in GRIDS:
        found = run(llama, site, axes, value="resample", engine=engine)
        # Of two prompts the other one is the only one to draw.
        assert apart(found, naive_twin(llama, found, TOKENS, TOKENS.flip(0), everything)) < 1e-9
        found = run(llama, site, axes, value="resample", reference=OTHERS[:1], engine=engine)
        source = OTHERS[:1].expand(2, -1)
        assert apart(found, naive_twin(llama, found, TOKENS, source, everything)) < 1e-9


def test_resampling_depends_on_the_seed_alone_and_never_draws_the_prompt_itself(llama):
    tokens = families.tokens(4, 5)
    axes = ("layer",)
    first, again = (
        run(llama, "resid_pre", axes, tokens=tokens, value="resample") for _ in range(2)
    )
    assert torch.equal(first.by_prompt, again.by_prompt)
    drawn = set()
    for seed in range(8):
        found = run(llama, "resid_pre", axes, tokens=tokens, value="resample", seed=seed)
        # The whole first stream of another prompt gives that prompt's metric.
        near = (found.by_prompt[0][:, None] - found.clean).abs()
        partner = near.argmin(1)
        assert float(near.amin(1).max()) < 1e-9
        assert (partner != torch.arange(4)).all()
        drawn.add(tuple(partner.tolist()))
    assert len(drawn) > 3


@pytest.mark.parametrize("engine", ENGINES)
def test_scaling_and_given_vectors(llama, engine):
    for site, axes in GRIDS:
        found = run(llama, site, axes, op="scale", factor=0.3, engine=engine)
        wanted = naive_twin(llama, found, TOKENS, None, everything, op="scale", factor=0.3)
        assert apart(found, wanted) < 1e-9, site
        shape = capture(llama, f"{site}.0", TOKENS)[f"{site}.0"].shape[2:]
        value = torch.linspace(-1, 1, shape.numel(), dtype=torch.float64)
        shaped = value.view(shape)
        for op, factor in (("replace", 1.0), ("add", 0.1)):
            found = run(llama, site, axes, value=value, op=op, factor=factor, engine=engine)
            wanted = with_values(llama, found, lambda _, v=shaped: v, op, factor=factor)
            assert apart(found, wanted) < 1e-9, (site, op)


def test_a_vector_as_wide_as_one_head_goes_to_each_head(llama):
    value = torch.linspace(-1, 1, 8, dtype=torch.float64)
    for axes in (("layer",), ("layer", "head"), ("layer", "position")):
        found = run(llama, "z", axes, value=value)
        assert apart(found, with_values(llama, found, lambda _: value.expand(4, 8))) < 1e-9


def test_chosen_neurons_are_taken_out_one_at_a_time(llama):
    found = ablate(
        llama, TOKENS, logit_difference(3, 4), "neurons", neurons=[1, 39], progress=False
    )
    assert found.axes == ("layer", "neuron")
    twin = naive_twin(
        llama, found, TOKENS, None, lambda x: x[:, -1, 3] - x[:, -1, 4], op="zero"
    )  # fmt: skip
    assert apart(found, twin) < 1e-9


@pytest.mark.parametrize("engine", ENGINES)
def test_means_leave_padding_out(llama, engine):
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]])

    def counted(logits: Tensor) -> Tensor:
        return torch.where(mask[..., None] == 1, logits, 0.0).square().sum((1, 2))

    changed = torch.where(mask == 1, TOKENS, TOKENS + 1)
    for value in ("mean", "mean-position"):
        one, other = (
            ablate(
                llama, tokens, counted, "z", value=value, axes=("layer", "position"),
                attention_mask=mask, engine=engine, progress=False,
            )
            for tokens in (TOKENS, changed)
        )  # fmt: skip
        torch.testing.assert_close(one.by_prompt, other.by_prompt, rtol=1e-9, atol=1e-9)
    # Where one prompt counts alone, the mean over prompts is its own activation.
    assert one.written[:, [0, 1, 4]].sum() == 0
    assert (one.written[:, 2] == 2).all()


def test_reference_prompts_are_whole_however_many_there_are(llama):
    mask = torch.tensor([[0, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    how = {"value": "mean", "attention_mask": mask}

    def last(logits: Tensor) -> Tensor:
        return logits[:, -1, 3]

    for engine in ENGINES:
        twice = torch.cat((OTHERS[:2], OTHERS[:2]))  # the same mean from another number of prompts
        two, four = (
            ablate(llama, TOKENS, last, reference=r, engine=engine, progress=False, **how)
            for r in (OTHERS[:2], twice)
        )
        torch.testing.assert_close(two.by_prompt, four.by_prompt, rtol=1e-9, atol=1e-9)


def test_an_addition_that_changes_no_bit_is_no_write(llama):
    found = run(llama, "z", ("layer", "position"), value=torch.zeros(32), op="add")
    assert not found.written.any()
    assert torch.equal(found.by_prompt, found.clean.expand_as(found.by_prompt))
    assert not run(llama, "z", ("layer", "head"), op="scale", factor=1.0).written.any()


@pytest.mark.parametrize("value", ["mean", "mean-position", "resample"])
def test_no_head_is_made_to_attend_to_padding(llama, value):
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]])
    how = {"value": value, "reference": OTHERS, "attention_mask": mask, "progress": False}
    runs = [
        ablate(llama, TOKENS, logit_difference(11, 12), "pattern", engine=engine, **how)
        for engine in ("native", "blocks", "forwards")
    ]
    for other in runs[1:]:
        torch.testing.assert_close(other.by_prompt, runs[0].by_prompt, rtol=1e-9, atol=1e-9)
