"""Activations like a language model's and weights like a trained SAE's, made on the card.

How many candidates survive a screen depends on both, so neither is plain noise and nothing is zero.
Features are used with a Zipf skew, rows differ in length, the noise between features is
anisotropic, and a few coordinates are massive, as in residual streams (Sun et al. 2024,
arXiv:2402.17762).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.on_gpu.device import Device
from benchmarks.on_gpu.item import Context
from microtome._seed import generator

MASSIVE = 3  # coordinates
WARM_ROWS = 256  # rows of a call that only compiles


@dataclass(frozen=True)
class Shape:
    """Sizes of an SAE and its batch.

    Attributes:
        name: "S", "M", "L" or "XL".
        n: rows.
        d: model width.
        f: features.
        k: active.
    """

    name: str
    n: int
    d: int
    f: int
    k: int


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("S", 8192, 768, 24576, 32),
        Shape("M", 8192, 2304, 65536, 64),
        Shape("L", 16384, 4096, 131072, 64),
        Shape("XL", 4096, 4096, 1048576, 32),
    )
}
DRY = Shape("", 6, 16, 64, 4)


def sized(context: Context, name: str) -> Shape:
    """The shape of that name: tiny in a dry run, of few rows in a call that only compiles."""
    shape = SHAPES[name]
    if context.device.dry:
        return Shape(name, DRY.n, DRY.d, DRY.f, DRY.k)
    if context.warm:
        return Shape(name, min(shape.n, WARM_ROWS), shape.d, shape.f, shape.k)
    return shape


@dataclass
class Batch:
    """One batch and the weights it is encoded by, float32.

    Attributes:
        shape: sizes.
        x: [n, d].
        W_enc, b_enc, W_dec, b_dec: [f, d], [f], [f, d] of unit rows, [d].
    """

    shape: Shape
    x: Tensor
    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor

    @property
    def weights(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """W_enc, b_enc, W_dec, b_dec."""
        return self.W_enc, self.b_enc, self.W_dec, self.b_dec


def batch(device: Device, shape: Shape, seed: int = 0) -> Batch:
    """Draw a batch: rows are sums of 2 k features with positive strengths, and what lies between.

        x[i] = b_dec + r_i (sum_j a_ij W_dec[g_ij] + noise_i),   g Zipf-distributed, a exponential

    The encoder is tied up to a small difference, its bias a little below zero.

    Args:
        device: where tensors lie.
        shape: sizes.
        seed: of everything drawn.
    """
    place, (n, d, f, k) = device.torch, (shape.n, shape.d, shape.f, shape.k)
    g = torch.Generator(place).manual_seed(1 + seed)
    draw = lambda *size: torch.randn(*size, generator=g, device=place)  # noqa: E731
    W_dec = draw(f, d)
    W_dec += 0.5 * draw(1, d)  # features share a direction, so that they interfere
    W_dec /= W_dec.norm(dim=1, keepdim=True)
    W_enc = draw(f, d).mul_(0.1 * d**-0.5).add_(W_dec)
    b_enc = draw(f).mul_(0.02).sub_(0.05)
    b_dec = draw(d).mul_(0.2)
    spectrum = torch.arange(1, d + 1, device=place, dtype=torch.float32).pow(-0.5)
    noise = (
        draw(n, d)
        * (spectrum / spectrum.norm() * d**0.5)[torch.randperm(d, generator=g, device=place)]
    )
    x = noise.mul_(0.6 * d**-0.5)
    used = zipf(n, min(2 * k, f), f, place, g)  # [n, 2k]
    strength = torch.empty(used.shape, device=place).exponential_(1.0, generator=g)
    for j in range(used.shape[1]):
        x.addcmul_(strength[:, j, None], W_dec[used[:, j]])
    x *= torch.exp(0.2 * draw(n, 1))  # rows differ in length
    x += b_dec
    columns = torch.randperm(d, generator=g, device=place)[: min(MASSIVE, d)]
    b_dec[columns] += 30.0
    x[:, columns] += 30.0 + draw(n, len(columns))
    return Batch(shape, x, W_enc, b_enc, W_dec, b_dec)


def zipf(n: int, k: int, f: int, place: torch.device, g: torch.Generator) -> Tensor:
    """[n, k] feature numbers whose frequency falls with a rank, drawn at random."""
    u = torch.rand(n, k, generator=g, device=place)
    rank = (f**u - 1).long().clamp_(0, f - 1)  # density ~ 1 / (rank + 1)
    # Half of the draws are even, or the head would take nearly all.
    even = torch.randint(0, f, (n, k), generator=g, device=place)
    rank = torch.where(torch.rand(n, k, generator=g, device=place) < 0.5, even, rank)
    return torch.randperm(f, generator=g, device=place)[rank]


def code(b: Batch, *, dense: bool = False) -> tuple[Tensor, Tensor]:
    """Values [n, k] after the ReLU and indices [n, k] int32 of the batch, by plain products.

    Args:
        b: the batch.
        dense: feature 0 is on every row.
    """
    values, indices = [], []
    for rows in b.x.split(1024):
        z = torch.nn.functional.linear(rows - b.b_dec, b.W_enc, b.b_enc)
        top = z.topk(b.shape.k)
        values.append(top.values.relu())
        indices.append(top.indices.int())
    v, i = torch.cat(values), torch.cat(indices)
    if dense:
        i[:, -1] = torch.where((i == 0).any(1), i[:, -1], 0)
    return v, i


def sample(n: int, rows: int = 8) -> Tensor:
    """Row numbers spread over [0, n), first and last among them."""
    return torch.linspace(0, n - 1, min(n, rows)).round().long().unique()


def host_generator(*key: object) -> torch.Generator:
    """A generator on the processor for small inputs."""
    return generator(0, "gpu", *map(str, key))
