"""What a sweep returns: effects, tables, files and pictures; and the examples in the docstrings."""

from __future__ import annotations

import doctest
import importlib
import json
import pkgutil

import pytest
import torch

import microtome.patching
from microtome.errors import ArgumentError
from microtome.models import ToyModel
from microtome.patching import Sweep, ablate, logit_difference, sweep
from microtome.testing.patching import changed

CORRUPTED = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
CLEAN = changed(CORRUPTED, (0, 1), (1, 3))


def by_hand(base: str = "corrupted") -> Sweep:
    """Two layers by two positions, two prompts; clean measures 4 and 2, corrupted 0 and 0."""
    by_prompt = torch.tensor([[[0.0, 0.0], [4.0, 1.0]], [[2.0, 0.0], [-1.0, -5.0]]])
    return Sweep(
        scores=by_prompt.mean(-1),
        by_prompt=by_prompt,
        axes=("layer", "position"),
        values=((0, 3), (1, 4)),
        site="z",
        metric="logit difference",
        clean=torch.tensor([4.0, 2.0]),
        corrupted=torch.tensor([0.0, 0.0]),
        base=base,
        written=torch.tensor([[0, 2], [1, 2]]),
        engine="native",
    )


def test_effects_are_differences_from_the_run_that_was_patched():
    assert by_hand().effect().tolist() == [[0, 2.5], [1, -3]]
    assert by_hand("clean").effect().tolist() == [[-3, -0.5], [-2, -6]]


def test_restored_is_0_at_the_corrupted_metric_and_1_at_the_clean_one():
    torch.testing.assert_close(by_hand().restored(), torch.tensor([[0, 2.5 / 3], [1 / 3, -1]]))
    torch.testing.assert_close(by_hand("clean").restored(), by_hand().restored())


def test_the_top_cells_come_by_the_size_of_their_effect():
    assert by_hand().top(2) == [
        {"layer": 3, "position": 4, "score": -3.0, "effect": -3.0, "written": 2},
        {"layer": 0, "position": 4, "score": 2.5, "effect": 2.5, "written": 2},
    ]
    assert len(by_hand().top()) == 4


def test_a_result_becomes_json_and_keeps_everything():
    found = by_hand()
    back = json.loads(json.dumps(found.to_dict()))
    assert back == found.to_dict()
    assert set(back) == set(Sweep.__dataclass_fields__)
    for name in ("scores", "by_prompt", "clean", "corrupted", "written"):
        assert torch.equal(torch.tensor(back[name]), getattr(found, name))
    assert back["values"] == [[0, 3], [1, 4]]


def test_a_result_says_in_a_line_what_it_is():
    assert repr(by_hand()) == "Sweep(z: 2 layers x 2 positions, logit difference, engine native)"


def test_there_is_nothing_to_restore_without_a_difference_or_a_corrupted_run():
    toy = ToyModel()
    same = sweep(toy, CLEAN, CLEAN, logit_difference(3, 4), progress=False)
    with pytest.raises(ArgumentError) as caught:
        same.restored()
    assert str(caught.value) == (
        "Sweep.restored: clean and corrupted have the same logit difference, "
        f"{float(same.clean.mean()):.4g}. Choose prompts that the metric tells apart."
    )
    ablated = ablate(toy, CLEAN, logit_difference(3, 4), progress=False)
    with pytest.raises(ArgumentError) as caught:
        ablated.restored()
    assert str(caught.value) == ("Sweep.restored: an ablation has no corrupted run. Use .effect().")


@pytest.mark.parametrize("axes", [("layer",), ("layer", "position"), ("layer", "position", "head")])
def test_a_heat_map_is_written_as_a_picture(axes, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    found = sweep(
        ToyModel(), CLEAN, CORRUPTED, logit_difference(3, 4), "z", axes=axes, progress=False
    )
    labels = ["$a$", "$$", "\\frac", "the", "\n"]
    path = found.plot(tmp_path / "map.png", tokens=labels)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 5000


def test_labels_have_to_reach_the_last_position(tmp_path):
    with pytest.raises(ArgumentError) as caught:
        by_hand().plot(tmp_path / "map.png", tokens=["a", "b"])
    assert str(caught.value) == (
        "Sweep.plot: tokens has 2 entries, but position 4 is drawn. Pass all tokens of the prompt."
    )


NAMES = [f"patching.{module.name}" for module in pkgutil.iter_modules(microtome.patching.__path__)]


@pytest.mark.parametrize("name", NAMES)
def test_the_examples_of_a_module_hold(name):
    assert doctest.testmod(importlib.import_module(f"microtome.{name}")).failed == 0
