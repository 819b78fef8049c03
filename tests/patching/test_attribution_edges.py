"""attribute leaves a model as it was, runs it as often as it says, and names what it cannot do."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from microtome import errors
from microtome.models import ToyConfig, ToyModel
from microtome.models.pattern import is_watched
from microtome.patching import attribute, kl_divergence, log_probability, logit_difference
from microtome.testing import families

CLEAN = torch.tensor([[7, 1, 2, 3, 4, 5]])
CORRUPTED = torch.tensor([[7, 1, 2, 40, 4, 5]])
METRIC = logit_difference(11, 13)


def toy() -> ToyModel:
    return ToyModel(
        ToyConfig(vocab_size=64, hidden_size=24, num_hidden_layers=3, num_attention_heads=3)
    )


def run(model: nn.Module, **change: Any):
    given = {"clean": CLEAN, "corrupted": CORRUPTED, "metric": METRIC, "progress": False}
    return attribute(model, **{**given, **change})


def state(model: nn.Module) -> list[object]:
    """What a call may not change, save the parameters themselves."""
    hooks = [
        (
            len(m._forward_hooks),
            len(m._forward_pre_hooks),
            m.training,
            is_watched(m),
            "forward" in vars(m),
        )
        for m in model.modules()
    ]
    implementation = getattr(model.config, "_attn_implementation", None)
    return [*hooks, implementation, *(p.requires_grad for p in model.parameters())]


def broken(logits: Tensor) -> Tensor:
    raise KeyError


@pytest.mark.parametrize("site", ["resid_pre", "resid_mid", "q", "pattern"])
@pytest.mark.parametrize("steps", [1, 2])
def test_a_model_is_afterwards_as_it_was_also_when_the_metric_fails(site: str, steps: int) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    model = families.build("gpt2").train()
    model.transformer.h[1].eval()
    parameters = list(model.parameters())
    for i, parameter in enumerate(parameters):
        parameter.requires_grad_(i % 3 > 0)
        parameter.grad = torch.full_like(parameter, 2.0) if i % 2 else None
    before, values = state(model), [p.detach().clone() for p in parameters]
    run(model, site=site, steps=steps)
    with pytest.raises(KeyError):
        run(model, site=site, steps=steps, metric=broken)
    assert state(model) == before
    for i, (parameter, value) in enumerate(zip(parameters, values, strict=True)):
        assert torch.equal(parameter, value)
        assert (parameter.grad is None) == (i % 2 == 0)
        assert parameter.grad is None or bool((parameter.grad == 2.0).all())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_are_taken_where_the_caller_has_switched_them_off(
    mode: Callable[[], Any],
) -> None:
    model = toy()
    right = run(model)
    with mode():
        got = run(model)
    model.requires_grad_(False)
    assert torch.equal(got.scores, right.scores)
    assert torch.equal(run(model).scores, right.scores)
    assert not right.scores.requires_grad


@pytest.mark.parametrize("site", ["resid_mid", "z", "pattern"])
def test_all_layers_take_two_forwards_and_one_backward(
    site: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, forwards, backwards = toy(), [], []
    model.register_forward_hook(lambda *_: forwards.append(1))
    real = torch.autograd.grad

    def counted(*args: Any, **kwargs: Any) -> Any:
        backwards.append(1)
        return real(*args, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", counted)
    run(model, site=site)
    assert (len(forwards), len(backwards)) == (2, 1)
    forwards.clear()
    backwards.clear()
    run(model, site=site, steps=4, layers=[1, 2])  # four steps in one batch
    assert (len(forwards), len(backwards)) == (2 + 2, 2)


def test_nothing_below_the_lowest_layer_is_differentiated() -> None:
    model, seen = toy(), []
    for block in model.h:
        block.register_full_backward_hook(lambda *_: seen.append(1))
    whole = run(model)
    assert len(seen) == 3
    seen.clear()
    part = run(model, layers=[2])
    assert len(seen) == 1
    assert torch.equal(part.scores, whole.scores[2:])


def test_a_low_precision_model_is_summed_in_float32() -> None:
    half = run(toy().bfloat16())
    assert half.scores.dtype == torch.float64
    right = run(toy())
    assert (
        torch.corrcoef(torch.stack((half.effect().flatten(), right.effect().flatten())))[0, 1]
        > 0.95
    )


def test_the_result_says_what_it_is_and_becomes_json() -> None:
    got = run(toy(), site="z", steps=3, check=2)
    assert repr(got) == "Attribution(z: 3 layers x 3 heads, logit difference, 3 steps)"
    assert (got.engine, got.note) == ("gradient", "an average over 3 gradients")
    plain = got.to_dict()
    assert (plain["steps"], plain["check"]["cells"], plain["site"]) == (3, 4, "z")
    best = got.top(1)[0]
    assert best["effect"] == pytest.approx(float(got.effect()[best["layer"], best["head"]]))
    torch.testing.assert_close(got.scores, got.unpatched.mean() + got.effect())
    assert run(toy()).to_dict()["check"] is None


class _Headless(nn.Module):
    """Returns no logits."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 4)
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return {"hidden": x}


