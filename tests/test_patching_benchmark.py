"""The patching benchmark counts right, compares answers, and prints no time beside a wrong one."""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
# Only `benchmarks` is wanted from the root, so the root does not stay on the path.
sys.path.insert(0, str(ROOT))
importlib.import_module("benchmarks")
sys.path.remove(str(ROOT))

from benchmarks import (  # noqa: E402
    patching,
    patching_case,
    patching_child,
    patching_floor,
    patching_judge,
    render,
)
from benchmarks.patching_case import SWEEPS, Shape, Sweep  # noqa: E402

TINY = Sweep("tiny", "resid_pre", 8, Shape(layers=3, d=16, heads=2, vocabulary=40, positions=8))


@pytest.fixture(autouse=True)
def _threads() -> Any:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def hand(site: str) -> Sweep:
    """Two layers of width 2 (24 d^2 = 96), two heads, two tokens of which the first differs."""
    return Sweep("hand", site, 2, Shape(layers=2, d=2, heads=2, vocabulary=3, positions=2))


def test_a_full_forward_a_cell_is_counted_as_by_hand():
    # A layer: 96 * 2 tokens + 8 * 3 query-key pairs = 216. The logits: 2 * 2 * 3 * 2 = 24.
    assert patching_floor.forward(hand("resid_pre")) == 2 * 216 + 24
    assert patching_floor.naive(hand("resid_pre")) == 4 * 456


def test_the_floor_of_a_residual_sweep_is_counted_as_by_hand():
    # Above a patch of position 0 the last layer takes 16 * 2 for keys and values, 80 + 16 for the
    # last position; of position 1 16 + 80 + 16. An answer takes 2 * 2 * 2 = 8.
    corrupted, clean = 216 + 128 + 8, 216 + 24 * 2
    cells = {
        # The other query swaps a key: 12; position 0 attends to itself: 8; W_O and MLP: 72 * 2.
        (0, 0): 12 + 8 + 144 + 128 + 8,
        # Position 1 attends to two keys: 16.
        (0, 1): 16 + 72 + 112 + 8,
        (1, 0): 12 + 72 + 8,
        (1, 1): 16 + 72 + 8,
    }
    floors = patching_floor.floors(hand("resid_pre"))
    assert floors["all"] == corrupted + clean + sum(cells.values())
    # The second token is the same in both prompts, so its residual at layer 0 is.
    assert floors["changed"] == floors["all"] - cells[0, 1]
    everywhere = replace(hand("resid_pre"), differ="all")
    assert patching_floor.floors(everywhere)["changed"] == floors["all"]


def test_the_floor_of_a_head_sweep_is_counted_as_by_hand():
    # A head's W_O is 1 x 2: 4 a token, the MLP 64. The clean run goes on to z: 2 keys, 16.
    corrupted, clean = 216 + 128 + 8, 216 + 24 * 2 + 16
    heads = 2 * (68 * 2 + 128 + 8) + 2 * (68 + 8)
    assert patching_floor.floors(hand("z"))["all"] == corrupted + clean + heads


@pytest.mark.parametrize(
    ("name", "naive", "all_cells", "ratio_without_the_same_prefix"),
    [
        ("resid-16", 0.546, 0.133, 7.0),
        ("resid-64", 8.79, 1.96, 7.9),
        ("head-16", 0.410, 0.182, 3.0),
        ("head-64", 1.65, 0.725, 3.0),
    ],
)
def test_the_floors_of_the_published_sweeps_in_teraflop(
    name, naive, all_cells, ratio_without_the_same_prefix
):
    sweep = SWEEPS[name]
    floors = patching_floor.floors(sweep)
    assert floors["naive"] / 1e12 == pytest.approx(naive, rel=5e-3)
    assert floors["all"] / 1e12 == pytest.approx(all_cells, rel=5e-3)
    later = [
        (layer, column)
        for layer, column in patching_floor.all_cells(sweep)
        if sweep.site == "z" or column >= sweep.first
    ]
    rest = patching_floor.floor(sweep, later, start=sweep.first)
    assert floors["naive"] / rest == pytest.approx(ratio_without_the_same_prefix, rel=1e-2)


def run(contender: str, variant: str, order: int, scores: Any, **more: Any) -> dict[str, Any]:
    return {
        "sweep": "tiny",
        "contender": contender,
        "variant": variant,
        "order": order,
        "status": "ok",
        "seconds": [1.0],
        "busy": [0.9],
        "forward_ms": [10.0],
        "product_gflops": [100.0],
        "working_mib": 5.0,
        "setup_mib": 1.0,
        "about": {},
        "build": "b1",
        "first_seconds": 3.0,
        "columns": list(range(8)),
        "scores": scores,
        **more,
    }


TRUTH = torch.linspace(0, 1, 24).view(3, 8)


def judged(*runs: dict[str, Any]) -> list[dict[str, Any]]:
    patching_judge.judge(list(runs), TINY.columns)
    return list(runs)


