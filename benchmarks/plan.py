"""The command line, and what its words choose."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.floors import floors
from benchmarks.real_activations import LAYERS, real_case
from microtome.testing import BENCH_CASES, Case

ROOT = Path(__file__).resolve().parent.parent
CONTENDERS = ("microtome", "torch", "sparsify", "sae_lens", "dictionary_learning")
PARTS = ("memory", "imports")
QUICK = Case("quick", 256, 128, 4096, 16)
# Word of the command line -> its case.
CASES = {**{c.name: c for c in BENCH_CASES}, **{f"layer{i}": real_case(i) for i in LAYERS}}


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="benchmarks/run.py", description=__doc__)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="one small case, 3 reps, ours against torch and sparsify",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="WORD",
        help="cases (A B C layer10 layer20 layer28), contenders (microtome torch sparsify sae_lens "
        "dictionary_learning), ops (topk_encode ... step), or parts (memory imports); words of one "
        "kind add up, kinds narrow each other",
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder for the JSON"
    )
    parser.add_argument("--name", help="name of the JSON: <name>-<isa>.json (bench, or quick)")
    parser.add_argument(
        "--merge",
        action="store_true",
        help="keep the rows of an existing JSON that are not run again",
    )
    parser.add_argument("--reps", type=int, help="timed pairs a row (7, quick 3)")
    parser.add_argument(
        "--steps", type=int, help="training steps before the FVU (50, quick 10); 0 for no FVU"
    )
    parser.add_argument(
        "--threads", type=int, default=2, help="threads of torch and of the kernels (2)"
    )
    parser.add_argument(
        "--timeout", type=float, default=3600.0, help="seconds for one contender on one case (3600)"
    )
    parser.add_argument(
        "--cache",
        type=Path,
        default=ROOT / "build" / "benchmarks",
        help="folder for the real activations, kept",
    )
    parser.add_argument(
        "--render", type=Path, nargs="+", metavar="JSON", help="print the tables of these and stop"
    )
    return parser.parse_args(arguments)


def plan(only: list[str], *, quick: bool) -> dict[str, list[str]]:
    """Sort the words of --only into cases, contenders, ops and parts.

    Words of one kind add up; a kind without a word means all of it, save that parts other than the
    table run only when nothing or they themselves are named.

    Args:
        only: the words; "topk_encode" also stands for its variants.
        quick: the small case in place of all others, and the two quickest peers.

    Returns:
        The four lists, in table order.

    Raises:
        SystemExit: a word is none of these.
    """
    choices = {
        "cases": ["quick"] if quick else list(CASES),
        "contenders": list(CONTENDERS),
        "ops": list(floors(QUICK)),
        "parts": list(PARTS),
    }
    usual = {**choices, "contenders": list(CONTENDERS[:3])} if quick else choices
    chosen: dict[str, list[str]] = {}
    for kind, words in choices.items():
        # No case, contender or part holds a space, so only an op's variants match by first word.
        chosen[kind] = [word for word in words if {word, word.split()[0]} & set(only)]
    known = {
        name for words in choices.values() for word in words for name in (word, word.split()[0])
    }
    if unknown := [word for word in only if word not in known]:
        there = "; ".join(f"{kind}: {', '.join(words)}" for kind, words in choices.items())
        msg = f"run.py: --only {unknown[0]!r} names nothing that can be run. There are {there}."
        raise SystemExit(msg)
    table = any(chosen[kind] for kind in ("cases", "contenders", "ops"))
    if table or not only:
        for kind in ("cases", "contenders", "ops"):
            chosen[kind] = chosen[kind] or usual[kind]
    if not only:
        chosen["parts"] = ["imports"] if quick else list(PARTS)
    return chosen
