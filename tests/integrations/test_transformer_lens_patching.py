"""Activation patching over plain models, against one forward for each cell."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from microtome.errors import ArgumentError
from microtome.integrations.transformer_lens import HookedModel, patching, rows
from microtome.integrations.transformer_lens.setters import stock_setter
from microtome.models import ToyConfig, ToyModel, capture, sites, splice
from microtome.testing import families

pytestmark = pytest.mark.usefixtures("one_thread")

GENERIC = importlib.import_module("microtome.integrations.transformer_lens.generic")

# Sweep -> activation, and the axes of the activation that the index entries after the layer pick.
SWEEPS = {
    "resid_pre": ("resid_pre", (1,)),
    "resid_mid": ("resid_mid", (1,)),
    "attn_out": ("attn_out", (1,)),
    "mlp_out": ("mlp_out", (1,)),
    "attn_head_out_all_pos": ("z", (2,)),
    "attn_head_q_all_pos": ("q", (2,)),
    "attn_head_k_all_pos": ("k", (2,)),
    "attn_head_v_all_pos": ("v", (2,)),
    "attn_head_out_by_pos": ("z", (1, 2)),
    "attn_head_q_by_pos": ("q", (1, 2)),
    "attn_head_k_by_pos": ("k", (1, 2)),
    "attn_head_v_by_pos": ("v", (1, 2)),
    "attn_head_pattern_all_pos": ("pattern", (1,)),
    "attn_head_pattern_by_pos": ("pattern", (1, 2)),
    "attn_head_pattern_dest_src_pos": ("pattern", (1, 2, 3)),
}


def metric(logits: Tensor) -> Tensor:
    """Reads several rows and positions, as no fast path for the last token could."""
    return (logits[:, -1, 3] - logits[:, -1, 5]).mean() + logits[0, 1, 2]


def pair(b: int = 2, t: int = 4) -> tuple[Tensor, Tensor]:
    both = families.tokens(2 * b, t)
    return both[:b], both[b:]


@pytest.fixture
def model() -> ToyModel:
    return ToyModel(ToyConfig(num_hidden_layers=2, hidden_size=16, vocab_size=50))


@pytest.fixture
def cache(model: ToyModel) -> Any:
    return HookedModel(model).run_with_cache(pair()[0])[1]


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "_said", True)


def cell_by_cell(
    plain: nn.Module, site: str, axes: Sequence[int], clean: Tensor, corrupted: Tensor
):
    """One spliced forward for each cell: what every sweep must agree with."""
    acts = capture(plain, [f"{site}.{layer}" for layer in range(families.LAYERS)], clean)
    sizes = [acts[f"{site}.0"].shape[axis] for axis in axes]
    scores = torch.zeros(families.LAYERS, *sizes)
    for cell in torch.cartesian_prod(*map(torch.arange, scores.shape)).tolist():
        name = f"{site}.{cell[0]}"
        where: list[Any] = [slice(None)] * acts[name].dim()
        for axis, i in zip(axes, cell[1:], strict=True):
            where[axis] = i

        def patch(act: Tensor, where=tuple(where), source=acts[name]) -> Tensor:
            act = act.clone()
            act[where] = source[where]
            return act

        with torch.no_grad(), splice(plain, name, patch):
            scores[tuple(cell)] = metric(plain(input_ids=corrupted, use_cache=False).logits)
    return scores


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("sweep", SWEEPS)
def test_every_sweep_agrees_with_one_forward_for_each_cell(family: str, sweep: str):
    site, axes = SWEEPS[sweep]
    plain = families.build(family)
    if f"{site}.0" not in sites(plain):
        pytest.skip(f"this model has no site {site!r}")
    clean, corrupted = pair(t=3)
    _, cache = HookedModel(plain).run_with_cache(clean, names_filter=lambda n: True)
    function = getattr(patching, f"get_act_patch_{sweep}")
    found = function(plain, corrupted, cache, metric, progress=False)
    torch.testing.assert_close(
        found, cell_by_cell(plain, site, axes, clean, corrupted), rtol=1e-5, atol=1e-5
    )
    assert found.std() > 0


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
def test_a_direct_path_lets_one_head_alone_read_the_write_of_another(family: str):
    plain = families.build(family)
    if "v.0" not in sites(plain):
        pytest.skip("this model has no site 'v'")
    clean, corrupted = pair(t=3)
    cleans, corrupts = (HookedModel(plain).run_with_cache(ids)[1] for ids in (clean, corrupted))
    found = patching.get_act_patch_direct_path(
        plain, corrupted, cleans, corrupts, metric, 0, 1, "v", verbose=False
    )
    write = {"gpt2": "transformer.h.0.attn.c_proj", "gpt_neox": "gpt_neox.layers.0.attention.dense"}
    project = plain.get_submodule(write[family])
    before, after = corrupts["z", 0], corrupts["z", 0].clone()
    after[:, :, 1] = cleans["z", 0][:, :, 1]
    with torch.no_grad():
        delta = project(after.flatten(-2)) - project(before.flatten(-2))
        for layer in (1, 2):
            with splice(plain, f"resid_pre.{layer}", lambda x: x + delta):
                moved = capture(plain, f"v.{layer}", corrupted)[f"v.{layer}"]
            for head in range(families.HEADS):

                def patch(act: Tensor, head: int = head, moved: Tensor = moved) -> Tensor:
                    act = act.clone()
                    act[:, :, head] = moved[:, :, head]
                    return act

                with splice(plain, f"v.{layer}", patch):
                    expected = metric(plain(input_ids=corrupted, use_cache=False).logits)
                torch.testing.assert_close(found[layer, head], expected, rtol=1e-5, atol=1e-5)
    assert not found[0].any()
    assert found[1:].std() > 1e-3


@pytest.mark.parametrize("family", ["gemma2", "bert"])
def test_a_direct_path_through_a_norm_is_refused(family: str):
    plain = HookedModel(families.build(family))
    clean, corrupted = pair()
    cleans, corrupts = (plain.run_with_cache(ids)[1] for ids in (clean, corrupted))
    with pytest.raises(
        ArgumentError, match=r"normalises what attention adds to the stream, so a h"
    ):
        patching.get_act_patch_direct_path(plain, corrupted, cleans, corrupts, metric, 0, 1)


def test_sweeps_stack_into_one_tensor_per_kind(model: ToyModel, cache: Any):
    _, corrupted = pair()
    given = (model, corrupted, cache, metric)
    block = patching.get_act_patch_block_every(*given, progress=False)
    for i, name in enumerate(("resid_pre", "attn_out", "mlp_out")):
        one = getattr(patching, f"get_act_patch_{name}")(*given, progress=False)
        assert torch.equal(block[i], one)
    typed = patching.get_act_patch_block_every(*given, progress=False, baseline=True)
    assert torch.equal(typed.values, block)
    assert typed.axis_names == ("patch_type", "layer", "pos")
    assert typed.patch_type_names == ("resid_pre", "attn_out", "mlp_out")
    assert len(typed.cells) == block.numel()
    assert typed.baseline.shape == ()


def test_patching_a_run_into_itself_changes_nothing(model: ToyModel, cache: Any):
    clean, _ = pair()
    scores = patching.get_act_patch_block_every(model, clean, cache, metric, progress=False)
    base = metric(model(clean).logits).detach()
    torch.testing.assert_close(scores, base.expand_as(scores))


def test_how_many_cells_share_a_forward_does_not_matter(model: ToyModel, cache: Any):
    _, corrupted = pair()
    one, some, all_ = (
        patching.get_act_patch_attn_head_out_by_pos(
            model, corrupted, cache, metric, progress=False, cells_per_forward=n
        )
        for n in (1, 5, None)
    )
    torch.testing.assert_close(one, some, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(one, all_, rtol=1e-5, atol=1e-6)


def test_an_unknown_setter_runs_row_batched_and_says_so_once(
    model: ToyModel, cache: Any, monkeypatch: pytest.MonkeyPatch
):
    seen: list[tuple[int, ...]] = []

    def halfway(act: Tensor, index: Sequence[int], clean: Tensor) -> Tensor:
        layer, pos = index
        seen.append((layer, pos, *act.shape))
        assert clean.shape == act.shape
        mixed = act.clone()
        mixed[:, pos] = 0.5 * (act[:, pos] + clean[:, pos])
        return mixed

    _, corrupted = pair()
    monkeypatch.setattr(rows, "_said", False)
    given = (model, corrupted, cache, metric, halfway, "mlp_out", ("layer", "pos"))
    with pytest.warns(UserWarning, match="setter 'halfway' is no stock one: this sweep") as said:
        scores = patching.generic_activation_patch(*given, progress=False)
    assert said[0].filename == __file__
    again = patching.generic_activation_patch(*given, progress=False)  # warnings are errors here
    assert torch.equal(scores, again)
    assert seen[:8] == [(layer, pos, 2, 4, 16) for layer in range(2) for pos in range(4)]
    for layer in range(2):
        for pos in range(4):
            patch = [
                (
                    f"mlp_out.{layer}",
                    lambda a, hook, c=(layer, pos): halfway(a, c, cache[hook.name]),
                )
            ]
            alone = HookedModel(model).run_with_hooks(corrupted, fwd_hooks=patch)
            torch.testing.assert_close(scores[layer, pos], metric(alone).detach())


@pytest.mark.usefixtures("quiet")
def test_a_setter_that_returns_nothing_may_have_written_in_place(model: ToyModel, cache: Any):
    def in_place(act: Tensor, index: Sequence[int], clean: Tensor) -> None:
        act[:, index[1]] = clean[:, index[1]]

    _, corrupted = pair()
    found = patching.generic_activation_patch(
        model, corrupted, cache, metric, in_place, "resid_pre", ("layer", "pos"), progress=False
    )
    stock = patching.get_act_patch_resid_pre(model, corrupted, cache, metric, progress=False)
    torch.testing.assert_close(found, stock)  # the stock one runs natively: another rounding


def test_the_fast_path_is_asked_for_stock_setters_and_its_scores_are_taken(
    model: ToyModel, cache: Any, monkeypatch: pytest.MonkeyPatch
):
    asked = []

    def fast(request: Any, *, progress: bool) -> Tensor:
        assert progress
        asked.append(request)
        return torch.arange(float(len(request.cells)))[:, None]

    monkeypatch.setattr(GENERIC, "try_fast", fast)
    _, corrupted = pair()
    found = patching.get_act_patch_attn_head_out_all_pos(model, corrupted, cache, metric)
    assert torch.equal(found, torch.arange(8.0).view(2, 4))
    (request,) = asked
    assert request.model.model is model
    assert request.metric is metric
    assert request.activation == "z"
    assert request.cells[5] == (1, 1)
    assert request.stock.where((1, 3)) == (slice(None), slice(None), 3)
    assert request.hooks == {0: "blocks.0.attn.hook_z", 1: "blocks.1.attn.hook_z"}
    assert request.clean["blocks.1.attn.hook_z"].shape == (2, 4, 4, 4)


def test_only_the_stock_setters_are_taken_for_stock():
    assert stock_setter(patching.layer_head_vector_patch_setter).axes == (("head", 2),)

    def layer_pos_patch_setter(act, index, clean):
        return act

    assert stock_setter(layer_pos_patch_setter) is None
    layer_pos_patch_setter.__module__ = "transformer_lens.patching"
    assert stock_setter(layer_pos_patch_setter).axes == (("pos", 1),)


def test_the_model_is_left_as_it_was_also_after_an_exception(model: ToyModel, cache: Any):
    _, corrupted = pair()
    model.train()
    model.h[1].eval()

    def fail(logits: Tensor) -> Tensor:
        assert not model.h[0].training
        assert not logits.requires_grad
        msg = "no metric"
        raise RuntimeError(msg)

    with pytest.raises(RuntimeError, match="no metric"):
        patching.get_act_patch_resid_mid(model, corrupted, cache, fail, progress=False)
    assert [block.training for block in model.h] == [True, False]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