class _Cut(_Headless):
    """Takes its second block's input out of the graph."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.blocks[0](self.embed(ids))
        return self.blocks[1](x.detach())


class _Unused(_Headless):
    """Never calls its second block."""

    def forward(self, ids: Tensor) -> Tensor:
        return self.blocks[0](self.embed(ids))


def accuracy(logits: Tensor) -> Tensor:
    return (logits[:, -1].argmax(-1) == 11).float()


def infinite(logits: Tensor) -> Tensor:
    return (logits[:, -1, 11] * 0).sqrt()


@pytest.mark.parametrize(
    ("model", "change", "error", "text"),
    [
        (
            toy,
            {"metric": accuracy},
            errors.ArgumentError,
            "the metric has no gradient with respect to the logits. Use one that is "
            "differentiable, such as logit_difference, or use sweep.",
        ),
        (
            toy,
            {"metric": kl_divergence("corrupted")},
            errors.ArgumentError,
            "KL divergence compares the corrupted run with itself where the gradient is taken, so "
            "every attribution would be 0. Use steps > 1, another direction or metric.",
        ),
        (
            toy,
            {"metric": kl_divergence("clean"), "direction": "noise"},
            errors.ArgumentError,
            "KL divergence compares the clean run with itself where the gradient is taken, so "
            "every attribution would be 0. Use steps > 1, another direction or metric.",
        ),
        (
            toy,
            {"direction": "both"},
            errors.ArgumentError,
            "direction must be one of 'denoise', 'noise', got 'both'.",
        ),
        (
            toy,
            {"site": "hidden"},
            errors.ArgumentError,
            "site must be one of 'resid_pre', 'resid_mid', 'resid_post', 'attn_out', 'mlp_out', "
            "'q', 'k', 'v', 'z', 'pattern', 'neurons', got 'hidden'.",
        ),
        (
            toy,
            {"steps": 0},
            errors.ArgumentError,
            f"steps must be between 1 and {1 << 20}, got steps=0.",
        ),
        (
            toy,
            {"check": -1},
            errors.ArgumentError,
            f"check must be between 0 and {1 << 30}, got check=-1.",
        ),
        (
            toy,
            {"axes": ("head",)},
            errors.ArgumentError,
            "site 'resid_pre' is swept over one of: layer, position; layer. Got head.",
        ),
        (
            toy,
            {"layers": [3]},
            errors.ArgumentError,
            "layers of 'resid_pre' lie between 0 and 2, got 3.",
        ),
        (
            toy,
            {"layers": []},
            errors.ArgumentError,
            "layers of 'resid_pre' lie between 0 and 2, none was given.",
        ),
        (
            toy,
            {"corrupted": CORRUPTED[:, :4]},
            errors.ShapeError,
            "clean has 6 tokens and corrupted 4, but a position is patched by the same position. "
            "Make the prompts equally long, or pad both on the same side and pass attention_mask.",
        ),
        (
            toy,
            {"attention_mask": torch.tensor([[0, 1, 1, 1, 1, 1]])},
            errors.ArgumentError,
            "ToyModel.forward takes no attention_mask, so it cannot leave padding out. Pass "
            "prompts of one length without padding.",
        ),
        (
            toy,
            {"corrupted": CLEAN, "check": 1},
            errors.ArgumentError,
            "no patch changes anything, so nothing can be checked. Do the runs differ?",
        ),
        (
            toy,
            {"metric": infinite},
            errors.NonFiniteError,
            "the attribution is NaN at layer 0, position 0. Is an activation or a gradient not "
            "finite?",
        ),
        (
            _Headless,
            {},
            errors.ArgumentError,
            "_Headless returns a dict without logits. Pass a model with a language-model head.",
        ),
        (
            _Headless,
            {"site": "z"},
            errors.SiteError,
            "_Headless has no z; it has resid_pre, resid_post.",
        ),
        (
            _Cut,
            {"metric": lambda logits: logits[:, -1, 1]},
            errors.SiteError,
            "no gradient reaches 'blocks.1:in': the model computes it without gradients. Choose "
            "another site, or use sweep.",
        ),
        (
            _Unused,
            {"metric": lambda logits: logits[:, -1, 1]},
            errors.SiteError,
            "site 'blocks.1:in' did not fire: the forward never called module 'blocks.1'. Name a "
            "module that runs.",
        ),
    ],
)
def test_what_it_cannot_do_is_named(
    model: Callable[[], nn.Module], change: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=f"^attribute: {re.escape(text)}$"):
        run(model(), **change)


def test_a_parallel_model_has_no_stream_in_the_middle() -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    text = "^attribute: GPTNeoXForCausalLM has no resid_mid; it has resid_pre, resid_post, attn_out"
    with pytest.raises(errors.SiteError, match=text):
        run(families.build("gpt_neox"), site="resid_mid")


def test_a_mask_that_hides_nothing_is_no_mask() -> None:
    got = run(toy(), attention_mask=torch.ones_like(CLEAN))
    assert torch.equal(got.scores, run(toy()).scores)


def test_equal_runs_have_no_attribution() -> None:
    got = run(toy(), corrupted=CLEAN, metric=log_probability(3), site="neurons")
    assert not got.written.any()
    assert not got.effect().any()
