"""AuxK by products over the dead latents, where they are few."""

from __future__ import annotations

import torch
from torch import Tensor

from microtome.ops import RowGradients
from microtome.sae.loss import DeadSet
from microtome.sae.weights import Weights

BLOCK_BYTES = 1 << 25  # of a block's pre-activations [rows, dead]


def by_products(
    weights: Weights, seen: Tensor, residual: Tensor, dead: DeadSet, scale: float
) -> tuple[RowGradients, Tensor]:
    """The gradients of AuxK's loss, and its squared errors, through dense products.

        z = seen W_enc[dead]^T + b_enc[dead];  a = relu(z), where z is among the row's k largest
        loss = scale * sum |a W_dec[dead] - residual|^2

    With k = d / 2 active latents a row, one by one gathers n d^2 / 2 numbers of the weights and
    sums as many rows for their gradients. Five products of n x n_dead x d cost less while few
    latents are dead; `worthwhile` says when.

    Args:
        weights: of the step.
        seen: [n, d], what the encoder sees.
        residual: [n, d], what the main code has left.
        dead: the latents and how many of them a row may use.
        scale: of the loss.

    Returns:
        The gradients of the dead latents' rows, and |a W_dec[dead] - residual|^2, [n].

    Deterministic, and as exact as torch's products: equal pre-activations at the border of the k
    may go to either latent.
    Source: Gao et al. 2024, arXiv:2406.04093.
    """
    enc, bias, _ = weights.encoder(dead.latents)
    dec, kind = weights.decoder()[dead.latents], weights.sae.W_enc.dtype
    grad_enc, grad_bias, grad_dec = (torch.zeros_like(t, dtype=kind) for t in (enc, bias, dec))
    used = torch.zeros(len(bias), dtype=torch.bool, device=bias.device)
    rows = max(1, BLOCK_BYTES // (len(bias) * enc.element_size()))
    errors = []
    for x, e in zip(seen.split(rows), residual.split(rows), strict=True):
        a = _active(torch.addmm(bias, x, enc.T), dead.k)  # [rows, dead]
        off = torch.addmm(e, a, dec, beta=-1)
        errors.append(off.to(kind).square().sum(1))
        grad_dec += a.T @ off
        grad = (off @ dec.T).mul_(a > 0)
        grad_enc += grad.T @ x
        grad_bias += grad.sum(0, dtype=kind)
        used |= (a > 0).any(0)
    for gradient in (grad_enc, grad_bias, grad_dec):
        gradient.mul_(2 * scale)
    places = torch.arange(len(bias), dtype=torch.int32, device=bias.device)
    place = torch.full((weights.sae.n_features,), -1, dtype=torch.int32, device=bias.device)
    place[dead.latents] = places.masked_fill_(~used, -1)
    sse = torch.cat(errors) if errors else residual.new_zeros(0)
    return RowGradients(place, grad_enc, grad_bias, grad_dec), sse


def worthwhile(dead: DeadSet, n_features: int) -> bool:
    """Whether the dead latents are few enough for products, and for a dense gradient of theirs.

    A sixteenth of the dictionary: then the gradients take 1/48 of what Adam and the weights do.
    """
    return len(dead.latents) <= max(n_features // 16, 16)


def _active(z: Tensor, k: int) -> Tensor:
    """relu(z) where z is among its row's k largest, else 0."""
    if k >= z.shape[1]:
        return z.relu_()
    values, indices = z.topk(k, sorted=False)
    return torch.zeros_like(z).scatter_(1, indices, values.relu_())
