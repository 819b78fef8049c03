"""Inputs from a real model: SmolLM2's residual stream, and an SAE trained on it by our own step.

Real activations have what Gaussian ones lack: two massive dimensions, a few rows a hundred times
longer than the rest, and correlated features, which is where a bound-based screen keeps the most
candidates.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from benchmarks.inputs import HELD_OUT_ROWS, Inputs, initial_weights, save
from benchmarks.step import Trainer
from microtome._seed import generator
from microtome.testing import Case

LAYERS = (10, 20, 28)
CONTEXT, TOKENS = 128, 25_088
TRAINING_STEPS, TRAINING_RATE = 120, 1e-3


def real_case(layer: int) -> Case:
    """The sizes measured on a layer of SmolLM2, whose width is 576."""
    return Case(f"layer{layer}", 1024, 576, 16384, 32)


def path_of(folder: Path, layer: int) -> Path:
    """Where the inputs of a layer lie."""
    return folder / f"smollm2-layer{layer}.safetensors"


def capture_rows(layers: list[int]) -> dict[int, Tensor]:
    """The residual stream before each layer over the King James text, [tokens, d] by layer."""
    from microtome.models import capture, corpus, load, tokenise

    loaded = load("smollm2")
    tokens = tokenise(loaded.tokenizer, corpus("kjv").text, CONTEXT, TOKENS)
    acts = capture(loaded.model, [f"resid_pre.{layer}" for layer in layers], tokens, batch_size=8)
    return {layer: acts[f"resid_pre.{layer}"].flatten(0, 1).float() for layer in layers}


def prepare(rows: Tensor, case: Case, steps: int = TRAINING_STEPS) -> Inputs:
    """Scale rows to a median length of sqrt(d), train an SAE on them, and take a batch to time.

    Args:
        rows: [m, d] activations; the last 512, after shuffling, are held out.
        case: the sizes n, d, f, k.
        steps: training steps.

    Returns:
        Inputs with trained weights and the rows as pool.
    """
    order = torch.randperm(rows.shape[0], generator=generator(0, "rows"))
    pool = rows[order] * (case.d**0.5 / rows.norm(dim=1).median())
    start = initial_weights(case.f, case.d, pool[:-HELD_OUT_ROWS].mean(0))
    untrained = Inputs(case, pool[: case.n], *start, start, pool)
    trainer = Trainer(start, case.k, lr=TRAINING_RATE)
    for step in range(steps):
        trainer.step(untrained.batch(step))
    return Inputs(case, pool[: case.n], *trainer.params, start, pool)


def main(_: str, folder: str, layers: str) -> None:
    """Write one file a layer into `folder`, those that are there already excepted."""
    absent = [
        int(layer) for layer in layers.split(",") if not path_of(Path(folder), int(layer)).exists()
    ]
    for layer, rows in capture_rows(absent).items() if absent else ():
        save(path_of(Path(folder), layer), prepare(rows, real_case(layer)))
