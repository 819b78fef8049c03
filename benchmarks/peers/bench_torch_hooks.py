"""Plain torch: a forward_pre_hook a cell, and the same with a layer's cells as rows of a batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.patching_case import Contender, Question, metric, row_metric


def modules(question: Question) -> list[Any]:
    """The module a layer whose input is the site."""
    blocks = question.model.transformer.h
    return [block.attn.c_proj if question.sweep.site == "z" else block for block in blocks]


def clean_run(question: Question) -> list[Tensor]:
    """The site in the clean run, [1, t, d] a layer."""
    kept: list[Tensor] = []

    def keep(_: Any, args: tuple[Any, ...]) -> None:
        kept.append(args[0].clone())

    handles = [module.register_forward_pre_hook(keep) for module in modules(question)]
    try:
        question.model(question.clean)
    finally:
        for handle in handles:
            handle.remove()
    return kept


def _where(question: Question, column: int) -> tuple[slice, slice]:
    """The (positions, width) that the patch of a column replaces."""
    if question.sweep.site == "z":
        return slice(None), question.part(column)
    return slice(column, column + 1), slice(None)


def hook_a_cell(question: Question) -> Contender:
    """The loop that everybody writes first: one forward a cell."""

    def swept(columns: list[int]) -> Tensor:
        clean = clean_run(question)
        scores = torch.empty(len(clean), len(columns))
        for layer, module in enumerate(modules(question)):
            for i, column in enumerate(columns):
                positions, width = _where(question, column)
                source = clean[layer][:, positions, width]

                def patch(
                    _: Any,
                    args: tuple[Any, ...],
                    where: tuple[slice, slice] = (positions, width),
                    source: Tensor = source,
                ) -> tuple[Any, ...]:
                    x = args[0].clone()
                    x[:, where[0], where[1]] = source
                    return (x, *args[1:])

                with module.register_forward_pre_hook(patch):
                    scores[layer, i] = metric(question.model(question.corrupted).logits)
            question.between()
        return scores

    return Contender(lambda: swept(question.columns), lambda: swept(question.columns[:1]))


def rows_of_a_layer(question: Question) -> Contender:
    """What a careful user writes: a batch a layer, one row a cell, still a whole forward a row."""

    def swept(columns: list[int]) -> Tensor:
        clean = clean_run(question)
        scores = torch.empty(len(clean), len(columns))
        batch = question.corrupted.expand(len(columns), -1)
        places = [_where(question, column) for column in columns]
        for layer, module in enumerate(modules(question)):

            def patch(
                _: Any, args: tuple[Any, ...], source: Tensor = clean[layer]
            ) -> tuple[Any, ...]:
                x = args[0].clone()
                for row, (positions, width) in enumerate(places):
                    x[row, positions, width] = source[0, positions, width]
                return (x, *args[1:])

            with module.register_forward_pre_hook(patch):
                scores[layer] = row_metric(question.model(batch).logits)
            question.between()
        return scores

    return Contender(lambda: swept(question.columns), lambda: swept(question.columns[:1]))


VARIANTS = {"a hook a cell": hook_a_cell, "a batch a layer, a row a cell": rows_of_a_layer}
