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

        def swept() -> Tensor:
            found = patching.sweep(
                question.model,
                question.clean,
                question.corrupted,
                metric,
                question.sweep.site,
                precision=precision,
                progress=False,
            )
            changed = int((found.written > 0).sum())
            about.update(engine=found.engine, note=found.note, changed_cells=changed)
            return found.scores

        # The first sweep packs the weights and verifies them, and keeps both for the model.
        return Contender(swept, None, lambda: about)

    return prepare


VARIANTS = {"fp32": _variant("fp32"), "delta-bf16": _variant("delta-bf16")}