def test_a_wrong_grid_fails_and_keeps_no_time():
    wrong = TRUTH.clone()
    wrong[1, 2] += 1e-4
    runs = judged(
        run("transformer_lens", "get_act_patch", 1, TRUTH),
        run("microtome", "fp32", 0, wrong),
        run("microtome", "fp32", 2, TRUTH),
    )
    assert runs[1]["status"] == "FAILED"
    assert runs[1]["error"] == "disagrees with TransformerLens by 0.0001, more than 1e-05"
    assert "seconds" not in runs[1]
    # One wrong answer is enough to take the time from the whole row, and the ratio to it.
    peer, ours = patching_judge.summarise(runs, TINY)
    assert ours["status"] == "FAILED"
    assert "seconds" not in ours
    assert peer["ours"] == {}


@pytest.mark.parametrize(
    ("error", "status"), [(4e-3, "ok"), (6e-3, "FAILED"), (float("nan"), "FAILED")]
)
def test_low_precision_may_err_by_half_a_percent_of_the_range(error, status):
    low = TRUTH.clone()
    low[2, 7] += error
    runs = judged(
        run("transformer_lens", "get_act_patch", 1, TRUTH), run("microtome", "delta-bf16", 0, low)
    )
    assert runs[1]["status"] == status


def test_without_the_judge_nothing_has_a_time():
    (only,) = judged(run("microtome", "fp32", 0, TRUTH))
    assert only["status"] == "FAILED"
    assert "no grid of TransformerLens" in only["error"]
    assert "seconds" not in only


@pytest.mark.parametrize("second", [{"build": "b2"}, None])
def test_ours_fails_where_microtome_was_replaced_during_the_sweep(second):
    runs = [
        run("microtome", "fp32", 0, TRUTH),
        run("transformer_lens", "get_act_patch", 1, TRUTH),
        run("microtome", "fp32", 2, TRUTH, **(second or {})),
    ]
    if second is None:
        absent = {"status": "not available (cannot import name 'x')", "variant": "all", "order": 2}
        runs[2] = {"sweep": "tiny", "contender": "microtome", **absent}
    judged(*runs)
    assert runs[0]["status"] == "FAILED"
    assert "microtome was replaced during the sweep: builds b1 and" in runs[0]["error"]
    assert "seconds" not in runs[0]
    assert runs[1]["status"] == "ok"


def test_ours_is_set_against_the_floor_at_the_rate_of_its_own_child():
    work = patching_floor.floors(TINY)["changed"] / 1e9
    runs = judged(
        run("microtome", "fp32", 0, TRUTH, seconds=[2 * work / 100]),
        run("transformer_lens", "get_act_patch", 1, TRUTH),
        run("microtome", "fp32", 2, TRUTH, seconds=[2 * work / 25], product_gflops=[25.0]),
    )
    assert patching_judge.summarise(runs, TINY)[0]["over_floor"] == pytest.approx(2.0)


def test_cells_that_the_judge_leaves_out_are_judged_by_the_batched_hooks():
    part = [3, 7]
    ours = TRUTH.clone()
    ours[0, 0] = 9.0
    runs = judged(
        run("transformer_lens", "get_act_patch", 1, TRUTH[:, part], columns=part),
        run("microtome", "fp32", 0, ours),
        run("torch", "a batch a layer, a row a cell", 3, TRUTH),
    )
    assert runs[2]["check"]["cells"] == 6
    assert runs[1]["status"] == "FAILED"


def test_a_ratio_takes_ours_from_right_before_and_after_and_scales_a_part():
    part = [3, 7]
    runs = judged(
        run("microtome", "fp32", 0, TRUTH, seconds=[0.9, 1.1]),
        run("transformer_lens", "get_act_patch", 1, TRUTH[:, part], columns=part, seconds=[3.0]),
        run("microtome", "fp32", 2, TRUTH, seconds=[1.0]),
        run("pyvene", "sources", 3, TRUTH, seconds=[20.0]),
        run("microtome", "fp32", 4, TRUTH, seconds=[5.0, 5.0], forward_ms=[50.0]),
    )
    ours, lens, pyvene = patching_judge.summarise(runs, TINY)
    assert ours["reps"] == 5
    assert ours["spread"] == [0.9, 5.0]
    assert ours["forwards"] == pytest.approx(100)
    assert lens["seconds"] == 12.0
    assert lens["part"] == 0.25
    assert lens["ours"]["fp32"]["ratio"] == pytest.approx(12.0)
    assert lens["ours"]["fp32"]["ratio_range"] == pytest.approx([12 / 1.1, 12 / 0.9])
    assert pyvene["ours"]["fp32"]["ratio"] == pytest.approx(4.0)
    # All ran as long in forwards of their own child, so this ratio does not see the busy machine.
    assert pyvene["ours"]["fp32"]["ratio_in_forwards"] == pytest.approx(20.0)


