"""From the children's runs to the table's rows: answers compared, times summed up, ratios taken.

No time stands beside a wrong answer: TransformerLens's grid judges all others.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch
from torch import Tensor

from benchmarks.patching_case import Sweep
from benchmarks.patching_child import JUDGE, OURS
from benchmarks.patching_floor import floors

Row = dict[str, Any]
EXACT = 1e-5  # largest allowed error of a score, in units of the metric
LOW_PRECISION = 5e-3  # of a variant named for its low precision, over the range of the grid
# It answers for the cells that the judge leaves out, once it agrees on those that both did.
WHOLE_GRID = ("torch", "a batch a layer, a row a cell")
FIGURES = (
    "seconds",
    "busy",
    "forward_ms",
    "product_gflops",
    "working_mib",
    "setup_mib",
    "first_seconds",
    "about",
)


def judge(runs: list[Row], columns: int) -> None:
    """Compare every run's grid with the judge's, in place: `check`, or FAILED without a time.

    Args:
        runs: the runs of one sweep. Those with status "ok" hold `scores` [layers, len(columns)],
            which is taken out, and `columns`.
        columns: of the whole grid.
    """
    _one_build(runs)
    grids = [(run, run.pop("scores")) for run in runs if run["status"] == "ok"]
    judges = [(run, grid) for run, grid in grids if run["contender"] == JUDGE]
    if not judges:
        for run, _ in grids:
            _fail(run, "not checked, for there is no grid of TransformerLens to check it against")
        return
    first, grid = judges[0]
    truth = torch.zeros(grid.shape[0], columns)
    truth[:, first["columns"]] = grid
    known = set(first["columns"])
    span = float(grid.max() - grid.min())
    nothing = {"error": 0.0, "error_over_range": 0.0, "limit": EXACT, "cells": 0}
    first["check"] = {**nothing, "range": span}  # it is not compared with itself
    grids = [pair for pair in grids if pair[0] is not first]
    # Python's sort is stable, and the whole grid must be judged before it judges.
    for run, grid in sorted(grids, key=lambda pair: not _is_whole(pair[0])):
        _compare(run, grid, truth, known, span)
        if _is_whole(run) and run["status"] == "ok":
            new = [c for c in run["columns"] if c not in known]
            truth[:, new] = grid[:, [run["columns"].index(c) for c in new]]
            known |= set(new)


def _one_build(runs: list[Row]) -> None:
    """Fail ours where microtome was replaced between its children."""
    ours = [run for run in runs if run["contender"] == OURS and "build" in run]
    builds = sorted({run["build"] for run in ours})
    # One that no longer imports leaves no digest, but it was replaced all the same.
    gone = any(run["contender"] == OURS and "build" not in run for run in runs)
    if len(builds) > 1 or (builds and gone):
        for run in ours:
            run.pop("scores", None)
            found = " and ".join([*builds, *["one that did not run"] * gone])
            _fail(run, f"microtome was replaced during the sweep: builds {found}")


def _is_whole(run: Row) -> bool:
    return (run["contender"], run["variant"]) == WHOLE_GRID


def _compare(run: Row, grid: Tensor, truth: Tensor, known: set[int], span: float) -> None:
    wanted = (truth.shape[0], len(run["columns"]))
    if tuple(grid.shape) != wanted:
        _fail(run, f"its grid is {list(grid.shape)}, not {list(wanted)}")
        return
    both = [(i, c) for i, c in enumerate(run["columns"]) if c in known]
    if not both:
        _fail(run, "not checked, for no cell of it is in TransformerLens's grid")
        return
    mine, theirs = (list(indices) for indices in zip(*both, strict=True))
    error = float((grid[:, mine] - truth[:, theirs]).abs().max())
    low = "bf16" in run["variant"]
    limit = LOW_PRECISION * span if low else EXACT
    run["check"] = {
        "error": error,
        "range": span,
        "error_over_range": error / span if span else float("nan"),
        "limit": limit,
        "cells": truth.shape[0] * len(both),
    }
    if not error <= limit:
        asked = f"{LOW_PRECISION:.1%} of the range {span:.3g}" if low else f"{EXACT:g}"
        _fail(run, f"disagrees with TransformerLens by {error:.2g}, more than {asked}")


def _fail(run: Row, error: str) -> None:
    for name in FIGURES:
        run.pop(name, None)
    run.update(status="FAILED", error=error)


def summarise(runs: list[Row], sweep: Sweep) -> list[Row]:
    """One row a contender and variant of one sweep, after `judge`.

    Args:
        runs: of one sweep; `order` is the child that each came from, counted from 0.
        sweep: the sizes.

    Returns:
        Rows with status, seconds (median, of the whole grid), spread (least and most), reps,
        busy (the least of its sweeps), part (chosen over all columns), forward_ms (median beside
        it), forwards (seconds in forwards of the same child), check (the worst), working_mib,
        setup_mib, about (the last one's), and for a peer `ours`: variant of ours -> ratio (its
        seconds over ours of the children right before and after), ratio_range (quickest over
        slowest, slowest over quickest), ratio_in_forwards. Ours has build, first_seconds, and in
        float32 over_floor: seconds over the floor of the changed cells at its own child's rate.
    """
    keys = dict.fromkeys((run["contender"], run["variant"]) for run in runs)
    return [
        _row([r for r in runs if (r["contender"], r["variant"]) == k], runs, sweep) for k in keys
    ]


def _row(mine: list[Row], runs: list[Row], sweep: Sweep) -> Row:
    row: Row = {name: mine[0][name] for name in ("sweep", "contender", "variant")}
    for run in mine:  # one wrong answer is enough
        if run["status"] != "ok":
            row.update({name: run[name] for name in ("status", "error", "check") if name in run})
            return row
    times = _times(mine, sweep)
    forwards = _pooled(mine, "forward_ms")
    row.update(
        status="ok",
        seconds=statistics.median(times),
        spread=[min(times), max(times)],
        reps=len(times),
        busy=min(_pooled(mine, "busy")),
        part=len(mine[0]["columns"]) / sweep.columns,
        forward_ms=statistics.median(forwards),
        forward_ms_spread=[min(forwards), max(forwards)],
        forwards=_in_forwards(mine, sweep),
        check=max((run["check"] for run in mine), key=lambda check: check["error"]),
        working_mib=max(run["working_mib"] for run in mine),
        setup_mib=max(run["setup_mib"] for run in mine),
        about=mine[-1]["about"],
    )
    if row["contender"] != OURS:
        row["ours"] = _ratios(mine, runs, sweep)
        return row
    row["build"] = mine[0]["build"]
    row["first_seconds"] = statistics.median(run["first_seconds"] for run in mine)
    if "bf16" not in row["variant"]:
        row["over_floor"] = _over_floor(mine, sweep)
    return row


def _ratios(mine: list[Row], runs: list[Row], sweep: Sweep) -> dict[str, Row]:
    near = {run["order"] + side for run in mine for side in (-1, 1)}
    ours = [run for run in runs if run["contender"] == OURS and run["order"] in near]
    theirs = _times(mine, sweep)
    found: dict[str, Row] = {}
    for variant in dict.fromkeys(run["variant"] for run in ours):
        same = [run for run in ours if run["variant"] == variant]
        if any(run["status"] != "ok" for run in same):
            continue
        times = _times(same, sweep)
        found[variant] = {
            "ratio": statistics.median(theirs) / statistics.median(times),
            "ratio_range": [min(theirs) / max(times), max(theirs) / min(times)],
            "ratio_in_forwards": _in_forwards(mine, sweep) / _in_forwards(same, sweep),
        }
    return found


def _times(runs: list[Row], sweep: Sweep) -> list[float]:
    """Seconds of the whole grid."""
    return [t * sweep.columns / len(run["columns"]) for run in runs for t in run["seconds"]]


def _in_forwards(runs: list[Row], sweep: Sweep) -> float:
    """Each child's sweeps over its own forwards; the median of those."""
    counts = [
        1e3 * t / statistics.median(run["forward_ms"]) for run in runs for t in _times([run], sweep)
    ]
    return statistics.median(counts)


def _over_floor(runs: list[Row], sweep: Sweep) -> float:
    work = floors(sweep)["changed"] / 1e9
    return statistics.median(
        t * statistics.median(run["product_gflops"]) / work
        for run in runs
        for t in _times([run], sweep)
    )


def _pooled(runs: list[Row], name: str) -> list[float]:
    return [value for run in runs for value in run[name]]


def floor_rows(runs: list[Row], sweep: Sweep) -> dict[str, Row]:
    """The floors of one sweep, and the time they take at the rates seen beside its sweeps.

    Returns:
        "all", "changed", "naive" -> flops, seconds (at the median float32 product rate of all
        children), forwards (those seconds over the median forward).
    """
    good = [run for run in runs if run["status"] == "ok"]
    counts = floors(sweep)
    if not good:
        return {name: {"flops": count} for name, count in counts.items()}
    rate = statistics.median(_pooled(good, "product_gflops"))
    forward = statistics.median(_pooled(good, "forward_ms"))
    return {
        name: {
            "flops": count,
            "seconds": count / rate / 1e9,
            "forwards": 1e3 * count / rate / 1e9 / forward,
            "product_gflops": rate,
        }
        for name, count in counts.items()
    }
