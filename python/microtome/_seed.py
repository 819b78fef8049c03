"""Generators from explicit seeds: nothing here reads or moves the global random state."""

import hashlib
from typing import TypeVar

import torch

from microtome.errors import ArgumentError

_MASK = 0xFFFFFFFF
Word = TypeVar("Word", int, torch.Tensor)


def generator(seed: int, *stream: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator for one named stream of a seed: streams with different names are independent.

    Args:
        seed: the user's seed, any integer.
        *stream: names of the use ("shuffle", epoch), so that two uses of one seed never share
            numbers.
        device: where the generator lives.

    Returns:
        A fresh torch.Generator; the same arguments give the same numbers in every process.

    Raises:
        ArgumentError: the seed is no number, None for one.
    """
    try:
        number = int(seed)
    except (TypeError, ValueError) as error:
        msg = (
            f"{stream[0] if stream else 'generator'}: seed must be a whole number, got {seed!r}. "
            "Nothing is drawn from a global state; for other numbers pass another seed."
        )
        raise ArgumentError(msg) from error
    key = repr((number, *stream)).encode()
    value = int.from_bytes(hashlib.sha256(key).digest()[:8], "little") & 0x7FFFFFFFFFFFFFFF
    return torch.Generator(device=device).manual_seed(value)


def mix32(h: Word) -> Word:
    """MurmurHash3's finaliser (Appleby, public domain) of 32-bit words in [0, 2^32)."""
    h = h ^ (h >> 16)
    h = (h * 0x85EBCA6B) & _MASK  # an int64's product wraps, its low 32 bits are right
    h = h ^ (h >> 13)
    h = (h * 0xC2B2AE35) & _MASK
    return h ^ (h >> 16)


def step_key(step: int, stream: int) -> int:
    """The 32-bit key of one stream of random words at one step."""
    return mix32(mix32((step + stream * 0x9E3779B9) & _MASK) ^ (step >> 32 & _MASK))
