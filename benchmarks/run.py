"""Measure ours, the peers and the floor side by side; benchmarks/README.md says how to read it."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
Row = dict[str, Any]
MEMORY_CASE = "f=2^20"
# Trained alike from the same weights on the same rows, ours and plain torch differ by rounding.
FVU_TOLERANCE = 0.01


def rows_of(options: argparse.Namespace, chosen: dict[str, list[str]]) -> Iterator[Row]:
    """Run the plan, one child after another, and yield rows as they come."""
    from benchmarks.child import child, ended_badly
    from benchmarks.plan import CASES, QUICK
    from benchmarks.real_activations import path_of

    limits = {"threads": options.threads, "timeout": options.timeout}
    layers = [name.removeprefix("layer") for name in chosen["cases"] if name.startswith("layer")]
    why = ""
    if layers:
        _, output = child("real_activations", str(options.cache), ",".join(layers), **limits)
        why = ended_badly(output)
    for name in chosen["cases"]:
        case, source = QUICK if name == QUICK.name else CASES[name], "gaussian"
        if name.startswith("layer"):
            source = str(path_of(options.cache, int(name.removeprefix("layer"))))
            if not Path(source).exists():
                key = {"case": name, "contender": "all", "op": "all"}
                # A missing package is no fault of the code; anything else is.
                if "PackageError" in why or "ModuleNotFoundError" in why:
                    yield {**key, "status": f"not available: {why}"}
                else:
                    yield {**key, "status": "FAILED", "error": why}
                continue
        request = {
            "case": vars(case),
            "input": source,
            "ops": chosen["ops"],
            "reps": options.reps,
            "steps": options.steps,
            "threads": options.threads,
        }
        for contender in chosen["contenders"]:
            rows, output = child(
                "harness", json.dumps({**request, "contender": contender}), **limits
            )
            yield from rows
            if problem := ended_badly(output):
                key = {"case": name, "contender": contender, "op": "the rest"}
                yield {**key, "status": "FAILED", "error": problem}
    for cold in ("", "cold") if "memory" in chosen["parts"] else ():
        rows, output = child("memory", cold, **limits)
        op = f"topk_encode memory {cold}".strip()
        failed = {"case": MEMORY_CASE, "contender": "microtome", "op": op, "status": "FAILED"}
        yield from rows or [{**failed, "error": ended_badly(output) or "it left no row"}]


def compare_fvu(rows: list[Row]) -> None:
    """Fail our step, in place, where its FVU is worse than plain torch's beyond rounding."""
    plain = {row["case"]: row for row in rows if row["contender"] == "torch" and "fvu" in row}
    for row in rows:
        other = plain.get(row["case"])
        if row["contender"] != "microtome" or "fvu" not in row or other is None:
            continue
        if row["fvu_steps"] != other["fvu_steps"]:
            continue
        if not row["fvu"] <= (1 + FVU_TOLERANCE) * other["fvu"]:
            both = f"FVU {row['fvu']:.4f}, plain torch {other['fvu']:.4f}"
            error = f"{both}, after {row['fvu_steps']} steps"
            key = {name: row[name] for name in ("case", "contender", "op")}
            row.clear()
            row.update(key, status="FAILED", error=error)


def merged(old: list[Row], new: list[Row]) -> list[Row]:
    """Old rows, those replaced that were run again, then the new ones."""
    replaced = {(row["case"], row["contender"], row["op"]): row for row in new}
    kept = [replaced.pop((row["case"], row["contender"], row["op"]), row) for row in old]
    return kept + list(replaced.values())


def main(arguments: list[str]) -> int:
    """Run, write the JSON after every row, print the tables; 1 if a row FAILED."""
    from benchmarks import floors, machine, plan, render

    options = plan.parse(arguments)
    if options.render:
        for result in render.read(options.render):
            print(render.markdown(result), render.readme_table(result), sep="\n\n")
        return 0
    import torch

    chosen = plan.plan(options.only, quick=options.quick)
    options.reps = options.reps or (3 if options.quick else 7)
    options.steps = (10 if options.quick else 50) if options.steps is None else options.steps
    torch.set_num_threads(options.threads)
    name = options.name or ("quick" if options.quick else "bench")
    path = options.out / f"{name}-{machine.isa()}.json"
    old = json.loads(path.read_text()) if options.merge and path.exists() else {}
    limits = floors.ceilings(quick=options.quick)
    imports = (
        machine.import_times(2 if options.quick else 7)
        if "imports" in chosen["parts"]
        else old.get("imports")
    )
    cases = [plan.QUICK] if options.quick else list(plan.CASES.values())
    result: dict[str, Any] = {
        "machine": machine.describe(options.threads),
        "ceilings": limits,
        "imports": imports,
        "cases": {c.name: {"n": c.n, "d": c.d, "f": c.f, "k": c.k} for c in cases},
        "floors": {c.name: floors.allowed(c, limits) for c in cases},
        "rows": old.get("rows", []),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    fresh: list[Row] = []
    for row in rows_of(options, chosen):
        fresh.append({**row, "date": result["machine"]["date"]})
        figure = f"{row['ratio']:.2f} G32" if "ratio" in row else row["status"]
        line = f"{row['case']:8} {row['contender']:20} {row['op']:24} {figure}"
        print(line, file=sys.stderr, flush=True)
        result["rows"] = merged(old.get("rows", []), fresh)
        path.write_text(json.dumps(result, indent=1) + "\n")
    compare_fvu(result["rows"])
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(render.markdown(result), f"written to {path}", sep="\n\n")
    return int(any(row["status"] == "FAILED" for row in result["rows"]))


if __name__ == "__main__":
    # The root must not stay on the path: its folder kernels/ has the name of a package that others
    # look for. Once `benchmarks` is imported, its modules are found through it.
    sys.path[0] = str(ROOT)
    importlib.import_module("benchmarks")
    sys.path.pop(0)
    if sys.argv[1:2] == ["--child"]:
        importlib.import_module(f"benchmarks.{sys.argv[2]}").main(*sys.argv[3:])
    else:
        sys.exit(main(sys.argv[1:]))
