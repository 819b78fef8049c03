"""`sae_update` at d = 256, 768 and 2304 in every state of its moments, and the sums it shares."""

from __future__ import annotations

from dataclasses import replace

from aot.case import Case, types
from microtome.kernels import sae_update, sae_update_entries, segments

f, FUSED = 65536, {"enable_fp_fusion": True}
STORED = {"float32": "fp32", "bfloat16": "i16", "int8": "i8"}
RULE = types("fp32", "lr beta1 rest1 beta2 rest2 eps decay shrink correction scale aux_scale")
SCALARS = {**RULE, "row_bytes": "i32/16", **types("i32", "key programs a main")}
# No places in memory: bits that are mixed, and bits of floats that are put together.
MIXED = {
    f"sae_update_states: {product}": "32 bits and no more by definition"
    for product in (
        "(code & 128) << 24", "h * 2246822507", "h * 3266489909", "least << 23",
        "tl.where(small, least, least - 1) << 23", "tl.where(small, least, least - 1) << 3",
        "upper.to(tl.int32) << 16",
    )
}  # fmt: skip
ADAM = {"OPTIMIZER": "adam", "MOMENTUM": True}


def cases() -> dict[str, Case]:
    """Adam with projection, renorm and a screen at the tiles that the host function chooses."""
    out = {
        "segments.chunk": Case(
            segments._chunk_kernel,
            {"TABLES": 1, "CHUNK": segments.CHUNK, "BL": 1, "BD": 1024}, {}, FUSED,
        ),
        "sae_update.entries": Case(
            sae_update_entries._entries_kernel, {"AUX": True, "BE": 1024}, {"flags": "i8"}, FUSED,
            SCALARS,
        ),
        "sae_update.bias": Case(
            sae_update._bias_kernel, {**ADAM, "BP": 128, "BD": 32}, {}, FUSED, SCALARS
        ),
    }  # fmt: skip
    for d, states, rowsparse in (
        (256, ("float32",), False),  # several latents a program
        (768, ("float32", "int8"), False),
        (2304, ("float32", "bfloat16", "int8"), False),
        (4096, ("float32", "int8"), True),
        (8192, ("float32",), False),
    ):
        g = sae_update.geometry(f, d, False)
        tiles = {"FLIGHT": g.FLIGHT, "CHUNK": segments.CHUNK, "BL": g.BL, "BD": g.BD, "BT": g.BT}
        options = {**sae_update.OPTIONS, "num_warps": g.warps}
        for state in states:
            both = {**ADAM, **tiles, "STATE": state, "ROWSPARSE": rowsparse, "COPY": False,
                    "EXTRA": False}  # fmt: skip
            pointers = {**types(STORED[state], "m_W v_W"), "flags": "i8", "shadow": "i16",
                        "fired": "i32", "place": "i32"}  # fmt: skip
            out[f"sae_update.encoder.{d}.{state}"] = Case(
                sae_update._encoder_kernel, {**both, "CENTER": True, "SHADOW": True, "BE": 32},
                pointers, options, SCALARS, narrow=MIXED,
            )  # fmt: skip
            out[f"sae_update.decoder.{d}.{state}"] = Case(
                sae_update._decoder_kernel,
                {**both, "PROJECT": True, "RENORM": True, "TABLES": 1 + rowsparse},
                pointers, options, SCALARS, narrow=MIXED,
            )  # fmt: skip
    return {**out, **narrow_rows(), **extra_rows(out)}


def extra_rows(plain: dict[str, Case]) -> dict[str, Case]:
    """Some of them where AuxK's gradients come as rows."""
    return {
        f"{name}.extra": replace(plain[name], constants={**plain[name].constants, "EXTRA": True})
        for half in ("encoder", "decoder")
        for name in (f"sae_update.{half}.{d}" for d in ("768.float32", "2304.float32", "2304.int8"))
    }


def narrow_rows() -> dict[str, Case]:
    """The same with rows in bfloat16 and copies of the weights, and without a screen."""
    rows = types("bf16", "table aux x grad_out aux_grad_out value grad_value aux_value "
                 "aux_grad_value")  # fmt: skip
    out = {
        "segments.chunk.bf16": Case(
            segments._chunk_kernel,
            {"TABLES": 1, "CHUNK": segments.CHUNK, "BL": 1, "BD": 1024}, rows, FUSED,
        ),
        "sae_update.entries.bf16": Case(
            sae_update_entries._entries_kernel, {"AUX": True, "BE": 1024}, {**rows, "flags": "i8"},
            {}, SCALARS,
        ),
    }  # fmt: skip
    for d in (768, 2304, 4096):
        g = sae_update.geometry(f, d, False)
        tiles = {"FLIGHT": g.FLIGHT, "CHUNK": segments.CHUNK, "BL": g.BL, "BD": g.BD, "BT": g.BT}
        options = {**sae_update.OPTIONS, "num_warps": g.warps}
        both = {**ADAM, **tiles, "STATE": "float32", "ROWSPARSE": False, "COPY": True,
                "EXTRA": False}  # fmt: skip
        pointers = {**rows, "flags": "i8", "fired": "i32", "copy": "i16", "place": "i32"}
        out[f"sae_update.encoder.{d}.mixed"] = Case(
            sae_update._encoder_kernel, {**both, "CENTER": True, "SHADOW": False, "BE": 32},
            pointers, options, SCALARS, narrow=MIXED,
        )  # fmt: skip
        out[f"sae_update.decoder.{d}.mixed"] = Case(
            sae_update._decoder_kernel,
            {**both, "PROJECT": True, "RENORM": True, "TABLES": 1}, pointers, options, SCALARS,
            narrow=MIXED,
        )  # fmt: skip
    return out
