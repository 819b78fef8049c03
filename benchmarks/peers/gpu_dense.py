"""A TopK SAE's step in plain torch on a card: dense products, autograd, fused Adam."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear


class DenseStep:
    """Encode, torch.topk, scatter, decode by a dense product; projection, fused Adam, renorm."""

    def __init__(
        self, weights: tuple[Tensor, ...], k: int, lr: float, dtype: torch.dtype = torch.bfloat16
    ) -> None:
        self.params = [torch.nn.Parameter(w.clone()) for w in weights]
        self.k, self.dtype = k, dtype
        self.optimizer = torch.optim.Adam(self.params, lr=lr, fused=True)

    def step(self, x: Tensor) -> Tensor:
        """One step on a batch [n, d]; its FVU before the step."""
        W_enc, b_enc, W_dec, b_dec = self.params
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            z = linear(x - b_dec, W_enc, b_enc)
            values, indices = z.topk(self.k, sorted=False)
            code = torch.zeros_like(z).scatter(1, indices, values.relu())
            out = code @ W_dec + b_dec
        error = out.float() - x
        fvu = error.pow(2).sum() / (x - x.mean(0)).pow(2).sum()
        fvu.backward()
        with torch.no_grad():
            assert W_dec.grad is not None
            W_dec.grad -= (W_dec.grad * W_dec).sum(1, keepdim=True) * W_dec
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            W_dec /= W_dec.norm(dim=1, keepdim=True)
        return fvu.detach()
