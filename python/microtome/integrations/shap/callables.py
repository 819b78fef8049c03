"""Models of any kind as functions of masked inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from microtome.shapley.call import as_function


def is_pipeline(model: Any) -> bool:
    """Whether this is a Hugging Face pipeline."""
    return callable(model) and all(hasattr(model, a) for a in ("task", "model", "preprocess"))


def pipeline_scores(pipeline: Any) -> Callable[[Any], np.ndarray]:
    """A text classification pipeline as a function: the scores of all labels, [texts, labels]."""
    labels = pipeline.model.config.id2label

    def scores(texts: Any) -> np.ndarray:
        out = np.zeros((len(texts), len(labels)))
        at = {name: i for i, name in labels.items()}
        for row, found in zip(out, pipeline([str(t) for t in texts], top_k=None), strict=True):
            for entry in found:
                row[at[entry["label"]]] = entry["score"]
        return out

    return scores


def label_names(model: Any) -> list[str] | None:
    """Names of the outputs, where the model has some."""
    if is_pipeline(model):
        labels = model.model.config.id2label
        return [labels[i] for i in sorted(labels)]
    names = getattr(model, "output_names", None)
    return None if names is None or callable(names) else list(names)


def plain(op: str, model: Any) -> Callable[..., Any]:
    """A model as a function of arrays, one for each of its inputs.

    Torch modules get tensors: floating-point numbers in the dtype and on the device of their first
    parameter.

    Raises:
        ArgumentError: it is neither callable nor an estimator.
    """
    if is_pipeline(model):
        return pipeline_scores(model)
    function, wants = as_function(op, model)
    module = model if isinstance(model, nn.Module) else getattr(model, "__self__", None)
    if wants != "torch":
        return function
    return lambda *inputs: function(*(as_module_input(module, a) for a in inputs))


def as_module_input(module: Any, array: Any) -> Any:
    """An array of numbers as a tensor that the module takes; anything else as it is."""
    if isinstance(array, np.ndarray) and array.dtype.kind in "OUS":
        return array
    tensor = torch.as_tensor(np.asarray(array)) if not isinstance(array, torch.Tensor) else array
    first = next(iter(module.parameters()), None)
    if first is None:
        return tensor
    floating = tensor.dtype.is_floating_point and first.dtype.is_floating_point
    return tensor.to(first.device, first.dtype if floating else tensor.dtype)
