"""nnsight: a trace a cell, and its batched way, a trace a layer with an invoke a cell."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.patching_case import ANSWERS, Contender, Question


def _clean_run(model: Any, question: Question) -> list[Tensor]:
    """The site in the clean run, [1, t, d] a layer."""
    kept: list[Tensor] = []
    with model.trace(question.clean):
        kept = [].save()
        for layer in range(question.sweep.shape.layers):
            block = model.transformer.h[layer]
            if question.sweep.site == "z":
                kept.append(block.attn.c_proj.input.clone())
            else:
                kept.append(block.input.clone())
    return kept


def trace_a_cell(question: Question) -> Contender:
    """A trace of the corrupted prompt for every cell: write the site, read two logits."""
    from nnsight import NNsight

    model = NNsight(question.model)
    good, bad = ANSWERS

    def swept(columns: list[int]) -> Tensor:
        clean = _clean_run(model, question)
        scores = torch.empty(len(clean), len(columns))
        for layer, source in enumerate(clean):
            block = model.transformer.h[layer]
            for i, column in enumerate(columns):
                if question.sweep.site == "z":
                    part = question.part(column)
                    with model.trace(question.corrupted):
                        block.attn.c_proj.input[..., part] = source[..., part]
                        logits = model.lm_head.output
                        score = (logits[0, -1, good] - logits[0, -1, bad]).save()
                else:
                    with model.trace(question.corrupted):
                        block.input[:, column] = source[:, column]
                        logits = model.lm_head.output
                        score = (logits[0, -1, good] - logits[0, -1, bad]).save()
                scores[layer, i] = score
            question.between()
        return scores

    return Contender(lambda: swept(question.columns), lambda: swept(question.columns[:1]))


def invoke_a_cell(question: Question) -> Contender:
    """A trace for every layer; its invokes, one a cell, become the rows of one batch."""
    from nnsight import LanguageModel

    model = LanguageModel(question.model, tokenizer=_tokenizer(question.sweep.shape.vocabulary))
    good, bad = ANSWERS

    def swept(columns: list[int]) -> Tensor:
        clean = _clean_run(model, question)
        scores = torch.empty(len(clean), len(columns))
        for layer, source in enumerate(clean):
            block = model.transformer.h[layer]
            with model.trace() as tracer:
                row = [].save()
                for column in columns:
                    with tracer.invoke(question.corrupted):
                        if question.sweep.site == "z":
                            part = question.part(column)
                            block.attn.c_proj.input[..., part] = source[..., part]
                        else:
                            block.input[:, column] = source[:, column]
                        logits = model.lm_head.output
                        row.append(logits[0, -1, good] - logits[0, -1, bad])
            scores[layer] = torch.stack(row)
            question.between()
        return scores

    return Contender(lambda: swept(question.columns), lambda: swept(question.columns[:1]))


def _tokenizer(vocabulary: int) -> Any:
    """LanguageModel insists on a tokenizer, though the prompts are token ids already."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {str(token): token for token in range(vocabulary)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="0")),
        pad_token="0",
        unk_token="0",
    )


VARIANTS = {"a trace a cell": trace_a_cell, "a trace a layer, an invoke a cell": invoke_a_cell}
