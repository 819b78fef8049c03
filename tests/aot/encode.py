"""The kernels of `topk_encode`: tiles for short and for long rows, and what follows the filter."""

from __future__ import annotations

import sys
from typing import Any

import triton
from aot.case import Case, types
from microtome.kernels import bf16, fp8, topk_encode, topk_encode_fp8, topk_narrow, topk_select
from microtome.kernels.dots import _whole_kernel

n, f, k = 8192, 24576, 32
FUSED = {"enable_fp_fusion": True}
SCALARS = {"width": "i32/16", **types("i32", "tiles group_rows groups stride")}

PROGRAMS = "the programs of a launch"
FEATURES = "a feature, or a tile's first; f < 2^31"
# Why these products stay below 2^31; tests/ops/test_topk_encode_triton.py checks plans for it.
NARROW = {
    "topk_encode: GROUP_ROWS * tiles": PROGRAMS,
    "topk_encode: tl.program_id(0) // (GROUP_ROWS * tiles) * GROUP_ROWS": PROGRAMS,
    "topk_encode: row_tile * BM": "a row of a block, whose lists fit the workspace",
    "topk_encode: line * 4": "a row of a block, whose lists fit the workspace",
    "topk_narrow: row * 4": "a row of a block, whose lists fit the workspace",
    "topk_encode: tile * stride": FEATURES,
    "topk_encode: tile * stride * BN": FEATURES,
    "topk_narrow: at // TILE * stride": FEATURES,
    "topk_narrow: tile * 2": FEATURES,
    "topk_narrow: tile * TILE": FEATURES,
    "topk_narrow: i * groups": "a sampled feature of one row",
    "lists: capacity * 4": "bytes of one list",
    "topk_select: BC * tl.num_programs(1)": "at most SPREAD programs a row",
    "topk_narrow: BC * tl.num_programs(1)": "two programs a row",
}


def cases() -> dict[str, Case]:
    """Every kernel at the tile its host function chooses on the architecture of argv[1]."""
    shadow = {"HAS_SUBTRACT": True, "STORE": True, "BR": 4, "BD": 512}
    return {
        **products(int(sys.argv[1])), **after(), **in_8_bits(int(sys.argv[1])),
        "bf16.shadow": Case(bf16._shadow_kernel, shadow, {"shadow": "i16"}, FUSED),
    }  # fmt: skip


