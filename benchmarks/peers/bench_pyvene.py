"""pyvene: an IntervenableModel a layer, called once a cell."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.patching_case import Contender, Question, metric
from benchmarks.peers.bench_torch_hooks import clean_run


def _intervenable(question: Question, layer: int) -> Any:
    import pyvene

    place = {"layer": layer, "intervention_type": pyvene.VanillaIntervention}
    if question.sweep.site == "z":
        place.update(component="head_attention_value_output", unit="h")
    else:
        place.update(component="block_input")
    return pyvene.IntervenableModel(pyvene.IntervenableConfig([place]), model=question.model)


def _sweep(question: Question, *, given: bool) -> Contender:
    def swept(columns: list[int]) -> Tensor:
        layers = question.sweep.shape.layers
        clean = clean_run(question) if given else None
        scores = torch.empty(layers, len(columns))
        for layer in range(layers):
            model = _intervenable(question, layer)
            key = next(iter(model.interventions))
            for i, column in enumerate(columns):
                if clean is None:
                    source = {"sources": [{"input_ids": question.clean}]}
                elif question.sweep.site == "z":
                    z = clean[layer][:, None, :, question.part(column)]  # [1, 1, t, d / heads]
                    source = {"source_representations": {key: z}}
                else:
                    source = {"source_representations": {key: clean[layer][:, column, None]}}
                _, output = model(
                    base={"input_ids": question.corrupted},
                    unit_locations={"sources->base": column},
                    **source,
                )
                scores[layer, i] = metric(output.logits)
            question.between()
        return scores

    return Contender(lambda: swept(question.columns), lambda: swept(question.columns[:1]))


def _variant(*, given: bool) -> Callable[[Question], Contender]:
    return lambda question: _sweep(question, given=given)


VARIANTS = {
    "sources": _variant(given=False),  # it runs the source again in every call
    "source_representations": _variant(given=True),
}