def result(runs: list[dict[str, Any]]) -> dict[str, Any]:
    machine = {"cpu": "x", "cores": 2, "flags": [], "isa": "avx2", "threads": 2, "date": "d"}
    sweep = {"site": TINY.site, "length": 8, "first": 2, "layers": 3, "columns": 8}
    return {
        "kind": "patching",
        "machine": {**machine, "commit": "c", "python": "3", "versions": {"torch": "2"}},
        "sweeps": {"tiny": {**sweep, "floors": patching_judge.floor_rows(runs, TINY)}},
        "rows": patching_judge.summarise(runs, TINY),
        "runs": runs,
    }


def test_the_table_shows_times_failures_and_floors_and_a_readme_may_quote_it():
    runs = judged(
        run("microtome", "fp32", 0, TRUTH, seconds=[0.25]),
        run("transformer_lens", "get_act_patch", 1, TRUTH, seconds=[2.53]),
        run("torch", "a hook a cell", 3, TRUTH + 1.0),
        {
            "sweep": "tiny",
            "contender": "pyvene",
            "variant": "all",
            "status": "not available (No module named 'pyvene')",
            "order": 5,
        },
    )
    said = json.loads(json.dumps(result(runs)))
    table = render.markdown(said)
    over = f"{said['rows'][0]['over_floor']:.2f}"
    ours = f"| fp32 | 0.25 | 0.25 - 0.25 | 90% | 25.0 | 3.00 | {over} | 0.0e+00 | 0.00% | 5 |  |"
    peer = "| get_act_patch | 2.53 | 2.53 - 2.53 | 90% | 253.0 |  |  | judge |  | 5 | 10.1 |"
    lines = [line for line in table.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1, lines
    assert f"| microtome {ours}" in table
    assert f"| transformer_lens {peer}" in table
    assert "| torch | a hook a cell | FAILED: disagrees with TransformerLens by 1, more" in table
    assert "| pyvene | all | not available (No module named 'pyvene') |" in table
    assert "| floor | every cell, 0 GFLOP | 0.00 |" in table
    assert "| transformer_lens, get_act_patch | 2.53 |" in render.readme_table(said)
    readme = "## Speed\n\nours 0.25 s, theirs 2.53 s, 10.1 times, not 11.1 times\n"
    assert render.unsupported(readme, [said]) == ["11.1"]


@pytest.mark.parametrize("site", ["resid_pre", "z"])
def test_both_loops_of_plain_torch_find_one_grid_and_its_no_op_cells(tmp_path, site):
    pytest.importorskip("transformers", reason="the model is transformers' GPT-2")
    sweep = Sweep("tiny", site, TINY.length, TINY.shape)
    grids = tmp_path / "grids"
    grids.mkdir()
    rows: list[dict[str, Any]] = []
    request = {
        "contender": "torch",
        "sweep": asdict(sweep),
        "folder": str(patching_case.save_model(tmp_path, sweep.shape)),
        "variants": [],
        "strides": {"a hook a cell": 2},
        "reps": 1,
        "spend": 0.0,
        "most": 1,
        "threads": 1,
        "grids": str(grids),
    }
    patching_child.run_contender(request, rows.append)
    assert [row["status"] for row in rows] == ["ok", "ok"], rows
    # Before, after, and after each layer.
    assert len(rows[0]["forward_ms"]) == 2 * patching_child.FORWARDS + sweep.shape.layers
    assert all(row["seconds"][0] > 0 for row in rows)
    part, whole = (torch.load(row["grid"]) for row in rows)
    assert rows[0]["columns"] == sweep.chosen(2)
    torch.testing.assert_close(part, whole[:, rows[0]["columns"]])
    changed = set(patching_floor.changed_cells(sweep))
    same = [whole[cell] for cell in patching_floor.all_cells(sweep) if cell not in changed]
    assert len({round(float(score), 6) for score in same}) == (site == "resid_pre")
    assert len(set(whole.flatten().tolist())) > 2


def test_a_contender_that_is_absent_is_a_row_that_says_so(monkeypatch):
    monkeypatch.setitem(patching_child.CONTENDERS, "ghost", ("benchmarks.ghost", "no_such_package"))
    rows: list[dict[str, Any]] = []
    request = {"contender": "ghost", "sweep": asdict(TINY), "threads": 1}
    patching_child.run_contender(request, rows.append)
    assert rows[0]["status"] == "not available (No module named 'no_such_package')"


def test_ours_runs_before_and_after_each_peer_and_the_judge_always_runs():
    sweeps, contenders = patching.chosen(["resid-16", "microtome", "pyvene"])
    assert sweeps == ["resid-16"]
    ours = "microtome"
    assert patching.order(contenders) == [ours, "transformer_lens", ours, "pyvene", ours]
    assert patching.narrowed("resid-16-all", contenders, []) == [ours, "transformer_lens"]
    assert patching.narrowed("resid-16-all", contenders, ["pyvene"]) == contenders
    with pytest.raises(SystemExit, match="--only 'resid' names nothing that can be run"):
        patching.chosen(["resid"])
