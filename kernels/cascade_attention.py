"""Attention of ragged rows over a shared prefix of keys and their own, and the repair of one
changed key. float32 throughout: products on the float32 units, no tensor-core rounding."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

OPTIONS = {"num_stages": 1, "enable_fp_fusion": True}
MOST = 2.0**60  # of a new key's weight; beyond it its product with a value could overflow


@triton.jit
def _tanh(x):
    """tanh in float32; below 1/2 by its continued fraction, for there 1 - e^-2x cancels."""
    square = x * x
    near = x * (945.0 + square * (105.0 + square)) / (945.0 + square * (420.0 + square * 15.0))
    rest = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - rest) / (1.0 + rest)
    return tl.where(tl.abs(x) < 0.5, near, tl.where(x < 0, -far, far))


@triton.jit
def _score(dot, scale, softcap, SOFTCAP: tl.constexpr):
    s = dot * scale
    if SOFTCAP:
        s = softcap * _tanh(s / softcap)
    return s


@triton.jit
def _attend(
    acc, top, total, q, live, k, v, k_token, v_token, begin, end, at, lower, upper, dh, dv,
    scale, softcap, SOFTCAP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Add the keys at positions [begin, end) of which each query sees [lower, upper].

    q [BM] points at the queries, those not `live` are not read; k and v at the key and value of
    position `at`. acc [BM, BV] is the sum of exp(score - top) v so far, total [BM] that of
    exp(score - top), top [BM] the largest score.
    """
    wide = tl.arange(0, BV)[None, :]
    for first in range(begin, end, BN):
        x = first + tl.arange(0, BN)
        token = (x - at).to(tl.int64)[:, None]
        inside = x < end
        s = tl.zeros((BM, BN), tl.float32)
        # By chunks of columns: whole rows of both operands would not fit the registers.
        for start in range(0, dh, BK):
            c = (start + tl.arange(0, BK))[None, :]
            query = tl.load(q[:, None] + c, mask=live[:, None] & (c < dh), other=0.0)
            key = tl.load(k + token * k_token + c, mask=inside[:, None] & (c < dh), other=0.0)
            s = tl.dot(query, tl.trans(key), s, input_precision="ieee")
        seen = inside[None, :] & (x[None, :] >= lower[:, None]) & (x[None, :] <= upper[:, None])
        s = tl.where(seen, _score(s, scale, softcap, SOFTCAP), float("-inf"))
        higher = tl.maximum(top, tl.max(s, 1))
        pivot = tl.where(higher == float("-inf"), 0.0, higher)  # not -inf - -inf where none is seen
        shrink, p = tl.exp(top - pivot), tl.exp(s - pivot[:, None])
        value = tl.load(v + token * v_token + wide, mask=inside[:, None] & (wide < dv), other=0.0)
        acc = tl.dot(p, value, acc * shrink[:, None], input_precision="ieee")
        total = total * shrink + tl.sum(p, 1)
        top = higher
    return acc, top, total


