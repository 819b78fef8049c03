"""Writes named one by one: any of them together, and pairs, against the naive sweep."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from microtome.errors import ArgumentError, NonFiniteError, ShapeError, SiteError
from microtome.models import ToyConfig, ToyModel
from microtome.models.native.base import BaseRun
from microtome.patching import (
    Write,
    kl_divergence,
    logit_difference,
    naive_sweep,
    pairs,
    patch,
    run_patched,
)
from microtome.testing import families
from microtome.testing.patching import changed, everything, last_difference

pytest.importorskip("transformers", reason="transformers is not installed")

B, T, LAYERS = 2, 6, 3
BASE = families.tokens(B, T)
SOURCE = families.tokens(2 * B, T)[B:]
KINDS = (
    "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "q", "k", "v", "pattern", "z",
    "neurons",
)  # fmt: skip
HEADED = ("q", "k", "v", "pattern", "z")
MASK = torch.tensor([[0, 1, 1, 1, 1, 0], [0, 0, 1, 1, 1, 1]])


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    return families.in_float64("llama")


@pytest.fixture(scope="module")
def toy() -> ToyModel:
    return ToyModel(ToyConfig(num_hidden_layers=2, hidden_size=16, vocab_size=50)).double()


def sizes(name: str) -> dict[str, tuple[int, ...]]:
    """Heads and units, or units, of each kind of site."""
    kv, width, hidden = (2, 8, 40) if name in ("llama", "gemma3") else (4, 6, 40)
    hidden = 96 if name == "gpt2" else hidden
    out: dict[str, tuple[int, ...]] = dict.fromkeys(KINDS, (24,))
    out |= {"q": (4, width), "z": (4, width), "k": (kv, width), "v": (kv, width)}
    return out | {"pattern": (4, T), "neurons": (hidden,)}


class Draw:
    """Random writes; every choice is one number of the generator."""

    def __init__(self, name: str, seed: int = 0) -> None:
        self.sizes, self.generator = sizes(name), torch.Generator().manual_seed(seed)
        self.kinds = [k for k in KINDS if not (name == "gpt_neox" and k == "resid_mid")]

    def of(self, *options: Any) -> Any:
        return options[int(torch.randint(len(options), (), generator=self.generator))]

    def cells(self, n: int) -> list[list[Write]]:
        return [[self.write() for _ in range(self.of(0, 1, 2, 3))] for _ in range(n)]

    def write(self) -> Write:
        kind = self.of(*self.kinds)
        op = self.of("replace", "add", "zero", "scale", "mean")
        positions, heads = self.of(None, 0, 2, 5, -1), None
        if kind in HEADED:
            heads = self.of(None, 0, 1, -1)
        units = self.of(None, 0, slice(1, 4), [3, 0])
        value: float | Tensor | None = None
        if op in ("replace", "add"):
            value = self.of(None, 0.5, "whole", "last axis")
        if isinstance(value, str):
            value = self.value(kind, positions, heads, units, value == "whole")
        factor = self.of(1.0, -0.7) if op in ("add", "scale") else 1.0
        layer = self.of(*range(LAYERS))
        return Write(f"{kind}.{layer}", positions, heads, units, op, value, factor)

    def value(self, kind: str, positions: Any, heads: Any, units: Any, whole: bool) -> Tensor:
        """Of the chosen part's shape, or of its last axis alone."""
        *heads_of, last = self.sizes[kind]
        count = {"None": last, "0": 0}.get(str(units), 3 if isinstance(units, slice) else 2)
        split = [*heads_of, *([count] if count else [])]  # one coordinate has no axis
        front = [B] if positions is not None else [B, T]
        if kind in HEADED and heads is not None:
            split.pop(0)
        elif kind == "pattern" and positions is None:  # [b, h, destination, source]
            front, split = [B, split[0], T], split[1:]
        shape = front + split if whole else split[-1:] if count else []
        return torch.randn(shape, generator=self.generator).double()


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3", "gpt_neox"])
def test_any_writes_together_give_the_naive_numbers(name):
    model, cells = families.in_float64(name), Draw(name).cells(90)
    wanted = naive_sweep(model, BASE, SOURCE, everything, cells)
    for how in ({"engine": "native"}, {"engine": "native", "memory": 1 << 20}):
        found = patch(model, BASE, SOURCE, everything, cells, **how)
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    for engine in ("blocks", "forwards")[: 2 if name == "llama" else 1]:
        found = patch(model, BASE, SOURCE, everything, cells[::3], engine=engine)
        torch.testing.assert_close(found, wanted[::3], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("engine", ["native", "blocks"])
def test_padding_is_written_by_no_write(llama, engine):
    cells = Draw("llama", 1).cells(60)
    cells = [cell for cell in cells if all(w.positions != 0 for w in cell)]  # padding in both
    cells += [[Write("pattern.1", op=op, value=0.5)] for op in ("replace", "add")]
    cells += [[Write(site, op="mean")] for site in ("z.1", "pattern.0", "resid_mid.2")]

    def visible(logits: Tensor) -> Tensor:
        weights = torch.linspace(-1, 1, logits[0].numel()).view(logits[0].shape).to(logits)
        return torch.where(MASK[..., None] == 1, logits * weights, 0.0).sum((1, 2))

    found = patch(llama, BASE, SOURCE, visible, cells, attention_mask=MASK, engine=engine)
    wanted = naive_sweep(llama, BASE, SOURCE, visible, cells, attention_mask=MASK)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("engine", ["native", "blocks"])
def test_a_block_writes_its_output_before_the_next_one_reads_it(llama, engine):
    half, other = Write("resid_pre.2", op="scale", factor=0.5), Write("resid_post.1", value=0.3)
    cells = [[half, other], [other, half]]
    found = patch(llama, BASE, SOURCE, everything, cells, engine=engine)
    wanted = naive_sweep(llama, BASE, SOURCE, everything, cells)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    assert torch.equal(found[0], found[1])


@pytest.mark.parametrize("position", [0, 2])
def test_a_pattern_may_look_past_the_position_that_is_measured(llama, position):
    late = [Write("mlp_out.0", positions=4, op="zero"), Write("pattern.1", positions=0, value=0.3)]
    cells = [[Write("pattern.1", value=0.5)], [Write("pattern.2", heads=1, op="mean")], late]
    metric = logit_difference(11, 12, position=position)
    found = patch(llama, BASE, SOURCE, metric, cells, engine="native")
    read = lambda logits: logits[:, position, 11] - logits[:, position, 12]  # noqa: E731
    wanted = naive_sweep(llama, BASE, SOURCE, read, cells)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("engine", ["native", "blocks"])
def test_values_need_no_source_and_no_writes_are_the_base_run(toy, engine):
    cells = [[], [Write("resid_pre.1", value=0.5)], [Write("z.0", heads=1, op="zero")]]
    found = patch(toy, BASE, None, last_difference, cells, engine=engine)
    wanted = naive_sweep(toy, BASE, None, last_difference, cells)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(found[0], last_difference(toy(BASE).logits))
    assert patch(toy, BASE, None, last_difference, [], engine=engine).shape == (0, B)
    assert patch(toy, BASE[0], SOURCE[0], logit_difference(11, 12), cells).shape == (3, 1)


def test_a_pattern_is_formed_once_for_all_the_writes_that_read_it(toy, monkeypatch):
    formed = []
    original = BaseRun.pattern

    def count(self: BaseRun, layer: int) -> Tensor:
        formed.append(layer)
        return original(self, layer)

    monkeypatch.setattr(BaseRun, "pattern", count)
    cells = [[Write("pattern.1", positions=p, heads=h)] for p in range(T) for h in range(4)]
    patch(toy, BASE, SOURCE, last_difference, cells)
    assert len(formed) == 2  # to read values from, and to compare them with


def test_to_a_metric_the_base_run_is_clean_and_the_source_corrupted(toy):
    cells = [[Write("resid_pre.0", positions=p)] for p in range(T)] + [[]]
    whole = [Write("resid_pre.0")]
    found = patch(toy, BASE, SOURCE, kl_divergence("corrupted"), [*cells, whole])
    assert float(found[-2].min()) > 1e-6
    assert float(found[-1].abs().max()) < 1e-12
    found = patch(toy, BASE, SOURCE, kl_divergence("clean"), [*cells, whole])
    assert float(found[-2].abs().max()) < 1e-12
    torch.testing.assert_close(
        found[-1], patch(toy, SOURCE, BASE, kl_divergence("corrupted"), [[]])[0]
    )


# Pairs


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_interaction_is_the_joint_effect_less_the_two_single_ones(toy, direction):
    writes = [
        Write("z.0", heads=1), Write("resid_mid.0", positions=2), Write("z.1", heads=3),
        Write("mlp_out.0", op="zero"),
    ]  # fmt: skip
    found = pairs(toy, SOURCE, BASE, last_difference, writes, direction=direction, progress=False)
    base, source = (BASE, SOURCE) if direction == "denoise" else (SOURCE, BASE)
    cells = [[], *([w] for w in writes), *([a, c] for a in writes for c in writes)]
    none, *rest = naive_sweep(toy, base, source, last_difference, cells).mean(1)
    alone, joint = torch.stack(rest[:4]), torch.stack(rest[4:]).view(4, 4)
    assert found.unpatched == pytest.approx(float(none), abs=1e-12)
    torch.testing.assert_close(found.alone, alone, rtol=1e-9, atol=1e-12)
    apart = ~torch.eye(4, dtype=torch.bool)
    torch.testing.assert_close(found.together[apart], joint[apart], rtol=1e-9, atol=1e-12)
    assert torch.equal(found.together.diag(), found.alone)
    assert torch.equal(found.together, found.together.T)
    by_hand = joint - none - (alone - none)[:, None] - (alone - none)[None]
    by_hand.fill_diagonal_(0.0)
    torch.testing.assert_close(found.interaction, by_hand, rtol=1e-9, atol=1e-12)
    assert float(found.interaction[0, 1].abs()) > 1e-6
    assert found.metric == "last_difference"


def test_writes_that_cannot_meet_do_not_interact(toy):
    # The first two prompts are one prompt until position 3, so a write before it does nothing.
    clean = changed(BASE, (0, 3), (1, 3))
    early, late = Write("resid_pre.1", positions=1), Write("resid_pre.1", positions=4)
    found = pairs(toy, clean, BASE, last_difference, [early, late], progress=False)
    assert float(found.alone[0]) == found.unpatched
    assert float(found.together[0, 1]) == float(found.alone[1])
    assert found.interaction.abs().max() == 0
    # What two heads add to the last stream is linear, but for the norm: read it without one.
    linear = ToyModel(ToyConfig(num_hidden_layers=1, hidden_size=16, vocab_size=50)).double()
    linear.ln_f = nn.Identity()
    heads = [Write("mlp_out.0", positions=-1), Write("resid_post.0", op="add", value=0.3)]
    found = pairs(linear, SOURCE, BASE, last_difference, heads, progress=False, engine="forwards")
    assert float((found.alone - found.unpatched).abs().min()) > 1e-4
    assert float(found.interaction.abs().max()) < 1e-12


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_a_metric_of_pairs_compares_with_the_run_that_it_names(toy, direction):
    metric, whole = kl_divergence("clean"), Write("resid_pre.0")
    found = pairs(toy, SOURCE, BASE, metric, [whole], direction=direction, progress=False)
    assert (abs(found.unpatched) < 1e-12) == (direction == "noise")
    assert (float(found.alone.abs()) < 1e-12) == (direction == "denoise")


# Refusals


def refuses(kind: type[Exception], message: str, model: nn.Module, write: Write, **how: Any):
    source = how.pop("source", SOURCE)
    with pytest.raises(kind) as raised:
        patch(model, BASE, source, last_difference, [[], [write]], **how)
    assert str(raised.value) == message


def test_a_site_that_is_not_there_is_named_with_those_that_are(llama):
    has = (
        "there are resid_pre, q, k, v, pattern, z, attn_out, resid_mid, neurons, mlp_out, "
        "resid_post, each with a layer, .0 to .2."
    )
    for name in ("z.3", "zed.0", "z", "z.-1", ""):
        refuses(SiteError, f"patch: no site {name!r}; {has}", llama, Write(name))
    with pytest.raises(SiteError, match=r"^pairs: no site 'z.3'; there are"):
        pairs(llama, SOURCE, BASE, last_difference, [Write("z.3")], progress=False)
    with pytest.raises(SiteError, match=r"^patch: GPTNeoXForCausalLM has no resid_mid: its atte"):
        patch(
            families.in_float64("gpt_neox"), BASE, SOURCE, everything, [[Write("resid_mid.0")]]
        )  # fmt: skip


def test_places_within_a_site_are_checked(llama):
    for write, what in (
        (Write("z.0", heads=4), "head must be between -4 and 3, got head=4."),
        (Write("k.0", heads=2), "head must be between -2 and 1, got head=2."),
        (Write("resid_pre.0", heads=1), "resid_pre.0 has no heads, got heads=1. Leave heads out."),
        (Write("z.0", units=8), "unit must be between -8 and 7, got unit=8."),
        (Write("z.0", units=[0, 8]), "units of z.0 lie between -8 and 7, got [0, 8]."),
        (Write("z.0", positions=6), "position must be between -6 and 5, got position=6."),
    ):
        refuses(ArgumentError, f"patch: {what}", llama, write)


def test_a_value_has_to_fit_and_a_write_that_reads_needs_a_source(llama):
    for write, wants, got in (
        (Write("z.0", value=torch.zeros(5)), [2, 6, 4, 8], [5]),
        (Write("pattern.0", heads=1, value=torch.zeros(5)), [2, 6, 6], [5]),
        (Write("pattern.0", value=torch.zeros(6, 4, 6)), [2, 4, 6, 6], [6, 4, 6]),
        (Write("resid_pre.1", 2, value=torch.zeros(2, 1, 24)), [2, 24], [2, 1, 24]),
    ):
        refuses(
            ShapeError,
            f"patch: the value for {write.site!r} must broadcast to {wants}, got shape {got}.",
            llama,
            write,
        )
    for write in (Write("z.0"), Write("z.0", op="mean")):
        refuses(
            ArgumentError,
            "patch: a write reads the source run, got source=None. Pass source, or a value.",
            llama, write, source=None,
        )  # fmt: skip


def test_nan_names_the_writes_of_its_cell(toy):
    def picky(logits: Tensor) -> Tensor:
        moved = (logits - before).abs().amax((1, 2)) > 1e-9
        return torch.where(moved, torch.nan, logits[:, -1, 0])

    with torch.no_grad():
        before = run_patched(toy, BASE, [])
    with pytest.raises(NonFiniteError, match=r"prompt 0 with the patch at z.0, mlp_out.1\."):
        patch(toy, BASE, None, picky, [[], [Write("z.0", op="zero"), Write("mlp_out.1", value=1)]])


def test_pairs_say_which_writes_changed_something(toy):
    writes = [Write("z.0", heads=1), Write("z.1", op="scale"), Write("mlp_out.1", positions=2)]
    found = pairs(toy, SOURCE, BASE, logit_difference(11, 12), writes, progress=False)
    assert found.written[1, 1] == 0  # a factor of 1
    assert found.alone[1] == found.unpatched
    assert found.written.diagonal()[[0, 2]].tolist() == [B * T, B]
    assert found.written[0, 2] == found.written[2, 0] == B * T + B


def test_writes_of_other_types_are_named(toy):
    for how, message in (
        ({"heads": [0, 1]}, "heads must be one number or None for all, got [0, 1]. For several, "
         "put a Write for each into the cell."),
        ({"value": "zero"}, "value must be a tensor or a number, got str."),
    ):  # fmt: skip
        with pytest.raises(ArgumentError) as raised:
            Write("z.0", **how)
        assert str(raised.value) == f"Write: {message}"
    with pytest.raises(ArgumentError, match=r"^patch: each cell must be a list of Write, got W"):
        patch(toy, BASE, SOURCE, last_difference, [Write("z.0")])


def test_a_write_to_padding_alone_is_an_error_and_no_silent_patch(llama):
    mask = torch.tensor([[0, 1, 1, 1, 1, 0], [0, 0, 1, 1, 1, 0]])
    metric = logit_difference(11, 12)
    with pytest.raises(ArgumentError) as raised:
        patch(llama, BASE, SOURCE, metric, [[Write("z.1", positions=-1)]], attention_mask=mask)
    assert str(raised.value) == (
        "patch: the write at 'z.1' changes nothing: position -1 is padding in every prompt. Their "
        "tokens stand at 1 ... 4."
    )
    some = [[Write("z.1", positions=1)]]  # a token of the first prompt
    assert patch(llama, BASE, SOURCE, metric, some, attention_mask=mask).shape == (1, B)
