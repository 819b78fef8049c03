"""microtome.patching.sweep: every cell and the changed ones, in float32 and in delta-bf16."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from benchmarks.patching_case import ANSWERS, Contender, Question


def _variant(precision: str, *, skip_unchanged: bool) -> Callable[[Question], Contender]:
    def prepare(question: Question) -> Contender:
        from microtome import patching

        metric = patching.logit_difference(*ANSWERS)

        def swept(clean: Tensor, corrupted: Tensor) -> Tensor:
            result = patching.sweep(
                question.model,
                clean,
                corrupted,
                metric,
                site=question.sweep.site,
                precision=precision,
                skip_unchanged=skip_unchanged,
            )
            return result.scores

        def warm() -> None:
            # A few tokens around the one that differs.
            few = slice(max(question.sweep.first - 2, 0), question.sweep.first + 4)
            swept(question.clean[:, few], question.corrupted[:, few])

        return Contender(lambda: swept(question.clean, question.corrupted), warm)

    return prepare


VARIANTS = {
    "fp32": _variant("fp32", skip_unchanged=False),
    "fp32, changed cells": _variant("fp32", skip_unchanged=True),
    "delta-bf16": _variant("delta-bf16", skip_unchanged=False),
    "delta-bf16, changed cells": _variant("delta-bf16", skip_unchanged=True),
}
