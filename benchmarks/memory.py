"""Working memory of topk_encode at a million features, measured in a process of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

LIMIT_MIB = 64
SIZES = {"n": 256, "d": 64, "f": 1_048_576, "k": 32}


def topk_encode_working_memory(result_path: str, cold: str = "", **sizes: int) -> dict[str, Any]:
    """Run topk_encode once and measure the memory it takes beyond inputs and outputs.

    The inputs are x, the weights and, unless `cold`, the screen. Call it in a fresh process: `main`
    of run.py does.

    Args:
        result_path: where the row is written as JSON; "" for nowhere.
        cold: "cold" to leave the screen out of the inputs.
        **sizes: n, d, f, k in place of SIZES.

    Returns:
        extra_mib (peak less inputs less outputs), outputs_mib, limit_mib, within_limit, and the
        check against float64.
    """
    from benchmarks.checks import DisagreementError, check_code
    from benchmarks.harness import memory_mark, memory_peak
    from benchmarks.inputs import gaussian
    from microtome.ops import screen_weights, topk_encode
    from microtome.testing import Case

    inputs = gaussian(Case("million", **{**SIZES, **sizes}))
    screen = None if cold else screen_weights(inputs.W_enc)

    def encode(rows: int, features: int) -> tuple[torch.Tensor, ...]:
        part = screen and screen._replace(
            shadow=screen.shadow[:features], stats=screen.stats[:features]
        )
        W_enc, b_enc = inputs.W_enc[:features], inputs.b_enc[:features]
        return topk_encode(
            inputs.x[:rows], W_enc, b_enc, inputs.b_dec, k=inputs.case.k, screen=part
        )

    encode(8, 4096)  # threads and their buffers
    before = memory_mark()
    values, indices, candidates = encode(inputs.case.n, inputs.case.f)
    peak = memory_peak()
    outputs = sum(t.numel() * t.element_size() for t in (values, indices, candidates)) / 2**20
    row: dict[str, Any] = {
        "status": "ok",
        "extra_mib": peak - before - outputs,
        "outputs_mib": outputs,
        "limit_mib": LIMIT_MIB,
        "within_limit": peak - before - outputs <= LIMIT_MIB,
    }
    try:
        row["check"] = check_code(inputs, values, indices)
    except DisagreementError as error:
        row = {"status": "FAILED", "error": f"disagrees with float64: {error}"}
    row.update(
        case="f=2^20", contender="microtome", op=f"topk_encode memory{' cold' if cold else ''}"
    )
    if result_path:
        with Path(result_path).open("a") as file:
            file.write(json.dumps(row) + "\n")
    return row


def working_memory_in_subprocess(*, cold: bool = False) -> dict[str, Any]:
    """What a test calls: the row of `topk_encode_working_memory`, from a fresh process.

    Raises:
        RuntimeError: the process failed; its output is in the message.
    """
    from benchmarks.child import child

    rows, output = child("memory", "cold" if cold else "")
    if not rows:
        msg = f"working_memory_in_subprocess: the child left no result:\n{output}"
        raise RuntimeError(msg)
    return rows[0]


main = topk_encode_working_memory

__all__ = [
    "LIMIT_MIB",
    "SIZES",
    "main",
    "topk_encode_working_memory",
    "working_memory_in_subprocess",
]
