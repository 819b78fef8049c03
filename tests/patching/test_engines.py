"""Every engine gives the naive sweep's numbers, on every family, at every site and axis."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from microtome.models.sites import canonical
from microtome.patching import attribute, logit_difference, sweep
from microtome.testing import families
from microtome.testing.patching import (
    MetricFunction,
    apart,
    changed,
    everything,
    last_difference,
    naive_twin,
)

pytest.importorskip("transformers", reason="transformers is not installed")

STREAMS = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
# site, axes, what is left out to save time
GRIDS = [
    *((site, None, {}) for site in (*STREAMS, "q", "k", "v", "z", "pattern")),
    ("resid_pre", ("layer",), {}),
    ("mlp_out", ("layer",), {}),
    ("z", ("layer", "position", "head"), {}),
    ("q", ("layer", "position"), {"layers": [0, 2]}),
    ("k", ("layer", "head", "position"), {}),
    ("v", ("layer", "position", "head"), {"layers": [1, 2]}),
    ("pattern", ("layer", "position", "head"), {"heads": [0, 3]}),
    ("pattern", ("layer", "head", "position", "source"), {"heads": [2], "layers": [0, 2]}),
    ("pattern", ("layer",), {}),
    ("neurons", ("layer", "position"), {}),
    ("neurons", ("layer", "neuron"), {"neurons": [0, 5]}),
    ("neurons", ("layer", "position", "neuron"), {"neurons": [7], "positions": [1, 4]}),
]
NATIVE = [name for name in families.MODELS if name not in ("bert", "gemma3_with_images")]
CORRUPTED = families.tokens(2, 5)
CLEAN = changed(CORRUPTED, (0, 1), (1, 2))


def grids(model: torch.nn.Module) -> list[tuple[str, tuple[str, ...] | None, dict[str, list[int]]]]:
    """Those that a model has."""
    known = canonical("test", model)
    return [grid for grid in GRIDS if f"{grid[0]}.0" in known]


def check(model: torch.nn.Module, engine: str, some: slice = slice(None)) -> None:
    """At each grid, a metric of two logits and one of all of them."""
    for site, axes, only in grids(model)[some]:
        agree(
            model, CLEAN, CORRUPTED, (last_difference, everything), site,
            axes=axes, engine=engine, **only,
        )  # fmt: skip


def agree(
    model: torch.nn.Module,
    clean: Tensor,
    corrupted: Tensor,
    twins: tuple[MetricFunction, MetricFunction],
    site: str,
    **how: Any,
) -> None:
    """`logit_difference(11, 12)`, and a callable, against one run of the naive twin."""
    few, whole = (
        sweep(model, clean, corrupted, metric, site, progress=False, **how)
        for metric in (logit_difference(11, 12), twins[1])
    )
    seen: list[Tensor] = []

    def both(logits: Tensor) -> Tensor:
        seen.append(twins[1](logits))
        return twins[0](logits)

    mask = how.get("attention_mask")
    wanted = naive_twin(model, few, corrupted, clean, both, attention_mask=mask)
    assert few.engine == whole.engine == how["engine"]
    assert apart(few, wanted) < 1e-9, (site, few.axes)
    assert apart(whole, torch.stack(seen).view_as(wanted)) < 1e-9, (site, few.axes)


@pytest.mark.parametrize("name", NATIVE)
def test_parts_give_the_naive_numbers_at_every_site(name):
    # Each reader at every grid, and what differs between families of a reader at some.
    all_of_it = name in ("gpt2", "llama", "gemma2", "gpt_neox")
    check(
        families.in_float64(name),
        "native",
        slice(None) if all_of_it else slice(len(name) % 3, None, 3),
    )


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "gpt_neox"])
@pytest.mark.parametrize("engine", ["blocks", "forwards"])
def test_the_models_own_forward_gives_the_naive_numbers(name, engine):
    check(families.in_float64(name), engine, slice(None, None, 2))


def test_bert_runs_block_by_block_and_the_user_is_told():
    model = families.in_float64("bert")
    with pytest.warns(UserWarning, match="patches run block by block") as told:
        sweep(model, CLEAN, CORRUPTED, everything, "z", progress=False)
    assert str(told[0].message) == (
        "sweep: z patches run block by block, since BertForMaskedLM is not one of the "
        "architectures that are read into parts."
    )
    assert told[0].filename == __file__
    check(model, "blocks", slice(1, None, 3))


def test_the_language_model_inside_gemma_3_is_read_too():
    model = families.in_float64("gemma3_with_images")
    found = sweep(model, CLEAN, CORRUPTED, everything, "z", progress=False)
    assert found.engine == "native"
    assert apart(found, naive_twin(model, found, CORRUPTED, CLEAN, everything)) < 1e-9


WINDOWED = {
    "mistral": {"sliding_window": 3},
    "gemma2": {"sliding_window": 3, "attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.0},
    "gemma3": {
        "sliding_window": 2,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
}
LONG = families.tokens(2, 8)


@pytest.mark.parametrize("name", WINDOWED)
def test_sliding_windows_shorter_than_the_prompt_are_kept(name):
    model = families.in_float64(name, **WINDOWED[name])
    wide = families.in_float64(name, **WINDOWED[name] | {"sliding_window": 8})
    with torch.no_grad():
        assert not torch.allclose(model(LONG).logits[:, -1], wide(LONG).logits[:, -1])
    clean = changed(LONG, (0, 1), (1, 4))
    for site, axes in (
        ("resid_pre", None),
        ("k", ("layer", "position", "head")),
        ("v", None),
        ("z", ("layer", "position")),
        ("pattern", ("layer", "position", "head")),
        ("mlp_out", None),
    ):
        found = sweep(model, clean, LONG, everything, site, axes=axes, progress=False)
        assert found.engine == "native"
        wanted = naive_twin(model, found, LONG, clean, everything)
        assert apart(found, wanted) < 1e-9, (site, axes)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("engine", ["native", "blocks"])
def test_float32_agrees_to_rounding(name, engine):
    model = families.build(name)
    for site in ("resid_pre", "z", "k"):
        found = sweep(model, CLEAN, CORRUPTED, everything, site, engine=engine, progress=False)
        wanted = naive_twin(model, found, CORRUPTED, CLEAN, everything)
        assert found.scores.dtype == torch.float32
        assert apart(found, wanted) < 1e-5, site


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_neox"])
def test_differences_in_bfloat16_stay_within_a_few_percent_of_the_effects(name):
    model = families.build(name)
    for site, axes in (
        ("resid_pre", None),
        ("z", ("layer", "position", "head")),
        ("v", None),
        ("neurons", ("layer", "position")),
        ("mlp_out", ("layer",)),
    ):
        for metric in (logit_difference(11, 12), everything):
            exact, fast = (
                sweep(
                    model, CLEAN, CORRUPTED, metric, site,
                    axes=axes, precision=precision, progress=False,
                )
                for precision in ("fp32", "delta-bf16")
            )  # fmt: skip
            off = (exact.by_prompt - fast.by_prompt).abs().max()
            assert off > 0
            assert off < 0.03 * (exact.by_prompt - exact.unpatched).abs().max(), site
            assert torch.equal(fast.written, exact.written)


@pytest.mark.parametrize("engine", ["blocks", "forwards"])
def test_a_model_in_bfloat16_is_measured_in_float32(engine):
    model = families.build("llama").bfloat16()
    found = sweep(model, CLEAN, CORRUPTED, everything, "z", engine=engine, progress=False)
    assert found.by_prompt.dtype == torch.float32
    twin = lambda logits: everything(logits.float())  # noqa: E731
    wanted = naive_twin(model, found, CORRUPTED, CLEAN, twin)
    assert apart(found, wanted) < 0.02


MASKS = {
    "left": [[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]],
    "right": [[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]],
    "both": [[0, 1, 1, 1, 1, 0], [0, 0, 1, 1, 1, 1]],
}


@pytest.mark.parametrize(("name", "engine", "side"), [
    ("llama", "native", "left"), ("llama", "native", "right"), ("gpt2", "native", "both"),
    ("gemma2", "native", "both"), ("gpt_neox", "native", "both"), ("llama", "blocks", "both"),
    ("bert", "blocks", "both"), ("llama", "forwards", "left"),
])  # fmt: skip
def test_padding_on_either_side_is_left_out(name, engine, side):
    model = families.in_float64(name, **({"sliding_window": 3} if name == "gemma2" else {}))
    mask = torch.tensor(MASKS[side])
    corrupted = families.tokens(2, 6)
    clean = changed(corrupted, (0, 2), (1, 3))
    ends = 5 - mask.flip(1).argmax(1)  # the last position that counts

    def last(logits: Tensor) -> Tensor:
        at = logits[torch.arange(2), ends]
        return at[:, 11] - at[:, 12]

    def visible(logits: Tensor) -> Tensor:
        weights = torch.linspace(-1, 1, logits[0].numel()).view(logits[0].shape).to(logits)
        return torch.where(mask[..., None] == 1, logits * weights, 0.0).sum((1, 2))

    for site, axes in (
        ("resid_pre", None),
        ("z", ("layer", "position", "head")),
        ("v", None),
        ("pattern", None),
        ("resid_post", ("layer",)),
    ):
        agree(
            model, clean, corrupted, (last, visible), site,
            axes=axes, engine=engine, attention_mask=mask,
        )  # fmt: skip


@pytest.mark.parametrize("engine", ["native", "blocks"])
def test_a_cell_at_padding_writes_nothing_and_is_the_unpatched_run(engine):
    model, mask = families.in_float64("llama"), torch.tensor(MASKS["both"])
    corrupted = families.tokens(2, 6)
    found = sweep(
        model, corrupted.roll(1), corrupted, logit_difference(11, 12), attention_mask=mask,
        engine=engine, progress=False,
    )  # fmt: skip
    assert found.written.tolist() == [mask.sum(0).tolist()] * 3
    assert torch.equal(found.by_prompt[:, 0], found.corrupted.expand(3, 2))
    assert torch.equal(found.by_prompt[:, 5, 0], found.corrupted[:1].expand(3))


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
def test_a_compiled_model_is_swept_as_the_plain_one_that_it_keeps():
    model = families.build("llama")
    corrupted = families.tokens(1, 5)
    clean = changed(corrupted, (0, 1))
    for call in (sweep, attribute):
        found, wanted = (
            call(one, clean, corrupted, logit_difference(11, 12), "z", progress=False)
            for one in (torch.compile(model), model)
        )
        assert torch.equal(found.scores, wanted.scores)
