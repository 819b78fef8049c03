"""`topk_encode` screened in e4m3, by the kernels of `topk_encode` and a model of the errors."""

# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

import torch
import triton
from microtome.kernels import topk_encode as encode
from microtome.kernels import topk_narrow as narrow
from torch import Tensor


def launch(
    x: Tensor, W_enc: Tensor, b_enc: Tensor | None, b_dec: Tensor | None, k: int,
    sigmas: float, repair: float, kind: str, shadow: Tensor | None, stats: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`topk_encode_fp8`. An "fp8" screen is used, another is ignored.

    A k whose lists are too long to be narrowed is screened in bf16. What is said of NaN, infinity
    and CUDA graphs at `topk_encode.launch` holds here, too.
    """
    n, f = x.shape[0], W_enc.shape[0]
    observed = torch.zeros(n, dtype=torch.float32, device=x.device)
    p = plan(n, f, k, sigmas, repair)
    if triton.next_power_of_2(p.capacity) > narrow.WIDEST:
        p = encode.plan(n, f, k, encode.features_of_a_tile(x))
    wanted = "fp8" if p.sigmas else "bf16"
    given = (shadow, stats) if kind == wanted and shadow is not None and stats is not None else None
    values, indices, candidates = encode.run(
        p, x, W_enc, b_enc, b_dec, k, given, observed=observed if p.sigmas else None
    )
    return values, indices, candidates, observed


def plan(n: int, f: int, k: int, sigmas: float, repair: float) -> encode.Plan:
    """`topk_encode.plan` with tiles of 128 columns, after which sums are moved to float32.

    128 features a tile: beside the sums a thread holds those of the last 128 columns.
    """
    return encode.plan(n, f, k, 128, sigmas, repair)
