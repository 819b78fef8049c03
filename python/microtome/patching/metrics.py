"""What a patched run is judged by: metrics that say which positions and which tokens they read.

A metric that reads the last position and two tokens costs two columns of one unembedding a row; one
that reads everything costs them all. So the built-in ones say what they read; any other callable is
given all logits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from microtome.errors import ArgumentError, NonFiniteError, ShapeError

Tokens = int | Sequence[int] | Tensor


@dataclass(frozen=True)
class Metric:
    """A number for each prompt, read off some logits.

    Attributes:
        name: for tables and plots.
        measure: (logits [..., b, m, c], reference [b, m, c]) -> [..., b]; the reference is the
            unpatched run that `reference` names.
        tokens: [b or 1, c] int64, the token ids that are read, or None for the whole vocabulary.
        positions: [b or 1, m] int64, negative ones counted from the end of the prompt, or None for
            all.
        reference: "clean", "corrupted" or "" for none.
        whole: `measure` takes one cell at a time, [b, t, vocabulary].
    """

    name: str
    measure: Callable[[Tensor, Tensor], Tensor]
    tokens: Tensor | None = None
    positions: Tensor | None = None
    reference: str = ""
    whole: bool = False

    def slots(self, stop: Tensor, t: int) -> Tensor:
        """[b, m] int64, the positions read of b prompts of t tokens that end before stop [b].

        Raises:
            ArgumentError: a position lies outside the prompts, or there are positions for another
                number of prompts.
        """
        b = len(stop)
        if self.positions is None:
            return torch.arange(t).expand(b, -1)
        if self.positions.shape[0] not in (1, b):
            msg = (
                f"{self.name}: positions for {self.positions.shape[0]} prompts, but there are {b}. "
                "Give one position, or one for each prompt."
            )
            raise ArgumentError(msg)
        if self.whole:
            return self.positions.expand(b, -1)  # read where they were read, padding or not
        at = torch.where(self.positions < 0, self.positions + stop[:, None], self.positions)
        if bool(((at < 0) | (at >= stop[:, None])).any()):
            msg = (
                f"{self.name}: position {int(self.positions.flatten()[0])} lies outside a prompt "
                f"of {int(stop.min())} tokens."
            )
            raise ArgumentError(msg)
        return at

    def columns(self, b: int, vocabulary: int) -> Tensor | None:
        """[b, c] int64, the token ids read, or None for all.

        Raises:
            ArgumentError: an id is not in the vocabulary, or there are ids for another number of
                prompts.
        """
        if self.tokens is None:
            return None
        if self.tokens.shape[0] not in (1, b):
            msg = (
                f"{self.name}: tokens for {self.tokens.shape[0]} prompts, but there are {b}. Give "
                "one token, or one for each prompt."
            )
            raise ArgumentError(msg)
        if bool(((self.tokens < 0) | (self.tokens >= vocabulary)).any()):
            bad = int(self.tokens[(self.tokens < 0) | (self.tokens >= vocabulary)][0])
            msg = f"{self.name}: token {bad} is not in the vocabulary of {vocabulary}."
            raise ArgumentError(msg)
        return self.tokens.expand(b, -1)

    def __call__(self, logits: Tensor, reference: Tensor) -> Tensor:
        """Measure, and check what came.

        Args:
            logits: [cells, b, m, c].
            reference: [b, m, c].

        Returns:
            [cells, b] float32 or float64.

        Raises:
            ShapeError: the metric did not return a number for each prompt.
            NonFiniteError: it returned NaN.
        """
        if self.whole:
            out = torch.stack([self._one(cell) for cell in logits])
        else:
            out = self.measure(logits, reference)
        if bool(out.isnan().any()):
            cell, prompt = (int(i) for i in out.isnan().nonzero()[0])
            msg = (
                f"{self.name}: the metric is NaN for prompt {prompt} (patch {cell} of its batch). "
                "Check it on the unpatched logits; log(0) and 0/0 are the usual causes."
            )
            raise NonFiniteError(msg)
        return out

    def _one(self, logits: Tensor) -> Tensor:
        out: Any = self.measure(logits, logits)
        b = logits.shape[0]
        if not isinstance(out, Tensor):
            out = torch.as_tensor(out)
        if b == 1 and out.numel() == 1:
            return out.reshape(1)
        if out.shape != (b,):
            msg = (
                f"{self.name}: the metric must return one number for each of {b} prompts, [{b}], "
                f"got shape {list(out.shape)}. Do not average over prompts; the sweep does."
            )
            raise ShapeError(msg)
        return out


def logit_difference(correct: Tokens, incorrect: Tokens, *, position: int | Tensor = -1) -> Metric:
    """logit[correct] - logit[incorrect] at one position.

    Args:
        correct: token id, or [b] one for each prompt.
        incorrect: likewise.
        position: which, or [b]; negative ones count from the end of the prompt.
    """
    a, b = _ids("logit_difference", correct), _ids("logit_difference", incorrect)
    if a.shape[0] != b.shape[0] and 1 not in (a.shape[0], b.shape[0]):
        msg = (
            f"logit_difference: {a.shape[0]} correct and {b.shape[0]} incorrect tokens. Pair them."
        )
        raise ArgumentError(msg)
    tokens = torch.cat(torch.broadcast_tensors(a, b), dim=1)
    measure = lambda logits, _: logits[..., 0, 0] - logits[..., 0, 1]  # noqa: E731
    return Metric("logit difference", measure, tokens, _positions(position))


def probability(token: Tokens, *, position: int | Tensor = -1) -> Metric:
    """softmax(logits)[token] at one position; `token` is an id, or [b] one for each prompt."""
    return _of_token("probability", token, position, lambda logp: logp.exp())


def log_probability(token: Tokens, *, position: int | Tensor = -1) -> Metric:
    """log softmax(logits)[token] at one position, in nats."""
    return _of_token("log probability", token, position, lambda logp: logp)


def kl_divergence(reference: str = "clean", *, position: int | Tensor = -1) -> Metric:
    """KL(reference || patched) of the next-token distributions at one position, in nats.

    Args:
        reference: "clean" or "corrupted", the unpatched run to compare with.
        position: which, or [b].
    """
    if reference not in ("clean", "corrupted"):
        msg = f"kl_divergence: reference must be 'clean' or 'corrupted', got {reference!r}."
        raise ArgumentError(msg)

    def measure(logits: Tensor, unpatched: Tensor) -> Tensor:
        p = unpatched[:, 0].log_softmax(-1)
        return (p.exp() * (p - logits[..., 0, :].log_softmax(-1))).sum(-1)

    return Metric("KL divergence", measure, None, _positions(position), reference)


def loss(targets: Tensor) -> Metric:
    """Mean next-token cross-entropy over the prompt, in nats.

    Args:
        targets: [b, t] int64, the prompt's own tokens: position i is judged by targets[:, i + 1].
    """

    def measure(logits: Tensor, _: Tensor) -> Tensor:
        wanted = targets[:, 1 : logits.shape[-2]].to(logits.device)
        logp = logits[..., :-1, :].log_softmax(-1)
        return -logp.gather(-1, wanted.expand(*logp.shape[:-2], -1)[..., None])[..., 0].mean(-1)

    return Metric("loss", measure)


def as_metric(metric: Metric | Callable[[Tensor], Tensor]) -> Metric:
    """A Metric as it is; any other callable as one that reads all logits, a cell at a time.

    Raises:
        ArgumentError: it is no callable.
    """
    if isinstance(metric, Metric):
        return metric
    if not callable(metric):
        msg = (
            f"patching: metric must be a microtome.patching metric or a callable that maps logits "
            f"[b, t, vocabulary] to [b], got {type(metric).__name__}."
        )
        raise ArgumentError(msg)
    name = getattr(metric, "__name__", type(metric).__name__)
    return Metric(name, lambda logits, _: metric(logits), whole=True)


def _of_token(
    name: str, token: Tokens, position: int | Tensor, of: Callable[[Tensor], Tensor]
) -> Metric:
    """A function of the log probability of one token; the softmax reads the whole vocabulary."""
    ids = _ids(name, token)

    def measure(logits: Tensor, _: Tensor) -> Tensor:
        logp = logits[..., 0, :].log_softmax(-1)  # [..., b, vocabulary]
        wanted = ids.to(logits.device).expand(logp.shape[-2], 1)
        if int(ids.max()) >= logp.shape[-1] or int(ids.min()) < 0:
            msg = f"{name}: token {int(ids.max())} is not in the vocabulary of {logp.shape[-1]}."
            raise ArgumentError(msg)
        return of(logp.gather(-1, wanted.expand(*logp.shape[:-1], 1))[..., 0])

    return Metric(name, measure, None, _positions(position))


def _ids(name: str, tokens: Tokens) -> Tensor:
    """[n, 1] int64."""
    out = torch.as_tensor(tokens)
    if out.is_floating_point() or out.dim() > 1 or out.numel() == 0:
        msg = f"{name}: tokens must be an id or a list of ids, got {tokens!r}."
        raise ArgumentError(msg)
    return out.long().reshape(-1, 1)


def _positions(position: int | Tensor) -> Tensor:
    """[n, 1] int64."""
    return torch.as_tensor(position).long().reshape(-1, 1)
