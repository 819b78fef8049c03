"""Rows as users have them (tensors, arrays, DataFrames) and as the ops want them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from microtome.errors import ArgumentError, ShapeError


class Rows:
    """Rows to explain and background rows as two matrices of one dtype, and the way back.

    Numbers keep their dtype. Columns of mixed or other types (a DataFrame with categories, an
    array of objects) are held as numbers into a pool of the values that occur.

    Args:
        op: name for messages.
        x: [e, ...] or, for one row of a table, [m]: a tensor, an array, a DataFrame or a list.
        background: [n, ...] or [m], of the same kind.
        wants: "torch", "numpy" or "same": what the model takes (call.as_function).
        like: a parameter of the model; rows of real numbers get its dtype, all rows its device.

    Attributes:
        x, background: [e, m] and [n, m].
        columns: m names.
    """

    def __init__(
        self, op: str, x: Any, background: Any, wants: str, like: Tensor | None = None
    ) -> None:
        self.frame = hasattr(x, "columns") and hasattr(x, "iloc")
        self.columns, self._pools, self._index = (), None, None
        if self.frame:
            self.columns = tuple(map(str, x.columns))
            self._labels = x.columns
            self._numeric = all(np.issubdtype(t, np.number) for t in map(_numpy_type, x.dtypes))
            same = self._numeric and len(set(x.dtypes)) == 1
            x, background = (_frame_array(op, a, x.columns, same) for a in (x, background))
        self.torch = isinstance(x, Tensor) if wants == "same" else wants == "torch"
        x, background = _no_rounding(_one_row(x), _one_row(background))
        if x.shape[1:] != background.shape[1:]:
            msg = (
                f"{op}: background must be [n, {', '.join(map(str, x.shape[1:]))}] like x, got "
                f"shape {list(background.shape)}."
            )
            raise ShapeError(msg)
        if background.shape[0] == 0:
            msg = f"{op}: background has no rows. Pass at least one to draw absent players from."
            raise ArgumentError(msg)
        self.shape = tuple(x.shape[1:])
        if isinstance(x, np.ndarray) and x.dtype == object:
            x, background = self._pool(x, background)
        x, background = torch.as_tensor(x), torch.as_tensor(background)
        if like is not None and self._pools is None:
            x = x.to(like.device, like.dtype if x.is_floating_point() else x.dtype)
        if x.dtype != background.dtype:
            background = background.to(x.dtype)
        self.x = x.flatten(1)
        self.background = background.to(x.device).flatten(1)
        if not self.columns:
            self.columns = tuple(f"x{j}" for j in range(self.x.shape[1]))

    def _pool(self, x: np.ndarray, background: np.ndarray) -> tuple[Tensor, Tensor]:
        e, n = len(x), len(background)
        both = np.concatenate([x.reshape(e, -1), background.reshape(n, -1)])
        self._pools = both
        codes = torch.arange(e + n, dtype=torch.int32)[:, None].expand(-1, both.shape[1])
        return codes[:e].contiguous(), codes[e:].contiguous()

    def back(self, rows: Tensor) -> Any:
        """[R, m] as the model wants them: the user's kind, shape and dtype."""
        if self._pools is not None:
            columns = np.arange(rows.shape[1])
            return self._boxed(self._pools[rows.numpy(), columns])
        rows = rows.reshape(rows.shape[0], *self.shape)
        return rows if self.torch else self._boxed(rows.cpu().numpy())

    def _boxed(self, rows: np.ndarray) -> Any:
        rows = rows.reshape(rows.shape[0], *self.shape)
        if not self.frame:
            return rows
        import pandas as pd

        frame = pd.DataFrame(rows, columns=self._labels)
        return frame.infer_objects() if self._pools is not None else frame

    def missing(self) -> list[str]:
        """Names of the columns that hold NaN."""
        if self._pools is not None or not self.x.dtype.is_floating_point:
            return []
        at = torch.isnan(self.x).any(0) | torch.isnan(self.background).any(0)
        return [self.columns[j] for j in at.nonzero().flatten().tolist()]

    def shown(self) -> Tensor | np.ndarray:
        """[e, m]: the rows to explain, numbers as a tensor, mixed values as an array of objects."""
        if self._pools is None:
            return self.x
        return self._pools[self.x.numpy(), np.arange(self.x.shape[1])]

    @property
    def row_bytes(self) -> int:
        return self.x.shape[1] * self.x.element_size()


def _numpy_type(dtype: Any) -> Any:
    return dtype if isinstance(dtype, np.dtype) else np.dtype(object)


def _frame_array(op: str, frame: Any, columns: Any, same: bool) -> np.ndarray:
    if hasattr(frame, "columns") and list(frame.columns) != list(columns):
        msg = (
            f"{op}: background has the columns {list(frame.columns)}, x has {list(columns)}. "
            "They must be the same, in the same order."
        )
        raise ArgumentError(msg)
    return np.asarray(frame) if same else np.asarray(frame, dtype=object)


def _one_row(a: Any) -> Any:
    """With a row dimension; lists become arrays, arrays of Python numbers float64."""
    if not isinstance(a, Tensor):
        a = np.asarray(a)
        a = a if a.flags.writeable else a.copy()  # torch warns of a read-only array
    return a[None] if a.ndim == 1 else a


def _no_rounding(x: Any, background: Any) -> tuple[Any, Any]:
    """Whole rows as fractions if the background has them, which rounding would change."""
    if isinstance(x, Tensor):
        fractions = isinstance(background, Tensor) and background.is_floating_point()
        return (
            x.to(background.dtype) if fractions and not x.is_floating_point() else x
        ), background
    fractions = isinstance(background, np.ndarray) and background.dtype.kind == "f"
    return (x.astype(background.dtype) if fractions and x.dtype.kind in "iub" else x), background
