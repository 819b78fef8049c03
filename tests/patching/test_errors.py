"""Bad input: what it says, and that the model is afterwards as it was."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from microtome.errors import ArgumentError, BackendError, DtypeError, ShapeError, SiteError
from microtome.integrations.transformer_lens import HookedModel
from microtome.models import ToyModel
from microtome.ops import use_backend
from microtome.patching import ablate, logit_difference, sweep, sweep_features
from microtome.testing import families
from microtome.testing.patching import changed, untouched
from microtome.testing.plain import Plain

CORRUPTED = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
CLEAN = changed(CORRUPTED, (0, 1), (1, 3))
LAST = logit_difference(3, 4)


def fails(
    error: type[Exception],
    model: nn.Module | None = None,
    call: Callable[..., object] = sweep,
    **how,
) -> str:
    """The message; the model comes out without hooks and with its old logits."""
    model = ToyModel() if model is None else model
    training = [m.training for m in model.modules()]
    prompts = {"clean": CLEAN, "corrupted": CORRUPTED} if call is sweep else {"tokens": CLEAN}
    with pytest.raises(error) as caught:
        call(model, **{**prompts, "metric": LAST, "progress": False, **how})
    assert training == [m.training for m in model.modules()]
    untouched(model)
    return str(caught.value)


# Prompts


def test_prompts_have_to_correspond():
    assert fails(ShapeError, clean=CLEAN[:, :4]) == (
        "sweep: clean has 4 tokens and corrupted 5, but a position is patched by the same "
        "position. Make the prompts equally long, or pad both on the same side and pass "
        "attention_mask."
    )
    assert fails(ShapeError, clean=CLEAN[:1]) == (
        "sweep: 1 clean and 2 corrupted prompts. Pass one corrupted prompt for each clean one."
    )
    assert fails(DtypeError, clean=[1, 2]).startswith("sweep: tokens must be a tensor, got list.")
    assert fails(DtypeError, clean=CLEAN.float()) == (
        "sweep: tokens must be int64, got float32. Cast it with .to()."
    )
    assert fails(ArgumentError, clean=CLEAN + 300) == (
        "sweep: tokens must lie in [0, vocabulary=256), got 309."
    )
    assert fails(
        ShapeError, Plain(), clean=torch.zeros(2, 5, 3), corrupted=torch.zeros(2, 5, 3)
    ) == ("sweep: tokens must be [b, t], got shape [2, 5, 3].")


def test_a_mask_is_one_run_of_ones_for_each_prompt():
    hole = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 1, 1, 1]])
    assert fails(ArgumentError, attention_mask=hole) == (
        "sweep: attention_mask of prompt 1 must be one run of ones, with padding before or after "
        "it."
    )
    assert "prompt 0 must be one run" in fails(ArgumentError, attention_mask=0 * hole)
    assert "attention_mask must be [b, t] with t=5" in fails(ShapeError, attention_mask=hole[:, :4])
    assert "attention_mask must be [b, t] with b=2" in fails(
        ShapeError, Plain(), attention_mask=hole[:1]
    )


def test_padding_needs_a_model_that_takes_a_mask():
    left, right = torch.ones(2, 2, 5).long().unbind()
    left[0, 0] = right[1, 4] = 0
    message = (
        "sweep: {}.forward takes no attention_mask, so it cannot leave padding out. Pass prompts "
        "of one length without padding."
    )
    assert fails(ArgumentError, attention_mask=left) == message.format("ToyModel")
    assert fails(ArgumentError, Plain(), attention_mask=right) == message.format("Plain")
    # Padding after a prompt is out of sight in a causal model; a mask of ones masks nothing.
    sweep(ToyModel(), CLEAN, CORRUPTED, LAST, attention_mask=right, progress=False)
    ones = torch.ones(2, 5)
    sweep(Plain(), CLEAN, CORRUPTED, LAST, attention_mask=ones, engine="blocks", progress=False)


# Sites, axes and options


def test_a_site_that_the_model_lacks_is_named_with_those_it_has():
    assert fails(ArgumentError, site="resid") == (
        "sweep: site must be one of 'resid_pre', 'resid_mid', 'resid_post', 'attn_out', 'mlp_out', "
        "'q', 'k', 'v', 'z', 'pattern', 'neurons', got 'resid'."
    )
    assert fails(SiteError, Plain(), site="z") == (
        "sweep: Plain is no architecture with a known z; of its blocks, blocks, resid_pre and "
        "resid_post can be patched. Choose another site."
    )
    pytest.importorskip("transformers", reason="transformers is not installed")
    neox, small = families.build("gpt_neox"), {"clean": CLEAN, "corrupted": CORRUPTED}
    for engine in ("native", "auto"):
        assert fails(SiteError, neox, site="resid_mid", engine=engine, **small) == (
            "sweep: GPTNeoXForCausalLM has no resid_mid: its attention and MLP run in parallel, so "
            "no stream lies between them. Choose another site."
        )
    assert fails(SiteError, neox, site="resid_mid", engine="forwards", **small) == (
        "sweep: GPTNeoXForCausalLM has no resid_mid; it has resid_pre, resid_post, attn_out, "
        "mlp_out, q, k, v, pattern, z, neurons. Choose another site."
    )


def test_a_model_without_blocks_or_without_logits_is_told_what_to_do():
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(256, 8), nn.Linear(8, 256)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.embed(tokens))

    assert fails(SiteError, Flat()) == (
        "sweep: Flat has no blocks: no nn.ModuleList holds modules of one class. Keep the blocks "
        "in an nn.ModuleList, each mapping [b, t, d] to [b, t, d]."
    )
    pytest.importorskip("transformers", reason="transformers is not installed")
    headless = families.build("llama").model
    assert fails(ArgumentError, headless, engine="blocks") == (
        "sweep: LlamaModel returns a BaseModelOutputWithPast without logits. Pass a model with a "
        "language-model head."
    )
    assert "returns a BaseModelOutputWithPast without logits" in fails(ArgumentError, headless)


def test_axes_and_their_values_are_checked():
    assert fails(ArgumentError, axes=("position", "head")) == (
        "sweep: site 'resid_pre' is swept over one of: layer, position; layer. Got position, head."
    )
    assert fails(ArgumentError, site="z", axes=("head", "head")).endswith("Got head, head.")
    assert fails(ArgumentError, positions=[0, 5]) == (
        "sweep: positions of 'resid_pre' lie between 0 and 4, got 5."
    )
    assert fails(ArgumentError, layers=[]) == (
        "sweep: layers of 'resid_pre' lie between 0 and 3, none was given."
    )
    assert fails(ArgumentError, site="z", positions=[1]) == (
        "sweep: positions were chosen, but the axes are layer, head. Name 'position' in axes."
    )
    assert fails(ArgumentError, call=ablate, heads=[4]) == (
        "ablate: heads of 'z' lie between 0 and 3, got 4."
    )
    assert fails(ArgumentError, call=ablate, site="mlp_out", heads=[0]) == (
        "ablate: heads were chosen, but the axes are layer, position. Name 'head' in axes."
    )


def test_options_are_checked():
    assert fails(ArgumentError, direction="both") == (
        "sweep: direction must be one of 'denoise', 'noise', got 'both'."
    )
    assert fails(ArgumentError, engine="fast") == (
        "sweep: engine must be one of 'auto', 'native', 'blocks', 'forwards', got 'fast'."
    )
    assert fails(ArgumentError, precision="bf16") == (
        "sweep: precision must be one of 'fp32', 'delta-bf16', got 'bf16'."
    )
    assert fails(ArgumentError, memory=100) == (
        f"sweep: memory must be between 1048576 and {1 << 50}, got memory=100."
    )
    assert fails(ArgumentError, Plain(), engine="native") == (
        "sweep: engine 'native' cannot run this model: Plain is not one of the architectures that "
        "are read into parts. Use engine='auto'."
    )
    assert fails(ArgumentError, precision="delta-bf16", engine="blocks") == (
        "sweep: precision 'delta-bf16' needs the native engine, but engine 'blocks' was asked for. "
        "Use 'fp32'."
    )


def test_a_demanded_backend_that_cannot_run_is_no_reason_to_fall_back():
    with use_backend("triton"):
        assert "backend 'triton' was demanded but cannot run here" in fails(BackendError)


def test_an_ablation_says_what_it_cannot_use():
    def refused(**how: object) -> str:
        return fails(ArgumentError, call=ablate, **how)

    assert refused(value="median") == (
        "ablate: value must be one of 'zero', 'mean', 'mean-position', 'resample', got 'median'."
    )
    assert refused(op="multiply") == (
        "ablate: op must be one of 'replace', 'add', 'scale', got 'multiply'."
    )
    assert refused(op="add") == (
        "ablate: op 'add' needs something to add, got value='zero'. Pass another value."
    )
    assert refused(op="scale", value="mean") == (
        "ablate: op 'scale' takes no value, got 'mean'. Leave it out, or use 'add'."
    )
    assert refused(op="scale", value=torch.ones(64)).startswith(
        "ablate: op 'scale' takes no value, got a tensor."
    )
    assert refused(factor=2.0) == (
        "ablate: op 'replace' takes no factor, got 2.0. Use 'add' or 'scale'."
    )
    assert refused(tokens=CLEAN[:1], value="resample") == (
        "ablate: resampling needs another prompt to draw from, but there is one. Pass several "
        "prompts, or reference."
    )
    assert refused(value="mean", reference=CLEAN[:, :3]) == (
        "ablate: reference has 3 tokens a prompt and tokens 5. Make them equally long."
    )
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]])
    assert refused(value="resample", attention_mask=mask) == (
        "ablate: prompt 0 would be resampled from prompt 1 of `tokens`, which has padding where it "
        "has none. Pass reference, prompts without padding."
    )
    assert fails(ShapeError, call=ablate, value=torch.ones(7)) == (
        "ablate: value must be a vector of 64 numbers (or 16, one head), got shape [7]."
    )
    assert fails(ShapeError, call=ablate, site="mlp_out", value=torch.ones(2, 64)) == (
        "ablate: value must be a vector of 64 numbers, got shape [2, 64]."
    )


# Whatever happens, the model is as it was


class Stopped(Exception):
    pass


@pytest.mark.parametrize("engine", ["native", "blocks", "forwards"])
@pytest.mark.parametrize("site", ["resid_pre", "resid_mid", "z", "pattern"])
def test_after_an_exception_from_the_metric_the_model_is_as_it_was(engine, site):
    pytest.importorskip("transformers", reason="transformers is not installed")
    model = families.build("llama").train()
    with torch.no_grad():
        before = model(CLEAN).logits
    calls = 0

    def metric(logits: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise Stopped
        return logits[:, -1, 0]

    fails(Stopped, model, metric=metric, site=site, engine=engine)
    assert model.training
    with torch.no_grad():
        assert torch.equal(model(CLEAN).logits, before)


@pytest.mark.parametrize("engine", ["native", "blocks", "forwards"])
def test_after_an_exception_from_a_block_the_model_is_as_it_was(engine):
    """At any of its calls: while it is read, verified, captured or patched."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    model = families.build("llama")
    block = model.model.layers[1]
    calls, stop_at = 0, 0

    class Breaking(type(block)):
        def forward(self, *args: object, **kwargs: object) -> Tensor:
            nonlocal calls
            calls += 1
            if calls == stop_at:
                raise Stopped
            return super().forward(*args, **kwargs)

    block.__class__ = Breaking
    with torch.no_grad():
        before = model(CLEAN).logits
    calls = 0
    sweep(model, CLEAN, CORRUPTED, LAST, engine=engine, progress=False)
    for stop_at in range(1, calls + 1):
        with torch.no_grad():  # other weights, so that parts are read anew
            model.lm_head.weight[40, 0] += 1.0
        calls = 0
        fails(Stopped, model, engine=engine)
        stop_at = 0
    with torch.no_grad():
        model.lm_head.weight[40, 0] = 0.0
        after = model(CLEAN).logits
    assert torch.equal(after[..., :40], before[..., :40])


