"""sae_update: both weight gradients, projection, Adam, renorm and the screen, in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.checks import check_update
from benchmarks.harness import Subject
from benchmarks.inputs import Inputs
from benchmarks.ops.bench_sparse_decode import code_of
from microtome._seed import generator
from microtome.ops import sae_loss, sae_update, screen_weights
from microtome.ops.sae_update import Code, UpdateRule

STEP = 10


def warm_moments(params: tuple[Tensor, ...]) -> list[Tensor | None]:
    """Adam's state as after some steps; from zero moments a step is a sign, which hides errors."""
    g = generator(0, "moments")
    moments: list[Tensor | None] = []
    for p in params:
        moments.append(torch.randn(p.shape, generator=g).mul_(1e-5))
        moments.append(torch.rand(p.shape, generator=g).add_(0.5).mul_(1e-10))
    return moments


def step_code(inputs: Inputs) -> Code:
    """The code of the timed activations with its gradients, scaled so that the loss is the FVU."""
    values, indices = code_of(inputs)
    _, grad_out, grad_values = sae_loss(inputs.x, values, indices, inputs.W_dec, inputs.b_dec)
    variance = float((inputs.x - inputs.x.mean(0)).pow(2).sum())
    return Code(indices, values, grad_values, grad_out, 1.0 / variance)


def update(inputs: Inputs) -> Subject:
    """One Adam step, projection and renorm included, with the screen refreshed in the same pass."""
    code, x = step_code(inputs), inputs.x - inputs.b_dec
    params = tuple(w.clone() for w in inputs.weights)
    moments, rule, screen = warm_moments(params), UpdateRule(lr=1e-4), screen_weights(inputs.W_enc)
    count = STEP

    def run() -> Tensor:
        nonlocal count
        count += 1
        return sae_update(code, x, params, moments, rule, count, screen=screen)

    def check() -> dict[str, Any]:
        nonlocal count
        count += 1
        return check_update(code, x, params, moments, rule, count, screen)

    return Subject(run, check)


OPS = {"sae_update": update}
