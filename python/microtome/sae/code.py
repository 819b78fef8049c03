"""A sparse code: which features are active in each row, and how strongly."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from microtome import _check
from microtome._csr import rows_of
from microtome.errors import ArgumentError, ShapeError


@dataclass(frozen=True, eq=False)
class SparseCode:
    """The active features of n rows.

    Attributes:
        values: [n, k] activations, or [entries] when `offsets` is given. Differentiable.
        indices: int32, same shape: the feature of each value, in [0, n_features).
        n_features: f, the width of the dense code.
        offsets: None when every row has k entries; else [n + 1] int64: row i is entries offsets[i]
            to offsets[i + 1]. Entries from offsets[n] on, which `threshold_encode` leaves where it
            was given a capacity, are unused and 0.
        leading: shape of the rows, such as (batch, position); their product is n. Default (n,).

    Raises:
        ShapeError, DtypeError, DeviceError: the letters, dtypes or devices do not agree, or leading
            does not hold n rows.
        ArgumentError: on a CPU, offsets that are no row starts, or an int64 index outside
            [0, n_features). `to_dense` and `to_torch_csr` look at int32 ones.

    A value of zero is a feature that was selected and then cut by the ReLU; it counts as inactive.
    Indexing goes over the leading shape as for a tensor: `code[3]`, `code[2:5]`, `code[mask]`,
    `code[0, 7]`.

    Example:
        >>> import torch
        >>> values = torch.tensor([[2.0, 0.5], [1.0, 0.0]])
        >>> code = SparseCode(values, torch.tensor([[3, 0], [1, 2]]), 4)
        >>> code.to_dense().tolist(), code.l0, len(code)
        ([[0.5, 0.0, 0.0, 2.0], [0.0, 1.0, 0.0, 0.0]], 1.5, 2)
    """

    values: Tensor
    indices: Tensor
    n_features: int
    offsets: Tensor | None = None
    leading: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        op, dims = "SparseCode", 2 if self.offsets is None else 1
        letters = "n k" if dims == 2 else "entries"
        _check.shapes(op, values=(self.values, letters), indices=(self.indices, letters))
        _check.dtype(op, _check.INDICES, indices=self.indices, offsets=self.offsets)
        _check.device(op, values=self.values, indices=self.indices, offsets=self.offsets)
        _check.between(op, "n_features", self.n_features, 1, 2**31 - 1)
        if self.indices.dtype == torch.int64 and _check.readable(self.indices):
            _check.index_range(op, self.indices, self.n_features, "n_features")
        self._check_offsets()
        object.__setattr__(self, "indices", self.indices.int())
        n = self.values.shape[0] if self.offsets is None else len(self.offsets) - 1
        if self.leading is None:
            object.__setattr__(self, "leading", (n,))
        elif math.prod(self.leading) != n:
            msg = f"SparseCode: leading shape {self.leading} must hold n={n} rows, holds "
            msg += f"{math.prod(self.leading)}."
            raise ShapeError(msg)

    def _check_offsets(self) -> None:
        offsets, entries = self.offsets, len(self.values)
        if offsets is None:
            return
        _check.shapes("SparseCode", offsets=(offsets, "rows+1"))
        wrong = len(offsets) == 0
        if not wrong and _check.readable(offsets):
            falls = bool((offsets.diff() < 0).any())
            wrong = falls or int(offsets[0]) != 0 or int(offsets[-1]) > entries
        if wrong:
            msg = "SparseCode: offsets must be [n + 1] row starts that begin with 0, do not fall "
            msg += f"and end at {entries} entries or before, got {offsets.tolist()!s:.60}."
            raise ArgumentError(msg)

    @property
    def n_rows(self) -> int:
        """How many rows, the leading dimensions flattened."""
        return math.prod(self.leading or ())

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense code: the leading shape, then f."""
        return (*(self.leading or ()), self.n_features)

    @property
    def l0(self) -> float:
        """Mean number of values above zero in a row; 0 when there are no rows."""
        return int((self.values > 0).sum()) / self.n_rows if self.n_rows else 0.0

    def __len__(self) -> int:
        if not self.leading:
            msg = "len() of a SparseCode of a single vector"
            raise TypeError(msg)
        return self.leading[0]

    def __getitem__(self, item: Any) -> SparseCode:
        numbers = torch.arange(self.n_rows, device=self.values.device).reshape(self.leading)
        if isinstance(item, list):
            item = torch.as_tensor(item, device=numbers.device)
        picked = numbers[item]
        rows = picked.flatten()
        leading = tuple(picked.shape)
        if self.offsets is None:
            return SparseCode(self.values[rows], self.indices[rows], self.n_features, None, leading)
        starts, lengths = self.offsets[rows], self.offsets[rows + 1] - self.offsets[rows]
        offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        within = torch.arange(int(offsets[-1]), device=rows.device)
        entries = within + (starts - offsets[:-1]).repeat_interleave(lengths)
        return SparseCode(
            self.values[entries], self.indices[entries], self.n_features, offsets, leading
        )

    def _rows(self) -> Tensor:
        """The row of every entry, [entries]; of unused ones the last, which a 0 does not change."""
        if _check.readable(self.indices):
            _check.index_range("SparseCode", self.indices, self.n_features, "n_features")
        device = self.values.device
        if self.offsets is None:
            return torch.arange(self.n_rows, device=device).repeat_interleave(self.values.shape[1])
        return rows_of(self.offsets, self.values.shape[0])

    def to_dense(self) -> Tensor:
        """The code as a tensor [*leading, f], zero where nothing is active; repeats add up."""
        dense = self.values.new_zeros(self.n_rows, self.n_features)
        places = (self._rows(), self.indices.flatten().long())
        return dense.index_put(places, self.values.flatten(), accumulate=True).reshape(self.shape)

    def to_torch_csr(self) -> Tensor:
        """The code as a torch CSR matrix [n, f], columns ascending in each row, zeros dropped.

        No feature may stand twice in a row.
        """
        rows, columns, values = self._rows(), self.indices.flatten().long(), self.values.flatten()
        kept = (values != 0).nonzero().flatten()
        order = kept[torch.argsort(rows[kept] * self.n_features + columns[kept], stable=True)]
        counts = torch.bincount(rows[order], minlength=self.n_rows)
        crow = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        with warnings.catch_warnings():  # torch says once a process that CSR tensors are in beta
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support")
            return torch.sparse_csr_tensor(
                crow,
                columns[order],
                values[order],
                size=(self.n_rows, self.n_features),
                check_invariants=True,
            )

    def padded(self) -> tuple[Tensor, Tensor]:
        """Values and indices as [n, k], k being the longest row; shorter rows end in zeros."""
        if self.offsets is None:
            return self.values, self.indices
        lengths = self.offsets.diff()
        k = max(1, int(lengths.max())) if len(lengths) else 1
        used = int(self.offsets[-1])
        rows = rows_of(self.offsets, used)
        slots = torch.arange(used, device=rows.device) - self.offsets[rows]
        values, indices = self.values[:used], self.indices[:used]
        return (
            values.new_zeros(self.n_rows, k).index_put((rows, slots), values),
            indices.new_zeros(self.n_rows, k).index_put((rows, slots), indices),
        )

    def to(self, device: torch.device | str) -> SparseCode:
        """The same code on another device."""
        if isinstance(device, torch.dtype):
            msg = "SparseCode.to: takes a device, got a dtype; cast .values instead."
            raise ArgumentError(msg)
        offsets = None if self.offsets is None else self.offsets.to(device)
        values, indices = self.values.to(device), self.indices.to(device)
        return SparseCode(values, indices, self.n_features, offsets, self.leading)
