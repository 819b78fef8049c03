"""Which features to show, in which words, and the text round their highest peaks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from microtome.errors import StoreError
from microtome.report.survey import Rows, Survey, entries

ABOUT = "text.json"


@dataclass(frozen=True)
class Context:
    """A stretch of text round a peak: tokens [w], activations [w] and the peak's place."""

    row: int
    tokens: tuple[int, ...]
    activations: tuple[float, ...]
    peak: int


@dataclass(frozen=True)
class Feature:
    """One feature as the page shows it."""

    index: int
    kind: str
    firings: int
    density: float
    maximum: float
    mean: float
    token_types: float
    top_tokens: tuple[tuple[int, float], ...]
    contexts: tuple[Context, ...]


@dataclass(frozen=True)
class Choice:
    """The features to show and, in words, how they were chosen."""

    words: list[int]
    subjects: list[int]
    rule: str


def choose(
    survey: Survey, count: int = 30, *, min_firings: int = 20, max_density: float = 0.01
) -> Choice:
    """Pick rare, strong features: half of them bound to a few words, half to a subject.

    A feature is eligible when it fires at least `min_firings` times, on at most `max_density` of
    the rows, and in at least 6 contexts. Among those,
    * word features spread over at most 4 token types, ordered by mean activation times
      -log10(density), one for each leading token;
    * subject features spread over at least 8 token types, ordered by how few contexts hold their
      firings, against the number that independent firing would reach.

    Args:
        survey: what `survey` returned.
        count: how many features in all.
        min_firings: firings a feature needs.
        max_density: the largest share of rows on which it may fire.

    Returns:
        A Choice. Small stores have few eligible features: then fewer come back.
    """
    n, f = survey.n_rows, survey.firings.numel()
    enough = min(min_firings, max(2, n // 200))
    spread = min(6, max(1, n // max(survey.context_length, 1) // 8))
    eligible = (
        (survey.firings >= enough)
        & (survey.density <= max_density)
        & (survey.contexts_fired >= spread)
    )
    if not bool(eligible.any()):
        eligible = survey.firings > 0
        limits = "features that fire at all (none passed the usual limits on so little text)"
    else:
        limits = (
            f"features that fire at least {enough} times, on at most {max_density:.0%} of the "
            f"tokens, in at least {spread} contexts"
        )
    mean = (survey.total / survey.firings.clamp(min=1)).float()
    rarity = -torch.log10(survey.density.clamp(min=1e-12)).float()
    words = _ordered(eligible & (survey.token_types <= 4), mean * rarity)
    seen: set[int] = set()
    leading = []
    for index in words:
        token = survey.top_tokens(index, 1)[0][0]
        if token not in seen:
            seen.add(token)
            leading.append(index)
    n_contexts = max(1, n // max(survey.context_length - 1, 1))
    chance = n_contexts * (1 - (1 - survey.density) ** (survey.context_length - 1))
    burst = chance / survey.contexts_fired.clamp(min=1)
    subjects = _ordered(eligible & (survey.token_types >= 8), burst.float())
    some = subjects[: count // 2]
    first = leading[: count - len(some)]
    some = subjects[: count - len(first)]
    rule = (
        f"Of {f:,} features, those shown are {limits}. Features of a word spread their activation "
        "over at most 4 kinds of token; the strong and rare come first, one for each leading "
        "token. Features of a subject spread it over 8 or more, and fire in fewer places than "
        "chance would have it. The densest features are left out on purpose."
    )
    return Choice(first, some, rule)


def _ordered(mask: Tensor, score: Tensor) -> list[int]:
    index = mask.nonzero().flatten()
    return [int(i) for i in index[torch.argsort(score[index], descending=True, stable=True)]]


def describe(
    sae: Any,
    store: Rows,
    found: Survey,
    choice: Choice,
    *,
    contexts: int = 6,
    before: int = 16,
    after: int = 12,
) -> list[Feature]:
    """The chosen features with the text round their peaks, one a context, no stretch twice.

    Args:
        sae: as for `survey`.
        store: the same store.
        found: the survey of that store.
        choice: what to describe.
        contexts: how many stretches a feature.
        before: tokens shown before the peak, within the context.
        after: tokens shown after it.

    Returns:
        One Feature for each chosen index, word features first.
    """
    out = []
    for kind, indices in (("word", choice.words), ("subject", choice.subjects)):
        for index in indices:
            shown: list[Context] = []
            texts: set[tuple[int, ...]] = set()
            for row in found.peak_rows[index].tolist():
                if row < 0 or len(shown) == contexts:
                    break
                context = _context(sae, store, found.context_length, index, row, before, after)
                near = context.tokens[max(0, context.peak - 4) : context.peak + 3]
                if near not in texts:
                    texts.add(near)
                    shown.append(context)
            firings = int(found.firings[index])
            out.append(
                Feature(
                    index=index,
                    kind=kind,
                    firings=firings,
                    density=float(found.density[index]),
                    maximum=float(found.maximum[index]),
                    mean=float(found.total[index]) / max(firings, 1),
                    token_types=float(found.token_types[index]),
                    top_tokens=tuple(found.top_tokens(index)),
                    contexts=tuple(shown),
                )
            )
    return out


def _context(
    sae: Any, store: Rows, length: int, index: int, row: int, before: int, after: int
) -> Context:
    begin = row // length * length
    first, stop = max(begin, row - before), min(begin + length, row + after + 1, len(store))
    with torch.no_grad():
        at, feature, value = entries(sae.encode(store.rows(slice(first, stop))))
    activations = torch.zeros(stop - first)
    mine = feature == index
    activations[at[mine]] = value[mine]
    tokens = tuple(int(t) for t in store.tokens(slice(first, stop)))
    return Context(row, tokens, tuple(activations.tolist()), row - first)


def token_texts(tokenizer: Any, tokens: list[int]) -> dict[int, str]:
    """Each token's text as in a sentence: a new word has its leading space, a piece none."""
    texts = {token: str(tokenizer.decode([token])) for token in tokens}
    pieces = getattr(tokenizer, "convert_ids_to_tokens", None)
    if pieces is not None and any(str(p).startswith("##") for p in pieces(tokens)):
        texts = {t: s[2:] if s.startswith("##") else f" {s}" for t, s in texts.items()}
    return texts


@dataclass(frozen=True)
class About:
    """What a store's tokens say, kept in it as text.json, so that a report needs no tokenizer.

    Attributes:
        text: what the text is, in words.
        vocabulary: the text of every token type in the store.
        notes: what a reader of the numbers must know, such as a model that stands in for another.
    """

    text: str = "unknown text"
    vocabulary: dict[int, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, store: Rows, tokenizer: Any, text: str, notes: Sequence[str] = ()) -> About:
        """Look up the text of every token type that occurs in a store."""
        used = torch.unique(store.tokens(slice(0, len(store)))).tolist()
        return cls(text, token_texts(tokenizer, used), tuple(notes))

    @classmethod
    def read(cls, path: Path) -> About:
        """Read text.json of a store directory; a store that has none shows token numbers.

        Raises:
            StoreError: the file is damaged.
        """
        file = path / ABOUT
        if not file.exists():
            return cls()
        try:
            read = json.loads(file.read_text(encoding="utf-8"))
            vocabulary = {int(token): text for token, text in read["vocabulary"].items()}
            return cls(read["text"], vocabulary, tuple(read["notes"]))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            msg = (
                f"report: {file} is damaged ({type(error).__name__}: {error}). Capture the store "
                "again, or remove the file: the report then shows token numbers."
            )
            raise StoreError(msg) from error

    def write(self, path: Path) -> None:
        """Write text.json into a store directory, whole or not at all."""
        partial = path / (ABOUT + ".partial")
        partial.write_text(json.dumps(asdict(self), ensure_ascii=False), encoding="utf-8")
        partial.replace(path / ABOUT)

    def token(self, token: int) -> str:
        """A token's text, " #17" where it is not known."""
        return self.vocabulary.get(token, f" #{token}")
