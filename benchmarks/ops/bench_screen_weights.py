"""screen_weights: a cold start, once per change of weights that `sae_update` did not make."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.checks import DisagreementError, sample
from benchmarks.harness import Subject
from benchmarks.inputs import Inputs
from microtome.ops import Screen, screen_weights


def check_screen(screen: Screen, W_enc: torch.Tensor) -> dict[str, Any]:
    """Check in float64 that the stated norms bound the true ones; report the relative error."""
    rows = sample(W_enc.shape[0])
    wide, bits = W_enc[rows].double(), screen.shadow[rows, : W_enc.shape[1]].contiguous()
    codes = bits.view(torch.bfloat16).double() if screen.kind == "bf16" else bits.double()
    scale, norm, error = screen.stats[rows, :3].double().T
    true_norm, true_error = wide.norm(dim=1), (wide - codes * scale[:, None]).norm(dim=1)
    if bool((norm < true_norm).any() or (error < true_error).any()):
        msg = "screen: a stated norm lies below the true one, so the bound does not hold"
        raise DisagreementError(msg)
    return {"kind": screen.kind, "relative_error": float((true_error / true_norm).max())}


def screen(inputs: Inputs) -> Subject:
    """The shadow of the encoder in the kind this processor screens with."""

    def run() -> Screen:
        return screen_weights(inputs.W_enc)

    return Subject(run, lambda: check_screen(run(), inputs.W_enc))


OPS = {"screen_weights": screen}
