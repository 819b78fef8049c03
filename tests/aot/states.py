"""The kernels of `sae_update`, at f = 24576, and at d = 768 and 2304, where it holds the most."""

from __future__ import annotations

from aot.case import Case, types
from microtome.kernels import sae_update, segments

d, f = 768, 24576
FUSED = {"enable_fp_fusion": True}
RULE = types("fp32", "lr beta1 rest1 beta2 rest2 eps decay shrink root")


def cases() -> dict[str, Case]:
    """The update and the partial sums it shares with the gradient of the decoder."""
    rule = {"OPTIMIZER": "adam", "MOMENTUM": True}
    flags = {
        "ROWSPARSE": False, "PROJECT": True, "RENORM": True, "CENTER": True, "SHADOW": True,
        "CHUNK": segments.CHUNK, "BE": 32,
    }  # fmt: skip
    out = {
        "segments.chunk": Case(
            segments._chunk_kernel, {"CHUNK": segments.CHUNK, "BL": 1, "BD": 1024}, {}, FUSED
        ),
        "sae_update.bias": Case(
            sae_update._sae_update_bias_kernel, {**rule, "BD": 256}, {}, FUSED, RULE
        ),
    }
    for wide in (d, 2304):
        _, _, BL, BD, warps = sae_update.geometry(f, wide, False)
        out[f"sae_update.{wide}"] = Case(
            sae_update._sae_update_kernel, {**rule, **flags, "BL": BL, "BD": BD},
            {"shadow": "i16"}, {**FUSED, "num_warps": warps}, RULE,
        )  # fmt: skip
    return out
