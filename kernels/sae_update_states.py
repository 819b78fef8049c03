"""The rule of `sae_update` on registers, its moments read from float32, bfloat16 or 8 bits.

The formats and the random bits are those of microtome.ops._sae_update_states, to the bit.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped"
from __future__ import annotations

import triton
import triton.language as tl

BLOCK = tl.constexpr(128)
SMALLEST = tl.constexpr(4)


@triton.jit
def mix(h):
    """MurmurHash3's finaliser of uint32."""
    h = h ^ (h >> 16)
    h = h * 0x85EBCA6B
    h = h ^ (h >> 13)
    h = h * 0xC2B2AE35
    return h ^ (h >> 16)


@triton.jit
def words(key, row, column):
    """[BL, BD] int32 random words: the first moment's 16 bits are the low ones."""
    of_row = mix(row.to(tl.uint32) ^ key.to(tl.uint32))
    return mix(of_row[:, None] ^ column.to(tl.uint32)[None, :]).to(tl.int32, bitcast=True)


@triton.jit
def _float(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _spread(of_block, SIZE: tl.constexpr):
    """[BL, NB] to [BL, NB * SIZE]: every column has what its block has."""
    BL: tl.constexpr = of_block.shape[0]
    NB: tl.constexpr = of_block.shape[1]
    return tl.reshape(tl.broadcast_to(of_block[:, :, None], (BL, NB, SIZE)), (BL, NB * SIZE))


@triton.jit
def columns(START: tl.constexpr, BD: tl.constexpr):
    """START, START + 1, ... written so that the compiler sees groups of four neighbours.

    Else it gives a thread eight where some tensor has 16 bits a number, and float32 rows are
    reordered through shared memory before they are stored.
    """
    i = tl.arange(0, BD)
    return START + i // 4 * 4 + i % 4


@triton.jit
def _at(stored, row, width, START: tl.constexpr, BD: tl.constexpr):
    """Pointers to rows [BL] int64 of `width` numbers, from column START on."""
    column = columns(START, BD)
    return stored + row[:, None] * width + column[None, :]


@triton.jit
def _blocks(stored, row, live, d, row_bytes, SIZE: tl.constexpr, START: tl.constexpr,
            BD: tl.constexpr):  # fmt: skip
    """Pointers to the bytes [BL, NB] of blocks, and which of them there are."""
    block = START // BLOCK + tl.arange(0, BD // SIZE)
    has = live[:, None] & (block * BLOCK < d)[None, :]
    return stored + row[:, None] * row_bytes + d + block[None, :], has


@triton.jit
def read(
    stored, row, live, mask, d, row_bytes,
    SECOND: tl.constexpr, STATE: tl.constexpr, START: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """[BL, BD] float32 moments of rows [BL] int64, where `live`, from column START on."""
    if STATE == "float32":
        moment = tl.load(_at(stored, row, d, START, BD), mask=mask, other=0.0)
    elif STATE == "bfloat16":
        upper = tl.load(_at(stored, row, d, START, BD), mask=mask, other=0)
        moment = _float(upper.to(tl.int32) << 16)
    else:
        SIZE: tl.constexpr = BD if BD < BLOCK else BLOCK
        code = tl.load(_at(stored, row, row_bytes, START, BD), mask=mask, other=0)
        code = code.to(tl.int32) & 0xFF
        at, has = _blocks(stored, row, live, d, row_bytes, SIZE, START, BD)
        least = _spread(tl.load(at, mask=has, other=0).to(tl.int32) & 0xFF, SIZE)
        sign = code & 0
        if not SECOND:
            sign = (code & 0x80) << 24
            code = code & 0x7F
        # Field 0 has no leading one: it is read as field 1 would be, and that one taken off again.
        small = code < 8
        one = _float(tl.where(small, least << 23, 0))
        size = _float((code << 20) + (tl.where(small, least, least - 1) << 23)) - one
        moment = _float(size.to(tl.int32, bitcast=True) | sign)
    return moment


@triton.jit
def write(
    stored, moment, random, row, live, mask, d, row_bytes,
    SECOND: tl.constexpr, STATE: tl.constexpr, START: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Round moments, zero from column d on, by their random words, and store them."""
    if STATE == "float32":
        tl.store(_at(stored, row, d, START, BD), moment, mask=mask)
    else:
        bits = moment.to(tl.int32, bitcast=True)
        chance = ((random >> 16) if SECOND else random) & 0xFFFF
        if STATE == "bfloat16":
            upper = ((bits + chance) >> 16).to(tl.int16)
            tl.store(_at(stored, row, d, START, BD), upper, mask=mask)
        else:
            SIZE: tl.constexpr = BD if BD < BLOCK else BLOCK
            TOP: tl.constexpr = 31 if SECOND else 15
            size = bits & 0x7FFFFFFF
            of_block = tl.max(tl.reshape(size, (row.shape[0], BD // SIZE, SIZE)), 2)  # [BL, NB]
            # The exponent that the largest has once it is rounded up: so no code overflows.
            least = tl.maximum(((of_block + 0xFFFFF) >> 23) - (TOP - 1), SMALLEST)
            at, has = _blocks(stored, row, live, d, row_bytes, SIZE, START, BD)
            tl.store(at, least.to(tl.int8), mask=has)
            least = _spread(least, SIZE)
            # Below the normal codes, adding 2^least makes the mantissa the fixed-point code.
            small = (size >> 23) < least
            number = _float(size) + _float(tl.where(small, least << 23, 0))
            code = (number.to(tl.int32, bitcast=True) + chance * 16 + 8) >> 20
            code -= tl.where(small, least, least - 1) << 3
            sign = (bits >> 24) & 0x80
            code = tl.where(size == 0, 0, tl.maximum(code, 1)) if SECOND else code | sign
            tl.store(_at(stored, row, row_bytes, START, BD), code.to(tl.int8), mask=mask)


@triton.jit
def moved_by(
    p, g, m, v, rule,
    OPTIMIZER: tl.constexpr, MOMENTUM: tl.constexpr, ROUNDED: tl.constexpr = True,
):  # fmt: skip
    """p, m and v after one step with gradient g.

    lr holds Adam's 1 / (1 - beta1^t), correction is 1 / sqrt(1 - beta2^t), rest is 1 - beta, shrink
    1 - lr * decoupled decay. Not ROUNDED, Adam's root and quotient are the processor's short ones,
    good to three units in the last place of what p moves by: for weights, which are large beside
    it.
    """
    lr, beta1, rest1, beta2, rest2, eps, decay, shrink, correction = rule
    g = g + decay * p
    p = p * shrink
    if OPTIMIZER == "adam":
        m = m + rest1 * (g - m)
        v = beta2 * v + rest2 * (g * g)
        if ROUNDED:
            p = p - lr * tl.div_rn(m, tl.sqrt_rn(v) * correction + eps)
        else:
            p = p - lr * (m / (tl.sqrt(v) * correction + eps))
    else:
        if MOMENTUM:
            m = beta1 * m + (rest1 * g if OPTIMIZER == "signsgd" else g)
            g = m
        if OPTIMIZER == "signsgd":
            g = tl.where(g > 0.0, 1.0, tl.where(g < 0.0, -1.0, 0.0))
        p = p - lr * g
    return p, m, v


@triton.jit
def moments(
    m_at, v_at, p, row, live, mask, d, row_bytes,
    OPTIMIZER: tl.constexpr, MOMENTUM: tl.constexpr, STATE: tl.constexpr,
    START: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """m and v [BL, BD], p in place of what the rule does not keep."""
    m, v = p, p
    if MOMENTUM:
        m = read(m_at, row, live, mask, d, row_bytes, False, STATE, START, BD)
    if OPTIMIZER == "adam":
        v = read(v_at, row, live, mask, d, row_bytes, True, STATE, START, BD)
    return m, v


@triton.jit
def moved(
    p, m, v, g, m_at, v_at, row, live, mask, d, row_bytes, key, rule,
    OPTIMIZER: tl.constexpr, MOMENTUM: tl.constexpr, STATE: tl.constexpr,
    START: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """p [BL, BD] after the step; its moments are stored."""
    # The short ones' many results at once would not fit in the registers that a wide row leaves.
    p, m, v = moved_by(p, g, m, v, rule, OPTIMIZER, MOMENTUM, BD > 2048)
    random = 0
    if STATE != "float32":
        random = words(key, row, START + tl.arange(0, BD))
    if MOMENTUM:
        write(m_at, m, random, row, live, mask, d, row_bytes, False, STATE, START, BD)
    if OPTIMIZER == "adam":
        write(v_at, v, random, row, live, mask, d, row_bytes, True, STATE, START, BD)
    return p
