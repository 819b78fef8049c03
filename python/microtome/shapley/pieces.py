"""How a text falls into pieces: words by a pattern, tokens by anybody's tokenizer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from microtome.errors import ArgumentError

_WORD = re.compile(r"\w+(?:['\u2019\-]\w+)*")
_MARKS = ("##", "▁", "Ġ", "@@", "</w>")  # how tokenizers write that a token starts or ends a word

Span = tuple[int, int]


@dataclass(frozen=True)
class Pieces:
    """A text's players.

    Attributes:
        names: p, as they are read.
        spans: p pairs of places in the text, in order and apart; None where a tokenizer tells none.
        ids: [t] int64 token ids, special tokens among them, or None.
        player: [t] int32, the player of each token, -1 for none, or None.
    """

    names: tuple[str, ...]
    spans: tuple[Span, ...] | None
    ids: Tensor | None = None
    player: Tensor | None = None


@dataclass(frozen=True)
class Encoded:
    """What a tokenizer made of a text: t tokens."""

    ids: list[int] | None
    spans: list[Span] | None
    tokens: list[str]
    special: list[bool]


def words(op: str, text: str, separators: str | None) -> list[Span]:
    """Places of the words of a text; what lies between belongs to none.

    Args:
        op: name for messages.
        text: the text.
        separators: a regular expression for what separates words. By default words are runs of
            letters and digits, with apostrophes and hyphens inside.

    Raises:
        ArgumentError: there is no word.
    """
    if separators is None:
        found = [match.span() for match in _WORD.finditer(text)]
    else:
        try:
            cuts = [match.span() for match in re.finditer(separators, text)]
        except re.error as error:
            msg = f"{op}: separators must be a regular expression, got {separators!r} ({error})."
            raise ArgumentError(msg) from error
        starts = [0, *(end for _, end in cuts)]
        ends = [*(start for start, _ in cuts), len(text)]
        found = [(s, e) for s, e in zip(starts, ends, strict=True) if s < e]
    if not found:
        msg = (
            f"{op}: {_short(text)} has no word, so there are no players. Pass separators (a "
            "regular expression), or unit='token' and a tokenizer."
        )
        raise ArgumentError(msg)
    return found


def encode(op: str, text: str, tokenizer: Any) -> Encoded:
    """Tokens of a text by a Hugging Face tokenizer (fast or slow), one of `tokenizers`, or a call.

    Raises:
        ArgumentError: the tokenizer is none of these, or its pieces do not lie in the text.
    """
    if hasattr(tokenizer, "token_to_id") and hasattr(tokenizer, "encode"):  # of `tokenizers`
        found = tokenizer.encode(text)
        special = [bool(flag) for flag in found.special_tokens_mask]
        return Encoded(list(found.ids), list(found.offsets), list(found.tokens), special)
    if hasattr(tokenizer, "convert_ids_to_tokens"):
        return _hugging_face(text, tokenizer)
    if not callable(tokenizer):
        msg = (
            f"{op}: tokenizer must be a Hugging Face tokenizer, a tokenizers.Tokenizer, or a "
            f"function from a text to its pieces or their (start, end), got "
            f"{type(tokenizer).__name__}."
        )
        raise ArgumentError(msg)
    return _called(op, text, tokenizer(text))


def _hugging_face(text: str, tokenizer: Any) -> Encoded:
    fast = bool(getattr(tokenizer, "is_fast", False))
    found = tokenizer(text, return_special_tokens_mask=True, return_offsets_mapping=fast)
    ids = list(found["input_ids"])
    # A text that spells out "[SEP]" gets the real one, which the mask does not mark.
    reserved = set(tokenizer.all_special_ids) - {getattr(tokenizer, "unk_token_id", None)}
    flags = zip(found["special_tokens_mask"], ids, strict=True)
    special = [bool(flag) or number in reserved for flag, number in flags]
    tokens = [str(token) for token in tokenizer.convert_ids_to_tokens(ids)]
    if fast:
        spans = [tuple(span) for span in found["offset_mapping"]]
    else:
        spans = _located(text, [None if s else t for t, s in zip(tokens, special, strict=True)])
    return Encoded(ids, spans, tokens, special)


def _called(op: str, text: str, found: Any) -> Encoded:
    ids = None
    if hasattr(found, "keys"):
        keys = set(found.keys())
        if "offset_mapping" not in keys:
            msg = f"{op}: tokenizer returned a mapping with {sorted(keys)}, offset_mapping missing."
            raise ArgumentError(msg)
        ids = [int(i) for i in found["input_ids"]] if "input_ids" in keys else None
        found = found["offset_mapping"]
    found = list(found)
    if all(isinstance(piece, str) for piece in found):
        spans = _located(text, found)
        if spans is None:
            msg = (
                f"{op}: the pieces that tokenizer returned do not lie one after another in "
                f"{_short(text)}. Return (start, end) pairs instead."
            )
            raise ArgumentError(msg)
    else:
        try:
            spans = [(int(s), int(e)) for s, e in found]
        except (TypeError, ValueError) as error:
            msg = f"{op}: tokenizer must return strings or (start, end) pairs, got {found[:3]}."
            raise ArgumentError(msg) from error
    if any(not 0 <= s <= e <= len(text) for s, e in spans):
        msg = f"{op}: tokenizer returned places outside of {_short(text)}."
        raise ArgumentError(msg)
    special = [s == e for s, e in spans]
    return Encoded(ids, spans, [text[s:e] for s, e in spans], special)


def _located(text: str, tokens: Sequence[str | None]) -> list[Span] | None:
    """Where tokens lie in a text, by searching one after another; None if one is not found."""
    lower = text.lower() if len(text.lower()) == len(text) else text
    at, spans = 0, []
    for token in tokens:
        if token is None:
            spans.append((at, at))
            continue
        start = -1
        for bare in dict.fromkeys((token, _bare(token))):
            start = lower.find(bare.lower(), at) if bare else at
            if start >= 0:
                break
        # A piece far ahead is another one's: only white space may be passed over.
        if start < 0 or text[at:start].strip():
            return None
        spans.append((start, start + len(bare)))
        at = start + len(bare)
    return spans


def _bare(token: str) -> str:
    for mark in _MARKS:
        token = token.removeprefix(mark).removesuffix(mark)
    return token


def token_pieces(op: str, text: str, encoded: Encoded) -> Pieces:
    """Every token that is not special plays, with those that share a character with it.

    A character of several tokens (an emoji in byte-level ones) cannot be cut, and a token of no
    width goes with its neighbour.

    Raises:
        ArgumentError: only special tokens came.
    """
    player, spans = [], []
    for i, special in enumerate(encoded.special):
        if special:
            player.append(-1)
        elif encoded.spans is None:
            player.append(len(spans))
            spans.append((i, i))
        else:
            start, end = encoded.spans[i]
            if not spans or (start >= spans[-1][1] and spans[-1][0] < spans[-1][1]):
                spans.append((start, end))
            else:
                before = spans[-1]
                wide = before[0] < before[1]
                spans[-1] = (before[0] if wide else start, max(before[1], end))
            player.append(len(spans) - 1)
    if not spans:
        msg = f"{op}: the tokenizer made no token of {_short(text)} but special ones."
        raise ArgumentError(msg)
    places = None if encoded.spans is None else tuple(spans)
    if places is None:
        names = tuple(_bare(encoded.tokens[i]) or encoded.tokens[i] for i, _ in spans)
    else:
        names = names_of(text, places)
    return _pieces(names, places, encoded, player)


def word_pieces(op: str, text: str, separators: str | None, encoded: Encoded | None) -> Pieces:
    """Every word plays; of tokens, those that share a character with it.

    Raises:
        ArgumentError: the tokenizer does not say where its tokens lie.
    """
    spans = words(op, text, separators)
    if encoded is None:
        return Pieces(names_of(text, spans), tuple(spans))
    if encoded.spans is None:
        msg = (
            f"{op}: this tokenizer does not say where its tokens lie in the text. Pass a fast one, "
            "or unit='token'."
        )
        raise ArgumentError(msg)
    owner = [-1] * len(text)
    for j, (start, end) in enumerate(spans):
        owner[start:end] = [j] * (end - start)
    player = []
    for (start, end), special in zip(encoded.spans, encoded.special, strict=True):
        held = [j for j in owner[start:end] if j >= 0]
        player.append(-1 if special or not held else held[0])
    return _pieces(names_of(text, spans), tuple(spans), encoded, player)


def _pieces(
    names: tuple[str, ...], spans: tuple[Span, ...] | None, encoded: Encoded, player: list[int]
) -> Pieces:
    ids = None if encoded.ids is None else torch.tensor(encoded.ids, dtype=torch.int64)
    return Pieces(names, spans, ids, torch.tensor(player, dtype=torch.int32))


def names_of(text: str, spans: Iterable[Span]) -> tuple[str, ...]:
    """The pieces as names; white space, which cannot be seen, as its code."""
    return tuple(text[s:e].strip() or repr(text[s:e])[1:-1] or "∅" for s, e in spans)


class Rebuild:
    """A text from the pieces that are in: the rest is masked, or dropped with the space before it.

    With all pieces in, the text comes back exactly.

    Args:
        text: the text.
        spans: the places of its p pieces, in order and apart.
        mask: what stands for a missing piece; "" drops it.
    """

    def __init__(self, text: str, spans: Sequence[Span], mask: str) -> None:
        ends = [0, *(e for _, e in spans)]
        starts = [*(s for s, _ in spans), len(text)]
        self.gaps = [text[e:s] for e, s in zip(ends, starts, strict=True)]  # p + 1
        self.pieces = [text[s:e] for s, e in spans]
        self.mask, self.indented = mask, text[:1].isspace()

    def __call__(self, inside: Tensor) -> list[str]:
        """K texts for [K, p] bool."""
        return [self._one(row) for row in inside.tolist()]

    def _one(self, inside: list[bool]) -> str:
        parts = []
        for here, gap, piece in zip(inside, self.gaps, self.pieces, strict=False):
            if here or self.mask:
                parts += [gap, piece if here else self.mask]
            else:
                parts.append(gap.rstrip())
        parts.append(self.gaps[-1])
        joined = "".join(parts)
        return joined if self.indented else joined.lstrip()


def _short(text: str) -> str:
    return repr(text if len(text) <= 30 else text[:29] + "…")
