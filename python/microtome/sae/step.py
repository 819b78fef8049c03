"""One training step in one pass over the parameters: no [n, f], no dense gradient in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from microtome._reading import Reading
from microtome.ops import RowGradients, sae_loss, sae_update, synchronize, topk_encode
from microtome.ops.sae_update import Code, moments_for
from microtome.sae.auxk import by_products, worthwhile
from microtome.sae.config import TrainConfig
from microtome.sae.loss import (
    DeadSet,
    LateLosses,
    Losses,
    dead_set,
    variance_of,
    variance_sums,
)
from microtome.sae.sae import SAE
from microtome.sae.weights import NarrowWeights, Weights

_MOMENTS = tuple(f"{m}.{p}" for p in ("W_enc", "b_enc", "W_dec", "b_dec") for m in ("m", "v"))


def named(moments: Sequence[Tensor | None], since_fired: Tensor) -> dict[str, Tensor]:
    """What a step keeps from one batch to the next, under its names in a checkpoint."""
    kept = {n: m for n, m in zip(_MOMENTS, moments, strict=True) if m is not None}
    return {**kept, "since_fired": since_fired}


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
        self._last: LateLosses | None = None  # whose numbers nobody may have read

    @torch.no_grad()
    def take(self, x: Tensor, factor: float, step: int) -> Losses:
        """One step.

        Args:
            x: [n, d], dtype and device of the weights; also bfloat16 with that precision.
            factor: the learning rate as a fraction of its peak.
            step: 1 for the first.

        Raises:
            NonFiniteError: x holds NaN or infinity, or the error overflows; nothing has been
                changed. On a GPU, which is not waited for, the next step raises, or who reads the
                losses first.
        """
        sae, weights, rows = self.sae, self.weights, self.weights.rows(x)
        dead_now = self.since_fired >= self.config.dead_after_tokens
        wide = x.to(sae.W_enc.dtype)
        first = Reading(*variance_sums(wide), dead_now.sum())
        W_enc, b_enc, screen = weights.encoder()
        values, indices, _ = topk_encode(rows.seen, W_enc, b_enc, k=sae.activation.k, screen=screen)
        values = values.relu()
        sse, grad_out, grad_values = sae_loss(
            rows.target, values, indices, weights.decoder(), rows.bias
        )
        # A GPU has these when the step before is done, and goes on with the encoder meanwhile.
        variance, energy, n_dead = first.read()
        self._settle_last()
        scale = 1.0 / variance_of(variance, energy, wide.dtype)

        aux, extra, aux_sse, weight = None, None, sse.new_zeros(1), 0.0
        dead = dead_set(self.since_fired, sae.d_model, self.config, int(n_dead))
        if dead is not None:
            aux, extra, aux_sse = self._aux(rows.seen, grad_out, dead, scale)
            weight = dead.weight
        sums, lr = Reading(sse.sum(), (values > 0).sum(), aux_sse.sum()), self.base_lr * factor
        # On a CPU an overflow raises here, before anything is written.
        losses = LateLosses(sums, scale, weight, sse, aux_sse, dead_now, lr)
        fired = sae_update(
            Code(indices, values, grad_values, grad_out, scale), rows.seen, sae.parameters_in_order,
            self.moments, self.config.rule(lr), step,
            aux=aux, extra=extra, center=sae.center, screen=screen, copies=weights.copies,
        )  # fmt: skip
        weights.keep(screen)
        self.since_fired += len(x)
        self.since_fired.masked_fill_(fired > 0, 0)  # by a mask as index, a GPU would be waited for
        torch.ge(self.since_fired, self.config.dead_after_tokens, out=dead_now)
        self._last = losses if sums.late else None
        return losses

    def _settle_last(self) -> None:
        """Raise what the losses of the step before turned out to be, once."""
        last, self._last = self._last, None
        if last is not None:
            last.settle()

    def _aux(
        self, seen: Tensor, grad_out: Tensor, dead: DeadSet, scale: float
    ) -> tuple[Code | None, RowGradients | None, Tensor]:
        residual = grad_out * -0.5  # grad_out is 2 (x_hat - x)
        if worthwhile(dead, self.sae.n_features):
            with torch.autocast(seen.device.type, enabled=False):  # the ops decide for themselves
                extra, sse = by_products(self.weights, seen, residual, dead, scale * dead.weight)
            return None, extra, sse
        W_enc, b_enc, screen = self.weights.encoder(dead.latents)
        values, places, _ = topk_encode(seen, W_enc, b_enc, k=dead.k, screen=screen)
        values, indices = values.relu(), dead.latents[places.long()].int()
        sse, aux_grad_out, aux_grad_values = sae_loss(
            residual, values, indices, self.weights.decoder()
        )
        aux = Code(indices, values, aux_grad_values, aux_grad_out, scale * dead.weight)
        return aux, None, sse

    def state(self) -> tuple[dict[str, Tensor], Any]:
        """Tensors and JSON values from which `load` continues bit for bit.

        Raises:
            NonFiniteError: on a GPU, for the last step, which a checkpoint must not count as taken.
        """
        self._settle_last()
        synchronize(self.sae.W_enc.device)
        return named(self.moments, self.since_fired), None

    def load(self, tensors: dict[str, Tensor], _: Any) -> None:
        """Take over what `state` gave."""
        for name, kept in named(self.moments, self.since_fired).items():
            kept.copy_(tensors[name])
