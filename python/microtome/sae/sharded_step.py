"""The fused step of a sharded SAE: ranks exchange candidates and rows, never a gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from microtome import _check
from microtome.ops import Screen, sae_update, topk_encode
from microtome.ops.sae_update import Code, UpdateRule, moments_for
from microtome.sae.config import TrainConfig
from microtome.sae.loss import Losses, aux_share, check_finite, variance_of, variance_sums
from microtome.sae.ranks import fingerprint, same_rows
from microtome.sae.sharded import ShardedSAE
from microtome.sae.sharded_top_k import own_entries, top_k_of_ranks
from microtome.sae.step import named


@dataclass(frozen=True)
class ShardedLosses(Losses):
    """`Losses` whose `dead` covers this rank's features only.

    Attributes:
        n_dead: dead latents of all ranks.
        n_features: f.
    """

    n_dead: int = 0
    n_features: int = 1

    @property
    def dead_fraction(self) -> float:
        """Dead latents, of all."""
        return self.n_dead / self.n_features


class ShardedStep:
    """What `FusedStep` does, with each rank's features updated where they are.

    1. Every rank encodes the batch with its own features; candidates go round, and all ranks pick
       the same k (`top_k_of_ranks`).
    2. Each rank decodes its own entries; row i is summed, in the order of the ranks, by the rank
       that holds block i, which forms the gradient of the reconstruction; these rows go round.
    3. The gradient of the values, both weight gradients and the optimizer need nothing more: each
       rank updates its shard. Of b_dec's gradient every rank sends its part, summed in rank order.

    AuxK is the same over again for the dead latents of all ranks. On a mesh with a dimension "data"
    each row of ranks does 1 and 2 for its part of the batch; then the rows' entries and gradients
    go to all, and every row takes step 3 alike, with the bits of one row. The losses are the
    same numbers on every rank. The random bits that round bfloat16 or int8 moments hash the
    row within the shard: with such moments the bits depend on the number of ranks of a row.

    Args:
        sae: updated in place.
        config: a fused optimizer.

    Attributes:
        since_fired: [features of this rank] int64: rows seen since each latent last fired.
        settings: nothing beyond the config.
    """

    def __init__(self, sae: ShardedSAE, config: TrainConfig) -> None:
        self.sae, self.config = sae, config
        self.settings: dict[str, str] = {}
        self.base_lr = config.base_lr(sae.n_features) or 0.0
        self.moments = moments_for(
            sae.parameters_in_order, config.rule(self.base_lr), config.moments
        )
        self.since_fired = torch.zeros(
            len(sae.features), dtype=torch.int64, device=sae.local.W_enc.device
        )

    @torch.no_grad()
    def take(self, x: Tensor, factor: float, step: int) -> Losses:
        """One step.

        Args:
            x: [n, d], dtype and device of the weights, the same on every rank.
            factor: the learning rate as a fraction of its peak.
            step: 1 for the first.

        Raises:
            NonFiniteError: x holds NaN or infinity, or the error overflows; on every rank, and
                nothing has been changed.
            DistributedError: the ranks were given different rows, or one of them failed.
        """
        sae, ranks, config, n = self.sae, self.sae.ranks, self.config, len(x)
        b_dec = sae.local.b_dec
        centred = x - b_dec if sae.center else x
        dead = self.since_fired >= config.dead_after_tokens
        here, rows = self._rows(n)
        if ranks.rows is not None:  # the encoder would count rows from here.start
            with ranks.hold():
                _check.finite_rows("train", "x", x)
        numbers = torch.stack([t.double() for t in (fingerprint(x), *variance_sums(x), dead.sum())])
        values, indices, heads = sae.top_k(centred[here], None, numbers)
        same_rows("train", [head[0] for head in heads])
        _, variance, energy, _ = heads[0]
        scale = 1.0 / variance_of(variance, energy, x.dtype)
        values = values.relu()
        own = own_entries(values, indices, sae.features)
        code, sse = self._code(own, b_dec - x[rows], n, scale)
        loss = fvu = float(sse.sum()) * scale
        with ranks.hold():
            check_finite(loss, sse)

        aux, auxk = None, 0.0
        n_dead = [int(head[3]) for head in heads[: ranks.size]]  # the other rows hold the same
        k, weight = aux_share(sum(n_dead), sae.d_model, config)
        if weight:
            found = self._aux_entries(centred[here], dead, n_dead, k)
            residual = code.grad_out[rows] * 0.5  # x_hat - x: e_hat is to be its negative
            aux, sse = self._code(found, residual, n, scale * weight)
            auxk = float(sse.sum()) * scale
            loss += weight * auxk
            with ranks.hold():
                check_finite(loss, sse)

        fired = torch.zeros(len(dead) + 1, dtype=torch.bool, device=x.device)  # the last: none
        fired[torch.where(code.values > 0, code.indices, len(dead)).long()] = True
        dead = (self.since_fired + n).masked_fill(fired[:-1], 0) >= config.dead_after_tokens
        counts = torch.stack([dead.sum(), (values > 0).sum()])
        gradient, heads = self._b_dec_gradient(code, aux, counts)
        n_dead_now = sum(int(head[0]) for head in heads[: ranks.size])
        l0 = sum(int(head[1]) for head in heads[:: ranks.size]) / max(1, n)
        # Every rank has come this far, or none goes on. What follows talks to nobody.
        lr = self.base_lr * factor
        self._update(code, aux, centred, gradient, lr, step)
        self.since_fired += n
        self.since_fired.masked_fill_(fired[:-1], 0)
        return ShardedLosses(fvu, auxk, loss, l0, dead, lr, n_dead_now, sae.n_features)

    def _rows(self, n: int) -> tuple[slice, slice]:
        """The rows of a batch that this row of ranks encodes, and those that this rank adds up."""
        ranks = self.sae.ranks
        here = ranks.rows.rows_of(n) if ranks.rows is not None else slice(0, n)
        mine = ranks.features.rows_of(here.stop - here.start)
        return here, slice(here.start + mine.start, here.start + mine.stop)

    def _code(
        self, own: tuple[Tensor, Tensor], residual: Tensor, n: int, scale: float
    ) -> tuple[Code, Tensor]:
        """The entries of this rank's features with their gradients, and every row's squared error.

        Args:
            own: the entries in the rows that this row of ranks encodes.
            residual: what their sum over the ranks is added to, for this rank's rows.
            n: rows of the batch.
            scale: of the code.
        """
        ranks, W_dec = self.sae.ranks, self.sae.local.W_dec
        values, indices = own
        block = 2 * (self.sae.decoded_rows(values, indices) + residual)
        (grad_out,) = ranks.features.all_rows(len(values), block)
        grad_values = ranks.attempt(
            lambda: torch.ops.microtome.sparse_decode_grad_values(grad_out, indices, W_dec),
            lambda: torch.zeros_like(values),
        )
        grad_values = grad_values.masked_fill(values == 0, 0.0)
        if ranks.rows is not None:
            widths = ranks.rows.gather(indices.new_tensor([values.shape[1]]))[0]
            more = (0, int(widths.max()) - values.shape[1])
            values, indices, grad_values = (
                torch.nn.functional.pad(t, more) for t in (values, indices, grad_values)
            )
            values, indices, grad_values, grad_out = ranks.rows.all_rows(
                n, values, indices, grad_values, grad_out
            )
        sse = (grad_out * 0.5).square().sum(1)
        return Code(indices, values, grad_values, grad_out, scale), sse

    def _aux_entries(
        self, centred: Tensor, dead: Tensor, n_dead: list[int], k: int
    ) -> tuple[Tensor, Tensor]:
        """This rank's entries among the k largest of all ranks' dead latents."""
        sae, rank = self.sae, self.sae.ranks.rank
        W_enc, b_enc, _, _ = sae.parameters_in_order
        available = [min(k, count) for count in n_dead]

        def here() -> tuple[Tensor, Tensor]:
            latents = torch.nonzero_static(dead, size=n_dead[rank]).flatten()
            if not available[rank]:
                return centred.new_zeros(len(centred), 0), latents.new_zeros(len(centred), 0).int()
            screen = sae.local.screen()
            if screen is not None:  # each row of a screen stands for itself
                screen = Screen(screen.kind, screen.shadow[latents], screen.stats[latents])
            values, places, _ = topk_encode(
                centred, W_enc[latents], b_enc[latents], k=available[rank], screen=screen
            )
            return values, (latents[places.long()] + sae.features.start).int()

        values, indices, _ = top_k_of_ranks(sae.ranks, here, centred, k, available)
        return own_entries(values.relu(), indices, sae.features)

    def _b_dec_gradient(
        self, code: Code, aux: Code | None, numbers: Tensor
    ) -> tuple[Tensor, list[list[float]]]:
        """b_dec's gradient [d], the same bits on every rank, and all ranks' numbers.

            scale * sum_rows grad_out[row] - (center) sum_g db_enc[g] W_enc[g]

        The rows are shared out, and g goes over each rank's features.
        """
        ranks = self.sae.ranks
        rows = ranks.features.rows_of(len(code.grad_out))

        def part() -> Tensor:
            summed = code.scale * code.grad_out[rows].sum(0, dtype=torch.float64)
            if self.sae.center:
                W_enc = self.sae.local.W_enc
                db_enc = sum(_grad_b_enc(c, len(W_enc)) for c in (code, aux) if c is not None)
                summed -= db_enc @ W_enc
            return summed

        mine = ranks.attempt(
            part, lambda: code.grad_out.new_zeros(self.sae.d_model, dtype=torch.float64)
        )
        heads, (parts,) = ranks.gather(mine, numbers=numbers)
        total = parts[0].clone()
        for other in parts[1:]:
            total += other
        return total.to(code.grad_out.dtype), heads

    def _update(
        self, code: Code, aux: Code | None, x: Tensor, gradient: Tensor, lr: float, step: int
    ) -> None:
        """This rank's features, then b_dec by the same rule.

        What goes wrong here has changed this rank already: the next exchange says so, as of an
        earlier call.
        """
        sae, local = self.sae, self.sae.local
        rule = self.config.rule(lr)
        W_enc, b_enc, W_dec, b_dec = sae.parameters_in_order
        *of_weights, m, v = self.moments
        # sae_update would move b_dec by this rank's part of its gradient: it gets another one.
        spare = [None if t is None else torch.zeros_like(t) for t in (m, v)]
        params = (W_enc, b_enc, W_dec, torch.zeros_like(b_dec))
        try:
            screen = local.screen()
            sae_update(
                code, x, params, [*of_weights, *spare], rule, step, aux=aux, center=False,
                screen=screen,
            )  # fmt: skip
            local.keep_screen(screen)
            _move_b_dec(b_dec, gradient, [m, v], rule, step)
        except Exception as error:
            error.late = True  # type: ignore[attr-defined]
            with sae.ranks.hold():
                raise

    def state(self) -> tuple[dict[str, Tensor], Any]:
        """This rank's tensors, from which `load` continues bit for bit."""
        return named(self.moments, self.since_fired), None

    def load(self, tensors: dict[str, Tensor], _: Any) -> None:
        """Take over what `state` gave."""
        for name, kept in named(self.moments, self.since_fired).items():
            kept.copy_(tensors[name])


def _grad_b_enc(code: Code, f: int) -> Tensor:
    """The gradient of b_enc by one code, [f]."""
    ones = code.grad_out.new_ones(len(code.grad_out), 1)
    weights = code.grad_values * code.scale
    summed: Tensor = torch.ops.microtome.sparse_decode_grad_W_dec(weights, code.indices, ones, f)
    return summed.flatten()


def _move_b_dec(
    b_dec: Tensor, gradient: Tensor, moments: list[Tensor | None], rule: UpdateRule, step: int
) -> None:
    """One step of the rule on b_dec, by the kernel that one process would use: the same bits.

    An SAE of one feature that never fires, on one row, whose b_dec is this one.
    """
    row = b_dec.new_zeros(1, len(b_dec))
    place, nothing = torch.zeros(1, 1, dtype=torch.int32, device=row.device), row.new_zeros(1, 1)
    params = (row.clone(), row.new_zeros(1), row.clone(), b_dec)
    state = [*moments_for(params, rule)[:6], *moments]
    code = Code(place, nothing, nothing, gradient[None], 1.0)
    sae_update(code, row, params, state, rule, step, center=False)
