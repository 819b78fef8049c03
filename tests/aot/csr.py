"""The kernels of codes with rows of any length, at d = 768, f = 24576, k = 32 and 8192 rows."""

from __future__ import annotations

from typing import Any

from aot.case import Case, types
from microtome.kernels import (
    batch_topk_encode,
    csr_rows,
    radix,
    segments,
    sparse_decode_csr,
    threshold_encode,
    topk_select,
)

n, d, f, k = 8192, 768, 24576, 32
FUSED = {"enable_fp_fusion": True}
INTEGERS = {
    **types("i32", "bad above many close passed kept_index rows_of index near_indices"),
    **types("i64", "found rest histogram reached kth taken near_offsets"),
}
SCALARS = {**types("i32", "shift room near_room wanted"), "half": "fp32"}
BN, BC = csr_rows.LISTED


def case(kernel: Any, constants: dict[str, Any], **more: Any) -> Case:
    """A case in which the names above are integers and nothing else is given."""
    pointers = {**INTEGERS, **more.pop("pointers", {})}
    options = more.pop("options", FUSED)
    return Case(kernel, constants, pointers, options, SCALARS, **more)


def cases() -> dict[str, Case]:
    """Every kernel at the tile its host function chooses."""
    plan = batch_topk_encode.plan(n, f, k)
    tiles = {"HAS_BIAS": True, "BM": 128, "BN": 128, "BD": 64, "UPCAST": False}
    products = {"pointers": types("bf16", "x W"), "options": csr_rows.OPTIONS}
    products["needs"] = ("tensor_core",)
    dots = {"HAS_B_DEC": True, "HAS_BIAS": True, "BD": topk_select.WIDTH}
    listed = {**dots, "WHOLE": False, "BN": BN, "BC": BC, "BF": topk_select.TILE[1]}
    whole = {**listed, "WHOLE": True, "BN": 1, "BC": csr_rows.SCAN}
    alone = {key: value for key, value in whole.items() if key != "WHOLE"}
    ties = types("i32", "ties")
    out = {
        "csr.overflow": case(csr_rows._overflow_kernel, {"BN": 128}),
        "csr.whole": case(csr_rows._whole_kernel, {**dots, "BC": topk_select.TILE[1]}),
        "csr.digit": case(radix._digit_kernel, {}),
        "batch_topk_encode.sample": case(
            batch_topk_encode._sample_kernel, {**tiles, "GROUP": plan.group}, **products
        ),
        "batch_topk_encode.reach": case(batch_topk_encode._reach_kernel, {"BN": BN, "BC": BC}),
        "batch_topk_encode.give_up": case(batch_topk_encode._give_up_kernel, {"BN": 128}),
        "batch_topk_encode.write": case(batch_topk_encode._write_kernel, {"BN": 1, "BC": 64}),
        "batch_topk_encode.write_whole": case(
            batch_topk_encode._write_whole_kernel, {**alone, "BE": 64}
        ),
        "threshold_encode.write": case(
            threshold_encode._write_kernel, {"WINDOW": True, "BN": 1, "BC": 64}
        ),
        "threshold_encode.write_whole": case(
            threshold_encode._write_whole_kernel, {**alone, "WINDOW": True}
        ),
        **decode(),
    }
    for name, wide in (("batch_topk_encode", False), ("threshold_encode", True)):
        constants = {**tiles, "PER_COLUMN": wide}
        out[f"{name}.filter"] = case(csr_rows._filter_kernel, constants, **products)
    for name, constants in (("listed", listed), ("whole", whole)):
        out[f"csr.histogram.{name}"] = case(radix._histogram_kernel, constants)
        out[f"batch_topk_encode.count.{name}"] = case(
            batch_topk_encode._count_kernel, constants, pointers=ties
        )
        out[f"threshold_encode.count.{name}"] = case(
            threshold_encode._count_kernel, {**constants, "WINDOW": True}
        )
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
