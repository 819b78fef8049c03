"""What a patched run is judged by: metrics that say which positions and which tokens they read.

A metric that reads the last position and two tokens costs two columns of one unembedding a row; one
that reads everything costs them all. So the built-in ones say what they read; any other callable is
given all logits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
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
        whole: `measure` takes one cell at a time, [b, t, vocabulary], NaN where there is padding.
    """

    name: str
    measure: Callable[[Tensor, Tensor], Tensor]
    tokens: Tensor | None = None
    positions: Tensor | None = None
    reference: str = ""
    whole: bool = False

    def slots(self, first: Tensor, stop: Tensor, t: int) -> Tensor:
        """[b, m] int64, the positions read of b prompts of t tokens.

        Args:
            first: [b], the first position of each prompt that counts.
            stop: [b], one past the last.
            t: tokens of a prompt, padding included.

        Raises:
            ArgumentError: a position is none of those, or there are positions for another number
                of prompts.
        """
        b = len(first)
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
        outside = (at < first[:, None]) | (at >= stop[:, None])
        if bool(outside.any()):
            prompt, column = (int(i) for i in outside.nonzero()[0])
            asked = int(self.positions.expand(b, -1)[prompt, column])
            msg = (
                f"{self.name}: position {asked} lies outside prompt {prompt}, whose tokens stand "
                f"at {int(first[prompt])} ... {int(stop[prompt]) - 1}. Negative positions count "
                "from its end."
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

    def __call__(
        self, logits: Tensor, reference: Tensor, where: Callable[[int], str] = "of cell {}".format
    ) -> Tensor:
        """Measure, and check what came.

        Args:
            logits: [cells, b, m, c].
            reference: [b, m, c].
            where: what a cell is called in a message.

        Returns:
            [cells, b] float32 or float64.

        Raises:
            ShapeError: the metric did not return a number for each prompt.
            NonFiniteError: it returned NaN.
        """
        cells, b = logits.shape[:2]
        if self.whole:
            out = torch.stack([self._checked(self.measure(cell, cell), (b,)) for cell in logits])
        else:
            out = self._checked(self.measure(logits, reference), (cells, b))
        if bool(out.isnan().any()):
            cell, prompt = (int(i) for i in out.isnan().nonzero()[0])
            msg = (
                f"{self.name}: the metric is NaN for prompt {prompt} {where(cell)}. Usual causes: "
                "log(0), 0/0, or reading positions that attention_mask leaves out: logits are NaN "
                "there."
            )
            raise NonFiniteError(msg)
        return out

    def _checked(self, out: Any, wanted: tuple[int, ...]) -> Tensor:
        """What `measure` returned, if it is one number for each prompt."""
        b = wanted[-1]
        if b == 1 and self.whole and (isinstance(out, Real) or hasattr(out, "__array__")):
            out = torch.as_tensor(out)
            if out.numel() == 1:
                return out.reshape(1)
        if not isinstance(out, Tensor) or out.shape != wanted:
            got = f"shape {list(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
            msg = (
                f"{self.name}: the metric must return one number for each of {b} prompts, "
                f"{list(wanted)}, got {got}. Do not average over prompts; the sweep does."
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
            A negative target, such as -100, is not judged: give it where there is padding.
    """

    def measure(logits: Tensor, _: Tensor) -> Tensor:
        if targets.shape != logits.shape[-3:-1]:
            msg = (
                f"loss: targets must be the prompts' tokens, {list(logits.shape[-3:-1])}, got "
                f"shape {list(targets.shape)}."
            )
            raise ShapeError(msg)
        wanted = targets[:, 1:].to(logits.device)
        judged = wanted >= 0
        logp = logits[..., :-1, :].log_softmax(-1)
        index = wanted.clamp_min(0).expand(*logp.shape[:-2], -1)[..., None]
        lost = -logp.gather(-1, index)[..., 0]
        return torch.where(judged, lost, 0.0).sum(-1) / judged.sum(-1)

    return Metric("loss", measure)


def as_metric(op: str, metric: Metric | Callable[[Tensor], Tensor]) -> Metric:
    """A Metric as it is; any other callable as one that reads all logits, a cell at a time.

    Raises:
        ArgumentError: it is no callable.
    """
    if isinstance(metric, Metric):
        return metric
    if not callable(metric):
        msg = (
            f"{op}: metric must be a microtome.patching metric or a callable that maps logits "
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
        Metric(name, measure, ids).columns(logits.shape[-3], logits.shape[-1])  # checks them
        logp = logits[..., 0, :].log_softmax(-1)  # [..., b, vocabulary]
        wanted = ids.to(logits.device).expand(*logp.shape[:-1], 1)
        return of(logp.gather(-1, wanted)[..., 0])

    return Metric(name, measure, None, _positions(position))


def _ids(name: str, tokens: Tokens) -> Tensor:
    """[n, 1] int64."""
    out = torch.as_tensor(tokens)
    if out.is_floating_point() or out.dim() > 1 or out.numel() == 0:
        msg = f"{name}: tokens must be an id or a list of ids, got {tokens!r}."
        raise ArgumentError(msg)
    return out.long().cpu().reshape(-1, 1)


def _positions(position: int | Tensor) -> Tensor:
    """[n, 1] int64."""
    return torch.as_tensor(position).long().cpu().reshape(-1, 1)
