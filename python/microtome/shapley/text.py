"""Games whose players are the words or tokens of a text."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from microtome import _check
from microtome.errors import ArgumentError
from microtome.shapley.call import is_pipeline, of_texts
from microtome.shapley.game import Game, SetGame
from microtome.shapley.inputs import InputGame
from microtome.shapley.permutation import permutation
from microtome.shapley.pieces import Pieces, Rebuild, encode, token_pieces, word_pieces
from microtome.shapley.players import Players
from microtome.shapley.result import ShapleyValues

_TOKENS = 4096  # in one call of a model, unless `batch` says otherwise
_TEXTS = 64  # in one call of a function of texts
_ROUND = 512  # coalitions between two looks at the clock; fixed, since results depend on it


def text_game(
    f: Any,
    text: str,
    *,
    tokenizer: Any = None,
    unit: str = "word",
    mask: str | int | None = None,
    separators: str | None = None,
    takes: str = "auto",
    hide: bool = False,
    batch: int | None = None,
    check: bool = True,
) -> Game:
    """The game of one text: v(S) = f(the text with all pieces outside of S masked).

    Args:
        f: takes texts (a function of list[str], a scikit-learn pipeline, a Hugging Face
            text-classification pipeline), or token ids (a torch module or Hugging Face model;
            or, with takes="ids", a function of int64 [R, t], and of an attention mask too if
            `hide`). It returns [R] or [R, o].
        text: the text. Special tokens that a tokenizer adds are always there and never play.
        tokenizer: a Hugging Face tokenizer, fast or slow, a `tokenizers.Tokenizer`, or a function
            from a text to its pieces, to their (start, end), or to a mapping with offset_mapping
            and input_ids. A pipeline brings its own.
        unit: "word" or "token". Punctuation between words is always there.
        mask: what stands for an absent piece: a string or, where f takes ids, a token's id too.
            By default the tokenizer's mask token, else "..."; without a tokenizer "", which drops
            the piece with the white space before it.
        separators: a regular expression for what separates words (pieces.words).
        takes: "text", "ids" or "auto": ids for a torch module, else text.
        hide: also take absent tokens out of the attention mask.
        batch: most texts in one call of f. By default 64 texts, or 4096 tokens.
        check: call f twice on the text, to find out whether it is deterministic.

    Returns:
        A game of one explicand, for any estimator: permutation(text_game(...)).

    Raises:
        ArgumentError: an empty text, a text without words, a text longer than the model takes, no
            tokenizer where one is needed, a mask that is no single token.

    A word's value depends on the mask: models are not trained on texts with many masks, so compare
    two masks before you rely on small values.

    Example:
        >>> game = text_game(lambda texts: [t.count("good") for t in texts], "good, very good")
        >>> permutation(game).values
        tensor([[1., 0., 1.]], dtype=torch.float64)
    """
    op = "text_game"
    _check.one_of(op, "unit", unit, ("word", "token"))
    _check.one_of(op, "takes", takes, ("auto", "text", "ids"))
    if not isinstance(text, str):
        msg = f"{op}: text must be one string, got {type(text).__name__}. explain_text takes many."
        raise ArgumentError(msg)
    if not text.strip():
        msg = f"{op}: the text is empty, so there are no players. Leave empty texts out."
        raise ArgumentError(msg)
    if batch is not None and batch < 1:
        msg = f"{op}: batch must be at least 1, got batch={batch}."
        raise ArgumentError(msg)
    if takes == "auto":
        takes = "ids" if isinstance(f, nn.Module) else "text"
    if tokenizer is None and is_pipeline(f):
        tokenizer = f.tokenizer
    if tokenizer is None and (unit == "token" or takes == "ids"):
        what = "unit='token'" if unit == "token" else "a model that takes token ids"
        msg = f"{op}: {what} needs a tokenizer. Pass tokenizer=..."
        raise ArgumentError(msg)
    encoded = None
    if unit == "token" or takes == "ids":
        encoded = encode(op, text, tokenizer)
    if encoded is not None and unit == "token":
        pieces = token_pieces(op, text, encoded)
    else:
        pieces = word_pieces(op, text, separators, encoded)
    if takes == "ids":
        return _id_game(op, f, text, pieces, tokenizer, mask, hide, batch, check)
    if hide:
        msg = f"{op}: hide=True needs an f that takes token ids. Pass the model and its tokenizer."
        raise ArgumentError(msg)
    return _string_game(op, f, text, pieces, tokenizer, mask, batch, check)


def explain_text(
    f: Any,
    texts: str | Sequence[str],
    *,
    estimator: Callable[..., ShapleyValues] = permutation,
    progress: bool = True,
    tokenizer: Any = None,
    unit: str = "word",
    mask: str | int | None = None,
    separators: str | None = None,
    takes: str = "auto",
    hide: bool = False,
    batch: int | None = None,
    check: bool = True,
    **options: Any,
) -> list[ShapleyValues]:
    """One result for each text: every text is a game of its own, with its own players.

    Args:
        f: as in `text_game`.
        texts: one text or several.
        estimator: what estimates a game: permutation, kernel, exact, ...
        progress: show a progress bar over texts.
        tokenizer: as in `text_game`, and so are unit, mask, separators, takes, hide, batch, check.
        unit: as there.
        mask: as there.
        separators: as there.
        takes: as there.
        hide: as there.
        batch: as there.
        check: for the first text only.
        **options: of the estimator.

    Raises:
        ArgumentError: as `text_game`; the message says which text.
    """
    texts = [texts] if isinstance(texts, str) else list(texts)
    results = []
    for i, text in enumerate(tqdm(texts, desc="explain_text", delay=1.0, disable=not progress)):
        try:
            game = text_game(
                f, text, tokenizer=tokenizer, unit=unit, mask=mask, separators=separators,
                takes=takes, hide=hide, batch=batch, check=check and i == 0,
            )  # fmt: skip
        except ArgumentError as error:
            msg = f"explain_text: text {i} of {len(texts)}: {error}"
            raise ArgumentError(msg) from error
        results.append(estimator(game, **options))
    return results


def _string_game(
    op: str,
    f: Any,
    text: str,
    pieces: Pieces,
    tokenizer: Any,
    mask: str | int | None,
    batch: int | None,
    check: bool,
) -> SetGame:
    if pieces.spans is None:
        msg = (
            f"{op}: this tokenizer does not say where its tokens lie in the text. Pass a fast one, "
            "unit='word', or a model that takes ids."
        )
        raise ArgumentError(msg)
    if isinstance(mask, int):
        msg = f"{op}: mask must be a string where f takes texts, got mask={mask}."
        raise ArgumentError(msg)
    if mask is None:
        mask = "" if tokenizer is None else _mask_token(tokenizer) or "..."
    batch = batch or _TEXTS
    rebuild = Rebuild(text, pieces.spans, mask)
    function, labels = of_texts(op, f, batch)
    players = _players(text, pieces, labels)
    game = SetGame(
        lambda inside: function(rebuild(inside)), players, per_call=batch, check=check,
        name=f"{op}: f",
    )  # fmt: skip
    game.rows_per_round = _ROUND
    return game


def _id_game(
    op: str,
    f: Any,
    text: str,
    pieces: Pieces,
    tokenizer: Any,
    mask: str | int | None,
    hide: bool,
    batch: int | None,
    check: bool,
) -> InputGame:
    ids, player = pieces.ids, pieces.player
    if ids is None or player is None:
        msg = (
            f"{op}: f takes token ids, but the tokenizer returned none. Return a mapping with "
            "input_ids and offset_mapping."
        )
        raise ArgumentError(msg)
    t = len(ids)
    longest = _longest(f, tokenizer)
    if t > longest:
        msg = (
            f"{op}: the text has {t} tokens, the model takes at most {longest}. Shorten the text, "
            "or explain it in parts."
        )
        raise ArgumentError(msg)
    hidden = torch.full_like(ids, _mask_id(op, tokenizer, mask))
    x, background = ids[None], hidden[None]  # [1, t]
    if hide:  # ids and attention mask side by side, a player holding its columns of both
        x = torch.cat([x, torch.ones_like(x)], 1)
        background = torch.cat([background, torch.zeros_like(background)], 1)
        player = torch.cat([player, player])
    first = next(f.parameters(), None) if isinstance(f, nn.Module) else None
    if first is not None:
        x = x.to(first.device)
    rows = batch or max(1, _TOKENS // t)
    config = getattr(f, "config", None)
    named = getattr(config, "id2label", None) or {}
    labels = tuple(str(named[i]) for i in sorted(named))
    game = InputGame(
        _of_ids(f, t, hide), x, background, groups=(_players(text, pieces, labels), player),
        memory=rows * 8 * x.shape[1], check=check, op=op,
    )  # fmt: skip
    game.rows_per_round = _ROUND
    return game


def _of_ids(f: Any, t: int, hide: bool) -> Callable[[Tensor], Any]:
    """f as a function of rows [R, t], or [R, 2 t] with the attention mask behind the ids."""
    forward = f.forward if isinstance(f, nn.Module) else f
    try:
        named = "attention_mask" in inspect.signature(forward).parameters
    except (TypeError, ValueError):  # a callable written in C
        named = False

    def call(rows: Tensor) -> Any:
        ids = rows[:, :t]
        attention = rows[:, t:] if hide else torch.ones_like(ids)
        if named:
            return f(ids, attention_mask=attention)
        return f(ids, attention) if hide else f(ids)

    return call


def _players(text: str, pieces: Pieces, outputs: tuple[str, ...]) -> Players:
    view = {"text": text, "spans": pieces.spans, "outputs": outputs}
    return Players(pieces.names, "text", None, view)


def _mask_token(tokenizer: Any) -> str | None:
    found = getattr(tokenizer, "mask_token", None)
    if found is None and hasattr(tokenizer, "token_to_id"):
        found = next(
            (m for m in ("[MASK]", "<mask>") if tokenizer.token_to_id(m) is not None), None
        )
    return found


def _mask_id(op: str, tokenizer: Any, mask: str | int | None) -> int:
    """The id of the mask: by itself, of the text that stands for it, or the tokenizer's own.

    Raises:
        ArgumentError: the text is not one token, or the tokenizer cannot be asked.
    """
    if isinstance(mask, int):
        return mask
    wanted = (_mask_token(tokenizer) or "...") if mask is None else mask
    if hasattr(tokenizer, "token_to_id"):
        found = [tokenizer.token_to_id(wanted)]
        if found == [None]:
            found = tokenizer.encode(wanted, add_special_tokens=False).ids
    elif hasattr(tokenizer, "convert_tokens_to_ids"):
        if wanted in (tokenizer.mask_token, tokenizer.pad_token, tokenizer.unk_token):
            return int(tokenizer.convert_tokens_to_ids(wanted))
        found = tokenizer(wanted, add_special_tokens=False)["input_ids"]
    else:
        found = []
    if len(found) != 1:
        said = f"mask={mask!r}" if mask is not None else f"{wanted!r}, for want of a mask token,"
        got = f"makes {len(found)} tokens" if found else "cannot be looked up in this tokenizer"
        msg = f"{op}: {said} must be one token, but {got}. Pass the id of a token as mask."
        raise ArgumentError(msg)
    return int(found[0])


def _longest(f: Any, tokenizer: Any) -> int:
    """Most tokens the model takes, as far as it says."""
    limits = [
        getattr(getattr(f, "config", None), "max_position_embeddings", None),
        getattr(tokenizer, "model_max_length", None),
    ]
    return min((n for n in limits if isinstance(n, int) and n > 0), default=1 << 62)
