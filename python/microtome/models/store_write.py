"""Writing an activation store: shards under temporary names, the manifest last."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from microtome import _check
from microtome.errors import ArgumentError, ShapeError, StoreError

FORMAT = "microtome-activations"
VERSION = 1
MANIFEST = "manifest.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_OURS = re.compile(r"(shard_\d{5,}\.safetensors|manifest\.json)(\.tmp)?")


class StoreWriter:
    """Writes one store; a context: leaving it finishes the store, an exception withdraws it.

    Until the manifest is there, which is written last, the directory is no store, whatever it
    holds.

    Args:
        path: directory; made if absent. It must be empty, or hold what an interrupted write left.
        site: where the rows come from, for the manifest.
        model_name: which model they come from, for the manifest.
        d: row width.
        context_length: tokens in one context; the rows must fill whole contexts.
        dtype: torch.float32 or torch.bfloat16, as stored.
        shard_rows: rows in one shard.
        extra: JSON values to keep in the manifest.

    Raises:
        StoreError: a store is there already, the directory holds other files, or it cannot be
            written.
        DtypeError, ArgumentError: an option is out of its range.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        site: str,
        model_name: str,
        d: int,
        context_length: int,
        dtype: torch.dtype = torch.float32,
        shard_rows: int = 16384,
        extra: dict[str, Any] | None = None,
    ) -> None:
        op = "ActivationStore.write"
        for name, value in (
            ("d", d),
            ("context_length", context_length),
            ("shard_rows", shard_rows),
        ):
            _check.between(op, name, value, 1, 1 << 31)
        _check.dtype(op, tuple(DTYPES.values()), dtype=torch.empty(0, dtype=dtype))
        self.path = check_free(path)
        self.head = {"format": FORMAT, "version": VERSION, "model": model_name, "site": site}
        self.dtype = str(dtype).removeprefix("torch.")
        self.d, self.context_length, self.extra = d, context_length, extra or {}
        try:
            json.dumps(self.extra)
        except (TypeError, ValueError) as error:
            msg = f"{op}: extra must hold JSON values: {error}."
            raise ArgumentError(msg) from None
        self.rows = torch.empty(shard_rows, d, dtype=dtype)
        self.tokens = torch.empty(shard_rows, dtype=torch.int64)
        self.filled = 0
        self.shards: list[dict[str, Any]] = []
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for file in list(self.path.iterdir()):
                file.unlink()
        except OSError as error:
            raise _failed(self.path, error) from error

    def add(self, rows: Tensor, tokens: Tensor) -> None:
        """Append rows in text order; a full shard goes to disk at once.

        Args:
            rows: [m, d] floats; cast to the store's dtype.
            tokens: [m] int64 or int32, the token at each row.

        Raises:
            ShapeError, DtypeError: they do not fit.
            StoreError: the disk refused.
        """
        op = "ActivationStore.add"
        _check.shapes(op, rows=(rows, "m d"), tokens=(tokens, "m"))
        _check.dtype(op, _check.FLOATS, rows=rows)
        _check.dtype(op, _check.INDICES, tokens=tokens)
        if rows.shape[1] != self.d:
            msg = f"{op}: rows must be [m, d={self.d}], got shape {list(rows.shape)}."
            raise ShapeError(msg)
        start = 0
        while start < len(rows):
            take = min(len(rows) - start, len(self.rows) - self.filled)
            here, there = slice(self.filled, self.filled + take), slice(start, start + take)
            self.rows[here], self.tokens[here] = rows[there].detach(), tokens[there]
            self.filled, start = self.filled + take, start + take
            if self.filled == len(self.rows):
                self._flush()

    def close(self) -> None:
        """Write the last shard and the manifest; from here on the directory is a store."""
        total = sum(shard["rows"] for shard in self.shards) + self.filled
        if total == 0 or total % self.context_length:
            msg = (
                f"ActivationStore.write: {total} rows are no whole number of contexts of "
                f"{self.context_length} tokens. Add full contexts, at least one."
            )
            raise ArgumentError(msg)
        if self.filled:
            self._flush()
        manifest = {
            **self.head,
            "dtype": self.dtype,
            "d": self.d,
            "context_length": self.context_length,
            "tokens": total,
            "shards": self.shards,
            "extra": self.extra,
        }
        self._put(MANIFEST, json.dumps(manifest, indent=1).encode())

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.close()
        except BaseException:
            self._withdraw()
            raise
        if kind is not None:
            self._withdraw()

    def _flush(self) -> None:
        """Write the rows gathered so far as one shard."""
        from safetensors.torch import save

        data = save({"rows": self.rows[: self.filled], "tokens": self.tokens[: self.filled]})
        file = f"shard_{len(self.shards):05d}.safetensors"
        self._put(file, data)
        digest = hashlib.sha256(data).hexdigest()
        self.shards.append(
            {"file": file, "rows": self.filled, "bytes": len(data), "sha256": digest}
        )
        self.filled = 0

    def _put(self, name: str, data: bytes) -> None:
        try:
            write_atomically(self.path / name, data)
        except OSError as error:
            raise _failed(self.path, error) from error

    def _withdraw(self) -> None:
        """Delete what this writer wrote, so that a failed write gives its disk space back."""
        for name in [MANIFEST, *(shard["file"] for shard in self.shards)]:
            (self.path / name).unlink(missing_ok=True)


def write_atomically(path: Path, data: bytes) -> None:
    """Put a whole file at `path` or nothing: write beside it, flush to the disk, then rename.

    After a power cut the name holds the old file, the new one, or none. OSError passes through with
    the temporary file removed.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if hasattr(os, "O_DIRECTORY"):
        folder = os.open(path.parent, os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def check_free(path: str | Path) -> Path:
    """The path as a local directory a new store may be written to, or StoreError."""
    if "://" in str(path):
        msg = (
            f"ActivationStore.write: {path} is remote; stores are read from there, not written. "
            "Write a local path."
        )
        raise StoreError(msg)
    place = Path(path)
    if (place / MANIFEST).exists():
        msg = (
            f"ActivationStore.write: {place} is a finished store already. Delete it or choose "
            "another path."
        )
        raise StoreError(msg)
    if place.exists() and not place.is_dir():
        msg = f"ActivationStore.write: {place} is a file. Choose a directory."
        raise StoreError(msg)
    foreign = (
        [f.name for f in place.iterdir() if not _OURS.fullmatch(f.name)] if place.exists() else []
    )
    if foreign:
        msg = (
            f"ActivationStore.write: {place} holds other files ({', '.join(sorted(foreign)[:3])}). "
            "Choose an empty directory."
        )
        raise StoreError(msg)
    return place


def _failed(path: Path, error: OSError) -> StoreError:
    return StoreError(
        f"ActivationStore.write: {path} could not be written ({error.strerror or error}). What "
        "was written of this store is removed; other data is as it was. Free some space or "
        "permission, or choose another path, and write again."
    )
