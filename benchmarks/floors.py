"""What no implementation can go below: bytes and operations by formula, on measured ceilings.

`floors` is for a processor, in float32; `Need` and the functions after it are for a GPU.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from microtome.testing import Case  # which needs pytest; a GPU machine may have none


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
    decode = {"bytes": active + x + code, "product": 0, "flops": 2 * n * k * d}
    offsets = 8 * (n + 1)  # of rows of any length
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
        "batch_topk_encode": {**encode, "bytes": encode["bytes"] + offsets},
        "threshold_encode": {**encode, "bytes": encode["bytes"] + offsets},
        "sparse_decode": decode,
        "sparse_decode_csr": {**decode, "bytes": decode["bytes"] + offsets},
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


@dataclass(frozen=True)
class Need:
    """What one call on a GPU cannot do without.

    Attributes:
        hbm: bytes through the card's memory, each input once and each output once, save that a
            gather reads a row as often as it is named unless the cache holds the whole table.
        l2: bytes read again, out of the cache.
        bf16: operations of a product on the matrix units.
        fp32, fp64: operations at the rate of a product of that type.
    """

    hbm: float = 0.0
    l2: float = 0.0
    bf16: float = 0.0
    fp32: float = 0.0
    fp64: float = 0.0

    def ms(self, limits: Mapping[str, float]) -> float:
        """The least time: memory, then what is read again, or the operations if they take longer.

        Args:
            limits: copy_gbs, l2_gbs in 1e9 bytes/s; bf16_tflops, fp32_tflops, fp64_tflops in 1e12.
        """
        moving = self.hbm / limits["copy_gbs"] / 1e6 + self.l2 / limits["l2_gbs"] / 1e6
        kinds = ("bf16", "fp32", "fp64")
        return max(moving, sum(getattr(self, t) / limits[f"{t}_tflops"] / 1e9 for t in kinds))

    def words(self) -> str:
        """The counts, for a table: "2.47 TFLOP bf16, 0.35 GB"."""
        parts = [
            f"{value / 1e12:.3g} TFLOP {name}"
            for name, value in (("bf16", self.bf16), ("fp32", self.fp32), ("fp64", self.fp64))
            if value
        ]
        parts += [f"{self.hbm / 1e9:.3g} GB"] if self.hbm else []
        parts += [f"{self.l2 / 1e9:.3g} GB again"] if self.l2 else []
        return ", ".join(parts)


def encode_need(n: int, d: int, f: int, k: int) -> Need:
    """A top k (or threshold) of x W^T from 16-bit operands: one product, its operands, the code."""
    return Need(hbm=2 * (f * d + n * d) + 8 * n * k, bf16=2 * n * d * f)


def gather_bytes(n: int, d: int, k: int, width: int) -> int:
    """Rows of `width`-byte numbers that n codes of k entries name, each as often as named."""
    return n * k * d * width


def decode_need(n: int, d: int, f: int, k: int, width: int, cache: float, *, loss: bool) -> Need:
    """Decoding; with `loss` also the error, its gradient and that of the values.

    Args:
        n: rows.
        d: model width.
        f: features.
        k: active.
        width: bytes of a number.
        cache: bytes of the card's second-level cache; a decoder that it holds is read once.
        loss: every row is read a second time, for the gradient of its value, while it is cached.
    """
    gather, table = gather_bytes(n, d, k, width), f * d * width
    rows = (2 if loss else 1) * n * d * width
    codes = (2 * width + 4 if loss else width + 4) * n * k
    held = table < cache
    again = (gather if held else 0) + (gather if loss else 0)
    return Need(hbm=(min(table, gather) if held else gather) + rows + codes, l2=again)


STATES = {"float32": 4, "bfloat16": 2, "int8": 1}  # bytes of a moment


def state_bytes(f: int, d: int, state: str = "float32", *, shadows: int = 2) -> int:
    """Both weights and both of Adam's moments of each, read and written, and 16-bit shadows.

    26 bytes a parameter with float32 moments and a shadow (or bfloat16 copy) of each matrix, 18
    with bfloat16, 14 with 8-bit moments; one less where only the encoder has a shadow.
    """
    return 2 * f * d * (8 + 4 * STATES[state]) + shadows * 2 * f * d


def touched(n: int, f: int, k: int) -> float:
    """The share of f features that n rows of k entries name, if all are alike."""
    return -math.expm1(-n * k / f)


def update_need(
    n: int, d: int, f: int, k: int, state: str = "float32", *, rowsparse: bool = False,
    mixed: bool = False,
) -> Need:  # fmt: skip
    """Gradients, optimizer, renorm and the encoder's shadow.

    Rows of x and of grad_out count once each, as if the cache held them; what the entries name of
    them, `gather_bytes` of each, is read while the parameters stream.

    Args:
        n: rows.
        d: model width.
        f: features.
        k: active.
        state: of the moments.
        rowsparse: only rows that an entry touches are moved.
        mixed: rows and the code in bfloat16, and a copy of both weights in place of the shadow.
    """
    width, shadows = (2, 2) if mixed else (4, 1)
    stream = state_bytes(f, d, state, shadows=shadows) * (touched(n, f, k) if rowsparse else 1.0)
    return Need(hbm=stream + 2 * width * n * d + (2 * width + 8) * n * k)


def step_needs(
    n: int, d: int, f: int, k: int, cache: float, state: str = "float32", *, mixed: bool = False
) -> list[Need]:
    """Of the ops of a TopK step; `mixed`: on bfloat16 rows and copies of the weights."""
    return [
        encode_need(n, d, f, k),
        decode_need(n, d, f, k, 2 if mixed else 4, cache, loss=True),
        update_need(n, d, f, k, state, mixed=mixed),
    ]


def step_ms(needs: list[Need], limits: Mapping[str, float]) -> float:
    """The floor of a step: its ops follow on each other, so their floors add up."""
    return sum(need.ms(limits) for need in needs)


def exchange_bytes(
    n: int, d: int, k: int, ranks: int, k_aux: int = 0, rows: int = 1
) -> dict[str, int]:
    """Bytes that a rank of a feature-parallel step receives from the others, in float32.

    No time follows from them: that is a matter of the link between the ranks.

    Args:
        n: rows of the batch; every rank reads them all.
        d: model width.
        k: active, of all ranks together.
        ranks: how many hold the features.
        k_aux: active in AuxK, while latents are dead.
        rows: how many such rows of ranks share the batch out.

    Returns:
        "encode": values and indices of the first 2 k / ranks + 1 candidates of every other rank;
        "encode whole": of all k, for rows that take the second round, too; "decode": the other
        ranks' parts of this rank's rows, then the rows of the others; "data": from the other rows
        of ranks the gradients of the reconstruction, and value, index and gradient of the entries
        of this rank's features, k / ranks a row if they are spread evenly; "b_dec": the parts of
        its gradient, in float64; "step": encode, decode and data, twice where there is AuxK, and
        b_dec. A dense gradient would be 2 f d numbers.
    """
    others, here = ranks - 1, -(-n // rows)

    def candidates(active: int) -> int:
        return 8 * here * others * min(active, 2 * active // ranks + 1)

    def codes(active: int) -> int:
        return 4 * here * (rows - 1) * (d + 3 * -(-active // ranks))

    decode = 2 * 4 * -(-here // ranks) * d * others
    encode, b_dec = candidates(k), 8 * d * others
    aux = candidates(k_aux) + decode + codes(k_aux) if k_aux else 0
    return {
        "encode": encode,
        "encode whole": 8 * here * others * k,
        "decode": decode,
        "data": codes(k),
        "b_dec": b_dec,
        "step": encode + decode + codes(k) + b_dec + aux,
    }