def test_a_forward_that_somebody_put_on_a_block_comes_back():
    toy = ToyModel()
    own = toy.h[0].forward
    calls = 0

    def counted(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return own(x)

    toy.h[0].forward = counted
    found = sweep(toy, CLEAN, CORRUPTED, LAST, engine="blocks", progress=False)
    assert found.engine == "blocks"
    assert toy.h[0].__dict__["forward"] is counted
    assert calls


# Arguments of another type


def test_arguments_of_another_type_are_named():
    assert fails(DtypeError, attention_mask=[[1] * 5] * 2) == (
        "sweep: attention_mask must be a tensor [b, t], got list."
    )
    assert fails(ArgumentError, layers=1) == (
        "sweep: layers must be a list of numbers, got 1. Pass [1]."
    )
    assert fails(ArgumentError, call=ablate, op="scale", factor="2") == (
        "ablate: factor must be a number or a list of numbers, got '2'."
    )
    assert fails(ShapeError, clean=CLEAN[:1], corrupted=CORRUPTED[:1], metric=lambda _: None) == (
        "<lambda>: the metric must return one number for each of 1 prompts, [1], got NoneType. Do "
        "not average over prompts; the sweep does."
    )
    with pytest.raises(DtypeError) as raised:
        sweep(HookedModel(ToyModel()), CLEAN, CORRUPTED, LAST)
    assert str(raised.value) == (
        "sweep: model must be a torch.nn.Module, got HookedModel. Its .model is one."
    )
    with pytest.raises(ArgumentError) as raised:
        sweep_features(ToyModel(), nn.Linear(2, 2), "resid_pre.1", CLEAN, CORRUPTED, LAST)
    assert str(raised.value) == (
        "sweep_features: sae must have encode(x) and W_dec [f, d], got Linear. See microtome.SAE."
    )


def test_one_axis_or_a_tensor_of_factors_will_do():
    toy, how = ToyModel(), {"progress": False}
    one, listed = (
        sweep(toy, CLEAN, CORRUPTED, LAST, "z", axes=a, **how) for a in ("head", ["head"])
    )
    assert torch.equal(one.scores, listed.scores)
    scaled = ablate(toy, CLEAN, LAST, op="scale", factor=torch.tensor([0.0, 1.0]), **how)
    assert scaled.values[-1] == (0.0, 1.0)
