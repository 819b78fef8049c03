"""Candidates of rows: features that a tile of scores lets through, appended in any order."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped"
from __future__ import annotations

import triton
import triton.language as tl


@triton.constexpr_function
def _shift_asm():
    """$0 = $1 shifted left by eight, the signs of $2 ... $9 below it."""
    middle = "".join(f"shf.l.wrap.b32 t, ${i}, t, 1;\n" for i in range(3, 9))
    first, last = "shf.l.wrap.b32 t, $2, $1, 1;\n", "shf.l.wrap.b32 $0, $9, t, 1;\n"
    return "{\n.reg .b32 t;\n" + first + middle + last + "}"


@triton.constexpr_function
def _reserve_asm():
    """$0 = the place of the first of $2's set bits in the list of row $3; $1 = $2, less what would
    lie beyond the capacity $4. $5: count."""
    return """{
.reg .pred p; .reg .b32 n, t, room; .reg .b64 a;
popc.b32 n, $2;
setp.ne.u32 p, n, 0;
mad.wide.u32 a, $3, 4, $5;
mov.b32 $0, 0;
@p atom.relaxed.gpu.global.add.u32 $0, [a], n;
mov.b32 $1, $2;
sub.s32 room, $4, $0;
max.s32 room, room, 0;
NEXT:
setp.le.s32 p, n, room;
@p bra DONE;
sub.u32 t, $1, 1;
and.b32 $1, $1, t;
sub.s32 n, n, 1;
bra NEXT;
DONE:
}"""


@triton.constexpr_function
def _store_asm(leaf, eighth):
    """Store what is set among eight bits of $2, from place $1 on; $0 = the next place.

    $3 row, $4 first column, $5 bytes of a list, $6 index, $7 value, $8 ... $15 scores: the first
    score's bit is the highest. A thread that has one, as a rule the only one, finds its place b,
    selects the score by b's three bits and the column by arithmetic.
    """
    pairs = "".join(
        f"selp.b32 s{i}, ${14 - 2 * i}, ${15 - 2 * i}, p1;\n" for i in range(4)
    )  # b = 2 i + 1 or 2 i
    return f"""{{
.reg .pred p, p1, p2, p4; .reg .b32 t, b, c, at, s0, s1, s2, s3; .reg .b64 a, i, v;
mov.b32 at, $1;
shr.u32 t, $2, {8 * eighth};
and.b32 t, t, 255;
setp.eq.u32 p, t, 0;
@p bra SKIP;
mad.wide.u32 i, $3, $5, $6;
mad.wide.u32 v, $3, $5, $7;
NEXT:
bfind.u32 b, t;
and.b32 c, b, 1;
setp.ne.u32 p1, c, 0;
and.b32 c, b, 2;
setp.ne.u32 p2, c, 0;
and.b32 c, b, 4;
setp.ne.u32 p4, c, 0;
{pairs}selp.b32 s0, s1, s0, p2;
selp.b32 s2, s3, s2, p2;
selp.b32 s0, s2, s0, p4;
xor.b32 c, b, 7;
shr.u32 s1, c, 1;
and.b32 c, c, 1;
add.u32 c, c, $4;
mad.lo.u32 c, s1, {leaf}, c;
mad.wide.u32 a, at, 4, i;
st.global.b32 [a], c;
mad.wide.u32 a, at, 4, v;
st.global.b32 [a], s0;
add.u32 at, at, 1;
shl.b32 c, 1, b;
xor.b32 t, t, c;
setp.ne.u32 p, t, 0;
@p bra NEXT;
SKIP:
mov.b32 $0, at;
}}"""


@triton.jit
def append_scores(
    score, lowest, row, first, f, count, index, value, capacity,
    BM: tl.constexpr, BN: tl.constexpr, LEAF: tl.constexpr,
):  # fmt: skip
    """Append features first ... first + BN - 1 with their scores, where not score < lowest.

    score [BM, BN] float32, -inf from feature f on. lowest [BM] float32, above -inf; +inf: keep
    none. row [BM] int32: the row's place in count [rows], which counts all that are kept, and in
    index and value [rows, capacity], which hold those that fit. LEAF is 0 for a form that the
    interpreter runs and every layout suits. Otherwise it is for the layout of tensor-core tiles,
    where a thread has two neighbouring columns of every LEAF: 8 for each warp along the columns, a
    power of two of at least BN / 32.

    Both forms keep the same features; only the order in a list differs, which is not fixed anyway.

    The second form has no branch that depends on the data until it writes. A thread holds pairs of
    neighbouring columns, LEAF apart. It takes the sign of score - lowest for each (exact: the
    difference of two floats is rounded to zero only where they are equal; the NaN that a unit
    computes has no sign; a lowest of 0.0 is made -0.0), shifts the signs into one integer of up to
    32 columns, reserves places for all of them by one atomic, and visits its scores again, eight at
    a time, to store those whose bit is set. So a tile waits for one atomic, however many features
    it keeps.
    """
    if LEAF == 0:
        feature = first + tl.arange(0, BN)
        keep = ~(score < lowest[:, None]) & (lowest < float("inf"))[:, None]
        keep = keep & (feature < f)[None, :]
        kept = keep.to(tl.int32)
        many = tl.sum(kept, 1)
        at = tl.atomic_add(count + row, many, mask=many > 0, sem="relaxed")  # [BM]
        at = at[:, None] + tl.cumsum(kept, 1) - kept
        place = row.to(tl.int64)[:, None] * capacity + at
        fits = keep & (at < capacity)
        tl.store(index + place, tl.zeros((BM, BN), tl.int32) + feature[None, :], mask=fits)
        tl.store(value + place, score, mask=fits)
    else:
        if BN > 16 * LEAF:
            left, right = _halves(score, BN)
            _append_half(left, lowest, row, first, count, index, value, capacity, BN // 2, LEAF)
            _append_half(
                right, lowest, row, first + BN // 2, count, index, value, capacity, BN // 2, LEAF
            )
        else:
            _append_half(score, lowest, row, first, count, index, value, capacity, BN, LEAF)


@triton.jit
def _append_half(
    score, lowest, row, first, count, index, value, capacity, N: tl.constexpr, LEAF: tl.constexpr,
):  # fmt: skip
    """`append_scores` for at most 16 LEAF columns, 32 a thread and row."""
    BM: tl.constexpr = score.shape[0]
    # 0.0 becomes -0.0, or -0.0 - 0.0 had a sign. In bits: Triton 3.6 reads the literal -0.0 as 0.0.
    bits = lowest.to(tl.int32, bitcast=True)
    least = tl.where(bits == 0, -2147483648, bits).to(tl.float32, bitcast=True)
    below = _signs(tl.zeros((BM, LEAF // 2), tl.int32), score - least[:, None], N, LEAF)
    kept = below ^ -1
    if N < 16 * LEAF:
        kept = kept & ((1 << (2 * N // LEAF)) - 1)
    # A NaN score has no sign, and such a row may lie beyond the last.
    kept = tl.where((lowest < float("inf"))[:, None], kept, 0)
    row = tl.broadcast_to(row[:, None], (BM, LEAF // 2))
    at, kept = tl.inline_asm_elementwise(
        _reserve_asm(), "=&r,=&r,r,r,r,l", [kept, row, capacity, count.to(tl.int64)],
        (tl.int32, tl.int32), is_pure=False, pack=1,
    )  # fmt: skip
    column = first + 2 * tl.arange(0, LEAF // 2)[None, :]
    _store(
        at, kept, score, row, column, capacity * 4, index.to(tl.int64), value.to(tl.int64),
        0, N, LEAF,
    )  # fmt: skip


@triton.jit
def _halves(tile, N: tl.constexpr):
    """The left and the right half of a [BM, N] tile; no data moves where a thread holds both."""
    return tl.split(tl.permute(tl.reshape(tile, (tile.shape[0], 2, N // 2)), (0, 2, 1)))


@triton.jit
def _pairs(tile, N: tl.constexpr):
    return tl.split(tl.reshape(tile, (tile.shape[0], N // 2, 2)))


@triton.jit
def _eight(tile, LEAF: tl.constexpr):
    """[BM, 4 LEAF] as eight [BM, LEAF / 2]: columns 2 j, 2 j + 1, then LEAF, 2 LEAF, 3 LEAF on."""
    left, right = _halves(tile, 4 * LEAF)
    a, b = _halves(left, 2 * LEAF)
    c, d = _halves(right, 2 * LEAF)
    a0, a1 = _pairs(a, LEAF)
    b0, b1 = _pairs(b, LEAF)
    c0, c1 = _pairs(c, LEAF)
    d0, d1 = _pairs(d, LEAF)
    return a0, a1, b0, b1, c0, c1, d0, d1


@triton.jit
def _signs(bits, room, N: tl.constexpr, LEAF: tl.constexpr):
    """Shift the signs of room's columns into bits, the first column's ending highest."""
    if N > 4 * LEAF:
        left, right = _halves(room, N)
        bits = _signs(bits, left, N // 2, LEAF)
        bits = _signs(bits, right, N // 2, LEAF)
    else:
        a0, a1, b0, b1, c0, c1, d0, d1 = _eight(room, LEAF)
        bits = tl.inline_asm_elementwise(
            _shift_asm(), "=r,r,r,r,r,r,r,r,r,r", [bits, a0, a1, b0, b1, c0, c1, d0, d1],
            tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    return bits


@triton.jit
def _store(
    at, kept, score, row, column, row_bytes, index, value, EIGHTH: tl.constexpr, N: tl.constexpr,
    LEAF: tl.constexpr,
):  # fmt: skip
    """Store the columns whose bit is set from place `at` on; the last eight are bits 0 to 7."""
    if N > 4 * LEAF:
        left, right = _halves(score, N)
        half: tl.constexpr = N // 2
        at = _store(
            at, kept, left, row, column, row_bytes, index, value, EIGHTH + half // (4 * LEAF), half,
            LEAF,
        )  # fmt: skip
        at = _store(
            at, kept, right, row, column + half, row_bytes, index, value, EIGHTH, half, LEAF
        )
    else:
        a0, a1, b0, b1, c0, c1, d0, d1 = _eight(score, LEAF)
        at = tl.inline_asm_elementwise(
            _store_asm(LEAF, EIGHTH), "=r,r,r,r,r,r,l,l,r,r,r,r,r,r,r,r",
            [at, kept, row, column, row_bytes, index, value, a0, a1, b0, b1, c0, c1, d0, d1],
            tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    return at
