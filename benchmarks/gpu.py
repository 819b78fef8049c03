"""Measure microtome on one CUDA card: `python benchmarks/gpu.py --part 1|2|3 --out DIR`.

Part 1 measures the card and checks every kernel; part 2 times kernels, part 3 whole steps. Each
takes under nine minutes, prints its table last and keeps everything in DIR/gpu-partN.json. What the
card or the build cannot do is a row that says so. docs/gpu.md says how to read it.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
Row = dict[str, Any]
LANES = 8  # processes that compile, or check, beside each other
HEAVY = 12.0  # GiB: such items compile one after another


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", type=int, nargs="+", choices=(1, 2, 3), default=[1, 2, 3])
    parser.add_argument("--out", type=Path, default=Path("build/gpu"))
    parser.add_argument("--minutes", type=float, default=8.5, help="wall clock for each part")
    parser.add_argument("--only", nargs="+", default=[], help="words that choose items")
    parser.add_argument("--dry", action="store_true", help="everything, tiny, on the processor")
    parser.add_argument("--processes", action="store_true", help="with --dry: use workers too")
    parser.add_argument("--acceptance", type=Path, nargs="+", help="results to judge, in Markdown")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--sanitize", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def chosen(items: list[Any], words: list[str]) -> list[Any]:
    """Items whose key holds one of the words; those that every part needs stay."""
    if not words:
        return items
    return [i for i in items if i.name == "ceilings" or any(w in i.key for w in words)]


def run_part(part: int, options: argparse.Namespace) -> dict[str, Any]:
    """Run one part and return its result; the JSON is written after every item."""
    from benchmarks.on_gpu import plan, sheet, supervise
    from benchmarks.on_gpu.device import Device
    from benchmarks.on_gpu.item import Context

    began = time.time()
    deadline = began + 60 * options.minutes
    path = options.out / f"gpu-part{part}{'-dry' if options.dry else ''}.json"
    result: dict[str, Any] = {
        "part": part,
        "device": {"name": "unknown", "dry": options.dry},
        "software": plan.software(),
        "ceilings": {},
        "minutes": options.minutes,
        "seconds": {},
        "rows": [],
    }
    items = chosen(plan.items(part), options.only)
    order = {item.key: i for i, item in enumerate(items)}
    ranked: list[tuple[int, list[Row]]] = []
    limits: dict[str, float] = {}

    def report(key: str, rows: list[Row], seconds: float) -> None:
        for row in rows:
            if key == "ceilings" and row["status"] == "ok":
                limits.update(row.get("limits") or {})
                result["device"] = row.get("device") or result["device"]
                result["ceilings"] = {} if options.dry else limits
            figure = row.get("ms") or row.get("note") or ""
            line = f"{time.time() - began:6.1f} s  {key:32} {row['status']:8} {figure}"
            print(line[:160], file=sys.stderr, flush=True)
        rows = [sheet.blank(row) if options.dry else row for row in rows]
        ranked.append((order.get(key, len(order)), rows))
        ranked.sort(key=lambda pair: pair[0])
        result["rows"] = [row for _, part_rows in ranked for row in part_rows]
        result["seconds"][key] = round(seconds, 2)
        sheet.write(path, result)

    first = [item for item in items if item.name == "ceilings"]
    shared = [item for item in items if not item.alone]
    alone = [item for item in items if item.alone and item.name != "ceilings"]
    if options.dry and not options.processes:
        context = Context(Device(dry=True), limits)
        supervise.in_turn(first, context, deadline, report)
        warm = Context(context.device, context.limits, warm=True)
        # A quarter shows that the way is open; interpreted, nothing is compiled.
        compiled = [item for item in alone if item.compiles][::4]
        supervise.in_turn(compiled, warm, deadline, lambda *_: None)
        supervise.in_turn([*shared, *alone], context, deadline, report)
    else:
        folder = options.out / f"workers-part{part}"
        me = [sys.executable, str(Path(__file__).resolve())]
        request = {"part": part, "dry": options.dry, "limits": {}, "warm": False}

        def supervisor(**more: Any) -> supervise.Supervisor:
            return supervise.Supervisor(
                lambda request_path: [*me, "--worker", str(request_path)],
                folder,
                {**request, "limits": limits, **more},
                (lambda *_: None) if more.get("warm") else report,
            )

        supervisor().run([first], deadline, "first")
        if shared:
            supervisor().run([shared[i::LANES] for i in range(LANES)], deadline, "shared")
        light = [item for item in alone if item.compiles and item.gib < HEAVY]
        heavy = [item for item in alone if item.compiles and item.gib >= HEAVY]
        lanes = [heavy, *(light[i :: LANES - 1] for i in range(LANES - 1))]
        most = min(deadline, time.time() + plan.COMPILE_SECONDS)
        supervisor(warm=True).run(lanes, most, "compile")
        supervisor().run([alone], deadline, "alone")
    result["total_seconds"] = round(time.time() - began, 1)
    sheet.write(path, result)
    return result


def worker(path: Path) -> int:
    """A worker process, told what to do by a request file."""
    from benchmarks.on_gpu import plan, supervise
    from benchmarks.on_gpu.device import Device
    from benchmarks.on_gpu.item import Context

    request = json.loads(path.read_text())
    context = Context(Device(request["dry"]), request["limits"], request["warm"])
    return supervise.work(request, plan.items(request["part"]), context)


def main(arguments: list[str]) -> int:
    """Run the parts that were asked for; 1 if a row went wrong."""
    options = parse(arguments)
    if options.dry:
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported: it decides at import
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("WANDB_MODE", "disabled")
    if options.worker:
        if json.loads(options.worker.read_text())["dry"]:
            os.environ["TRITON_INTERPRET"] = "1"
        return worker(options.worker)
    from benchmarks.on_gpu import goals, sheet

    if options.acceptance:
        print(goals.acceptance(sheet.read(options.acceptance)))
        return 0
    if options.sanitize:
        from benchmarks.on_gpu import sanitize

        return sanitize.once(options.sanitize)
    import torch

    if not options.dry and not torch.cuda.is_available():
        print("gpu.py: torch finds no CUDA device. --dry runs everything on the processor.")
        return 2
    results = [run_part(part, options) for part in options.part]
    for result in results:
        print("\n" + sheet.table(result))
    bad = [row for result in results for row in result["rows"] if row["status"] in sheet.BAD]
    return int(bool(bad))


if __name__ == "__main__":
    # The root must not stay on the path: its folder kernels/ has the name of a package that others
    # look for. Once `benchmarks` is imported, its modules are found through it.
    sys.path[0] = str(ROOT)
    importlib.import_module("benchmarks")
    sys.path.pop(0)
    sys.exit(main(sys.argv[1:]))