def products(arch: int) -> dict[str, Case]:
    """Sample and filter: pointers and mma.sync below sm_90, descriptors and wgmma there."""
    out = {}
    for BN in (128, 256) if arch >= 90 else (128,):
        plan = topk_encode.plan(n, f, k, BN)
        constants = {
            "HAS_BIAS": True, "BM": plan.BM, "BN": BN, "BD": plan.BD, "UPCAST": False,
            "TMA": arch >= 90, "FP8": False,
        }  # fmt: skip
        inputs = types("*bf16/16", "x W")
        if arch >= 90:
            constants |= {"x_stride": 0, "w_stride": 0}
            inputs = {
                "x": f"tensordesc<bf16[{plan.BM}, {plan.BD}]>",
                "W": f"tensordesc<bf16[{BN}, {plan.BD}]>",
            }
        scalars = {**SCALARS, **inputs}
        needs = ("HGMMA", "UTMALDG") if arch >= 90 else ("HMMA",)
        leaf = {"LEAF": topk_encode.LEAVES[arch // 10]}
        for name, kernel, more in (
            ("sample", topk_encode._sample_kernel, {}),
            ("filter", topk_encode._filter_kernel, leaf),
        ):  # fmt: skip
            out[f"topk_encode.{name}_{BN}"] = Case(
                kernel,
                {**constants, **more},
                {},
                topk_encode.OPTIONS,
                scalars,
                needs,
                narrow=NARROW,
            )
    return out


def narrow(
    below: int, length: int, in_fp8: bool = False
) -> tuple[dict[str, Any], dict[str, str], dict[str, Any]]:
    """Constants, pointers and options for lists of this length."""
    constants = {"ANSWER": False, "BR": 1, "BELOW": below, "BC": length, "FP8": in_fp8}
    return constants, {"sure": "i32"}, {**FUSED, "num_warps": topk_narrow.warps(length)}


def in_8_bits(arch: int) -> dict[str, Case]:
    """What `topk_encode_fp8` launches; products of e4m3 from compute capability 8.9 on."""
    plan = topk_encode_fp8.plan(n, f, k, 6.0, 4.0)
    groups = triton.next_power_of_2(plan.groups)
    length = triton.next_power_of_2(plan.capacity)
    sampled = {
        "TILE": plan.BN, "GROUP": plan.group, "BR": 1, "BG": groups, "BC": topk_narrow.CHUNK,
        "FP8": True,
    }  # fmt: skip
    rows = {"HAS_SUBTRACT": True, "BR": fp8.ROWS}
    observed = {"BR": 1, "BC": topk_narrow.SEEN}
    scalars = {**SCALARS, **types("fp32", "sigmas repair")}
    short = topk_narrow._narrow_kernel, *narrow(0, topk_narrow.SHORT, True)
    long = topk_narrow._narrow_kernel, *narrow(topk_narrow.SHORT + 1, length, True)
    kernels = {
        "rows": (fp8._rows_kernel, rows, {"shadow": "u8"}, fp8.OPTIONS),
        "sampled": (topk_narrow._sampled_kernel, sampled, {}, topk_narrow.THRESHOLD_OPTIONS),
        "narrow": short,
        "narrow_long": long,
        "observed": (topk_narrow._observed_kernel, observed, {}, topk_narrow.THRESHOLD_OPTIONS),
    }
    out = {
        f"topk_encode_fp8.{name}": Case(*parts, scalars, narrow=NARROW)
        for name, parts in kernels.items()
    }
    if arch < 89:
        return out
    tile = {
        "HAS_BIAS": True, "BM": plan.BM, "BN": plan.BN, "BD": plan.BD, "UPCAST": False,
        "TMA": arch >= 90, "FP8": True,
    }  # fmt: skip
    if arch >= 90:
        tile |= {"x_stride": 0, "w_stride": 0}
        block = f"tensordesc<fp8e4nv[{plan.BM}, {plan.BD}]>"  # BM = BN
        scalars = {**scalars, "x": block, "W": block}
    else:
        scalars = {**scalars, **types("*fp8e4nv/16", "x W")}
    needs = ("QGMMA", "UTMALDG") if arch >= 90 else ("tensor_core",)
    leaf = {"LEAF": topk_encode.LEAVES[arch // 10]}
    for name, kernel, more in (
        ("sample", topk_encode._sample_kernel, {}),
        ("filter", topk_encode._filter_kernel, leaf),
    ):
        out[f"topk_encode_fp8.{name}"] = Case(
            kernel, {**tile, **more}, {}, topk_encode.OPTIONS, scalars, needs, narrow=NARROW
        )
    return out


def after() -> dict[str, Case]:
    """From the sample and the lists to the answer."""
    plan = topk_encode.plan(n, f, k)
    dots = {"HAS_B_DEC": True, "HAS_BIAS": True, "BD": topk_select.WIDTH}
    BN, BC = topk_select.TILE
    value = {**dots, "ALL": False, "BN": BN, "BC": BC}
    groups = triton.next_power_of_2(plan.groups)
    length = triton.next_power_of_2(plan.capacity)
    sampled = {
        "TILE": 128, "GROUP": plan.group, "BR": 1, "BG": groups, "BC": topk_narrow.CHUNK,
        "FP8": False,
    }  # fmt: skip
    pick = {**dots, "BC": BC, "BF": topk_select.SCAN}
    select = {"LISTED": False, "BN": BN, "BC": topk_select.BLOCK}
    halves = types("bf16", "x b_dec W bias")
    sure = {"sure": "i32"}
    kernels = {
        "tops": (topk_narrow._tops_kernel, {"BN": 128}, {}, FUSED),
        "sampled": (topk_narrow._sampled_kernel, sampled, {}, topk_narrow.THRESHOLD_OPTIONS),
        "narrow": (topk_narrow._narrow_kernel, *narrow(0, topk_narrow.SHORT)),
        "narrow_long": (topk_narrow._narrow_kernel, *narrow(topk_narrow.SHORT + 1, length)),
        "value": (topk_select._value_kernel, value, {}, FUSED),
        "value_bf16": (topk_select._value_kernel, value, halves, FUSED),
        "rest": (topk_narrow._rest_kernel, {**dots, "BN": BN, "BC": BC}, sure, FUSED),
        "rest_bf16": (
            topk_narrow._rest_kernel, {**dots, "BN": BN, "BC": BC}, {**sure, **halves}, FUSED,
        ),
        "threshold": (topk_select._threshold_kernel, {"BN": 1, "BG": groups}, {}, FUSED),
        "select": (topk_select._select_kernel, select, {}, FUSED),
        "repair_value": (_whole_kernel, {**dots, "ORDERED": True, "BC": BC}, {}, FUSED),
        "repair_pick": (topk_select._repair_pick_kernel, pick, {}, FUSED),
    }  # fmt: skip
    return {
        f"topk_encode.{name}": Case(*parts, SCALARS, narrow=NARROW)
        for name, parts in kernels.items()
    }
