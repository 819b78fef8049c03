"""Measure patching sweeps, ours between the peers; benchmarks/README.md says how to read it."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
Row = dict[str, Any]
# A peer's ways that run one forward a cell take minutes at 64 tokens, so there they do every fourth
# position. The batched way of plain torch does them all and judges ours where the others did not.
STRIDES = dict.fromkeys(
    (
        "get_act_patch",
        "a trace a cell",
        "a trace a layer, an invoke a cell",
        "sources",
        "source_representations",
        "a hook a cell",
    ),
    4,
)
STRIDED = ("resid-64", "resid-64-all")
# Ours: at least two sweeps a child, more while they are quick. A peer's is timed once.
REPS = {"microtome": {"reps": 2, "spend": 3.0, "most": 5}}
PEER_REPS = {"reps": 1, "spend": 0.0, "most": 1}


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="benchmarks/patching.py", description=__doc__)
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="WORD",
        help="sweeps (resid-16 head-16 resid-64 head-64, each also with -all) or contenders "
        "(microtome nnsight pyvene torch); transformer_lens always runs, for it judges the others",
    )
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--name", default="patching", help="of the JSON: <name>-<isa>.json")
    parser.add_argument(
        "--merge", action="store_true", help="keep an existing JSON's sweeps that are not run again"
    )
    parser.add_argument("--peer-reps", type=int, default=1, help="sweeps of a peer (1)")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch and kernels (2)")
    parser.add_argument(
        "--timeout", type=float, default=3600.0, help="seconds for one child (3600)"
    )
    parser.add_argument(
        "--cache",
        type=Path,
        default=ROOT / "build" / "benchmarks",
        help="folder for the model, kept",
    )
    parser.add_argument(
        "--render", type=Path, nargs="+", metavar="JSON", help="print the tables of these and stop"
    )
    return parser.parse_args(arguments)


def chosen(only: list[str]) -> tuple[list[str], list[str]]:
    """Sort the words of --only into sweeps and contenders; a kind without a word means all of it.

    Raises:
        SystemExit: a word is neither.
    """
    from benchmarks.patching_case import SWEEPS
    from benchmarks.patching_child import CONTENDERS, JUDGE

    for word in only:
        if word not in SWEEPS and word not in CONTENDERS:
            there = f"sweeps: {', '.join(SWEEPS)}; contenders: {', '.join(CONTENDERS)}"
            msg = f"patching.py: --only {word!r} names nothing that can be run. There are {there}."
            raise SystemExit(msg)
    sweeps = [word for word in SWEEPS if word in only] or list(SWEEPS)
    words = [word for word in CONTENDERS if word in only] or list(CONTENDERS)
    return sweeps, [word for word in CONTENDERS if word in words or word == JUDGE]


def narrowed(sweep: str, contenders: list[str], only: list[str]) -> list[str]:
    """The contenders of one sweep: fewer where all tokens differ, unless they are named.

    A peer's time does not depend on the prompts; only ours leaves out what they do not change.
    """
    from benchmarks.patching_child import JUDGE, OURS

    if not sweep.endswith("-all"):
        return contenders
    return [name for name in contenders if name in (OURS, JUDGE) or name in only]


def order(contenders: list[str]) -> list[str]:
    """The children of a sweep: ours before and after each peer, so that a ratio has both sides."""
    from benchmarks.patching_child import OURS

    peers = [name for name in contenders if name != OURS]
    if OURS not in contenders:
        return peers
    return [OURS, *(name for peer in peers for name in (peer, OURS))]


def runs_of(name: str, contenders: list[str], options: argparse.Namespace) -> list[Row]:
    """Run the children of one sweep, one after another, and compare their answers."""
    import torch

    from benchmarks.child import child
    from benchmarks.patching_case import SWEEPS, save_model
    from benchmarks.patching_child import OURS
    from benchmarks.patching_judge import judge

    sweep = SWEEPS[name]
    folder = save_model(options.cache, sweep.shape)
    runs: list[Row] = []
    given_up: set[str] = set()
    with tempfile.TemporaryDirectory() as grids:
        for number, contender in enumerate(order(contenders)):
            if contender in given_up:
                continue
            request = {
                "contender": contender,
                "sweep": asdict(sweep),
                "folder": str(folder),
                "variants": [],
                "strides": STRIDES if name in STRIDED else {},
                **REPS.get(contender, {**PEER_REPS, "reps": options.peer_reps}),
                "threads": options.threads,
                "grids": grids,
            }
            limits = {"threads": options.threads, "timeout": options.timeout}
            rows, output = child("patching_child", json.dumps(request), **limits)
            lines = [line for line in output.splitlines() if line.strip()]
            if lines and lines[-1].startswith("child: "):
                key = {"sweep": name, "contender": contender, "variant": "the rest"}
                rows.append({**key, "status": "FAILED", "error": " ".join(lines[-2:])})
            for row in rows:
                if "grid" in row:
                    row["scores"] = torch.load(row.pop("grid"))
                runs.append({**row, "order": number})
                line = f"{name:10} {contender:18} {row['variant']:36} {row['status']}"
                print(line, file=sys.stderr, flush=True)
            # What cannot run does not run again between the other peers.
            if all(row["status"] != "ok" for row in rows) and contender == OURS:
                given_up.add(contender)
    judge(runs, sweep.columns)
    return runs


def main(arguments: list[str]) -> int:
    """Run, write the JSON after every sweep, print the tables; 1 if a row FAILED."""
    from benchmarks import machine, render
    from benchmarks.patching_case import SWEEPS
    from benchmarks.patching_judge import floor_rows, summarise

    options = parse(arguments)
    if options.render:
        for result in render.read(options.render):
            print(render.markdown(result), render.readme_table(result), sep="\n\n")
        return 0
    sweeps, contenders = chosen(options.only)
    path = options.out / f"{options.name}-{machine.isa()}.json"
    old = json.loads(path.read_text()) if options.merge and path.exists() else {}
    result: dict[str, Any] = {
        "kind": "patching",
        "machine": machine.describe(options.threads),
        "openmp": {k: v for k, v in os.environ.items() if k.startswith(("OMP_", "GOMP_"))},
        # A sweep is replaced whole, for its ratios and its checks hold within one run only.
        "sweeps": {k: v for k, v in old.get("sweeps", {}).items() if k not in sweeps},
        "rows": [row for row in old.get("rows", []) if row["sweep"] not in sweeps],
        "runs": [row for row in old.get("runs", []) if row["sweep"] not in sweeps],
    }
    options.out.mkdir(parents=True, exist_ok=True)
    for name in sweeps:
        sweep = SWEEPS[name]
        runs = runs_of(name, narrowed(name, contenders, options.only), options)
        result["sweeps"][name] = {
            "date": result["machine"]["date"],
            "commit": result["machine"]["commit"],
            "site": sweep.site,
            "length": sweep.length,
            "first": sweep.first,
            "differ": sweep.differ,
            "layers": sweep.shape.layers,
            "columns": sweep.columns,
            "strides": STRIDES if name in STRIDED else {},
            "floors": floor_rows(runs, sweep),
        }
        result["runs"] += runs
        result["rows"] += summarise(runs, sweep)
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
