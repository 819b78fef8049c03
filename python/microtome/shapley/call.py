"""Any callable as a function of rows: what may come back, and what is wrong with the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from microtome import _heap
from microtome.errors import ArgumentError, NonFiniteError, ShapeError


class Outputs:
    """A function whose answers are checked and turned into float64.

    Args:
        name: what messages call it.
        function: takes one argument, which stands for R rows, and returns R numbers or R rows of o
            numbers: a tensor, an array, a DataFrame, a list, or a Hugging Face output with logits.
        hint: what to add to the message when an answer is NaN or infinite.
        rows: what is done to the rows, for the same message.

    Attributes:
        scalar: whether it returns one number a row; known after the first call.
    """

    def __init__(
        self,
        name: str,
        function: Callable[[Any], Any],
        hint: Callable[[], str] | None = None,
        rows: str = "Absent players are replaced by background values",
    ) -> None:
        self.name, self.function, self.hint, self.rows = name, function, hint, rows
        self.scalar = True
        self.outputs: int | None = None
        _heap.keep_freed()

    def __call__(self, inputs: Any, count: int) -> Tensor:
        """[count, o] float64 on the CPU, o = 1 for a scalar function.

        Raises:
            ShapeError: another number of rows came back, or other than 1 or 2 dimensions, or
                another number of outputs than before.
            NonFiniteError: an answer is NaN or infinite; the message names the rows.
        """
        with torch.no_grad():
            out = as_tensor(self.function(inputs), self.name)
        if out.dim() == 0 or out.shape[0] != count:
            got = "a single number" if out.dim() == 0 else f"shape {list(out.shape)}"
            msg = (
                f"{self.name} was called with {count} rows and returned {got}. It must return one "
                f"number, or one row of numbers, for each row it is given: [{count}] or "
                f"[{count}, outputs]."
            )
            raise ShapeError(msg)
        if out.dim() > 2:
            msg = (
                f"{self.name} must return [rows] or [rows, outputs], got shape {list(out.shape)}. "
                "Choose the output to explain inside the function (one position, one class)."
            )
            raise ShapeError(msg)
        scalar = out.dim() == 1
        out = out[:, None] if scalar else out
        if self.outputs is None:
            self.scalar, self.outputs = scalar, out.shape[1]
        elif (scalar, out.shape[1]) != (self.scalar, self.outputs) and count:
            msg = (
                f"{self.name} returned {self.outputs} outputs at first and {out.shape[1]} now. It "
                "must return the same number for every row."
            )
            raise ShapeError(msg)
        if not np.isfinite(float(out.sum())) and not bool(torch.isfinite(out).all()):
            bad = (~torch.isfinite(out)).any(1).nonzero().flatten()
            first = ", ".join(map(str, bad[:5].tolist()))
            hint = self.hint() if self.hint else ""
            msg = (
                f"{self.name} returned NaN or infinity for {len(bad)} of {count} rows (row {first}"
                f"{', ...' if len(bad) > 5 else ''}). {hint}{self.rows}: check that "
                "the model takes such rows."
            )
            raise NonFiniteError(msg)
        return out


def as_tensor(out: Any, name: str) -> Tensor:
    """What a model returned, as a float64 tensor on the CPU.

    Raises:
        ShapeError: it is nothing that holds numbers.
    """
    out = getattr(out, "logits", out)
    if isinstance(out, Tensor | np.ndarray | np.generic) and "complex" in str(out.dtype):
        msg = f"{name} must return real numbers, got {out.dtype}. Take .abs() or .real of them."
        raise ShapeError(msg)
    if isinstance(out, Tensor):
        return out.detach().to("cpu", torch.float64)
    try:
        return torch.from_numpy(np.array(out, dtype=np.float64))  # a copy: pandas' are read-only
    except (TypeError, ValueError) as error:
        msg = (
            f"{name} must return numbers (a tensor, an array or a list of them), got "
            f"{type(out).__name__}. Wrap it: lambda rows: model(rows)[...]."
        )
        raise ShapeError(msg) from error


def as_function(op: str, f: Any) -> tuple[Callable[[Any], Any], str]:
    """A model as a plain function, and what kind of rows it wants: "torch", "numpy" or "same".

    A torch module takes tensors, a scikit-learn estimator arrays or DataFrames (its predict_proba
    if it has one, else its predict), and any other callable whatever kind the user's rows are.

    Raises:
        ArgumentError: `f` is neither callable nor an estimator.
    """
    if isinstance(f, nn.Module):
        return f, "torch"
    for method in ("predict_proba", "predict"):
        if hasattr(f, method) and hasattr(f, "fit"):
            return getattr(f, method), "numpy"
    if not callable(f):
        msg = (
            f"{op}: f must be a function of rows, a torch module or a scikit-learn estimator, got "
            f"{type(f).__name__}."
        )
        raise ArgumentError(msg)
    owner = getattr(f, "__self__", None)
    return f, "torch" if isinstance(owner, nn.Module) else "same"


def is_pipeline(f: Any) -> bool:
    """Whether this is a Hugging Face pipeline over texts."""
    return hasattr(f, "task") and hasattr(f, "model") and hasattr(f, "tokenizer")


def of_texts(op: str, f: Any, batch: int) -> tuple[Callable[[list[str]], Any], tuple[str, ...]]:
    """f as a function of list[str], and the names of its outputs if it knows them.

    Raises:
        ArgumentError: a pipeline of another task; nothing that can be called.
    """
    if not is_pipeline(f):
        function, _ = as_function(op, f)
        named = getattr(f, "classes_", ()) if hasattr(f, "predict_proba") else ()
        return function, tuple(map(str, named))
    if f.task not in ("", "text-classification", "sentiment-analysis"):
        msg = (
            f"{op}: a pipeline must be one for text-classification, got one for {f.task!r}. Wrap "
            "it in a function from a list of texts to numbers."
        )
        raise ArgumentError(msg)
    named = f.model.config.id2label
    labels = tuple(str(named[i]) for i in sorted(named))
    size = batch if getattr(f.tokenizer, "pad_token_id", None) is not None else 1

    def scores(texts: list[str]) -> list[list[float]]:
        found = f(texts, top_k=None, batch_size=size)
        by_label = [{one["label"]: one["score"] for one in row} for row in found]
        return [[row[label] for label in labels] for row in by_label]

    return scores, labels


def parameter_of(f: Any) -> Tensor | None:
    """The first floating parameter of a torch module, or of the module that a method belongs to."""
    owner = f if isinstance(f, nn.Module) else getattr(f, "__self__", None)
    if not isinstance(owner, nn.Module):
        return None
    return next((a for a in owner.parameters() if a.is_floating_point()), None)


def takes_real(f: Any) -> bool:
    """Whether f begins with a layer that multiplies its rows, so that whole numbers must be real.

    Other modules may look whole numbers up.
    """
    first = f
    while type(first) is nn.Sequential:
        passed = (nn.Flatten, nn.Identity, nn.Dropout)
        first = next((layer for layer in first if not isinstance(layer, passed)), None)
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.BatchNorm1d, nn.LayerNorm)
    return isinstance(first, kinds)


def check_deterministic(
    op: str, first: Tensor, second: Tensor, others: Tensor | None = None
) -> None:
    """Raise ArgumentError if two answers to the same rows differ by more than rounding.

    `others` are answers to other rows, which say how large an answer can be.
    """
    if first.numel() == 0:
        return
    apart = float((first - second).abs().max())
    scale = max(float(a.abs().max()) for a in (first, others) if a is not None and a.numel())
    if apart > 1e-4 * max(scale, 1e-30):
        msg = (
            f"{op}: f gives different answers to the same rows (they differ by up to {apart:.3g}). "
            "Put the model in evaluation mode (model.eval()), fix its seed inside f, or let it "
            "answer each row by itself; or pass check=False to sample over its noise."
        )
        raise ArgumentError(msg)
