"""The kernels of solu, feature_clamp and attribution_scores, at rows of 768 and 3072 numbers."""

from __future__ import annotations

from aot.case import Case, types
from microtome.kernels import attribution_scores, feature_clamp, solu

n, d, width = 8192, 768, 3072
FUSED = {"enable_fp_fusion": True}


def cases() -> dict[str, Case]:
    """Every kernel at the tile its host function chooses."""
    out: dict[str, Case] = {}
    BR, BD, warps = solu.geometry(n, width, False)
    tile, options = {"BR": BR, "BD": BD}, {**FUSED, "num_warps": warps}
    halves = types("bf16", "x out grad_out")
    for name, kernel in (("", solu._solu_kernel), (".grad_x", solu._solu_grad_x_kernel)):
        for dtype, pointers in (("fp32", {}), ("bf16", halves)):
            out[f"solu{name}.{dtype}"] = Case(kernel, tile, pointers, options, needs=("load_16",))
    BR, BD, warps = feature_clamp.geometry(n, d, False)
    has = {"HAS_B_ENC": True, "HAS_B_DEC": True, "HAS_THRESHOLD": True, "HAS_CURRENT": False}
    halves = types("bf16", "x targets W_enc b_enc b_dec W_dec threshold current out")
    for dtype, pointers in (("fp32", {}), ("bf16", halves)):
        out[f"feature_clamp.{dtype}"] = Case(
            feature_clamp._feature_clamp_kernel, {"MODE": "set", **has, "BR": BR, "BD": BD},
            {"features": "i64", **pointers}, {**FUSED, "num_warps": warps},
            {"m": "i32", "target_stride": "i32"}, needs=("load_16",),
        )  # fmt: skip
    scalars = {"cells": "i32/16", "units": "i32", "width": "i32/16"}
    scalars |= types("i32/16", "s_stride b_stride g_stride")
    for units in (1, 12):
        BU, BC = attribution_scores.tile(n * units, d // units, False)
        out[f"attribution_scores.{units}"] = Case(
            attribution_scores._attribution_scores_kernel, {"BU": BU, "BC": BC},
            {"changed": "i1"}, FUSED, scalars, needs=("load_16",),
        )  # fmt: skip
    return out
