"""eai-sparsify on a card: its SparseCoder with given weights, stepped as its trainer does."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from benchmarks.on_gpu.item import AbsentError


def coder(weights: tuple[Tensor, ...], k: int) -> Any:
    """A SparseCoder that holds these weights; raises AbsentError where it is not installed."""
    if weights[0].device.type == "cpu":
        # With triton installed it picks its CUDA decoder, also on a processor.
        os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
    try:
        from sparsify import SparseCoder, SparseCoderConfig
    except ImportError as error:
        msg = f"not installed ({error})"
        raise AbsentError(msg) from error
    f, d = weights[0].shape
    config = SparseCoderConfig(num_latents=f, k=k)
    sae = SparseCoder(d, config, dtype=torch.float32, device=weights[0].device)
    with torch.no_grad():
        own = (sae.encoder.weight, sae.encoder.bias, sae.W_dec, sae.b_dec)
        for parameter, weight in zip(own, weights, strict=True):
            parameter.copy_(weight)
    return sae


class SparsifyStep:
    """Forward and backward of SparseCoder under bf16 autocast, projection, fused Adam, renorm."""

    def __init__(self, weights: tuple[Tensor, ...], k: int, lr: float) -> None:
        self.sae = coder(weights, k)
        self.optimizer = torch.optim.Adam(self.sae.parameters(), lr=lr, fused=True)

    def step(self, x: Tensor) -> Tensor:
        """One step on a batch [n, d]; its FVU before the step."""
        sae = self.sae
        sae.set_decoder_norm_to_unit_norm()
        with torch.autocast(x.device.type, torch.bfloat16):
            fvu = sae(x).fvu
        fvu.backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        self.optimizer.step()
        self.optimizer.zero_grad()
        loss: Tensor = fvu.detach()
        return loss

    @property
    def params(self) -> tuple[Tensor, ...]:
        """W_enc, b_enc, W_dec, b_dec."""
        sae = self.sae
        return sae.encoder.weight, sae.encoder.bias, sae.W_dec, sae.b_dec
