"""microtome.patching.sweep, in float32 and in delta-bf16."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from benchmarks.patching_case import ANSWERS, Contender, Question


def _variant(precision: str) -> Callable[[Question], Contender]:
    def prepare(question: Question) -> Contender:
        from microtome import patching

        metric = patching.logit_difference(*ANSWERS)
        about: dict[str, Any] = {}

        def swept(clean: Tensor, corrupted: Tensor) -> Tensor:
            found = patching.sweep(
                question.model,
                clean,
                corrupted,
                metric,
                question.sweep.site,
                precision=precision,
                progress=False,
            )
            changed = int((found.written > 0).sum())
            about.update(engine=found.engine, note=found.note, changed_cells=changed)
            return found.scores

        def warm() -> None:
            # A few tokens around the first that differs.
            few = slice(max(question.sweep.first - 2, 0), question.sweep.first + 4)
            swept(question.clean[:, few], question.corrupted[:, few])

        return Contender(lambda: swept(question.clean, question.corrupted), warm, lambda: about)

    return prepare


VARIANTS = {"fp32": _variant("fp32"), "delta-bf16": _variant("delta-bf16")}
