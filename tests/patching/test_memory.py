"""More prompts than the memory holds the runs of: the same numbers, some prompts at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from microtome.integrations.transformer_lens import HookedModel, get_act_patch_resid_pre
from microtome.models.native.base import bytes_kept
from microtome.models.native.runner import Runner, runner_of
from microtome.patching import Write, ablate, kl_divergence, logit_difference, patch, sweep
from microtome.patching.held import Held
from microtome.patching.parted import PartedEngine
from microtome.testing import families
from microtome.testing.patching import everything

pytest.importorskip("transformers", reason="transformers is not installed")

BASE, SOURCE = families.tokens(5, 6), families.tokens(10, 6)[5:]
MASK = torch.ones(5, 6, dtype=torch.int64)
MASK[1, :2], MASK[3, 5] = 0, 0
LAST = logit_difference(3, 4)
CELLS = [[Write("z.0", heads=1), Write("mlp_out.2", op="mean")], [], [Write("k.1", op="zero")]]
CALLS: dict[str, Callable[..., Tensor]] = {
    "stream": lambda m, **how: sweep(m, SOURCE, BASE, everything, **how).by_prompt,
    "end": lambda m, **how: sweep(m, SOURCE, BASE, kl_divergence(), "resid_post", **how).by_prompt,
    "padded": lambda m, **how: (
        sweep(m, SOURCE, BASE, LAST, "pattern", attention_mask=MASK, **how).by_prompt
    ),
    "means": lambda m, **how: (
        ablate(m, BASE, LAST, "v", value="mean", attention_mask=MASK, **how).by_prompt
    ),
    "others": lambda m, **how: (
        ablate(m, BASE, LAST, "mlp_out", value="resample", reference=SOURCE[:3], **how).by_prompt
    ),
    "listed": lambda m, **how: patch(m, BASE, SOURCE, LAST, CELLS, **how),
}


def in_parts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Make base runs look so large that one prompt's fits; how many prompts each engine takes."""
    seen: list[int] = []
    original = PartedEngine.__init__

    def noted(self: PartedEngine, *args: Any, **how: Any) -> None:
        original(self, *args, **how)
        seen.append(self.at_once)

    monkeypatch.setattr(PartedEngine, "__init__", noted)
    monkeypatch.setattr(Runner, "bytes_a_token", lambda self, *, differences: 1 << 26)
    return seen


@pytest.mark.parametrize("call", CALLS)
def test_prompts_that_do_not_fit_together_give_the_same_numbers(call, monkeypatch):
    model = families.in_float64("gemma2")
    whole = CALLS[call](model, progress=False)
    with monkeypatch.context() as patched:
        seen = in_parts(patched)
        found = CALLS[call](model, progress=False)
    assert seen == [1]
    torch.testing.assert_close(found, whole, rtol=1e-9, atol=1e-12)


def test_the_delta_form_runs_in_parts_too(monkeypatch):
    how = {"precision": "delta-bf16", "progress": False}
    model = families.build("llama")
    wanted = sweep(model, SOURCE, BASE, LAST, **how).scores
    seen = in_parts(monkeypatch)
    found = sweep(model, SOURCE, BASE, LAST, **how).scores
    assert seen == [1]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_calls_of_transformer_lens_run_in_parts_too(monkeypatch):
    seen = in_parts(monkeypatch)
    model = HookedModel(families.build("llama"))
    _, cache = model.run_with_cache(SOURCE, names_filter=lambda name: "resid_pre" in name)
    metric = lambda logits: (logits[:, -1, 3] - logits[:, -1, 4]).mean()  # noqa: E731
    found = get_act_patch_resid_pre(model, BASE, cache, metric, progress=False)
    assert seen == [1]
    wanted = sweep(model.model, SOURCE, BASE, LAST, progress=False).scores
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "qwen3", "gemma2", "gpt_neox"])
@pytest.mark.parametrize("differences", [False, True])
def test_what_a_base_run_takes_is_known_before_it(name, differences):
    model, first = families.build(name), torch.zeros(5, dtype=torch.int32)
    runner = runner_of(model, BASE, first)
    assert isinstance(runner, Runner)
    run = runner.base(model, BASE, first, differences=differences)
    assert run.nbytes == BASE.numel() * bytes_kept(runner.stack, differences=differences)


def test_places_are_held_as_far_as_memory_goes():
    asked: list[tuple[list[int], str]] = []

    def read(layers: range, stage: str) -> list[Tensor]:
        asked.append((list(layers), stage))
        return [torch.full((10,), float(layer)) for layer in layers]

    held = Held(4, lambda stage: 40, 100, read)  # two at a time
    assert float(held(1, "z")[0]) == 1.0
    assert float(held(2, "z")[0]) == 2.0
    kept = held(3, "z")
    held(0, "q")
    assert held(3, "z") is kept  # dropped by then, and still in our hands
    held(1, "z")
    assert asked == [([1, 2], "z"), ([3], "z"), ([0, 1], "q"), ([1, 2], "z")]
    assert Held(4, lambda stage: 40, 0, read)(3, "v")[0] == 3.0
    Held(4, lambda stage: 40, 160, read)(2, "k")
    assert asked[-2:] == [([3], "v"), ([0, 1, 2, 3], "k")]
