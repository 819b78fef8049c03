"""A text as features that can be left out: its words, or its characters."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import chain

import numpy as np

from microtome.errors import ArgumentError

Split = str | Callable[[str], Sequence[str]]


class Words:
    """A text cut into pieces, some of which are features.

    Args:
        text: the text.
        split: a regular expression of what separates words, or a function from a text to its
            tokens, which must occur in it in order.
        together: whether all occurrences of a word are one feature, which is removed; else each
            occurrence is one, and `mask` stands in its place.
        mask: replaces a word that is switched off, if not together.
        characters: features are characters instead of words.

    Attributes:
        pieces: words and what separates them; joined they are the text.
        start: [pieces], where each begins.
        words: the p features.
        positions: for each feature the numbers of its pieces.

    Raises:
        ArgumentError: the tokens do not lie in the text.
    """

    def __init__(
        self,
        text: str,
        split: Split = r"\W+",
        together: bool = True,
        mask: str | None = None,
        characters: bool = False,
    ) -> None:
        self.text, self.together = text, together
        self.mask = ("\0" if characters else "UNKWORDZ") if mask is None else mask
        if characters:
            self.pieces, between = list(text), None
        elif callable(split):
            tokens = list(split(text))
            self.pieces = _around(text, tokens)
            known = set(tokens)
            between = lambda piece: piece not in known  # noqa: E731
        else:
            matcher = re.compile(f"({split})|$")
            self.pieces = [piece for piece in matcher.split(text) if piece]
            between = matcher.match
        self.start = np.cumsum([0, *map(len, self.pieces[:-1])])
        self.words: list[str] = []
        self.positions: list[list[int]] = []
        seen: dict[str, int] = {}
        separators: dict[str, bool] = {}
        for at, piece in enumerate(self.pieces):
            if piece not in separators:
                separators[piece] = bool(between and between(piece))
            if separators[piece]:
                continue
            if together and piece in seen:
                self.positions[seen[piece]].append(at)
                continue
            seen[piece] = len(self.words)
            self.words.append(piece)
            self.positions.append([at])

    def labelled(self) -> tuple[tuple[str, int], ...]:
        """The pieces in order, each with the number of its feature, -1 for a separator."""
        feature = {at: j for j, places in enumerate(self.positions) for at in places}
        return tuple((piece, feature.get(at, -1)) for at, piece in enumerate(self.pieces))

    def without(self, off: Sequence[int] | np.ndarray) -> str:
        """The text with these features switched off."""
        gone = set(chain.from_iterable(self.positions[j] for j in off))
        if self.together:
            return "".join(piece for at, piece in enumerate(self.pieces) if at not in gone)
        mask = self.mask
        return "".join(mask if at in gone else piece for at, piece in enumerate(self.pieces))


def _around(text: str, tokens: Sequence[str]) -> list[str]:
    """Tokens and what lies between them."""
    pieces, at = [], 0
    for token in tokens:
        found = text.find(token, at)
        if found < 0:
            msg = (
                f"split: the tokens must occur in the text in order; {token!r} does not follow "
                f"after character {at}. Return the tokens as they stand in the text."
            )
            raise ArgumentError(msg)
        if found > at:
            pieces.append(text[at:found])
        pieces.append(token)
        at = found + len(token)
    if at < len(text):
        pieces.append(text[at:])
    return pieces
