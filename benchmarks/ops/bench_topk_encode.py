"""topk_encode: exact and fast with a cached screen, and exact from cold."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from benchmarks.checks import check_code
from benchmarks.harness import Subject
from benchmarks.inputs import Inputs
from microtome.ops import Screen, screen_weights, topk_encode

# "fast" selects by 16-bit scores: bf16 rounds x and w by 2^-9 each.
FAST_SLACK = 2.0**-8


def survivors(candidates: Tensor, f: int) -> dict[str, Any]:
    """How many features a row were computed in float32; a row computed whole counts f."""
    c = candidates.double()
    return {
        "mean": float(c.mean()),
        "median": float(c.median()),
        "p99": float(c.quantile(0.99)),
        "max": int(candidates.max()),
        "rows_whole": int((candidates == f).sum()),
    }


def _subject(inputs: Inputs, precision: str, screen: Screen | None) -> Subject:
    k, f = inputs.case.k, inputs.case.f

    def run() -> tuple[Tensor, Tensor, Tensor]:
        return topk_encode(
            inputs.x,
            inputs.W_enc,
            inputs.b_enc,
            inputs.b_dec,
            k=k,
            precision=precision,
            screen=screen,
        )

    def check() -> dict[str, Any]:
        values, indices, _ = run()
        return check_code(inputs, values, indices, slack=FAST_SLACK if precision == "fast" else 0.0)

    return Subject(run, check, lambda: {"survivors": survivors(run()[2], f)})


def exact(inputs: Inputs) -> Subject:
    """The exact answer, with the encoder's screen at hand, as in training."""
    return _subject(inputs, "exact", screen_weights(inputs.W_enc))


def fast(inputs: Inputs) -> Subject:
    """The low-precision selection."""
    return _subject(inputs, "fast", screen_weights(inputs.W_enc))


def cold(inputs: Inputs) -> Subject:
    """The exact answer from the float32 weights alone."""
    return _subject(inputs, "exact", None)


OPS = {"topk_encode": exact, "topk_encode fast": fast, "topk_encode cold": cold}
