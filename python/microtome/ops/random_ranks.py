"""Uniformly random orders of players, each from a seed and its own number alone.

CUDA C++ draws on a GPU; elsewhere the reference does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from microtome import _check, _native
from microtome.ops._registry import Backend, Op, why_not_common

_LOW = 0xFFFFFFFF
_MULTIPLIERS, _WEYL = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)
_MOST = 1 << 24  # players
WIDEST = 4096  # players whose keys a block of the CUDA kernel sorts


def random_ranks(samples: Tensor, p: int, seed: int) -> Tensor:
    """Draw a uniformly random order of p players for every sample number.

        key[i, j] = 64 bits of Philox4x32-10 at counter (j // 2, samples[i]) under the seed,
                    the last b of them replaced by j;  b = max(12, bits of p - 1)
        ranks[i, j] = how many players of sample i have a lower key

    so that an order depends on the seed and on its number alone: batches may be cut, shuffled or
    drawn again anywhere and give the same orders. The antithetic order is p - 1 - ranks.

    Args:
        samples: [s] int32 or int64, the numbers of the orders; equal numbers give equal orders.
        p: players, at most 2^24.
        seed: in [0, 2^63).

    Returns:
        ranks [s, p] int32 in [0, p): the place of each player, 0 first.

    Raises:
        ShapeError, DtypeError: samples is not a vector of integers.
        ArgumentError: p or seed lies outside its range.
        BackendError: a demanded backend cannot run these inputs.

    Not differentiable. Every backend gives the same bits. Uniform but for ties of the 64 - b random
    bits, which go to the lower player: two of p players tie with a probability of at most
    p^2 / 2^(65 - b). Writes 4 bytes a player, reads 8 a sample.
    Source: Salmon et al. 2011, doi:10.1145/2063384.2063405.

    Example:
        >>> import torch
        >>> whole = random_ranks(torch.arange(4), 5, seed=7)
        >>> torch.equal(whole[2:], random_ranks(torch.arange(2, 4), 5, seed=7))
        True
    """
    op = "random_ranks"
    _check.shapes(op, samples=(samples, "s"))
    _check.dtype(op, _check.INDICES, samples=samples)
    _check.between(op, "p", p, 1, _MOST)
    _check.between(op, "seed", seed, 0, 2**63 - 1)
    ranks: Tensor = _ranks(samples, p, seed)
    return ranks


def philox(counter: list[Tensor], seed: int) -> list[Tensor]:
    """Philox4x32-10 of four int64 tensors that hold 32 bits each; so does the answer."""
    key = [seed & _LOW, seed >> 32]
    for _ in range(10):
        x, y, z, w = counter
        # int64 keeps the low 64 bits of a product, sign or not: the shift fills with the sign.
        first, second = x * _MULTIPLIERS[0], z * _MULTIPLIERS[1]
        counter = [
            (second >> 32 & _LOW) ^ y ^ key[0],
            second & _LOW,
            (first >> 32 & _LOW) ^ w ^ key[1],
            first & _LOW,
        ]
        key = [(k + more) & _LOW for k, more in zip(key, _WEYL, strict=True)]
    return counter


def random_ranks_reference(samples: Tensor, p: int, seed: int) -> Tensor:
    """Form every key, then sort."""
    number = samples.long()[:, None]
    pair = torch.arange((p + 1) // 2, device=samples.device)
    shape = (number.shape[0], pair.shape[0])
    counter = [pair, torch.zeros_like(pair), number & _LOW, number >> 32 & _LOW]
    words = philox([c.expand(shape) for c in counter], seed)
    keys = torch.stack([words[1] << 32 | words[0], words[3] << 32 | words[2]], 2)
    keys = keys.flatten(1)[:, :p]  # [s, p]
    bits = max(12, (p - 1).bit_length())
    player = torch.arange(p, device=samples.device)
    keys = (keys >> bits << bits) | player
    order = (keys ^ -(2**63)).argsort(1)  # as unsigned numbers
    return torch.empty_like(order).scatter_(1, order, player.expand_as(order)).int()


def _fake(samples: Tensor, p: int, seed: int) -> Tensor:
    return samples.new_empty((samples.shape[0], p), dtype=torch.int32)


def _cuda_ranks(samples: Tensor, p: int, seed: int) -> Tensor:
    samples = samples.long().contiguous()
    ranks = torch.empty(samples.shape[0], p, dtype=torch.int32, device=samples.device)
    with _native.device_of(samples):
        _native.cuda().random_ranks(
            samples.data_ptr(), ranks.data_ptr(), *ranks.shape, seed, _native.stream(samples)
        )
    return ranks


def _why_not_cuda(samples: Tensor, p: int, seed: int) -> str | None:
    reason = why_not_common("cuda", (samples,), ())
    if reason is None and p > WIDEST:
        return f"p={p} (a block sorts up to {WIDEST} players)"
    return reason


_ranks = Op(
    random_ranks_reference,
    fake=_fake,
    backends=[Backend("cuda", f"{__name__}:_cuda_ranks", _why_not_cuda)],
)
