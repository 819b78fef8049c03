"""One training step in one pass over the parameters: no [n, f], no dense gradient in memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from microtome.ops import sae_loss, sae_update, topk_encode
from microtome.ops.sae_update import Code, moments_for
from microtome.sae.config import TrainConfig
from microtome.sae.loss import (
    DeadSet,
    Losses,
    check_finite,
    dead_set,
    variance_of,
    variance_sums,
)
from microtome.sae.sae import SAE
from microtome.sae.weights import NarrowWeights, Weights

MOMENTS = tuple(f"{m}.{p}" for p in ("W_enc", "b_enc", "W_dec", "b_dec") for m in ("m", "v"))


class FusedStep:
    """A step by `topk_encode`, `sae_loss` and `sae_update`.

        loss = (|x - x_hat|^2 + weight * |e - e_hat|^2) / total variance of the batch

    where e = x - x_hat, held fixed, and e_hat is its reconstruction, without b_dec, by the k_aux
    dead latents with the largest pre-activations (AuxK, Gao et al. 2024, arXiv:2406.04093). AuxK's
    gradient reaches the dead latents' encoder and decoder rows, and b_dec through the centred
    input. With precision="bfloat16" both products and their gradients read bfloat16 rows and copies
    of the weights, sums are float32, and float32 parameters take the step.

    Args:
        sae: updated in place.
        config: a fused optimizer.

    Raises:
        DtypeError: precision="bfloat16", and the SAE is not in float32.

    Attributes:
        since_fired: [f] int64: rows seen since each latent last fired.
        settings: what the config does not say of the optimizer: nothing.
    """

    def __init__(self, sae: SAE, config: TrainConfig) -> None:
        self.sae, self.config = sae, config
        self.weights = NarrowWeights(sae) if config.precision == "bfloat16" else Weights(sae)
        self.settings: dict[str, str] = {}
        self.base_lr = config.base_lr(sae.n_features) or 0.0
        self.moments = moments_for(
            sae.parameters_in_order, config.rule(self.base_lr), config.moments
        )
        self.since_fired = torch.zeros(sae.n_features, dtype=torch.int64, device=sae.W_enc.device)

    @torch.no_grad()
    def take(self, x: Tensor, factor: float, step: int) -> Losses:
        """One step.

        Args:
            x: [n, d], dtype and device of the weights; also bfloat16 with that precision.
            factor: the learning rate as a fraction of its peak.
            step: 1 for the first.

        Raises:
            NonFiniteError: x holds NaN or infinity, or the error overflows; nothing has been
                changed.
        """
        sae, weights = self.sae, self.weights
        rows = weights.rows(x)
        W_enc, b_enc, screen = weights.encoder()
        values, indices, _ = topk_encode(rows.seen, W_enc, b_enc, k=sae.activation.k, screen=screen)
        values = values.relu()
        sse, grad_out, grad_values = sae_loss(
            rows.target, values, indices, weights.decoder(), rows.bias
        )
        x = x.to(sae.W_enc.dtype)
        dead_now = self.since_fired >= self.config.dead_after_tokens
        counts = ((values > 0).sum(), dead_now.sum())
        # All that the host must know of the step in one reading: on a GPU each is a wait.
        numbers = torch.stack([t.double() for t in (*variance_sums(x), sse.sum(), *counts)])
        variance, energy, error, active, n_dead = numbers.tolist()
        scale = 1.0 / variance_of(variance, energy, x.dtype)
        loss = fvu = error * scale
        check_finite(loss, sse)
        code = Code(indices, values, grad_values, grad_out, scale)
        l0 = int(active) / max(1, len(x))

        aux, auxk = None, 0.0
        dead = dead_set(self.since_fired, sae.d_model, self.config, int(n_dead))
        if dead is not None:
            aux, sse = self._aux(rows.seen, grad_out, dead, scale)
            auxk = float(sse.sum()) * scale
            loss += dead.weight * auxk
            check_finite(loss, sse)

        lr = self.base_lr * factor
        fired = sae_update(
            code, rows.seen, sae.parameters_in_order, self.moments, self.config.rule(lr), step,
            aux=aux, center=sae.center, screen=screen, copies=weights.copies,
        )  # fmt: skip
        weights.keep(screen)
        self.since_fired += len(x)
        self.since_fired.masked_fill_(fired > 0, 0)  # by a mask as index, a GPU would be waited for
        return Losses(fvu, auxk, loss, l0, self.since_fired >= self.config.dead_after_tokens, lr)

    def _aux(
        self, seen: Tensor, grad_out: Tensor, dead: DeadSet, scale: float
    ) -> tuple[Code, Tensor]:
        W_enc, b_enc, screen = self.weights.encoder(dead.latents)
        values, places, _ = topk_encode(seen, W_enc, b_enc, k=dead.k, screen=screen)
        values, indices = values.relu(), dead.latents[places.long()].int()
        residual = grad_out * -0.5  # grad_out is 2 (x_hat - x)
        sse, aux_grad_out, aux_grad_values = sae_loss(
            residual, values, indices, self.weights.decoder()
        )
        return Code(indices, values, aux_grad_values, aux_grad_out, scale * dead.weight), sse

    def state(self) -> tuple[dict[str, Tensor], Any]:
        """Tensors and JSON values from which `load` continues bit for bit."""
        tensors = {n: m for n, m in zip(MOMENTS, self.moments, strict=True) if m is not None}
        return {**tensors, "since_fired": self.since_fired}, None

    def load(self, tensors: dict[str, Tensor], _: Any) -> None:
        """Take over what `state` gave."""
        for name, moment in zip(MOMENTS, self.moments, strict=True):
            if moment is not None:
                moment.copy_(tensors[name])
        self.since_fired.copy_(tensors["since_fired"])
