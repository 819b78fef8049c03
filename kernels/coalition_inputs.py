"""Write the inputs of many coalitions in one pass: every number is one of two that are loaded."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from microtome.kernels.segments import tile
from torch import Tensor

WIDEST, SIZE = 512, 2048  # columns and numbers of a tile
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of an item


@triton.jit
def place_of(program, m, BR: tl.constexpr, BC: tl.constexpr):
    """The rows and columns of a program's tile, [BR] and [BC] int64; tiles of a row follow each
    other.

    int64, because the numbers before a row may be 2^31 and more.
    """
    tiles = tl.cdiv(m, BC)
    row = (program // tiles).to(tl.int64) * BR + tl.arange(0, BR)
    return row, (program % tiles).to(tl.int64) * BC + tl.arange(0, BC)


@triton.jit
def _coalition_inputs_kernel(
    x, background, ranks, rows, player, out, R, m, p,
    GROUPED: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    row, column = place_of(tl.program_id(0), m, BR, BC)
    live, known = row < R, column < m
    explicand = tl.load(rows + row * 5, mask=live, other=0).to(tl.int64)[:, None]
    behind = tl.load(rows + row * 5 + 1, mask=live, other=0).to(tl.int64)[:, None]
    order = tl.load(rows + row * 5 + 2, mask=live, other=0).to(tl.int64)[:, None]
    lo = tl.load(rows + row * 5 + 3, mask=live, other=0)[:, None]
    hi = tl.load(rows + row * 5 + 4, mask=live, other=0)[:, None]
    mask = live[:, None] & known[None, :]
    c = column[None, :]
    if GROUPED:
        who = tl.load(player + column, mask=known, other=-1)[None, :]
        rank = tl.load(ranks + order * p + who, mask=mask & (who >= 0), other=0)
        present = (who < 0) | ((rank >= lo) & (rank < hi))  # [BR, BC]
    else:
        rank = tl.load(ranks + order * p + c, mask=mask, other=0)
        present = (rank >= lo) & (rank < hi)
    there = tl.load(x + explicand * m + c, mask=mask, other=0)
    away = tl.load(background + behind * m + c, mask=mask, other=0)
    tl.store(out + row[:, None] * m + c, tl.where(present, there, away), mask=mask)


def launch(
    x: Tensor, background: Tensor, ranks: Tensor, rows: Tensor, player: Tensor | None
) -> Tensor:
    """`coalition_inputs`: a program per block of rows and of columns, on items as integers.

    x, background and ranks are read from the cache where they fit it; nothing is read back to the
    host.
    """
    R, m = rows.shape[0], x.shape[1]
    out = torch.empty(R, m, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    bits = _BITS[x.element_size()]
    ranks = ranks.contiguous()
    BR, BC = tile(R, m, not x.is_cuda, WIDEST, SIZE)
    with torch.cuda.device_of(x):
        _coalition_inputs_kernel[(triton.cdiv(R, BR) * triton.cdiv(m, BC),)](
            x.contiguous().view(bits), background.contiguous().view(bits), ranks,
            rows.contiguous(), ranks if player is None else player.contiguous(), out.view(bits),
            R, m, ranks.shape[1], GROUPED=player is not None, BR=BR, BC=BC,
            enable_fp_fusion=False,
        )  # fmt: skip
    return out
