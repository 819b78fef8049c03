"""The kernels of codes with rows of any length, at d = 768, f = 24576, k = 32 and 8192 rows."""

from __future__ import annotations

import sys
from typing import Any

from aot.case import Case, types
from microtome.kernels import (
    batch_topk_encode,
    csr_filter,
    csr_rows,
    radix,
    segments,
    sparse_decode_csr,
    threshold_encode,
    threshold_whole,
    topk_encode,
    topk_select,
)
from microtome.kernels.dots import _whole_kernel

n, d, f, k = 8192, 768, 24576, 32
FUSED = {"enable_fp_fusion": True}
POINTED = {
    **types("i32", "bad above many close passed kept_index rows_of index near_indices"),
    **types("i32", "counts near_counts"),
    **types("i64", "found rest histogram reached kth taken near_offsets"),
    "scratch": "fp32",  # of topk_encode it holds ordered integers
}
SCALARS = {**types("i32", "shift room near_room wanted chunks"), "half": "fp32", "chunk": "i32/16"}
BN, BC = csr_rows.LISTED
PROGRAMS = "the programs of a launch"
ROWS = "a row, or up to a tile beyond the last; n < 2^29"
# Why these products stay below 2^31.
NARROW = {
    "topk_encode: GROUP_ROWS * tiles": PROGRAMS,
    "topk_encode: tl.program_id(0) // (GROUP_ROWS * tiles) * GROUP_ROWS": PROGRAMS,
    "csr_filter: row_tile * BM": ROWS,
    "batch_topk_encode: row_tile * BM": ROWS,
    "topk_narrow: row * 4": ROWS,
    "csr_filter: tile * BN": "a feature; f < 2^31",
    "threshold_whole: part * chunk": "a feature; f < 2^31",
    "threshold_whole: turn % tiles * BN": ROWS,
    "threshold_whole: tl.cdiv(failing, BN) * chunks": "turns, at most 8 n; n < 2^28",
    "batch_topk_encode: tile * BN": "a sampled feature; f < 2^31",
    "batch_topk_encode: tile * (BN // GROUP)": "a sampled feature; f < 2^31",
    "csr_filter: tile * 2": "a tile of features",
    "csr_filter: tl.program_id(0) * BN": ROWS,
    "lists: capacity * 4": "bytes of one list",
}


def case(kernel: Any, constants: dict[str, Any], **more: Any) -> Case:
    """A case in which the names above point at what they do and nothing else is given."""
    pointers = {**POINTED, **more.pop("pointers", {})}
    options = more.pop("options", FUSED)
    return Case(kernel, constants, pointers, options, SCALARS, **more)


def cases() -> dict[str, Case]:
    """Every kernel at the tile its host function chooses."""
    dots = {"HAS_B_DEC": True, "HAS_BIAS": True, "BD": topk_select.WIDTH}
    listed = {**dots, "WHOLE": False, "BN": BN, "BC": BC, "BF": topk_select.TILE[1]}
    whole = {**listed, "WHOLE": True, "BN": 1, "BC": csr_rows.SCAN}
    alone = {key: value for key, value in whole.items() if key != "WHOLE"}
    ties = types("i32", "ties")
    out = {
        "csr.overflow": case(csr_rows._overflow_kernel, {"BN": 128}),
        "csr.whole": case(_whole_kernel, {**dots, "ORDERED": False, "BC": topk_select.TILE[1]}),
        "csr.digit": case(radix._digit_kernel, {}),
        "csr.start": case(csr_filter._start_kernel, {"BN": 128}, narrow=NARROW),
        "csr.own": case(csr_filter._own_kernel, {"BN": 1, "BC": csr_filter.LISTED}),
        "batch_topk_encode.reach": case(batch_topk_encode._reach_kernel, {"BN": BN, "BC": BC}),
        "batch_topk_encode.give_up": case(batch_topk_encode._give_up_kernel, {"BN": 128}),
        "batch_topk_encode.write": case(batch_topk_encode._write_kernel, {"BN": 1, "BC": 64}),
        "batch_topk_encode.write_whole": case(
            batch_topk_encode._write_whole_kernel, {**alone, "BE": 64}
        ),
        "threshold_encode.write": case(
            threshold_encode._write_kernel, {"WINDOW": True, "BN": 1, "BC": 64}
        ),
        "threshold_encode.count": case(
            threshold_encode._count_kernel, {"WINDOW": True, "BN": BN, "BC": BC}
        ),
        **whole_rows(dots),
        **products(int(sys.argv[1])),
        **decode(),
    }
    for name, constants in (("listed", listed), ("whole", whole)):
        out[f"csr.histogram.{name}"] = case(radix._histogram_kernel, constants)
        out[f"batch_topk_encode.count.{name}"] = case(
            batch_topk_encode._count_kernel, constants, pointers=ties
        )
    return out


