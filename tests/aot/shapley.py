"""The kernels of Shapley sampling: 30 players, and 784 where that is another tile."""

from __future__ import annotations

from aot.case import Case, types
from microtome.kernels import (
    coalition_gram,
    coalition_inputs,
    mlp_layers,
    mlp_shapley,
    segments,
    shapley_reduce,
)

EXACT = {"enable_fp_fusion": False}
WALK = "a walk's numbers, which columns of a tile count"
RELU, GELU, SOFTPLUS = 1, 2, 9


def cases() -> dict[str, Case]:
    """`coalition_inputs`, `shapley_reduce`, `coalition_gram` and `mlp_shapley`."""
    return {**sampling(), **gram(), **mlp()}


def sampling() -> dict[str, Case]:
    """Inputs of the coalitions, and the sums over what came of them."""
    out: dict[str, Case] = {}
    BR, BC = segments.tile(1 << 16, 784, False, coalition_inputs.WIDEST, coalition_inputs.SIZE)
    for bits in ("i8", "i32"):
        out[f"coalition_inputs.{bits}"] = Case(
            coalition_inputs._coalition_inputs_kernel, {"GROUPED": True, "BR": BR, "BC": BC},
            {**types("i32", "ranks rows player"), **types(bits, "x background out")}, EXACT,
            types("i32", "R p"),
        )  # fmt: skip
    BR, BC = segments.tile(100, 30, False, shapley_reduce.WIDEST, shapley_reduce.SIZE)
    out["shapley_reduce"] = Case(
        shapley_reduce._shapley_reduce_kernel, {"PAIRED": True, "BR": BR, "BC": BC},
        {**types("i32", "ranks rows"), **types("fp64", "mean m2")}, EXACT,
        {**types("i32", "p S U A repeat points strata"), "o": "i32/16"},
        narrow={"shapley_reduce: p * o": WALK},
    )  # fmt: skip
    return out


def gram() -> dict[str, Case]:
    """`coalition_gram`: float64 throughout."""
    double = types("fp64", "weights values partial out")
    sizes = {**types("i32", "K P C parts each weight_row total"), "w": "i32/16"}
    out = {
        f"coalition_gram.{what}": Case(
            coalition_gram._parts_kernel, {"GRAM": what == "gram", "BC": BC},
            {**double, "coalitions": "i64"}, coalition_gram.OPTIONS, sizes,
            narrow={"coalition_gram: tl.cdiv(P, 32) * across": "programs of a launch"},
        )
        for what, BC in (("gram", 32), ("moments", 1))
    }  # fmt: skip
    out["coalition_gram.fold"] = Case(
        coalition_gram._fold_kernel, {"GRAM": True, "BE": 256}, double, EXACT, sizes
    )
    return out


def mlp() -> dict[str, Case]:
    """`mlp_shapley`, of three layers in both precisions and of two."""
    pointers = {
        **types("i32", "player columns offsets order"),
        **types("fp32", "first scratch"),
    }
    sizes = {
        **types("i32/16", "o wide hidden held_row"),
        **types("i32", "each p empty_row shift"),
    }
    out = {
        "mlp_shapley.first": Case(
            mlp_layers._first_kernel,
            {"GROUPED": True, "HELD": True, "HAS_BIAS": True, "BR": 8, "B1": 128}, pointers,
            {"enable_fp_fusion": True}, sizes,
        ),
    }  # fmt: skip
    for name, widths, code in (
        ("bf16_128", [128, 128], RELU),
        ("bf16_256", [256, 256], RELU),
        ("fp32_128", [128, 128], GELU),
        ("fp32_256", [256, 256], RELU),
        ("two_128", [128], SOFTPLUS),
    ):
        bf16 = name.startswith("bf16")
        tile, warps = mlp_layers.geometry(widths, bf16, 2000, 160 * 1024)
        constants = {
            "DEPTH": len(widths) + 1, "ACT_1": code, "ACT_2": code, "ACT_OUT": 0, "BF16": bf16,
            "UPCAST": False, **tile,
        }  # fmt: skip
        flags = {"SHARED": False, "PAIRED": True, "GROUPED": code != RELU}
        own = {**pointers, "W_2": "bf16"} if bf16 else pointers
        options = {"num_warps": warps, **mlp_layers.OPTIONS}
        promise = {"needs": ("tensor_core",)} if bf16 else {}
        if name.startswith("fp32"):  # and not its tensor-core kin
            promise = {"needs": ("fused",), "lacks": ("tensor_core",)}
        out[f"mlp_shapley.{name}"] = Case(
            mlp_shapley._walks_kernel,
            {**constants, **flags},
            own,
            options,
            sizes,
            **promise,
            narrow={"mlp_shapley: DIRECTIONS * p": "steps of a walk there and back"},
        )
        if name == "bf16_128":
            out["mlp_shapley.ends"] = Case(
                mlp_layers._ends_kernel, {**constants, "RESIDENT": False}, own, options, sizes,
                **promise,
            )  # fmt: skip
    return out
