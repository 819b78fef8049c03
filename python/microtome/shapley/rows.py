"""Rows as users have them (tensors, arrays, DataFrames) and as the ops want them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from microtome.errors import ArgumentError, ShapeError

_MOVED = tuple(  # what coalition_inputs takes of what torch takes
    map(np.dtype, ("float64", "float32", "float16", "int64", "int32", "uint8", "bool"))
)


class Rows:
    """Rows to explain and background rows as two matrices of one dtype, and the way back.

    Numbers keep their dtype. Columns of mixed or other types (a DataFrame with categories, an
    array of objects, texts, dates or 16-bit numbers) are held as numbers into a pool of the values
    that occur.

    Args:
        op: name for messages.
        x: [e, ...] or, for one row of a table, [m]: a tensor, an array, a DataFrame or a list.
        background: [n, ...] or [m], of the same kind.
        wants: "torch", "numpy" or "same": what the model takes (call.as_function).
        like: a parameter of the model; rows of real numbers get its dtype, all rows its device.
        real: whether whole numbers and truth values get that dtype too.

    Attributes:
        x, background: [e, m] and [n, m].
        columns: m names.
    """

    def __init__(
        self,
        op: str,
        x: Any,
        background: Any,
        wants: str,
        like: Tensor | None = None,
        *,
        real: bool = False,
    ) -> None:
        for name, given in (("x", x), ("background", background)):
            if hasattr(given, "toarray") and hasattr(given, "tocsr"):
                msg = (
                    f"{op}: {name} must be a tensor, an array, a DataFrame or a list, got a sparse "
                    f"matrix. Pass {name}.toarray()."
                )
                raise ArgumentError(msg)
        if hasattr(x, "to_frame") and _is_frame(background):  # a row of a DataFrame is a Series
            x = x.to_frame().T.infer_objects()
        self.frame = _is_frame(x)
        self.columns: tuple[str, ...] = ()
        self._pools: np.ndarray | None = None
        self._typed: list[Any] = []  # the columns of a DataFrame of mixed types
        if self.frame:
            self.columns = tuple(map(str, x.columns))
            self._labels = x.columns
            x, background = self._of_frame(op, x, background, wants)
        self.torch = isinstance(x, Tensor) if wants == "same" else wants == "torch"
        x, background = _no_rounding(_one_row(x), _one_row(background))
        if x.ndim == 0:
            msg = f"{op}: x must be [e, m], or [m] for one row, got a single number."
            raise ShapeError(msg)
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
        if isinstance(x, np.ndarray) and (
            x.dtype.kind not in "fiub" or (x.dtype not in _MOVED and not self.torch)
        ):
            x, background = self._pool(x, background)
        x, background = torch.as_tensor(x), torch.as_tensor(background)
        if like is not None and self._pools is None:
            x = x.to(like.device, like.dtype if real or x.is_floating_point() else x.dtype)
        if x.dtype != background.dtype:
            background = background.to(x.dtype)
        self.x = x.flatten(1)
        self.background = background.to(x.device).flatten(1)
        if not self.columns:
            self.columns = tuple(f"x{j}" for j in range(self.x.shape[1]))

    def _of_frame(self, op: str, x: Any, background: Any, wants: str) -> tuple[Any, Any]:
        """x and background as arrays: of one dtype, or of objects."""
        if _is_frame(background) and list(background.columns) != list(x.columns):
            msg = (
                f"{op}: background has the columns {list(background.columns)}, x has "
                f"{list(x.columns)}. They must be the same, in the same order."
            )
            raise ArgumentError(msg)
        if wants == "torch":
            return _numbers(op, x), _numbers(op, background) if _is_frame(
                background
            ) else background
        frames = [a for a in (x, background) if _is_frame(a)]
        if len(set(x.dtypes)) == 1 and all(_is_number(t) for a in frames for t in a.dtypes):
            return np.asarray(x), np.asarray(background)
        objects = np.asarray(x, dtype=object), np.asarray(background, dtype=object)
        if not _is_frame(background) and objects[1].shape[-1:] == (x.shape[1],):
            background = type(x)(_one_row(objects[1]), columns=x.columns).infer_objects()
        if _is_frame(background):
            self._typed = [_stacked(x.iloc[:, j], background.iloc[:, j]) for j in range(x.shape[1])]
        return objects

    def _pool(self, x: np.ndarray, background: np.ndarray) -> tuple[Tensor, Tensor]:
        e, n = len(x), len(background)
        m = math.prod(self.shape)  # not -1, which no rows do not tell
        both = np.concatenate([x.reshape(e, m), background.reshape(n, m)])
        self._pools = both
        codes = torch.arange(e + n, dtype=torch.int32)[:, None].expand(-1, both.shape[1])
        return codes[:e].contiguous(), codes[e:].contiguous()

    def back(self, rows: Tensor) -> Any:
        """[R, m] as the model wants them: the user's kind, shape and dtype."""
        if self._pools is not None:
            if self._typed:
                return self._frame_of(rows.numpy())
            columns = np.arange(rows.shape[1])
            return self._boxed(self._pools[rows.numpy(), columns])
        rows = rows.reshape(rows.shape[0], *self.shape)
        return rows if self.torch else self._boxed(rows.cpu().numpy())

    def _boxed(self, rows: np.ndarray) -> Any:
        rows = rows.reshape(rows.shape[0], *self.shape)
        if not self.frame:
            return rows
        import pandas as pd

        return pd.DataFrame(rows, columns=self._labels)

    def _frame_of(self, codes: np.ndarray) -> Any:
        """A DataFrame whose columns have the user's types, categories too."""
        import pandas as pd

        taken = {j: held.take(codes[:, j]) for j, held in enumerate(self._typed)}
        return pd.DataFrame(taken).set_axis(self._labels, axis=1)

    def missing(self) -> list[str]:
        """Names of the columns that hold NaN."""
        if self._typed:
            holes = zip(self.columns, self._typed, strict=True)
            return [name for name, held in holes if bool(held.isna().any())]
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


