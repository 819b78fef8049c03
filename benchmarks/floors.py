"""What no implementation can go below: bytes and operations by formula, on measured ceilings."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from microtome.testing import Case


def floors(case: Case) -> dict[str, dict[str, int]]:
    """Bytes that must move through memory and operations that must be done, per op, in float32.

    A decoder row that several entries name is counted once: the second use may hit the cache.

    Args:
        case: the sizes n, d, f, k.

    Returns:
        op -> {"bytes", "product" (operations of the [n, d] x [d, f] product), "flops" (other
        operations)}.
    """
    n, d, f, k = case.n, case.d, case.f, case.k
    product = 2 * n * d * f
    x, code, row = 4 * n * d, 8 * n * k, 4 * d
    active = min(n * k, f) * row  # decoder rows that are named at all, at most
    shadow = 2 * f * d + 16 * f  # 16-bit weights and their norms
    moved = 2 * 3 * 4 * (2 * f * d + f + d)  # read and write the parameter and two moments of each
    encode = {"bytes": shadow + x + code, "product": product, "flops": 2 * n * k * d}
    loss = {"bytes": active + 2 * x + 2 * code, "product": 0, "flops": 4 * n * k * d}
    update = {
        "bytes": moved + shadow + 2 * x + 2 * code,
        "product": 0,
        "flops": 4 * n * k * d + 30 * f * d,
    }
    return {
        "topk_encode": encode,
        "topk_encode fast": encode,
        "topk_encode cold": {**encode, "bytes": encode["bytes"] + 4 * f * d + shadow},
        "sparse_decode": {"bytes": active + x + code, "product": 0, "flops": 2 * n * k * d},
        "sae_loss": loss,
        "sae_update": update,
        "screen_weights": {"bytes": 4 * f * d + shadow, "product": 0, "flops": 6 * f * d},
        "step": {
            key: encode[key] + loss[key] + update[key] for key in ("bytes", "product", "flops")
        },
    }


def _best(function: Callable[[], object], reps: int) -> float:
    times = []
    function()
    for _ in range(reps):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def ceilings(*, quick: bool = False) -> dict[str, float]:
    """Measure what this machine allows.

    Args:
        quick: smaller buffers and fewer reps.

    Returns:
        copy_gbs: bytes read plus written per second by torch's copy, in 1e9 (a write that also
        fetches its line counts once). fp32_gflops: the product x W^T into a buffer that is there
        already. g32_gflops: the same as F.linear, which pays for fresh pages; this is G32.
        bf16_gflops: torch's bf16 product, the ceiling of a 16-bit screen where the processor has
        one.
    """
    reps = 3 if quick else 7
    source = torch.ones(2**22 if quick else 2**26)
    target = torch.empty_like(source)
    copy = _best(lambda: target.copy_(source), reps)
    n, d, f = (256, 256, 4096) if quick else (1024, 768, 24576)
    x, W = torch.randn(n, d), torch.randn(f, d)
    out = torch.empty(n, f)
    into = _best(lambda: torch.mm(x, W.T, out=out), reps)
    fresh = _best(lambda: torch.nn.functional.linear(x, W), reps)
    # Without native bf16 torch needs hundreds of times longer, so it gets a piece.
    x16, W16 = x.bfloat16(), W[: f // 16].bfloat16()
    short = _best(lambda: torch.nn.functional.linear(x16, W16), 3)
    operations = 2e-9 * n * d * f
    return {
        "copy_gbs": 2 * 4 * source.numel() / copy / 1e9,
        "fp32_gflops": operations / into,
        "g32_gflops": operations / fresh,
        "bf16_gflops": operations / 16 / short,
    }


def allowed(case: Case, limits: dict[str, float]) -> dict[str, dict[str, Any]]:
    """The least time that the ceilings allow each op, in ms and in units of G32.

    The product is charged at torch's bf16 rate or twice the fp32 rate, whichever is faster: a
    16-bit integer multiply-add does two terms a lane where fp32 does one. The other operations go
    at the fp32 rate. Bytes and operations may overlap within an op, so the larger counts. A step is
    the sum of its ops.

    Args:
        case: the sizes.
        limits: what `ceilings` returned.

    Returns:
        op -> {"bytes", "product", "flops", "ms", "ratio", "bound" ("bytes" or "operations")}.
    """
    unit = 2 * case.n * case.d * case.f / limits["g32_gflops"] / 1e6  # ms
    rate = max(limits["bf16_gflops"], 2 * limits["fp32_gflops"])
    result: dict[str, dict[str, Any]] = {}
    for op, need in floors(case).items():
        moving = need["bytes"] / limits["copy_gbs"] / 1e6
        computing = need["product"] / rate / 1e6 + need["flops"] / limits["fp32_gflops"] / 1e6
        ms = max(moving, computing)
        bound = "bytes" if moving > computing else "operations"
        result[op] = {**need, "ms": ms, "ratio": ms / unit, "bound": bound}
    ms = sum(result[op]["ms"] for op in ("topk_encode", "sae_loss", "sae_update"))
    result["step"].update(ms=ms, ratio=ms / unit, bound="sum of its ops")
    return result
