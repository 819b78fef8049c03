"""Rows, the JSON they are kept in, and the table that is printed last."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.on_gpu.goals import judge

Row = dict[str, Any]
STATUSES = ("ok", "WRONG", "FAILED", "DIED", "skipped", "absent")
BAD = ("WRONG", "FAILED", "DIED")
NUMBERS = (
    "ms",
    "spread",
    "rounds",
    "quartiles",
    "wall_ms",
    "graph_ms",
    "floor_ms",
    "over_floor",
    "peak_mib",
    "limits",
)
NOTE = 110  # characters of a note in the table; the JSON has all of it


def row(part: int, item: str, shape: str = "", status: str = "ok", **more: Any) -> Row:
    """One row; `status` is one of STATUSES."""
    return {"part": part, "item": item, "shape": shape, "status": status, **more}


def judged(measured: Row) -> Row:
    """The row with ratios to its floor and to who ran beside it, and the goals it meets or not."""
    ms = measured.get("ms")
    if measured["status"] != "ok" or not ms:
        return measured
    if measured.get("floor_ms"):
        measured["over_floor"] = ms / measured["floor_ms"]
    for other in measured.get("beside", {}).values():
        if other.get("ms"):
            other["ratio"] = ms / other["ms"]
    measured["goals"] = judge(measured)
    return measured


def blank(measured: Row) -> Row:
    """A dry run's row: what was done, without a figure that could be taken for a measurement."""
    kept = {key: value for key, value in measured.items() if key not in NUMBERS}
    if "beside" in kept:
        kept["beside"] = {
            name: {"note": other["note"]} if "note" in other else {}
            for name, other in kept["beside"].items()
        }
    kept["goals"] = [{"goal": goal["goal"]} for goal in kept.get("goals", [])]
    if "figures" in kept:
        kept["figures"] = sorted(kept["figures"])
    return {**kept, "dry": True}


def write(path: Path, result: dict[str, Any]) -> None:
    """Write the JSON whole, so that what is there is never half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".tmp")
    fresh.write_text(json.dumps(result, indent=1, default=str) + "\n")
    fresh.replace(path)


def table(result: dict[str, Any]) -> str:
    """The table: a line for each row, then the ceilings and a count of what went wrong."""
    rows = result["rows"]
    head = ("item", "shape", "backend", "ms", "+-%", "floor", "x floor", "MiB", "beside, goals")
    cells = [head, *(_cells(r) for r in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(head) - 1)]
    lines = []
    for line in cells:
        padded = [
            text.ljust(width) if i < 3 else text.rjust(width)
            for i, (text, width) in enumerate(zip(line[:-1], widths, strict=True))
        ]
        lines.append("  ".join([*padded, line[-1]]).rstrip())
    counts = {s: sum(r["status"] == s for r in rows) for s in STATUSES}
    said = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    goals = [goal for r in rows for goal in r.get("goals", []) if "met" in goal]
    met = sum(goal["met"] for goal in goals)
    lines += ["", f"part {result['part']} on {result['device'].get('name')}: {said or 'no rows'}"]
    if goals:
        lines[-1] += f"; {met} of {len(goals)} goals met"
    if result.get("ceilings") and not result["device"].get("dry"):
        lines.append(", ".join(f"{k} {v:.4g}" for k, v in result["ceilings"].items()))
    return "\n".join(lines)


def _cells(r: Row) -> tuple[str, ...]:
    number = lambda key, form: format(r[key], form) if r.get(key) is not None else ""  # noqa: E731
    spread = f"{100 * r['spread']:.1f}" if r.get("spread") is not None else ""
    ms = number("ms", ".4g") if r["status"] == "ok" else r["status"]
    if r["status"] == "ok" and not ms:
        ms = "dry" if r.get("dry") else "ok"
    return (
        r["item"],
        r.get("shape", ""),
        r.get("backend", ""),
        ms,
        spread,
        number("floor_ms", ".3g"),
        number("over_floor", ".2f"),
        number("peak_mib", ".0f"),
        _remarks(r),
    )


def _remarks(r: Row) -> str:
    parts = []
    for name, other in r.get("beside", {}).items():
        if other.get("ratio"):
            peak = f", {other['peak_mib']:.0f} MiB" if other.get("peak_mib") else ""
            parts.append(f"{name} {other['ms']:.3g} (x{other['ratio']:.2f}{peak})")
        else:
            parts.append(f"{name}: {other.get('note', '')}"[:60].rstrip(": "))
    for goal in r.get("goals", []):
        if "met" in goal:
            parts.append(f"{'MET' if goal['met'] else 'MISSED'} {goal['goal']}")
        else:
            parts.append(f"goal: {goal['goal']}")
    if r.get("note"):
        parts.append(" ".join(str(r["note"]).split())[:NOTE])
    return "; ".join(parts)


def read(paths: Iterable[Path]) -> list[Row]:
    """All rows of result files that were measured on a card."""
    out: list[Row] = []
    for path in paths:
        result = json.loads(path.read_text())
        if not result["device"].get("dry"):
            out += result["rows"]
    return out
