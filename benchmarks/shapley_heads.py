"""Heads as players: coalitions of the 144 heads of a GPT-2 small, beside captum with hooks.

Both sides walk the same permutations, so they evaluate the same coalitions and must give the same
values; they alternate in one process and the best of the repeats counts. Run by hand:

    python -m benchmarks.shapley_heads --walks 7 --reps 3
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import describe
from benchmarks.patching_case import ANSWERS, SWEEPS, Question, question, save_model
from microtome.patching import logit_difference
from microtome.shapley import ShapleyValues, parts, permutation
from microtome.shapley.orders import design_of, ranks
from microtome.shapley.parts_game import ROWS


def ours(asked: Question, walks: int) -> Callable[[], Tensor]:
    """Values [heads] by permutation sampling over the game of heads, the base run included."""

    def run() -> Tensor:
        metric = logit_difference(*ANSWERS)
        game = parts.heads(asked.model, asked.clean, asked.corrupted, metric)
        found: ShapleyValues = permutation(game, n_permutations=walks, design="plain")
        return found.values[0]

    return run


def captum(asked: Question, walks: int, at_once: int) -> Callable[[], Tensor]:
    """The same by captum's ShapleyValueSampling over a mask of heads that hooks on z read."""
    from captum.attr import ShapleyValueSampling

    model, shape = asked.model, asked.sweep.shape
    size = shape.d // shape.heads
    taken: dict[int, Tensor] = {}
    mask: list[Tensor] = []

    def hook(layer: int) -> Callable[..., Any]:
        def before(_: Any, args: tuple[Tensor]) -> Any:
            if not mask:
                taken[layer] = args[0]
                return None
            present = mask[0][:, layer].repeat_interleave(size, 1)[:, None]  # [n, 1, d]
            return (torch.where(present, args[0], taken[layer]),)

        return before

    def value(inside: Tensor) -> Tensor:
        mask[:] = [inside.bool().unflatten(1, (shape.layers, shape.heads))]
        clean = asked.clean.expand(len(inside), -1)
        logits = model(clean, use_cache=False, logits_to_keep=1).logits[:, -1]
        return logits[:, ANSWERS[0]] - logits[:, ANSWERS[1]]

    orders = [order.tolist() for order in permutations(shape.layers * shape.heads, walks)]

    def run() -> Tensor:
        blocks = model.transformer.h
        handles = [b.attn.c_proj.register_forward_pre_hook(hook(i)) for i, b in enumerate(blocks)]
        try:
            with torch.no_grad():
                mask.clear()
                model(asked.corrupted, use_cache=False)
                ones = torch.ones(1, shape.layers * shape.heads)
                sampling = ShapleyValueSampling(value)
                sampling.permutation_generator = lambda *_: iter(orders)
                return sampling.attribute(
                    ones, baselines=torch.zeros_like(ones), n_samples=walks,
                    perturbations_per_eval=at_once,
                )[0]  # fmt: skip
        finally:
            for handle in handles:
                handle.remove()

    return run


def permutations(p: int, walks: int) -> Iterator[Tensor]:
    """The orders [p] that `permutation` walks with the plain design and seed 0.

    It asks for them in rounds of as many units as fill `rows_per_round`.
    """
    plan = design_of("shapley_heads", "plain", p, walks)
    each = max(1, ROWS // plan.steps)
    for first in range(0, walks, each):
        yield from ranks(plan, 1, first, min(each, walks - first), 0)[0, :, 0].argsort(-1)


def main() -> None:
    """Measure and print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--walks", type=int, default=7)
    parser.add_argument("--reps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--at-once", type=int, nargs="+", default=[16, 36, 144])
    parser.add_argument("--prompts", choices=("one", "all"), default="one")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    asked_for = parser.parse_args()
    torch.set_num_threads(asked_for.threads)
    sweep = SWEEPS["head-16" if asked_for.prompts == "one" else "head-16-all"]
    asked = question(sweep, save_model(asked_for.folder, sweep.shape))
    walks = asked_for.walks
    sides = {"microtome": ours(asked, walks)}
    sides |= {f"captum {n} at once": captum(asked, walks, n) for n in asked_for.at_once}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    cpu: dict[str, list[float]] = {name: [] for name in sides}
    values = {}
    for rep in range(asked_for.reps + 1):  # the first is for what happens once in a process
        for name, run in sides.items():
            if rep == 0 and name not in ("microtome", next(reversed(sides))):
                continue
            start, used = time.perf_counter(), time.process_time()
            values[name] = run()
            if rep:
                seconds[name].append(time.perf_counter() - start)
                cpu[name].append(time.process_time() - used)
            print(name, rep, time.perf_counter() - start, file=sys.stderr, flush=True)
    best = {name: min(taken) for name, taken in seconds.items()}
    peer = min((name for name in best if name != "microtome"), key=best.__getitem__)
    mine, theirs = values["microtome"], values[peer].double()
    about = describe(asked_for.threads)
    row = {
        "players": len(mine),
        "coalitions": walks * (len(mine) - 1) + 2,
        "tokens": sweep.length,
        "differ": sweep.differ,
        "seconds": {name: [round(s, 3) for s in taken] for name, taken in seconds.items()},
        "cpu_seconds": {name: [round(s, 3) for s in taken] for name, taken in cpu.items()},
        "ratio": round(best[peer] / best["microtome"], 2),
        "cpu_ratio": round(min(cpu[peer]) / min(cpu["microtome"]), 2),
        "apart": float((mine - theirs).abs().max()),
        "largest": float(mine.abs().max()),
        "threads": asked_for.threads,
        "machine": {key: about[key] for key in ("cpu", "isa", "load_average", "versions")},
    }
    print(json.dumps(row))


if __name__ == "__main__":
    main()
