"""Small causal models that no table of architectures knows, in several ways of being built."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Mixer(nn.Module):
    """A causal block without attention: each position adds the mean of those up to it."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.mix = nn.Linear(d, d)

    def forward(self, x: Tensor) -> Tensor:
        mean = x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]
        return x + torch.tanh(self.mix(mean))


class InTuple(Mixer):
    """Gives the stream first in a tuple, and nothing after it."""

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return super().forward(x), None


class InPlace(Mixer):
    """Writes into its input."""

    def forward(self, x: Tensor) -> Tensor:
        x += super().forward(x)
        return x


class WithState(Mixer):
    """Hands on the stream and a second one."""

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        new = super().forward(x + 0.1 * state)
        return new, state + new


class Plain(nn.Module):
    """An embedding, a list of blocks of its own, and a head.

    Args:
        block: made with the width of the stream.
        skips: two blocks; the output of the first is added to the input of the second.
    """

    def __init__(
        self, block: type[nn.Module] = Mixer, skips: tuple[int, int] | None = None
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embed, self.head = nn.Embedding(64, 8), nn.Linear(8, 64)
        self.blocks = nn.ModuleList(block(8) for _ in range(6))
        self.skips = skips
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(0, 0.7, generator=generator)

    def forward(self, tokens: Tensor) -> Tensor:
        x, kept = self.embed(tokens), []
        state = x
        for i, block in enumerate(self.blocks):
            if self.skips and i == self.skips[1]:
                x = x + kept[self.skips[0]]
            out = block(x, state) if isinstance(block, WithState) else block(x)
            x, state = out if isinstance(out, tuple) else (out, state)
            kept.append(x)
        return self.head(x)
