"""The kernels of patching, at 16384 tokens, d = 768 and heads of 64 and 128."""

from __future__ import annotations

from aot.case import Case, types
from microtome.kernels import cascade_attention, delta_linear, patch_rows, segments

T, d = 16384, 768
EXACT = {"enable_fp_fusion": False}
FUSED = {"enable_fp_fusion": True}
SIZES = {
    **types("i32/16", "i o base_stride y_base_stride add_stride out_stride pairs"),
    "T": "i32",
}
PANEL = "32 outputs of a panel, or their pairs: 2^31 would be 2^27 inputs of one layer"
HEADS = "a token's numbers before a head"
PAIRS = "(query, head) pairs of one row and key head, which a grid of blocks covers"


def cases() -> dict[str, Case]:
    """`patch_rows`, `delta_linear` and the two attention ops."""
    BT, BW = segments.tile(T, d, False, patch_rows.WIDEST, patch_rows.SIZE)
    tables = {**types("i32", "rows table"), **types("i64", "at token_row")}
    sizes = {"T": "i32", **types("i32/16", "w base_example base_token source_row")}
    return {
        "patch_rows": Case(
            patch_rows._patch_rows_kernel, {"NARROW": True, "BT": BT, "BW": BW}, tables, EXACT,
            sizes, lacks=("fused",),
        ),
        **linear(),
        **attention(),
    }  # fmt: skip


def linear() -> dict[str, Case]:
    """`delta_linear`: rows rounded in the product's program or before it."""
    out = {
        "delta_linear.rounded_rows": Case(
            delta_linear._round_rows_kernel, {"BM": 4, "BD": 512, "UPCAST": False},
            {"out": "bf16"}, FUSED, SIZES,
        ),
        "delta_linear.unpack": Case(
            delta_linear._unpack_kernel, {"BQ": 64}, types("i32", "packed out"), FUSED, SIZES,
            narrow={
                "delta_linear: lane[:, None] * pairs": PANEL,
                "delta_linear: q[:, None] * 32": PANEL,
            },
        ),
    }  # fmt: skip
    tiles = {"HAS_ADD": True, "BN": delta_linear.BN, "BD": delta_linear.BD, "UPCAST": False}
    for name, prepared, BM in (("few", False, 16), ("fused", False, 64), ("prepared", True, 128)):
        pointers = types("bf16", "x packed") if prepared else {"packed": "i32"}
        out[f"delta_linear.{name}"] = Case(
            delta_linear._delta_linear_kernel, {**tiles, "PREPARED": prepared, "BM": BM},
            pointers, delta_linear.OPTIONS, SIZES, needs=("tensor_core",),
            narrow={"delta_linear: q * 32": PANEL},
        )  # fmt: skip
    return out


def attention() -> dict[str, Case]:
    """`cascade_attention` and `swap_key_attention`: float32 and not its tensor-core kin."""
    pointers = types("i32", "rows ends tile_row q_positions first at token_row")
    pointers |= types("fp32", "q k v")
    sizes = {
        **types(
            "i32/16",
            "dh dv pairs q_example q_token k_token v_token k_base_example k_base_token",
            "v_base_example v_base_token q_new_row k_new_row v_new_row",
        ),
        **types("i32", "t h group window"),
        **types("fp32", "scale softcap most"),
    }
    heads = ("head * dh", "head_1 * dh", "key_1 * dh", "key_1 * dv", "key_head * dh",
             "key_head * dv", "key_head * group")  # fmt: skip
    pairs_of = ("tile * BM", "tl.load(rows + row * 6 + 5) * group")
    narrow = {
        **{f"cascade_attention: {product}": HEADS for product in heads},
        **{f"cascade_attention: {product}": PAIRS for product in pairs_of},
    }
    exact = {"needs": ("fused",), "lacks": ("tensor_core",), "narrow": narrow}
    out: dict[str, Case] = {}
    for dh, pairs, softcap in ((64, 1, False), (64, 32, False), (64, 64, False), (128, 64, True)):
        tile, warps = cascade_attention.geometry(pairs, dh, dh, False)
        out[f"cascade_attention.{dh}x{pairs}"] = Case(
            cascade_attention._cascade_attention_kernel,
            {"BASE": True, "SOFTCAP": softcap, **tile}, pointers,
            cascade_attention.options(tile["BV"], warps), sizes, **exact,
        )  # fmt: skip
        tile, warps = cascade_attention.swap_geometry(dh, dh, False)
        out[f"swap_key_attention.{dh}"] = Case(
            cascade_attention._swap_key_attention_kernel, {"SOFTCAP": softcap, **tile}, pointers,
            {"num_warps": warps, **cascade_attention.OPTIONS}, sizes, **exact,
        )  # fmt: skip
    return out