def whole_rows(dots: dict[str, Any]) -> dict[str, Case]:
    """Rows of `threshold_encode` whose list overflowed, with and without a window."""
    tile = {"BN": threshold_whole.ROWS, "BC": threshold_whole.FEATURES}
    out = {}
    for name, window in (("", False), ("_window", True)):
        constants, options = {**dots, **tile, "WINDOW": window}, threshold_whole.OPTIONS
        for kind, kernel, more in (
            ("count", threshold_whole._count_whole_kernel, {}),
            ("write", threshold_whole._write_whole_kernel, {"BP": 64}),
        ):  # fmt: skip
            out[f"threshold_encode.{kind}_whole{name}"] = case(
                kernel, {**constants, **more}, options=options, narrow=NARROW, needs=("fused",)
            )
    return out


def products(arch: int) -> dict[str, Case]:
    """Sample and filter: pointers and mma.sync below sm_90, descriptors and wgmma there."""
    out = {}
    constants = {"HAS_BIAS": True, "BM": 128, "BD": 64, "UPCAST": False, "TMA": arch >= 90}
    inputs = {"pointers": types("bf16", "x W"), "needs": ("HMMA",)}
    if arch >= 90:
        constants |= {"x_stride": 0, "w_stride": 0}
        inputs = {"needs": ("HGMMA", "UTMALDG")}
    leaf = {"LEAF": topk_encode.LEAVES[arch // 10]}
    group = {"GROUP": batch_topk_encode.plan(n, f, k).group}
    for name, kernel, BN, more in (
        ("batch_topk_encode.sample", batch_topk_encode._sample_kernel, 128, group),
        ("csr.filter_128", csr_filter._filter_kernel, 128, leaf),
        ("csr.filter_256", csr_filter._filter_kernel, 256, leaf),
    ):  # fmt: skip
        if BN == 256 and arch < 90:
            continue
        scalars = {**SCALARS, **types("i32", "tiles group_rows")}
        if arch >= 90:
            scalars |= {t: f"tensordesc<bf16[{m}, 64]>" for t, m in (("x", 128), ("W", BN))}
        out[name] = Case(
            kernel, {**constants, **more, "BN": BN}, inputs.get("pointers", {}),
            topk_encode.OPTIONS, scalars, inputs["needs"], narrow=NARROW,
        )  # fmt: skip
    return out


def decode() -> dict[str, Case]:
    """`sparse_decode` of such codes, and its gradients."""
    BL, BD = segments.tile(n, d, False, sparse_decode_csr.WIDEST, sparse_decode_csr.SIZE)
    BE, _ = segments.tile(n * k, d, False, sparse_decode_csr.WIDEST)
    halves = types("bf16", "table bias out grad_out W_dec")
    tile = {"CHUNK": segments.CHUNK, "BL": BL, "BD": BD}
    rows = types("i32", "rows")
    return {
        "sparse_decode_csr.fp32": case(sparse_decode_csr._sum_kernel, {**tile, "HAS_BIAS": True}),
        "sparse_decode_csr.bf16": case(
            sparse_decode_csr._sum_kernel, {**tile, "HAS_BIAS": True}, pointers=halves
        ),
        "sparse_decode_csr.grad_W_dec": case(
            sparse_decode_csr._sum_kernel, {**tile, "HAS_BIAS": False}
        ),
        "sparse_decode_csr.grad_values": case(
            sparse_decode_csr._dot_kernel, {"BE": BE, "BD": BD}, pointers=rows
        ),
    }
