"""Compile Triton kernels for GPUs that need not be here; print what came of it as JSON.

Run in a process without TRITON_INTERPRET: `python tests/triton_aot.py 80` or 90. The tiles are
those that the host functions choose at d = 768, f = 24576, k = 32, and for
patching at 16384 tokens, d = 768, heads of 64 and 128.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from microtome.kernels import (
    bf16,
    cascade_attention,
    coalition_gram,
    coalition_inputs,
    delta_linear,
    mlp_layers,
    mlp_shapley,
    patch_rows,
    sae_loss,
    segments,
    shapley_reduce,
    sparse_decode,
    topk_encode,
    topk_select,
)
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
INTEGERS = {
    "n", "k", "d", "f", "rows", "m", "entries", "capacity", "slots", "groups", "rank", "stride",
    "turns",
    "x_stride", "w_stride", "stride_f", "shadow_stride",
    "T", "i", "o", "w", "t", "h", "group", "dh", "dv", "window", "pairs",
    "base_stride", "y_base_stride", "add_stride", "out_stride",
    "base_example", "base_token", "source_row", "q_example", "q_token", "k_token", "v_token",
    "k_base_example", "k_base_token", "v_base_example", "v_base_token",
    "q_new_row", "k_new_row", "v_new_row",
    "R", "p", "K", "P", "C", "S", "U", "A", "parts", "each", "weight_row", "total", "repeat",
    "points", "strata", "wide", "hidden", "held_row", "empty_row", "shift",
}  # fmt: skip
FLOATS = {
    "unit", "lr", "beta1", "rest1", "beta2", "rest2", "eps", "decay", "shrink", "root",
    "scale", "softcap", "most",
}  # fmt: skip
POINTERS = {
    "indices": "i32", "index": "i32", "count": "i32", "failed": "i32", "failures": "i32",
    "candidates": "i32",
    "source": "i32", "latents": "i32", "touched": "i32", "scratch": "i32", "offsets": "i64",
    "packed": "i32", "at": "i32", "token_row": "i32", "order": "i64",
    "ends": "i32", "tile_row": "i32", "q_positions": "i32", "first": "i32",
}  # fmt: skip
UNALIGNED = {
    "k", "rank", "turns", "slots", "T", "t", "h", "group", "window",
    "R", "p", "K", "P", "C", "S", "U", "A", "parts", "each", "weight_row", "total", "repeat",
    "points", "strata", "empty_row", "shift",
}  # fmt: skip

# kernel, constants, pointer types other than fp32 (of what is no pointer elsewhere too), options
Case = tuple[Any, dict[str, Any], dict[str, str], dict[str, Any]]


def patching_cases() -> dict[str, Case]:
    """The kernels of patch_rows, delta_linear and the two attention ops."""
    T, d = 16384, 768
    tables = {"rows": "i32", "k": "fp32"}
    BT, BW = segments.tile(T, d, False, patch_rows.WIDEST, patch_rows.SIZE)
    wide = dict.fromkeys(("at", "token_row"), "i64")
    out: dict[str, Case] = {
        "patch_rows": (
            patch_rows._patch_rows_kernel, {"NARROW": True, "BT": BT, "BW": BW},
            {**tables, **wide, "table": "i32"}, {"enable_fp_fusion": False},
        ),
        "delta_linear.rounded_rows": (
            delta_linear._round_rows_kernel, {"BM": 4, "BD": 512, "UPCAST": False},
            {"out": "bf16"}, {"enable_fp_fusion": True},
        ),
        "delta_linear.unpack": (
            delta_linear._unpack_kernel, {"BQ": 64}, {"out": "i32"}, {"enable_fp_fusion": True},
        ),
    }  # fmt: skip
    tiles = {"HAS_ADD": True, "BN": delta_linear.BN, "BD": delta_linear.BD, "UPCAST": False}
    for name, prepared, BM in (("few", False, 16), ("fused", False, 64), ("prepared", True, 128)):
        types = dict.fromkeys(("x", "packed"), "bf16") if prepared else {}
        constants = {**tiles, "PREPARED": prepared, "BM": BM}
        out[f"delta_linear.{name}"] = (
            delta_linear._delta_linear_kernel, constants, types, delta_linear.OPTIONS,
        )  # fmt: skip
    for dh, pairs, softcap in ((64, 1, False), (64, 32, False), (64, 64, False), (128, 64, True)):
        tile, warps = cascade_attention.geometry(pairs, dh, dh, False)
        out[f"cascade_attention.{dh}x{pairs}"] = (
            cascade_attention._cascade_attention_kernel,
            {"BASE": True, "SOFTCAP": softcap, **tile}, tables,
            {"num_warps": warps, **cascade_attention.OPTIONS},
        )  # fmt: skip
        tile, warps = cascade_attention.swap_geometry(dh, dh, False)
        out[f"swap_key_attention.{dh}"] = (
            cascade_attention._swap_key_attention_kernel, {"SOFTCAP": softcap, **tile}, tables,
            {"num_warps": warps, **cascade_attention.OPTIONS},
        )  # fmt: skip
    return out


def cases() -> dict[str, Case]:
    """Every kernel at the size it is used at."""
    sae = {
        name: (kernel, constants, types, {**topk_encode.OPTIONS, "num_warps": warps})
        for name, (kernel, constants, types, warps) in sae_cases().items()
    }
    return {**sae, **patching_cases(), **shapley_cases()}


def shapley_cases() -> dict[str, Case]:
    """The kernels of Shapley sampling: 30 players, and 784 where that is another tile."""
    tables: dict[str, str] = dict.fromkeys(("ranks", "rows", "player"), "i32")
    out: dict[str, Case] = {}
    BR, BC = segments.tile(1 << 16, 784, False, coalition_inputs.WIDEST, coalition_inputs.SIZE)
    for bits in ("i8", "i32"):
        types = {**tables, **dict.fromkeys(("x", "background", "out"), bits)}
        out[f"coalition_inputs.{bits}"] = (
            coalition_inputs._coalition_inputs_kernel, {"GROUPED": True, "BR": BR, "BC": BC},
            types, {"enable_fp_fusion": False},
        )  # fmt: skip
    BR, BC = segments.tile(100, 30, False, shapley_reduce.WIDEST, shapley_reduce.SIZE)
    types = {"ranks": "i32", "rows": "i32", "mean": "fp64", "m2": "fp64"}
    out["shapley_reduce"] = (
        shapley_reduce._shapley_reduce_kernel, {"PAIRED": True, "BR": BR, "BC": BC},
        types, {"enable_fp_fusion": False},
    )  # fmt: skip
    double = dict.fromkeys(("weights", "values", "partial", "out"), "fp64")
    types = {**double, "coalitions": "i64", "k": "i32"}
    for what, BC in (("gram", 32), ("moments", 1)):
        out[f"coalition_gram.{what}"] = (
            coalition_gram._parts_kernel, {"GRAM": what == "gram", "BC": BC}, types,
            coalition_gram.OPTIONS,
        )  # fmt: skip
    out.update(mlp_cases())
    out["coalition_gram.fold"] = (
        coalition_gram._fold_kernel, {"GRAM": True, "BE": 256}, double,
        {"enable_fp_fusion": False},
    )  # fmt: skip
    return out


def mlp_cases() -> dict[str, Case]:
    """The kernels of mlp_shapley, of three layers in both precisions and of two."""
    types = {
        **dict.fromkeys(("player", "columns", "offsets", "order"), "i32"),
        **dict.fromkeys(("first", "scratch"), "fp32"),
    }
    out: dict[str, Case] = {
        "mlp_shapley.first": (
            mlp_layers._first_kernel,
            {"GROUPED": True, "HELD": True, "HAS_BIAS": True, "BR": 8, "B1": 128}, types,
            {"enable_fp_fusion": True},
        ),
    }  # fmt: skip
    RELU, GELU, SOFTPLUS = 1, 2, 9
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
        own = {**types, "W_2": "bf16"} if bf16 else types
        options = {"num_warps": warps, **mlp_layers.OPTIONS}
        out[f"mlp_shapley.{name}"] = (
            mlp_shapley._walks_kernel, {**constants, **flags}, own, options,
        )  # fmt: skip
        if name == "bf16_128":
            out["mlp_shapley.ends"] = (
                mlp_layers._ends_kernel, {**constants, "RESIDENT": False}, own, options,
            )  # fmt: skip
    return out


def sae_cases() -> dict[str, tuple[Any, dict[str, Any], dict[str, str], int]]:
    """The kernels of an SAE: kernel, constants, pointer types other than fp32, warps."""
    d, f, k, n = 768, 24576, 32, 8192
    plan = topk_encode.plan(n, f, k)
    tiles = {"HAS_BIAS": True, "BM": plan.BM, "BN": plan.BN, "BD": plan.BD, "UPCAST": False}
    shadows = {"x": "bf16", "W": "bf16"}
    dots = {"HAS_B_DEC": True, "HAS_BIAS": True, "BD": topk_select.WIDTH}
    BN, BC = topk_select.TILE
    out: dict[str, tuple[Any, dict[str, Any], dict[str, str], int]] = {
        "topk_encode.sample": (topk_encode._sample_kernel, {**tiles, "GROUP": plan.group},
        shadows, 8),
        "topk_encode.filter": (topk_encode._filter_kernel, tiles, shadows, 8),
        "topk_encode.threshold": (
            topk_select._threshold_kernel,
            {"BN": 1, "BG": triton.next_power_of_2(plan.groups)},
            {},
            4,
        ),
        "topk_encode.value": (topk_select._value_kernel, {**dots, "ALL": False, "BN": BN,
        "BC": BC}, {}, 4),
        "topk_encode.value_bf16": (
            topk_select._value_kernel,
            {**dots, "ALL": False, "BN": BN, "BC": BC},
            dict.fromkeys(("x", "b_dec", "W", "bias"), "bf16"),
            4,
        ),
        "topk_encode.select": (topk_select._select_kernel, {"LISTED": False, "BN": BN,
        "BC": topk_select.BLOCK}, {}, 4),
        "topk_encode.repair_value": (topk_select._repair_value_kernel, {**dots, "BC": BC}, {}, 4),
        "topk_encode.repair_pick": (topk_select._repair_pick_kernel, {**dots, "BC": BC,
        "BF": topk_select.SCAN}, {}, 4),
        "bf16.shadow": (bf16._shadow_kernel, {"HAS_SUBTRACT": True, "STORE": True, "BR": 4,
        "BD": 512},
                        {"shadow": "i16"}, 4),
    }  # fmt: skip
    types = dict.fromkeys(
        ("values", "W_dec", "b_dec", "out", "grad_out", "x", "grad_values"), "bf16"
    )
    BN, BD = segments.tile(n, d, False, sparse_decode.WIDEST)
    decode = {"HAS_BIAS": True, "BN": BN, "BD": BD, "stride_d": 1}
    out["sparse_decode.fp32"] = (sparse_decode._sparse_decode_kernel, decode, {}, 4)
    out["sparse_decode.bf16"] = (sparse_decode._sparse_decode_kernel, decode, types, 4)
    out["sparse_decode.grad_values"] = (
        sparse_decode._sparse_decode_grad_values_kernel, {"BE": BN, "BD": BD, "stride_d": 1}, {}, 4,
    )  # fmt: skip
    BL, BD = segments.tile(f, d, False, sparse_decode.WIDEST, 1024)
    out["sparse_decode.grad_W_dec"] = (
        sparse_decode._sparse_decode_grad_W_dec_kernel, {"CHUNK": segments.CHUNK, "BL": BL,
        "BD": BD}, {}, 4,
    )  # fmt: skip
    for kind, pointers in (("fp32", {}), ("bf16", types)):
        BN, BD = segments.tile(n, d, False)
        constants = {"HAS_BIAS": True, "BN": BN, "BD": BD, "stride_d": 1}
        out[f"sae_loss.{kind}"] = (
            sae_loss._sae_loss_kernel,
            constants,
            pointers,
            sae_loss.warps(BN, BD),
        )
    return out


def measure(
    kernel: Any,
    constants: dict[str, Any],
    types: dict[str, str],
    options: dict[str, Any],
    arch: int,
) -> dict[str, int]:
    """Registers, stack, shared memory and instructions of one compiled kernel."""
    signature: dict[str, str] = {}
    attributes: dict[tuple[int], list[list[object]]] = {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in INTEGERS and name not in types:
            signature[name] = "i32"
            if name not in UNALIGNED:
                attributes[(i,)] = [["tt.divisibility", 16]]
        elif name in FLOATS:
            signature[name] = "fp32"
        else:
            signature[name] = "*" + types.get(name, POINTERS.get(name, "fp32"))
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [TOOLS / "cuobjdump", "-res-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        )
        sass = subprocess.run(
            [TOOLS / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = {
        key: int(value)
        for key, value in re.findall(r"(REG|STACK):(\d+)", usage.stdout + usage.stderr)
    }
    instructions = re.findall(
        r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][A-Z0-9_.]*)", sass, re.M
    )
    count = lambda *names: sum(i.split(".")[0] in names for i in instructions)  # noqa: E731
    return {
        "registers": found["REG"],
        "stack": found["STACK"],
        "shared": compiled.metadata.shared,
        "instructions": len(instructions),
        "tensor_core": count("HMMA", "HGMMA"),
        "fused": count("FFMA"),
        "local": count("LDL", "STL"),
    }


if __name__ == "__main__":
    arch = int(sys.argv[1])
    print(json.dumps({name: measure(*case, arch) for name, case in cases().items()}))
