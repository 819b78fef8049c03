"""The kernels of sparse autoencoders, at d = 768, f = 24576, k = 32 and 8192 rows.

`encode.py` has those of the encoder, `states.py` those of the update.
"""

from __future__ import annotations

from aot.case import Case, types
from microtome.kernels import sae_loss, segments, sparse_decode

n, d, f, k = 8192, 768, 24576, 32
FUSED = {"enable_fp_fusion": True}
HALVES = types("bf16", "values W_dec b_dec out grad_out x grad_values")


def cases() -> dict[str, Case]:
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
