"""A table as the user has it, as float64 numbers, and new rows of numbers as the user's kind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from microtome.errors import ArgumentError, ShapeError


class Columns:
    """Rows to explain and background rows as float64; categories as codes 0, 1, ...

    Args:
        op: name for messages.
        x: [e, m] or [m]: a tensor, an array, a DataFrame or a list.
        background: [n, m], of the same kind.
        wants: "torch", "numpy" or "same": what the model takes (shapley.call.as_function).
        categorical: "auto" for the columns that hold no numbers, or columns by name or number.
        f: the model; a torch module's parameters say in which precision it wants its rows.

    Attributes:
        x, background: [e, m] and [n, m] float64 arrays.
        names: m names.
        categorical: [m] bool.
        torch: whether the model gets tensors.
        levels: for each column the values behind its codes, or None where x holds the numbers.

    Raises:
        ShapeError: x and background do not agree.
        ArgumentError: no rows or columns, missing values, an unknown column, text in a column that
            is not categorical.
    """

    def __init__(
        self,
        op: str,
        x: Any,
        background: Any,
        wants: str,
        categorical: str | Sequence[int | str] = "auto",
        f: Any = None,
    ) -> None:
        self.op = op
        self._labels = x.columns if hasattr(x, "columns") and hasattr(x, "iloc") else None
        self.torch = isinstance(x, Tensor) if wants == "same" else wants == "torch"
        self._dtype, self._device = _target(x, f)
        x, background = self._array(x, "x"), self._array(background, "background")
        if x.shape[1] != background.shape[1]:
            got = list(background.shape)
            msg = f"{op}: background must be [n, {x.shape[1]}] like x, got shape {got}."
            raise ShapeError(msg)
        if not len(background) or not x.shape[1]:
            what = "background has no rows" if x.shape[1] else "x has no columns"
            msg = f"{op}: {what}. LIME draws its samples from the background's columns."
            raise ArgumentError(msg)
        m = x.shape[1]
        given = self._labels is not None
        self.names = tuple(map(str, self._labels)) if given else tuple(f"x{j}" for j in range(m))
        self.levels: list[Any] = [None] * m
        if x.dtype == object or background.dtype == object:
            x, background = self._encode(x.astype(object), background.astype(object))
        self.x, self.background = x.astype(np.float64), background.astype(np.float64)
        self.categorical = self._which(categorical)
        self._complete()

    def _array(self, a: Any, name: str) -> np.ndarray:
        if self._labels is not None:
            if not hasattr(a, "columns") or list(a.columns) != list(self._labels):
                msg = (
                    f"{self.op}: {name} must be a DataFrame with the columns {list(self._labels)}, "
                    "in this order, as x is."
                )
                raise ArgumentError(msg)
            a = np.asarray(a)
        if isinstance(a, Tensor):
            a = a.detach().to("cpu", torch.float64).numpy()
        a = np.asarray(a)
        if a.dtype.kind in "US":
            a = a.astype(object)
        a = a[None] if a.ndim == 1 else a
        if a.ndim != 2:
            msg = (
                f"{self.op}: {name} must be [rows, columns], got shape {list(a.shape)}. Flatten "
                "rows of more dimensions, or use explain_image."
            )
            raise ShapeError(msg)
        return a

    def _encode(self, x: np.ndarray, background: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Numbers for columns of objects: codes where a value is no number."""
        both = np.concatenate([x, background])
        out = np.empty(both.shape)
        for j in range(both.shape[1]):
            column = both[:, j]
            try:
                out[:, j] = [_number(value) for value in column]
            except (TypeError, ValueError):
                levels = sorted(set(column.tolist()), key=lambda v: (str(type(v)), str(v)))
                code = {value: at for at, value in enumerate(levels)}
                out[:, j] = [code[value] for value in column]
                boxed = np.empty(len(levels), dtype=object)
                boxed[:] = levels
                self.levels[j] = boxed
        return out[: len(x)], out[len(x) :]

    def _which(self, categorical: str | Sequence[int | str]) -> np.ndarray:
        coded = np.array([levels is not None for levels in self.levels])
        if isinstance(categorical, str):
            if categorical != "auto":
                msg = (
                    f"{self.op}: categorical must be 'auto' or a list of columns, got "
                    f"{categorical!r}."
                )
                raise ArgumentError(msg)
            return coded
        which = np.zeros(len(self.names), dtype=bool)
        for column in categorical:
            which[self.column(column, "categorical")] = True
        if (coded & ~which).any():
            name = self.names[int((coded & ~which).argmax())]
            msg = (
                f"{self.op}: column {name!r} holds values that are no numbers, so it must be among "
                "the categorical ones. Add it, or pass categorical='auto'."
            )
            raise ArgumentError(msg)
        return which

    def column(self, column: int | str, argument: str) -> int:
        """The number of a column given by name or number."""
        if isinstance(column, str):
            found = self.names.index(column) if column in self.names else -1
        else:
            found = int(column)
        if not 0 <= found < len(self.names):
            known = ", ".join(self.names[:8]) + (" ..." if len(self.names) > 8 else "")
            msg = f"{self.op}: {argument} names column {column!r}; the columns are {known}."
            raise ArgumentError(msg)
        return found

    def _complete(self) -> None:
        for name, rows in (("x", self.x), ("background", self.background)):
            if np.isfinite(rows.sum()):
                continue
            bad = ~np.isfinite(rows).all(0)
            if bad.any():
                columns = ", ".join(np.array(self.names)[bad][:5])
                msg = (
                    f"{self.op}: {name} has missing or infinite values in column {columns}. LIME "
                    "needs their distribution: impute them, or drop those rows."
                )
                raise ArgumentError(msg)

    def back(self, rows: np.ndarray) -> Any:
        """[R, m] float64 as the model takes them: the user's kind of rows and numbers."""
        if self.torch:
            return torch.from_numpy(rows).to(self._device, self._dtype)
        if any(levels is not None for levels in self.levels):
            columns: list[Any] = list(rows.T)
            for j, levels in enumerate(self.levels):
                if levels is not None:
                    columns[j] = levels[rows[:, j].astype(np.int64)]
            if self._labels is None:
                out = np.empty(rows.shape, dtype=object)
                for j, column in enumerate(columns):
                    out[:, j] = column
                return out
            return _frame(dict(zip(self._labels, columns, strict=True)))
        if self._labels is not None:
            return _frame(rows, columns=self._labels)
        dtype = torch.empty(0, dtype=self._dtype).numpy().dtype
        return rows.astype(dtype, copy=False)

    def show(self, j: int, value: float) -> str:
        """A value of column j in words."""
        return f"{value:.4g}" if self.levels[j] is None else str(self.levels[j][int(value)])


def _number(value: Any) -> float:
    if isinstance(value, (str, bytes, bool, np.bool_)):
        raise TypeError
    return float(value)


def _target(x: Any, f: Any) -> tuple[torch.dtype, Any]:
    """Precision and device of the rows a model gets: x's, else its own parameters'."""
    if isinstance(x, Tensor):
        floats = x.dtype.is_floating_point
        return x.dtype if floats else torch.get_default_dtype(), x.device
    if isinstance(f, nn.Module):
        for parameter in f.parameters():
            if parameter.is_floating_point():
                return parameter.dtype, parameter.device
    single = isinstance(x, np.ndarray) and x.dtype == np.float32
    return torch.float32 if single else torch.float64, "cpu"


def _frame(*args: Any, **options: Any) -> Any:
    import pandas as pd

    return pd.DataFrame(*args, **options)
