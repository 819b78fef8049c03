"""A TopK SAE's step in the style of OpenAI's sparse autoencoder kernels, written from the method.

Gao et al. 2024 (arXiv:2406.04093, appendix D): the pre-activations are dense and torch.topk picks;
decoding gathers rows, the gradient of the values is a dot product with each of them; a weight's
gradient sorts the entries by latent, and programs that each take a stretch of entries add up while
the latent stays the same and finish with a float atomic. So its sums depend on the order in which
programs arrive.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import linear

STRETCH = 64  # entries of a program
FUSED = {"enable_fp_fusion": True}  # the default, of which Triton 3.9 warns


@triton.jit
def _decode_kernel(values, indices, W, out, k, d, BD: tl.constexpr):
    """Row: the sum of its active decoder rows."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BD + tl.arange(0, BD)
    acc = tl.zeros((BD,), tl.float32)
    for j in range(0, k):
        value = tl.load(values + row * k + j).to(tl.float32)
        at = tl.load(indices + row * k + j).to(tl.int64)
        acc += value * tl.load(W + at * d + column, mask=column < d, other=0.0).to(tl.float32)
    tl.store(out + row * d + column, acc, mask=column < d)


@triton.jit
def _grad_values_kernel(grad, indices, W, out, k, d, BD: tl.constexpr):
    """Entry: the dot product of its row's gradient with its decoder row."""
    row = tl.program_id(0).to(tl.int64)
    for j in range(0, k):
        at = tl.load(indices + row * k + j).to(tl.int64)
        acc = tl.zeros((BD,), tl.float32)
        for first in range(0, d, BD):
            column = first + tl.arange(0, BD)
            g = tl.load(grad + row * d + column, mask=column < d, other=0.0).to(tl.float32)
            w = tl.load(W + at * d + column, mask=column < d, other=0.0).to(tl.float32)
            acc += g * w
        tl.store(out + row * k + j, tl.sum(acc, 0))


@triton.jit
def _grad_W_kernel(
    latents, rows, values, dense, out, m, d, STRETCH: tl.constexpr, BD: tl.constexpr
):
    """A stretch of sorted entries, an atomic addition wherever the latent changes."""
    first = tl.program_id(0) * STRETCH
    column = tl.program_id(1) * BD + tl.arange(0, BD)
    live = column < d
    last = tl.minimum(first + STRETCH, m)
    latent = tl.load(latents + first).to(tl.int64)
    acc = tl.zeros((BD,), tl.float32)
    for at in range(first, last):
        here = tl.load(latents + at).to(tl.int64)
        if here != latent:
            tl.atomic_add(out + latent * d + column, acc, mask=live, sem="relaxed")
            acc = tl.zeros((BD,), tl.float32)
            latent = here
        row = tl.load(rows + at).to(tl.int64)
        value = tl.load(values + at).to(tl.float32)
        acc += value * tl.load(dense + row * d + column, mask=live, other=0.0).to(tl.float32)
    tl.atomic_add(out + latent * d + column, acc, mask=live, sem="relaxed")


def _block(d: int, most: int) -> int:
    return min(triton.next_power_of_2(max(d, 16)), most)


def decode(values: Tensor, indices: Tensor, W: Tensor) -> Tensor:
    """[n, d] sums of decoder rows, without a bias."""
    n, k, d = *values.shape, W.shape[1]
    out = torch.empty(n, d, dtype=torch.float32, device=W.device)
    BD = _block(d, 1024)
    _decode_kernel[(n, triton.cdiv(d, BD))](values, indices, W, out, k, d, BD=BD, **FUSED)
    return out


def grad_values(grad: Tensor, indices: Tensor, W: Tensor) -> Tensor:
    """[n, k] dot products of the gradient's rows with the active decoder rows."""
    n, k, d = *indices.shape, W.shape[1]
    out = torch.empty(n, k, dtype=torch.float32, device=W.device)
    _grad_values_kernel[(n,)](grad, indices, W, out, k, d, BD=_block(d, 1024), **FUSED)
    return out


def grad_W(latents: Tensor, rows: Tensor, values: Tensor, dense: Tensor, f: int) -> Tensor:
    """[f, d]: for each latent the sum of values times rows of `dense`, over sorted entries."""
    m, d = latents.numel(), dense.shape[1]
    out = torch.zeros(f, d, dtype=torch.float32, device=dense.device)
    BD = _block(d, 1024)
    grid = (triton.cdiv(m, STRETCH), triton.cdiv(d, BD))
    _grad_W_kernel[grid](latents, rows, values, dense, out, m, d, STRETCH=STRETCH, BD=BD, **FUSED)
    return out


def gradients(
    params: list[torch.nn.Parameter],
    indices: Tensor,
    values: Tensor,
    grad: Tensor,
    grad_out: Tensor,
    x: Tensor,
    scale: float,
) -> None:
    """Set the gradients of W_enc, b_enc, W_dec, b_dec from a code and its gradients.

    Args:
        params: the four parameters.
        indices: [n, k].
        values: [n, k] after the ReLU.
        grad: [n, k], the gradient of the values.
        grad_out: [n, d], that of the reconstruction.
        x: [n, d], centred.
        scale: of both gradients.
    """
    W_enc, b_enc, W_dec, b_dec = params
    f, k = W_enc.shape[0], indices.shape[1]
    latents, order = indices.flatten().sort()
    rows = order // k
    sorted_values = values.flatten()[order] * scale
    sorted_grad = grad.flatten()[order] * scale
    W_dec.grad = grad_W(latents, rows, sorted_values, grad_out, f)
    W_enc.grad = grad_W(latents, rows, sorted_grad, x, f)
    b_enc.grad = torch.zeros_like(b_enc).index_add_(0, latents.long(), sorted_grad)
    b_dec.grad = scale * grad_out.sum(0) - b_enc.grad @ W_enc


def finish(params: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """Projection, the optimizer's step, renorm."""
    W_dec = params[2]
    assert W_dec.grad is not None
    W_dec.grad -= (W_dec.grad * W_dec).sum(1, keepdim=True) * W_dec
    optimizer.step()
    optimizer.zero_grad()
    W_dec /= W_dec.norm(dim=1, keepdim=True)


class OpenAIStep:
    """A step: bf16 dense product, torch.topk, then the kernels above, fused Adam."""

    def __init__(self, weights: tuple[Tensor, ...], k: int, lr: float) -> None:
        self.params = [torch.nn.Parameter(w.clone()) for w in weights]
        self.k = k
        self.optimizer = torch.optim.Adam(self.params, lr=lr, fused=True)

    @torch.no_grad()
    def step(self, x: Tensor, scale: float) -> Tensor:
        """One step on a batch [n, d] whose total variance is 1 / scale; its FVU before the step."""
        W_enc, b_enc, W_dec, b_dec = self.params
        centred = x - b_dec
        z = linear(centred.bfloat16(), W_enc.bfloat16(), b_enc.bfloat16())
        values, indices = z.topk(self.k, sorted=False)
        values, indices = values.float().relu(), indices.int()
        grad_out = 2 * (decode(values, indices, W_dec) + b_dec - x)
        grad = grad_values(grad_out, indices, W_dec).masked_fill(values == 0, 0.0)
        gradients(self.params, indices, values, grad, grad_out, centred, scale)
        finish(self.params, self.optimizer)
        return grad_out.pow(2).sum() * (scale / 4)
