"""The kernels of sparse autoencoders, at d = 768, f = 24576, k = 32 and 8192 rows.

`states.py` has those of the update.
"""

from __future__ import annotations

import triton
from aot.case import Case, types
from microtome.kernels import (
    bf16,
    sae_loss,
    segments,
    sparse_decode,
    topk_encode,
    topk_select,
)

n, d, f, k = 8192, 768, 24576, 32
FUSED = {"enable_fp_fusion": True}
HALVES = types("bf16", "values W_dec b_dec out grad_out x grad_values")


def cases() -> dict[str, Case]:
    """Every kernel at the tile its host function chooses."""
    return {**encode(), **decode()}


def encode() -> dict[str, Case]:
    """`topk_encode`: the products in bf16, the answers in float32."""
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


def decode() -> dict[str, Case]:
    """`sparse_decode`, its gradients, and `sae_loss`."""
    BN, BD = segments.tile(n, d, False, sparse_decode.WIDEST)
    BL, wide = segments.tile(f, d, False, sparse_decode.WIDEST, 1024)
    rows = {"HAS_BIAS": True, "BN": BN, "BD": BD, "stride_d": 1}
    out = {
        "sparse_decode.grad_values": Case(
            sparse_decode._sparse_decode_grad_values_kernel, {"BE": BN, "BD": BD, "stride_d": 1},
            {}, FUSED,
        ),
        "sparse_decode.grad_W_dec": Case(
            sparse_decode._sparse_decode_grad_W_dec_kernel,
            {"CHUNK": segments.CHUNK, "BL": BL, "BD": wide}, {}, FUSED,
        ),
    }  # fmt: skip
    for kind, pointers in (("fp32", {}), ("bf16", HALVES)):
        out[f"sparse_decode.{kind}"] = Case(
            sparse_decode._sparse_decode_kernel, rows, pointers, FUSED
        )
        BN, BD = segments.tile(n, d, False)
        options = {**FUSED, "num_warps": sae_loss.warps(BN, BD)}
        out[f"sae_loss.{kind}"] = Case(
            sae_loss._sae_loss_kernel, {**rows, "BN": BN, "BD": BD}, pointers, options
        )
    return out
