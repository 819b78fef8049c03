"""How well an SAE reconstructs, and how much of the model's loss survives the reconstruction."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from microtome import _check
from microtome.errors import ArgumentError, NonFiniteError, ShapeError
from microtome.sae.ranks import ALONE
from microtome.sae.sae import SAE
from microtome.sae.sharded import ShardedSAE
from microtome.sae.source import ActivationSource, as_source

Splice = Callable[[nn.Module, str, Callable[[Tensor], Tensor]], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` measured.

    Attributes:
        fvu: fraction of variance unexplained over all rows: sum |x - x_hat|^2 / sum |x - mean|^2. 0
            is perfect, 1 is no better than the mean.
        l0: mean number of active features in a row.
        dead_fraction: features that fired on none of these rows, of all; it shrinks as n_rows
            grows.
        firing_counts: [f] int64, rows on which each feature fired.
        n_rows: how many rows.
        ce_clean: the model's cross-entropy on the tokens, in nats a token; None without a model, as
            the next three.
        ce_spliced: the same with the reconstruction in place of the activation.
        ce_zero: the same with zeros in its place.
        ce_recovered: (ce_zero - ce_spliced) / (ce_zero - ce_clean): 1 when the reconstruction loses
            nothing, 0 when it is as bad as zeros. Zero-ablation is a weak baseline: a high number
            alone does not say the SAE is good. None too where zeros do not raise the loss, as in a
            model with random weights: then there is nothing to recover.
    """

    fvu: float
    l0: float
    dead_fraction: float
    firing_counts: Tensor
    n_rows: int
    ce_clean: float | None = None
    ce_spliced: float | None = None
    ce_zero: float | None = None
    ce_recovered: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The numbers without firing_counts; what was not measured is left out."""
        fields = (f.name for f in dataclasses.fields(self) if f.name != "firing_counts")
        return {name: getattr(self, name) for name in fields if getattr(self, name) is not None}


@torch.no_grad()
def evaluate(
    sae: SAE | ShardedSAE,
    activations: Any,
    *,
    model: nn.Module | None = None,
    site: str | None = None,
    tokens: Tensor | None = None,
    batch_size: int = 1024,
    progress: bool = False,
    model_batch_size: int = 8,
    splice: Splice | None = None,
) -> Evaluation:
    """Measure an SAE on held-out activations, and inside its model if one is given.

    Args:
        sae: the autoencoder; of a sharded one every rank makes the call, and gets the same numbers.
        activations: a tensor [rows, d], an ActivationStore or a view of one.
        model: the language model the activations came from; needs `site` and `tokens`.
        site: where the reconstruction goes, such as "resid_post.10".
        tokens: [b, t] int64 to measure the cross-entropy on, t at least 2.
        batch_size: rows at a time.
        progress: show a progress bar.
        model_batch_size: sequences at a time.
        splice: replaces `microtome.models.splice`, for models it does not know.

    Returns:
        An Evaluation, sums accumulated in float64.

    Raises:
        ShapeError: another width than the SAE's, of the activations or at the site.
        ArgumentError: model without site and tokens, tokens that it does not know, or a model that
            returns no logits.
        NonFiniteError: a row holds NaN or infinity; the message names the rows.

    Changes neither the SAE nor the model. Deterministic.
    """
    source = as_source("evaluate", activations, sae.d_model)
    _check.between("evaluate", "batch_size", batch_size, 1, 2**31)
    if model is not None and (site is None or tokens is None):
        msg = "evaluate: a model needs site= (where the reconstruction goes) and tokens= [b, t]."
        raise ArgumentError(msg)
    n, f, W = len(source), sae.n_features, sae.parameters_in_order[0]
    ranks = sae.ranks if isinstance(sae, ShardedSAE) else ALONE
    counts = torch.zeros(f, dtype=torch.int64)
    mean, energy, error = torch.zeros(sae.d_model, dtype=torch.float64), 0.0, 0.0
    origin = None  # sums are taken from the first row, or a large common offset would cancel digits
    for start in tqdm(range(0, n, batch_size), desc="evaluate", unit="batch", disable=not progress):
        rows = slice(start, min(n, start + batch_size))
        x = ranks.attempt(
            partial(_moved, source, rows, W), partial(W.new_zeros, rows.stop - start, sae.d_model)
        )
        try:
            code = sae.encode(x)
        except NonFiniteError:
            bad = (~torch.isfinite(x)).any(-1).nonzero().flatten().cpu()
            if len(bad):  # `encode` numbers the rows of its own batch
                _check.rows("evaluate", "activations", bad + start)
            raise
        error += float(sae.squared_errors(x, code).double().sum())
        fired = code.indices[code.values > 0].long()
        counts += torch.bincount(fired, minlength=f).cpu()
        wide = x.double().cpu()
        origin = wide[0] if origin is None else origin
        mean += (wide - origin).sum(0)
        energy += float((wide - origin).square().sum())
    variance = energy - float(mean.square().sum()) / n
    fvu = error / variance if variance > 0 else (float("inf") if error > 0 else 0.0)
    result = Evaluation(fvu, int(counts.sum()) / n, int((counts == 0).sum()) / f, counts, n)
    if model is None or site is None or tokens is None:
        return result
    losses = _cross_entropies(sae, model, site, tokens, model_batch_size, progress, splice)
    clean, spliced, zero = losses
    recovered = (zero - spliced) / (zero - clean) if zero > clean else None
    return dataclasses.replace(
        result, ce_clean=clean, ce_spliced=spliced, ce_zero=zero, ce_recovered=recovered
    )


def _moved(source: ActivationSource, rows: slice, like: Tensor) -> Tensor:
    return source.rows(rows).to(like.device, like.dtype)


def _cross_entropies(
    sae: SAE | ShardedSAE,
    model: nn.Module,
    site: str,
    tokens: Tensor,
    batch_size: int,
    progress: bool,
    splice: Splice | None,
) -> tuple[float, float, float]:
    """Clean, spliced and zero-ablated cross-entropy, in nats a predicted token."""
    _check.shapes("evaluate", tokens=(tokens, "b t"))
    _check.dtype("evaluate", _check.INDICES, tokens=tokens)
    _check.between("evaluate", "t (tokens a sequence)", tokens.shape[1], 2, 2**31)
    _check.between("evaluate", "b (sequences)", tokens.shape[0], 1, 2**31)
    _check.between("evaluate", "model_batch_size", batch_size, 1, 2**31)
    from microtome.models import splice as splice_in_model
    from microtome.models.capture import check_tokens

    splice, tokens = splice or splice_in_model, tokens.long()
    check_tokens("evaluate", model, tokens, None, batch_size)

    def reconstruct(activation: Tensor) -> Tensor:
        # [b, t, h, d_head] is one row of h * d_head a token
        width = activation[0, 0].numel() if activation.dim() > 2 else 0
        if width != sae.d_model or activation.shape[1] != tokens.shape[1]:
            msg = f"evaluate: site {site!r} has shape {list(activation.shape)}, must be [b, t, "
            msg += f"d={sae.d_model}] as the SAE's d_model. Name the site that it was trained on."
            raise ShapeError(msg)
        rows = activation.reshape(-1, sae.d_model)
        return sae(rows.to(sae.W_enc.device)).to(activation).reshape(activation.shape)

    sums = [0.0, 0.0, 0.0]
    was_training = model.training
    model.eval()
    try:
        batches = tokens.split(batch_size)
        for batch in tqdm(batches, desc="cross-entropy", unit="batch", disable=not progress):
            sums[0] += _next_token_loss(model, batch)
            with splice(model, site, reconstruct):
                sums[1] += _next_token_loss(model, batch)
            with splice(model, site, torch.zeros_like):
                sums[2] += _next_token_loss(model, batch)
    finally:
        model.train(was_training)
    predicted = tokens.shape[0] * (tokens.shape[1] - 1)
    return sums[0] / predicted, sums[1] / predicted, sums[2] / predicted


def _next_token_loss(model: nn.Module, tokens: Tensor) -> float:
    """Sum of -log p(next token) over a batch."""
    first = next(model.parameters(), None)
    tokens = tokens if first is None else tokens.to(first.device)
    output = model(tokens)
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or logits.shape[:2] != tokens.shape or logits.dim() != 3:
        msg = "evaluate: the model must return logits [b, t, vocabulary] (or an object with "
        msg += f".logits) to have a cross-entropy, returned {type(output).__name__}. "
        msg += "Leave model= out to measure the SAE alone."
        raise ArgumentError(msg)
    flat = logits[:, :-1].flatten(0, 1).float()
    targets = tokens[:, 1:].flatten().long()
    return float(nn.functional.cross_entropy(flat, targets, reduction="sum"))
