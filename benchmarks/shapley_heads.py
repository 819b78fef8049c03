"""Heads as players: coalitions of the 144 heads of a GPT-2 small, beside captum with hooks.

Both sides walk the same permutations, those that ours drew, so they evaluate the same coalitions
and must give the same values; they take turns in one process.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.checks import DisagreementError
from benchmarks.patching_case import ANSWERS, SWEEPS, Question, question, save_model
from microtome.patching import logit_difference
from microtome.shapley import ShapleyValues, parts, permutation

CASE = "heads-144"
AT_ONCE = (36, 144)  # perturbations in a call of captum: around the quickest


def ours(asked: Question, walks: int, orders: list[list[int]]) -> Callable[[], Tensor]:
    """Values [heads] by permutation sampling over the game of heads, the base run included.

    `orders` is filled with the permutations walked.
    """

    def run() -> Tensor:
        metric = logit_difference(*ANSWERS)
        game = parts.heads(asked.model, asked.clean, asked.corrupted, metric)
        answer = game.values
        orders.clear()

        def values(ranks: Tensor, spans: Tensor, who: Tensor) -> Tensor:
            orders.extend(ranks.argsort(-1).tolist())
            return answer(ranks, spans, who)

        game.values = values  # type: ignore[method-assign]
        found: ShapleyValues = permutation(game, n_permutations=walks, design="plain")
        return found.values[0]

    return run


def captum(asked: Question, orders: list[list[int]], at_once: int) -> Callable[[], Tensor]:
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
                    ones, baselines=torch.zeros_like(ones), n_samples=len(orders),
                    perturbations_per_eval=at_once,
                )[0]  # fmt: skip
        finally:
            for handle in handles:
                handle.remove()

    return run


def main(result_path: str, request: str) -> None:
    """Entry of the child: `request` is JSON (cache, threads, walks, reps); rows to `result_path`.

    Raises:
        DisagreementError: the two sides give different values.
    """
    asked_for = json.loads(request)
    torch.set_num_threads(asked_for["threads"])
    sweep = SWEEPS["head-16"]
    asked = question(sweep, save_model(Path(asked_for["cache"]), sweep.shape))
    walks = asked_for["walks"]
    orders: list[list[int]] = []
    sides = {"microtome": ours(asked, walks, orders)}
    sides |= {f"captum SVS, hooks, {n} a call": captum(asked, orders, n) for n in AT_ONCE}
    ms: dict[str, list[float]] = {name: [] for name in sides}
    values: dict[str, Tensor] = {}
    for turn in range(asked_for["reps"] + 1):  # the first is for what happens once in a process
        for name, run in sides.items():
            if turn == 0 and name not in ("microtome", next(reversed(sides))):
                continue
            start = time.perf_counter()
            values[name] = run()
            if turn:
                ms[name].append(1e3 * (time.perf_counter() - start))
    mine = values["microtome"]
    with Path(result_path).open("a") as file:
        for name, taken in ms.items():
            apart = float((mine - values[name]).abs().max())
            if apart > 1e-5:
                msg = f"{name}: values differ by {apart:.2g}"
                raise DisagreementError(msg)
            row = {
                "case": CASE,
                "contender": name,
                "threads": asked_for["threads"],
                "status": "ok",
                "ms": statistics.median(taken),
                "ms_least": min(taken),
                "ms_most": max(taken),
                "turns": len(taken),
                "evaluations": walks * (len(mine) - 1) + 2,
                "apart": apart,
            }
            file.write(json.dumps(row) + "\n")