def _is_frame(a: Any) -> bool:
    return hasattr(a, "columns") and hasattr(a, "iloc")


def _is_number(dtype: Any) -> bool:
    return isinstance(dtype, np.dtype) and np.issubdtype(dtype, np.number)


def _numbers(op: str, frame: Any) -> np.ndarray:
    """A DataFrame as a torch module takes it.

    Raises:
        ArgumentError: a column holds other things than numbers and truth values.
    """
    other = [
        f"{name!r} ({dtype})"
        for name, dtype in zip(frame.columns, frame.dtypes, strict=True)
        if not (_is_number(dtype) or dtype == np.dtype(bool))
    ]
    if other:
        msg = (
            f"{op}: f is a torch module, which takes numbers, but these columns hold other things: "
            f"{', '.join(other[:5])}. Encode them, or wrap f in a function of a DataFrame."
        )
        raise ArgumentError(msg)
    return np.asarray(frame, dtype=np.result_type(*frame.dtypes) if frame.shape[1] else None)


def _stacked(x: Any, background: Any) -> Any:
    """A column of x over that of the background, as an array of one type that holds both.

    Categories are those of the first that has any, and after them what else occurs: a value that
    is no category would become missing.
    """
    import pandas as pd

    both = next((a.dtype for a in (x, background) if hasattr(a, "cat")), None)
    if both is not None and x.dtype != background.dtype:
        seen = pd.concat([x.astype(object), background.astype(object)]).dropna().unique()
        more = [value for value in seen if value not in both.categories]
        both = pd.CategoricalDtype([*both.categories, *more], both.ordered)
        x, background = (a.astype(object).astype(both) for a in (x, background))
    return (pd.concat([x, background], ignore_index=True) if len(x) else background).array


def _one_row(a: Any) -> Any:
    """With a row dimension; lists become arrays, arrays of Python numbers float64."""
    if not isinstance(a, Tensor):
        a = np.asarray(a)
        # torch warns of a read-only array, and takes none that runs backwards or in foreign bytes.
        if not a.flags.writeable or min(a.strides, default=0) < 0:
            a = a.copy()
        a = a if a.dtype.isnative else a.astype(a.dtype.newbyteorder("="))
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
