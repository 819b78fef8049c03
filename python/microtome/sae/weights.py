"""What a training step multiplies by: the parameters themselves, or their copies in bfloat16."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from microtome.errors import DtypeError
from microtome.ops import Screen
from microtome.sae.sae import SAE, version_of


class Rows(NamedTuple):
    """A batch as the two ops of the forward pass take it.

    Attributes:
        seen: [n, d], what the encoder sees.
        target: [n, d], what the code is to add up to, with `bias`.
        bias: [d] of the reconstruction, or None where the target is without it.
    """

    seen: Tensor
    target: Tensor
    bias: Tensor | None


class Weights:
    """The weights of a step in the parameters' own dtype.

    Attributes:
        copies: what `sae_update` refreshes beside the parameters.
    """

    copies: tuple[Tensor, Tensor] | None = None

    def __init__(self, sae: SAE) -> None:
        self.sae = sae

    def encoder(self, latents: Tensor | None = None) -> tuple[Tensor, Tensor, Screen | None]:
        """W_enc, b_enc and the screen: whole, or the rows of some latents."""
        W_enc, b_enc, screen = self.sae.W_enc, self.sae.b_enc, self.sae.screen()
        if latents is None:
            return W_enc, b_enc, screen
        if screen is not None:  # each row of a screen stands for itself
            screen = Screen(screen.kind, screen.shadow[latents], screen.stats[latents])
        return W_enc[latents], b_enc[latents], screen

    def decoder(self) -> Tensor:
        """W_dec."""
        return self.sae.W_dec

    def rows(self, x: Tensor) -> Rows:
        """A batch [n, d] for the two products."""
        b_dec = self.sae.b_dec
        return Rows(x - b_dec if self.sae.center else x, x, b_dec)

    def keep(self, screen: Screen | None) -> None:
        """Declare screen and copies to be those of the parameters as `sae_update` left them."""
        self.sae.keep_screen(screen)


class NarrowWeights(Weights):
    """Copies of W_enc and W_dec in bfloat16: half the bytes in every gather, and no screen.

    They are a function of the parameters, made anew where those have changed in another way than by
    `sae_update`, so a checkpoint need not hold them. b_dec is taken off x before the rounding: what
    is left is smaller, and so is what the rounding loses of it.

    Raises:
        DtypeError: the parameters are not float32.
    """

    def __init__(self, sae: SAE) -> None:
        super().__init__(sae)
        if sae.W_enc.dtype != torch.float32:
            kind = str(sae.W_enc.dtype).removeprefix("torch.")
            msg = "train: precision='bfloat16' keeps float32 parameters beside their copies, got "
            msg += f"an SAE in {kind}. Call sae.float()."
            raise DtypeError(msg)
        self._versions: object = None

    def _versions_now(self) -> object:
        return version_of(self.sae.W_enc), version_of(self.sae.W_dec)

    def _fresh(self) -> tuple[Tensor, Tensor]:
        if self.copies is None or self._versions != self._versions_now():
            self.copies = None  # before the new ones take memory
            self.copies = (self.sae.W_enc.bfloat16(), self.sae.W_dec.bfloat16())
            self._versions = self._versions_now()
        return self.copies

    def encoder(self, latents: Tensor | None = None) -> tuple[Tensor, Tensor, Screen | None]:
        W_enc, b_enc = self._fresh()[0], self.sae.b_enc.bfloat16()
        return (W_enc, b_enc, None) if latents is None else (W_enc[latents], b_enc[latents], None)

    def decoder(self) -> Tensor:
        return self._fresh()[1]

    def rows(self, x: Tensor) -> Rows:
        centred = torch.empty_like(x, dtype=torch.bfloat16)
        torch.sub(x, self.sae.b_dec, out=centred)  # in float32, then rounded
        return Rows(centred if self.sae.center else x.bfloat16(), centred, None)

    def keep(self, screen: Screen | None) -> None:
        super().keep(screen)
        self._versions = self._versions_now()
