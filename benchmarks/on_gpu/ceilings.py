"""What this very card reaches: copies, products, reads out of its cache."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from benchmarks.on_gpu.device import Device
from benchmarks.on_gpu.inputs import DRY, SHAPES
from benchmarks.on_gpu.item import Context, Item, Row, said

COPY = 8 * 10**9  # bytes read and written
CACHED = 24 * 2**20  # bytes that stay in the cache
LOOPS = 64  # reads of them in a launch
BLOCK = 4096


@triton.jit
def _read_kernel(source, out, loops, blocks, BLOCK: tl.constexpr):
    """Each program reads blocks of the source, all of them `loops` times over the grid."""
    program = tl.program_id(0)
    acc = tl.zeros((BLOCK,), tl.float32)
    for turn in range(0, loops):
        at = (program + turn * 37) % blocks  # neighbours of a turn read different blocks
        acc += tl.load(source + at * BLOCK + tl.arange(0, BLOCK))
    tl.store(out + program, tl.sum(acc, 0))


def copy_gbs(device: Device) -> float:
    """Bytes read plus written per second by a large copy, in 1e9."""
    count = 1024 if device.dry else COPY // 4 // 2
    source = torch.randn(count, device=device.torch)
    target = torch.empty_like(source)
    ms = min(device.time(lambda: target.copy_(source)).rounds)
    return 8 * count / ms / 1e6


def l2_gbs(device: Device) -> float:
    """Bytes per second read out of the cache: 24 MB again and again."""
    blocks = 4 if device.dry else CACHED // 4 // BLOCK
    size = 16 if device.dry else BLOCK
    programs = 2 if device.dry else 4 * torch.cuda.get_device_properties(0).multi_processor_count
    loops = 2 if device.dry else LOOPS * blocks // programs
    source = torch.randn(blocks * size, device=device.torch)
    out = torch.empty(programs, device=device.torch)

    def run() -> None:
        _read_kernel[(programs,)](
            source, out, loops, blocks, BLOCK=size, num_warps=8, enable_fp_fusion=True
        )

    ms = min(device.time(run).rounds)
    return 4 * programs * loops * size / ms / 1e6


def product_tflops(device: Device, name: str, dtype: torch.dtype, *, tf32: bool = False) -> float:
    """Operations per second of x W^T by torch, in 1e12, on random data."""
    shape = DRY if device.dry else SHAPES[name]
    # float64 and float32 are slow enough to be measured on a part of the features.
    f = shape.f if dtype == torch.bfloat16 or device.dry else shape.f // 8
    x = torch.randn(shape.n, shape.d, device=device.torch, dtype=dtype)
    W = torch.randn(f, shape.d, device=device.torch, dtype=dtype)
    out = torch.empty(shape.n, f, device=device.torch, dtype=dtype)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    try:
        ms = min(device.time(lambda: torch.mm(x, W.T, out=out)).rounds)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    return 2 * shape.n * shape.d * f / ms / 1e9


def fp8_tflops(device: Device, name: str) -> float:
    """The same in 8-bit floats by torch._scaled_mm; raises where the card has none."""
    shape = DRY if device.dry else SHAPES[name]
    kind = torch.float8_e4m3fn
    x = torch.randn(16 if device.dry else shape.n, shape.d, device=device.torch).to(kind)
    W = torch.randn(shape.f, shape.d, device=device.torch).to(kind)
    one: Tensor = torch.ones((), device=device.torch)

    def run() -> Tensor:
        return torch._scaled_mm(x, W.T, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)

    ms = min(device.time(run).rounds)
    return 2 * x.shape[0] * shape.d * shape.f / ms / 1e9


def launch_us(device: Device) -> float | None:
    """Time of one launch in a replayed graph of tiny ones, in microseconds."""
    x = torch.ones(16, device=device.torch)
    timing = device.time(lambda: x.add_(1.0))
    return None if timing.graph_ms is None else 1e3 * timing.graph_ms


def go(context: Context) -> list[Row]:
    """One row with everything; a ceiling that cannot be measured is a note."""
    device = context.device
    tests: dict[str, Any] = {
        "copy_gbs": lambda: copy_gbs(device),
        "l2_gbs": lambda: l2_gbs(device),
        **{
            f"bf16_tflops_{name}": (lambda name=name: product_tflops(device, name, torch.bfloat16))
            for name in ("S", "M", "L")
        },
        "fp32_tflops": lambda: product_tflops(device, "M", torch.float32),
        "tf32_tflops": lambda: product_tflops(device, "M", torch.float32, tf32=True),
        "fp64_tflops": lambda: product_tflops(device, "S", torch.float64),
        "fp8_tflops": lambda: fp8_tflops(device, "M"),
        "launch_us": lambda: launch_us(device),
    }
    limits: dict[str, float] = {}
    notes = []
    for name, test in tests.items():
        try:
            value = test()
            if value is None:
                notes.append(f"{name}: no graph")
            else:
                limits[name] = value
        except Exception as error:
            notes.append(f"{name}: {said(error)}")
        device.free()
    products = [value for name, value in limits.items() if name.startswith("bf16_tflops_")]
    if products:
        limits["bf16_tflops"] = max(products)
    row = {
        "part": 0,
        "item": "ceilings",
        "shape": "",
        "status": "ok" if {"copy_gbs", "l2_gbs", "bf16_tflops"} <= limits.keys() else "FAILED",
        "limits": limits,
        "device": device.describe(),
        "note": "; ".join(notes),
    }
    return [row]


def item(part: int) -> Item:
    """The first item of every part: the card may be another one than last time."""
    return Item(part, "ceilings", "", go, seconds=30.0, compiles=False)
