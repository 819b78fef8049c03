"""How `sae_update` keeps the moments of a weight matrix: float32, bfloat16 or 8 bits a number.

The spec that every backend follows to the bit: given a float32 moment, the step, the matrix and
the place in it, what is stored does not depend on the backend.

Random bits are a hash of (step, matrix, row, column), so that a run repeats and resumes. With mix
the finaliser of MurmurHash3 on 32 bits, and matrix 0 for W_enc and 2 for W_dec,

    key  = mix(mix(step + matrix * 0x9E3779B9 mod 2^32) ^ (step >> 32))
    word = mix(mix(key ^ row) ^ column)

The first moment rounds by the low 16 bits of a word, the second by its high 16.

bfloat16: the float32's bits plus 16 random bits, cut after the upper 16: up with the probability of
the part that is cut, so that the mean is the number itself.

int8: a row of d codes of one byte, then one byte for every BLOCK of them (the last may be short),
then zeros up to a multiple of 16. A code is a small float: 3 bits of mantissa under 4 bits of
exponent and a sign for the first moment, 5 bits of exponent and no sign for the second. The block's
byte is `least`, the exponent, as float32 counts it, of its smallest normal code; it follows from
the largest number of the block. So scales are powers of two: a number that does not change
keeps its code while the block's largest grows or falls. Numbers span 2^17 below the largest
of the block (first moment) and 2^34 (second). Rounding is by 16 random bits as above, except that a
second moment above zero never becomes zero: its square root is what a step is divided by.

Source: Dettmers et al. 2022, arXiv:2110.02861 (block-wise 8-bit states).
"""

from __future__ import annotations

import torch
from torch import Tensor

from microtome._seed import mix32

STATES = ("float32", "bfloat16", "int8")
BLOCK = 128
TOP = (15, 31)  # largest exponent field of a code, of the first and the second moment
SMALLEST = 4  # least `least`: every code stands for a normal float32 or zero


def row_bytes(d: int) -> int:
    """Bytes of a row of d numbers in the 8-bit state."""
    return -(-(d + -(-d // BLOCK)) // 16) * 16


def zeros(p: Tensor, state: str, device: str | None = None) -> Tensor:
    """A moment of zeros for a parameter; a bias keeps its own dtype in every state."""
    if p.dim() == 1 or state == "float32":
        return torch.zeros_like(p, device=device, requires_grad=False)
    if state == "bfloat16":
        return torch.zeros_like(p, device=device, dtype=torch.bfloat16, requires_grad=False)
    return torch.zeros(
        p.shape[0], row_bytes(p.shape[1]), dtype=torch.int8, device=device or p.device
    )


def words(key: int, rows: Tensor, d: int) -> Tensor:
    """[len(rows), d] int64 random words of 32 bits for rows of a matrix."""
    column = torch.arange(d, dtype=torch.int64, device=rows.device)
    return mix32(mix32(rows.long() ^ key)[:, None] ^ column)


def read(stored: Tensor, like: Tensor, *, second: bool) -> Tensor:
    """Moments in the shape and dtype of their parameter; those of full precision themselves."""
    if stored.dtype != torch.int8:
        return stored.to(like.dtype)
    d = like.shape[1]
    raw = stored.long() & 0xFF
    code, least = raw[:, :d], _spread(raw[:, d : d + -(-d // BLOCK)], d)
    negative = torch.zeros_like(code) if second else code >> 7
    code = code if second else code & 0x7F
    # Field 0 has no leading one: it is read as field 1 would be, and that one taken off again.
    normal = (code >= 8).long()
    one = _float((least << 23) * (1 - normal))
    number = _float((code << 20) + ((least - normal) << 23)) - one
    return (number * (1 - 2 * negative)).to(like.dtype)


def write(
    stored: Tensor, rows: Tensor | slice, moment: Tensor, bits: Tensor, *, second: bool
) -> None:
    """Round moments [r, d] by random words [r, d] into rows of a bfloat16 or int8 state."""
    if stored.dtype == torch.bfloat16:
        stored[rows] = _rounded(moment.float(), _half(bits, second=second))
    else:
        stored[rows] = _packed(moment.float(), _half(bits, second=second), second=second)


def _half(bits: Tensor, *, second: bool) -> Tensor:
    return bits >> 16 if second else bits & 0xFFFF


def _rounded(value: Tensor, random: Tensor) -> Tensor:
    upper = (value.view(torch.int32).long() + random) >> 16
    return upper.to(torch.int16).view(torch.bfloat16)


def _packed(value: Tensor, random: Tensor, *, second: bool) -> Tensor:
    (r, d), top = value.shape, TOP[second]
    size = value.abs()
    bits = size.view(torch.int32).long()
    blocks = torch.nn.functional.pad(bits, (0, -d % BLOCK)).view(r, -1, BLOCK)
    # The exponent that the block's largest has once it is rounded up: so no code overflows.
    largest = (blocks.amax(2) + 0xFFFFF) >> 23
    least = (largest - (top - 1)).clamp_min(SMALLEST)  # [r, blocks]
    low = _spread(least, d)
    # Below the normal codes, adding 2^least makes a float32 whose mantissa is the fixed-point code.
    normal = (bits >> 23 >= low).long()
    number = size + _float((low << 23) * (1 - normal))
    code = (number.view(torch.int32).long() + 16 * random + 8) >> 20
    code -= (low - normal) << 3
    if second:
        code = torch.where(size == 0, 0, code.clamp_min(1))
    else:
        code |= (value < 0) * 0x80
    out = torch.zeros(r, row_bytes(d), dtype=torch.int8, device=value.device)
    out[:, :d] = code.to(torch.int8)
    out[:, d : d + least.shape[1]] = least.to(torch.int8)
    return out


def _spread(blocks: Tensor, d: int) -> Tensor:
    """One number a block to one a column."""
    return blocks.repeat_interleave(BLOCK, 1)[:, :d]


def _float(bits: Tensor) -> Tensor:
    return bits.to(torch.int32).view(torch.float32)