@triton.jit
def _cascade_attention_kernel(
    q, k, v, k_base, v_base, rows, ends, tile_row, q_positions, first, z, lse,
    q_token, k_token, v_token, k_base_example, k_base_token, v_base_example, v_base_token,
    n, t, h, group, dh, dv, window, scale, softcap,
    BASE: tl.constexpr, SOFTCAP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """BM (query, head) pairs of one row and one key head: pair i is query i / group, its head i %
    group."""
    tile = tl.program_id(0)
    row = tl.load(tile_row + tile).to(tl.int64)
    if row >= n:
        return
    tile -= tl.load(ends + row - 1, mask=row > 0, other=0)
    key_head = tl.program_id(1)
    example = tl.load(rows + row * 6).to(tl.int64)
    start = tl.load(rows + row * 6 + 1)
    kv_at = tl.load(rows + row * 6 + 2).to(tl.int64)
    q_at = tl.load(rows + row * 6 + 4)
    pair = tile * BM + tl.arange(0, BM)
    live = pair < tl.load(rows + row * 6 + 5) * group
    query = (q_at + pair // group).to(tl.int64)
    head = key_head * group + pair % group
    upper = tl.load(q_positions + query, mask=live, other=-1)
    lower = tl.zeros((BM,), tl.int32)
    if BASE:
        lower = tl.maximum(lower, tl.load(first + example))
    if window > 0:
        lower = tl.maximum(lower, upper - window + 1)
    # Pairs past the row's last see nothing and do not widen the range of keys.
    begin = tl.min(tl.where(live, lower, 0x7FFFFFFF), 0)
    end = tl.max(upper, 0) + 1
    queries = q + query * q_token + head * dh
    acc = tl.zeros((BM, BV), tl.float32)
    top = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    if BASE:
        acc, top, total = _attend(
            acc, top, total, queries, live, k_base + example * k_base_example + key_head * dh,
            v_base + example * v_base_example + key_head * dv, k_base_token, v_base_token,
            begin // BN * BN, tl.minimum(start, t), 0, lower, upper, dh, dv, scale, softcap,
            SOFTCAP, BM, BN, BK, BV,
        )  # fmt: skip
    acc, top, total = _attend(
        acc, top, total, queries, live, k + kv_at * k_token + key_head * dh,
        v + kv_at * v_token + key_head * dv, k_token, v_token,
        start + tl.maximum(begin - start, 0) // BN * BN, end, start, lower, upper, dh, dv,
        scale, softcap, SOFTCAP, BM, BN, BK, BV,
    )  # fmt: skip
    seen = total != 0  # and NaN is seen
    total = tl.where(seen, total, 1.0)
    place, wide = query * h + head, tl.arange(0, BV)[None, :]
    answer = tl.where(seen[:, None], acc / total[:, None], 0.0)
    tl.store(z + place[:, None] * dv + wide, answer, mask=live[:, None] & (wide < dv))
    tl.store(lse + place, tl.where(seen, top + tl.log(total), float("-inf")), mask=live)


@triton.jit
def _in_full(
    q, k_new, v_new, k_base, v_base, k_token, v_token, position, lower, last, dh, dv,
    scale, softcap, SOFTCAP: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """[BV], one query's attention over the base keys lower .. last and, at `position`, a new one.

    `q` is the query, [1, BK]; the pointers are those of one key head.
    """
    c, wide = tl.arange(0, BK)[None, :], tl.arange(0, BV)[None, :]
    own = position >= lower
    key = tl.load(k_new + c, mask=c < dh, other=0.0)
    of_new = _score(tl.sum(tl.sum(q * key, 1), 0), scale, softcap, SOFTCAP)
    top = tl.where(own, of_new, float("-inf"))
    total = tl.where(own, 1.0, 0.0)
    acc = tl.sum(tl.load(v_new + wide, mask=wide < tl.where(own, dv, 0), other=0.0), 0)  # [BV]
    for first in range(lower, last + 1, BN):
        x = first + tl.arange(0, BN)
        token = x.to(tl.int64)[:, None]
        old = (x <= last) & (x != position)
        keys = tl.load(
            k_base + token * k_token + c, mask=old[:, None] & (c < dh), other=0.0
        )  # [BN, BK]
        s = _score(tl.sum(keys * q, 1), scale, softcap, SOFTCAP)
        s = tl.where(old, s, float("-inf"))
        higher = tl.maximum(top, tl.max(s, 0))
        pivot = tl.where(higher == float("-inf"), 0.0, higher)
        shrink, p = tl.exp(top - pivot), tl.exp(s - pivot)
        values = tl.load(
            v_base + token * v_token + wide, mask=old[:, None] & (wide < dv), other=0.0
        )
        acc = acc * shrink + tl.sum(p[:, None] * values, 0)
        total = total * shrink + tl.sum(p, 0)
        top = higher
    return tl.where(total != 0, acc / tl.where(total != 0, total, 1.0), 0.0)


@triton.jit
def _swap_key_attention_kernel(
    z, lse, q, k_base, v_base, q_new, k_new, v_new, rows, at, token_row, first, out, n,
    q_example, q_token, k_base_example, k_base_token, v_base_example, v_base_token,
    q_new_row, k_new_row, v_new_row, pairs, t, h, group, dh, dv, window, scale, softcap, most,
    SOFTCAP: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr,
):  # fmt: skip
    """BP (token, head) pairs by the quotient; those that it cannot answer in full, one by one."""
    lane = tl.arange(0, BP)
    pair = tl.program_id(0).to(tl.int64) * BP + lane
    live = pair < pairs
    token, head = (pair // h).to(tl.int32), (pair % h).to(tl.int32)
    key_head = head // group
    row = tl.load(token_row + token, mask=live, other=n).to(tl.int64)
    there = row < n  # NaN where there turned out to be more tokens than the rows have
    example = tl.load(rows + row * 3, mask=there, other=0).to(tl.int64)
    position = tl.load(rows + row * 3 + 1, mask=there, other=0)
    i = position + token - tl.load(at + row, mask=there, other=0)
    lower = tl.maximum(tl.load(first + example, mask=there, other=0), 0)
    if window > 0:
        lower = tl.maximum(lower, i - window + 1)
    changes = there & (position >= lower) & (i > position)
    place = (example * t + i) * h + head
    c, wide = tl.arange(0, BK)[None, :], tl.arange(0, BV)[None, :]
    mask = changes[:, None] & (c < dh)
    asked = q + example * q_example + i.to(tl.int64) * q_token + head * dh
    query = tl.load(asked[:, None] + c, mask=mask, other=0.0)  # [BP, BK]
    base = example * k_base_example + key_head * dh
    old = tl.load(
        (k_base + base + position.to(tl.int64) * k_base_token)[:, None] + c, mask=mask, other=0.0
    )
    new = tl.load((k_new + row * k_new_row + key_head * dh)[:, None] + c, mask=mask, other=0.0)
    known = tl.load(lse + place, mask=changes, other=0.0)
    of_old = tl.exp(_score(tl.sum(query * old, 1), scale, softcap, SOFTCAP) - known)
    of_new = tl.exp(_score(tl.sum(query * new, 1), scale, softcap, SOFTCAP) - known)
    # Not (>): NaN too must be answered in full.
    quick = changes & (of_old <= 0.5) & (of_new <= most)
    of_old, of_new = tl.where(quick, of_old, 0.0), tl.where(quick, of_new, 0.0)
    mask = (wide < dv) & quick[:, None]
    base = example * v_base_example + key_head * dv
    old = tl.load(
        (v_base + base + position.to(tl.int64) * v_base_token)[:, None] + wide, mask=mask, other=0.0
    )
    new = tl.load((v_new + row * v_new_row + key_head * dv)[:, None] + wide, mask=mask, other=0.0)
    mask = there[:, None] & (wide < dv)
    kept = tl.load(z + place[:, None] * dv + wide, mask=mask, other=float("nan"))
    answer = kept - of_old[:, None] * old + of_new[:, None] * new
    answer = tl.where(quick[:, None], answer / (1.0 - of_old + of_new)[:, None], kept)
    left = (there & (i == position)) | (changes & (quick == 0))
    for _ in range(0, tl.sum(left.to(tl.int32), 0)):
        one = tl.min(tl.where(left, lane, BP), 0)
        pair_1 = tl.program_id(0).to(tl.int64) * BP + one
        token_1, head_1 = (pair_1 // h).to(tl.int32), (pair_1 % h).to(tl.int32)
        key_1 = head_1 // group
        row_1 = tl.load(token_row + token_1).to(tl.int64)
        example_1 = tl.load(rows + row_1 * 3).to(tl.int64)
        position_1 = tl.load(rows + row_1 * 3 + 1)
        i_1 = position_1 + token_1 - tl.load(at + row_1)
        lower_1 = tl.maximum(tl.load(first + example_1), 0)
        if window > 0:
            lower_1 = tl.maximum(lower_1, i_1 - window + 1)
        # The token at the position asks by the new query, another by the base run's.
        by_new = tl.where(i_1 == position_1, dh, 0)
        query_1 = tl.load(
            q_new + row_1 * q_new_row + head_1 * dh + c, mask=c < by_new, other=0.0
        ) + tl.load(
            q + example_1 * q_example + i_1.to(tl.int64) * q_token + head_1 * dh + c,
            mask=c < dh - by_new, other=0.0,
        )  # fmt: skip
        whole = _in_full(
            query_1, k_new + row_1 * k_new_row + key_1 * dh, v_new + row_1 * v_new_row + key_1 * dv,
            k_base + example_1 * k_base_example + key_1 * dh,
            v_base + example_1 * v_base_example + key_1 * dv, k_base_token, v_base_token,
            position_1, lower_1, i_1, dh, dv, scale, softcap, SOFTCAP, BN, BK, BV,
        )  # fmt: skip
        chosen = lane == one
        answer = tl.where(chosen[:, None], whole[None, :], answer)
        left = left & (chosen == 0)
    tl.store(out + pair[:, None] * dv + wide, answer, mask=live[:, None] & (wide < dv))


def geometry(pairs: float, dh: int, dv: int, interpreted: bool) -> tuple[dict[str, int], int]:
    """Tile of `cascade_attention` for rows of `pairs` (query, head) pairs on average, and warps.

    The widest that spill no registers (tests/test_triton_compile.py); wider where every program
    costs milliseconds.
    """
    BV, BK = padded(dv), padded(dh)
    BM = min(max(triton.next_power_of_2(int(pairs)), 16), 64 if BV <= 128 else 32)
    BN, BK = (128, BK) if interpreted else (32 if BV <= 64 else 16, min(BK, 32))
    return {"BM": BM, "BN": BN, "BK": BK, "BV": BV}, 8 if BM == 64 or BV > 128 else 4


def options(BV: int, warps: int) -> dict[str, int | bool]:
    """Compile options of `cascade_attention`.

    The cap on registers leaves room for three programs of 4 warps on a processor. With none named,
    Triton 3.6's assembler keeps to 128 or fewer, for one program more, and spills.
    """
    return {"num_warps": warps, "maxnreg": 168 if BV <= 64 else 255, **OPTIONS}


def swap_geometry(dh: int, dv: int, interpreted: bool) -> tuple[dict[str, int], int]:
    """Tile of `swap_key_attention` and warps, chosen likewise."""
    BV, BK = padded(dv), padded(dh)
    few = max(512 // max(BV, BK), 1)
    BP, BN = (64 * few, 64) if interpreted else (few, few)
    return {"BP": BP, "BN": BN, "BK": BK, "BV": BV}, 4


def padded(width: int) -> int:
    """The width of a tile of `width` columns."""
    return max(triton.next_power_of_2(width), 16)  # type: ignore[no-any-return]


def launch(
    q: Tensor, k: Tensor, v: Tensor, k_base: Tensor, v_base: Tensor, rows: Tensor,
    q_positions: Tensor, first: Tensor, scale: float, softcap: float, window: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`cascade_attention`: a program per row, block of (query, head) pairs and key head.

    How many blocks a row has is known on the device alone: the grid has as many programs as there
    can be blocks, and those beyond the last return at once.
    """
    (Tq, h, dh), (_, hk, dv), n, t = q.shape, v.shape, rows.shape[0], k_base.shape[1]
    z = torch.empty(Tq, h, dv, dtype=torch.float32, device=q.device)
    lse = torch.empty(Tq, h, dtype=torch.float32, device=q.device)
    if lse.numel() == 0:
        return z, lse
    q, k, v, k_base, v_base = (heads_together(x) for x in (q, k, v, k_base, v_base))
    group = h // hk
    tile, warps = geometry(Tq * group / n, dh, dv, not q.is_cuda)
    blocks = -(rows[:, 5].long() * -group // tile["BM"])  # [n], rounded up
    ends = blocks.cumsum(0).int()
    programs = Tq * group // tile["BM"] + n
    tile_row = torch.searchsorted(
        ends, torch.arange(programs, dtype=torch.int32, device=q.device), right=True, out_int32=True
    )
    with torch.cuda.device_of(q):
        _cascade_attention_kernel[(programs, hk)](
            q, k, v, k_base, v_base, rows.int().contiguous(), ends, tile_row,
            q_positions.int().contiguous(), first.int().contiguous(), z, lse,
            q.stride(0), k.stride(0), v.stride(0), *k_base.stride()[:2], *v_base.stride()[:2],
            n, t, h, group, dh, dv, window, scale, softcap, BASE=k_base.shape[0] > 0,
            SOFTCAP=softcap > 0, **tile, **options(tile["BV"], warps),
        )  # fmt: skip
    return z, lse


def launch_swap(
    z: Tensor, lse: Tensor, q: Tensor, k_base: Tensor, v_base: Tensor, q_new: Tensor,
    k_new: Tensor, v_new: Tensor, rows: Tensor, first: Tensor, scale: float, softcap: float,
    window: int, total: int,
) -> Tensor:  # fmt: skip
    """`swap_key_attention`: a program per block of (token, head) pairs.

    Rows lie within the base, but `total` need not be the sum of their tokens.
    """
    (_, t, h, dh), (_, _, hk, dv) = q.shape, v_base.shape
    out = torch.empty(total, h, dv, dtype=torch.float32, device=q.device)
    if total * h == 0:
        return out
    q, k_base, v_base, q_new, k_new, v_new = (
        heads_together(x) for x in (q, k_base, v_base, q_new, k_new, v_new)
    )
    count = (rows[:, 2] - rows[:, 1]).long()
    ends = count.cumsum(0)
    at = (ends - count).int()  # [n], the first token of each row
    numbers = torch.arange(total, device=q.device)
    token_row = torch.searchsorted(ends, numbers, right=True, out_int32=True)
    tile, warps = swap_geometry(dh, dv, not q.is_cuda)
    with torch.cuda.device_of(q):
        _swap_key_attention_kernel[(triton.cdiv(total * h, tile["BP"]),)](
            z.contiguous(), lse.contiguous(), q, k_base, v_base, q_new, k_new, v_new,
            rows.int().contiguous(), at, token_row, first.int().contiguous(), out,
            rows.shape[0], *q.stride()[:2], *k_base.stride()[:2], *v_base.stride()[:2],
            q_new.stride(0), k_new.stride(0), v_new.stride(0),
            total * h, t, h, h // hk, dh, dv, window, scale, softcap, MOST, SOFTCAP=softcap > 0,
            **tile, num_warps=warps, **OPTIONS,
        )  # fmt: skip
    return out


def heads_together(x: Tensor) -> Tensor:
    """x itself where a token's heads lie one after another, else a copy of which that is so."""
    heads, width = x.shape[-2:]
    together = (x.stride(-1) == 1 or width == 1) and (x.stride(-2) == width or heads == 1)
    return x if together else x.contiguous()
