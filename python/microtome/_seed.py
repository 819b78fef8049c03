"""Generators from explicit seeds: nothing here reads or moves the global random state."""

import hashlib

import torch


def generator(seed: int, *stream: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator for one named stream of a seed: streams with different names are independent.

    Args:
        seed: the user's seed, any integer.
        *stream: names of the use ("shuffle", epoch), so that two uses of one seed never share
            numbers.
        device: where the generator lives.

    Returns:
        A fresh torch.Generator; the same arguments give the same numbers in every process.
    """
    key = repr((int(seed), *stream)).encode()
    value = int.from_bytes(hashlib.sha256(key).digest()[:8], "little") & 0x7FFFFFFFFFFFFFFF
    return torch.Generator(device=device).manual_seed(value)
