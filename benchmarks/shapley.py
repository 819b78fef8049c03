"""Measure Shapley values and LIME beside the peers; benchmarks/README.md says how to read it."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
Row = dict[str, Any]
HEADS = "heads-144"  # a case of its own: heads of a language model as players


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="benchmarks/shapley.py", description=__doc__)
    parser.add_argument("--only", nargs="+", default=[], metavar="CASE", help="cases to run")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="counts (1 2)")
    parser.add_argument("--spend", type=float, default=6.0, help="seconds a contender (6)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--name", default="shapley", help="of the JSON: <name>-<isa>.json")
    parser.add_argument("--merge", action="store_true", help="keep rows that are not run again")
    parser.add_argument("--timeout", type=float, default=1800.0, help="seconds a child (1800)")
    parser.add_argument("--cache", type=Path, default=ROOT / "build" / "benchmarks")
    parser.add_argument("--render", type=Path, nargs="+", metavar="JSON", help="print these, stop")
    return parser.parse_args(arguments)


def failed(case: str, contender: str, threads: int, error: str) -> Row:
    """The row of a child that left none, or not all."""
    key = {"case": case, "contender": contender, "threads": threads}
    return {**key, "status": "FAILED", "error": error}


def rows_of(name: str, threads: int, options: argparse.Namespace) -> list[Row]:
    """The rows of a case: one child for all contenders, who take turns; for memory one for each."""
    from benchmarks.child import child, ended_badly
    from benchmarks.shapley_case import CASES
    from benchmarks.shapley_child import ways

    request: dict[str, Any] = {"cache": str(options.cache), "threads": threads}
    if name == HEADS:
        module, requests = "shapley_heads", {"all": {**request, "walks": 7, "reps": 3}}
    else:
        module, request = "shapley_child", {**request, "case": name, "spend": options.spend}
        alone = ways(name) if CASES[name].what == "memory" else [""]
        requests = {only or "all": {**request, "only": only} for only in alone}
    rows: list[Row] = []
    for label, asked in requests.items():
        found, output = child(module, json.dumps(asked), threads=threads, timeout=options.timeout)
        rows += found
        if problem := ended_badly(output) or ("" if found else "it left no row"):
            rows.append(failed(name, label, threads, problem))
    return rows


def main(arguments: list[str]) -> int:
    """Run, write the JSON after every case, print the tables; 1 if a row FAILED."""
    from benchmarks import machine, render
    from benchmarks.shapley_case import CASES

    options = parse(arguments)
    if options.render:
        for result in render.read(options.render):
            print(render.markdown(result))
        return 0
    there = [*CASES, HEADS]
    unknown = [word for word in options.only if word not in there]
    if unknown:
        msg = f"shapley.py: --only {unknown[0]!r} is no case. There are {', '.join(there)}."
        raise SystemExit(msg)
    path = options.out / f"{options.name}-{machine.isa()}.json"
    old = json.loads(path.read_text())["rows"] if options.merge and path.exists() else []
    about = machine.describe(max(options.threads))
    result: dict[str, Any] = {"kind": "shapley", "machine": about, "rows": old}
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.only or there:
        for threads in options.threads:
            new = rows_of(name, threads, options)
            for row in new:
                row.update(date=about["date"], commit=about["commit"])
                said = f"{row['ms']:.3f} ms" if row["status"] == "ok" else row["status"]
                print(f"{name:16} {threads} {row['contender']:36} {said}", file=sys.stderr)
            key = (name, threads)
            kept = [row for row in result["rows"] if (row["case"], row["threads"]) != key]
            result["rows"] = kept + new
            path.write_text(json.dumps(result, indent=1) + "\n")
    print(render.markdown(result), f"written to {path}", sep="\n\n")
    return int(any(row["status"] == "FAILED" for row in result["rows"]))


if __name__ == "__main__":
    # The root must not stay on the path: its folder kernels/ has the name of a package that others
    # look for. Once `benchmarks` is imported, its modules are found through it.
    sys.path[0] = str(ROOT)
    importlib.import_module("benchmarks")
    sys.path.pop(0)
    sys.exit(main(sys.argv[1:]))
