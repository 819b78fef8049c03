"""The kernels of `topk_encode`, at d = 768, f = 24576, k = 32 and 8192 rows."""

from __future__ import annotations

import triton
from aot.case import Case, types
from microtome.kernels import bf16, topk_encode, topk_select

n, f, k = 8192, 24576, 32
FUSED = {"enable_fp_fusion": True}


def cases() -> dict[str, Case]:
    """The products in bf16, the answers in float32."""
    plan = topk_encode.plan(n, f, k)
    tiles = {"HAS_BIAS": True, "BM": plan.BM, "BN": plan.BN, "BD": plan.BD, "UPCAST": False}
    shadows = types("bf16", "x W")
    products = {**topk_encode.OPTIONS, "num_warps": 8}
    dots = {"HAS_B_DEC": True, "HAS_BIAS": True, "BD": topk_select.WIDTH}
    BN, BC = topk_select.TILE
    value = {**dots, "ALL": False, "BN": BN, "BC": BC}
    groups = triton.next_power_of_2(plan.groups)
    select = {"LISTED": False, "BN": BN, "BC": topk_select.BLOCK}
    pick = {**dots, "BC": BC, "BF": topk_select.SCAN}
    shadow = {"HAS_SUBTRACT": True, "STORE": True, "BR": 4, "BD": 512}
    tensor_cores = {"needs": ("tensor_core",)}
    plain = [
        ("threshold", topk_select._threshold_kernel, {"BN": 1, "BG": groups}, {}),
        ("value", topk_select._value_kernel, value, {}),
        ("value_bf16", topk_select._value_kernel, value, types("bf16", "x b_dec W bias")),
        ("select", topk_select._select_kernel, select, {}),
        ("repair_value", topk_select._repair_value_kernel, {**dots, "BC": BC}, {}),
        ("repair_pick", topk_select._repair_pick_kernel, pick, {}),
    ]
    return {
        "topk_encode.sample": Case(
            topk_encode._sample_kernel, {**tiles, "GROUP": plan.group}, shadows, products,
            **tensor_cores,
        ),
        "topk_encode.filter": Case(
            topk_encode._filter_kernel, tiles, shadows, products, **tensor_cores,
            narrow={"topk_encode: row * 4": "rows of a block, whose lists fit the workspace"},
        ),
        **{f"topk_encode.{name}": Case(*rest, FUSED) for name, *rest in plain},
        "bf16.shadow": Case(bf16._shadow_kernel, shadow, {"shadow": "i16"}, FUSED),
    }  # fmt: skip
