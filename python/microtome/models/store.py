"""ActivationStore: activations on disk, read by row, by slice, or as shuffled batches."""

from __future__ import annotations

import functools
import itertools
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from microtome import _check
from microtome.errors import ArgumentError, DtypeError, ShapeError, SiteError
from microtome.models.batches import Prefetched, RowOrder
from microtome.models.capture import Recorder, batch_slices, check_tokens
from microtome.models.sites import resolve
from microtome.models.store_read import Shards
from microtome.models.store_write import StoreWriter, check_free


class StoreView:
    """A run of whole contexts of a store. Row r belongs to context r // context_length, at position
    r % context_length.

    Attributes:
        manifest: of the whole store: model, site, dtype, d, context_length, tokens, shards, extra.
        d: row width.
        context_length: tokens in one context.
    """

    def __init__(self, shards: Shards, start: int, stop: int) -> None:
        self._shards, self._start, self._stop = shards, start, stop
        self.manifest: dict[str, Any] = shards.manifest
        self.d: int = shards.manifest["d"]
        self.context_length: int = shards.manifest["context_length"]

    def __len__(self) -> int:
        return self._stop - self._start

    def __repr__(self) -> str:
        m = self.manifest
        return (
            f"{type(self).__name__}({len(self):,} rows of {self.d}, {m['site']} of {m['model']}, "
            f"{m['dtype']})"
        )

    def rows(self, index: Tensor | slice) -> Tensor:
        """Read activations.

        Args:
            index: [m] int64 row numbers in any order, negative ones from the end; or a slice.

        Returns:
            [m, d] float32, the caller's own.

        Raises:
            ArgumentError: a row number is out of range.
            DtypeError, ShapeError: index is no [m] integer tensor.
        """
        return self._read(index, tokens=False)

    def tokens(self, index: Tensor | slice) -> Tensor:
        """Read the tokens at some rows: [m] int64; arguments and errors as in `rows`."""
        return self._read(index, tokens=True)

    def split(self, held_out_fraction: float) -> tuple[StoreView, StoreView]:
        """Cut off the last contexts.

        Args:
            held_out_fraction: between 0 and 1; rounded to whole contexts, at least one on either
                side.

        Returns:
            (train, held out), which read as the store does.

        Raises:
            ArgumentError: the fraction is not between 0 and 1, or there are fewer than two
                contexts.
        """
        contexts = len(self) // self.context_length
        if not 0.0 < held_out_fraction < 1.0 or contexts < 2:
            msg = (
                "ActivationStore.split: held_out_fraction must lie between 0 and 1 over at least "
                f"two contexts, got {held_out_fraction} over {contexts}."
            )
            raise ArgumentError(msg)
        held = min(max(1, round(held_out_fraction * contexts)), contexts - 1)
        cut = self._stop - held * self.context_length
        return StoreView(self._shards, self._start, cut), StoreView(self._shards, cut, self._stop)

    def batches(
        self,
        batch_size: int,
        *,
        seed: int,
        start: int = 0,
        prefetch: int = 2,
        window_rows: int = 1 << 20,
    ) -> Prefetched:
        """Shuffled batches without end. Batch i is a pure function of (seed, i): `start=i` resumes.

        Each epoch visits every row once. Up to `window_rows` rows, that is the whole view where it
        is no larger, are permuted together: shards in random order fill one window after the other.
        What an epoch leaves over after its last whole batch begins the first batch of the next.

        Args:
            batch_size: rows in one batch; may exceed the store.
            seed: of the order.
            start: number of the first batch.
            prefetch: batches read ahead by a thread, which ends with the iterator (`.close()`); 0
                for no thread.
            window_rows: rows shuffled together, at least one shard.

        Returns:
            Iterator of [batch_size, d] float32.

        Raises:
            ArgumentError: an option is out of its range. What goes wrong in the thread is raised by
                `next`.
        """
        op = "ActivationStore.batches"
        _check.between(op, "batch_size", batch_size, 1, 1 << 31)
        _check.between(op, "start", start, 0, 1 << 62)
        _check.between(op, "prefetch", prefetch, 0, 1 << 10)
        _check.between(op, "window_rows", window_rows, 1, 1 << 31)
        offsets = self._shards.offsets
        blocks = [
            (max(a, self._start), min(b, self._stop))
            for a, b in itertools.pairwise(offsets)
            if a < self._stop and b > self._start
        ]
        order = RowOrder(blocks, seed, window_rows)
        return Prefetched(
            functools.partial(_batch, self._shards, order, batch_size), start, prefetch
        )

    def _read(self, index: Tensor | slice, *, tokens: bool) -> Tensor:
        op = f"ActivationStore.{'tokens' if tokens else 'rows'}"
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step == 1:
                return self._shards.slice(
                    self._start + start, self._start + max(start, stop), tokens=tokens
                )
            index = (
                torch.arange(start, max(start, stop), step)
                if step > 0
                else torch.tensor(range(start, stop, step))
            )
        if not isinstance(index, Tensor):
            msg = f"{op}: index must be an integer tensor or a slice, got {type(index).__name__}."
            raise DtypeError(msg)
        _check.shapes(op, index=(index, "m"))
        _check.dtype(op, _check.INDICES, index=index)
        index = index.long().cpu()
        if index.numel() and not -len(self) <= int(index.min()) <= int(index.max()) < len(self):
            bad = int(index.min()) if int(index.min()) < -len(self) else int(index.max())
            msg = f"{op}: index must lie in [-{len(self)}, rows={len(self)}), got {bad}."
            raise ArgumentError(msg)
        index = torch.where(index < 0, index + len(self), index)
        return self._shards.gather(index + self._start, tokens=tokens)


class ActivationStore(StoreView):
    """Activations of one site on disk: safetensors shards of rows and tokens, and a manifest.

    Reading maps the files into memory, so that opening costs nothing and only what is used is read.
    No pickle.

    Args:
        path: a directory that `capture_to_store` or `ActivationStore.write` finished, or a URL
            (s3://, memory://) read through fsspec.
        verify: also compare the sha256 of every shard, which reads everything once. Sizes are
            always compared.

    Raises:
        StoreError: no finished store is there, or a shard is missing, truncated or corrupt; the
            message names it.
    """

    def __init__(self, path: str | Path, verify: bool = False) -> None:
        shards = Shards(path)
        super().__init__(shards, 0, shards.offsets[-1])
        self.path = str(path)
        if verify:
            self.verify()

    def verify(self) -> None:
        """Compare the sha256 of every shard; StoreError names the first that differs."""
        self._shards.verify()

    write = StoreWriter


def _batch(shards: Shards, order: RowOrder, size: int, i: int) -> Tensor:
    return shards.gather(order.batch(i, size), tokens=False)


def capture_to_store(
    model: nn.Module,
    tokens: Tensor,
    site: str,
    path: str | Path,
    *,
    model_name: str,
    dtype: torch.dtype = torch.float32,
    batch_size: int = 8,
    progress: bool = True,
) -> ActivationStore:
    """Run a model over tokens and write the activations at one site to a store, batch by batch.

    Args:
        model: as in `capture`.
        tokens: [b, t] int64; each row is one context.
        site: one canonical name or module path whose activation is [b, t, ...]; trailing axes are
            joined (z becomes rows of h * d_head).
        path: a new directory.
        model_name: for the manifest.
        dtype: torch.float32 or torch.bfloat16, as stored.
        batch_size: contexts in one forward.
        progress: show a progress bar, counted in contexts.

    Returns:
        The store, opened. Row r is position r % t of context r // t.

    Raises:
        SiteError, ShapeError, DtypeError, ArgumentError: as `capture`.
        NonFiniteError: the model gave NaN or infinity.
        StoreError: a store is there already, or the disk refused; earlier data is as it was.

    Needs memory for one batch and one shard.
    """
    op = "capture_to_store"
    found = resolve(op, model, [site])
    if found[0].kind == "pattern":  # with as many heads as tokens its shape would not give it away
        msg = (
            f"{op}: site {site!r} is a pattern [h, t, t], not one activation for each token. Name "
            "another site, or keep patterns with `capture`."
        )
        raise SiteError(msg)
    check_tokens(op, model, tokens, None, batch_size)
    _check.shapes(op, tokens=(tokens, "b t"))
    _check.dtype(op, (torch.int64,), tokens=tokens)
    check_free(path)
    with Recorder(op, model, found, stop_early=True) as recorder, ExitStack() as stack:
        writer: StoreWriter | None = None
        for part in batch_slices(len(tokens), batch_size, op if progress else None, "context"):
            rows = _rows(op, site, recorder.run(tokens[part], None)[site], tokens[part])
            if writer is None:
                writer = ActivationStore.write(
                    path,
                    site=site,
                    model_name=model_name,
                    d=rows.shape[1],
                    context_length=tokens.shape[1],
                    dtype=dtype,
                )
                stack.enter_context(writer)
            writer.add(rows, tokens[part].flatten())
    return ActivationStore(path)


def _rows(op: str, site: str, activation: Tensor, tokens: Tensor) -> Tensor:
    """[b, t, ...] as [b * t, d] on the CPU, finite."""
    if activation.dim() < 3 or activation.shape[:2] != tokens.shape:
        msg = (
            f"{op}: site {site!r} has shape {list(activation.shape)}, must be [b, t, d] with [b, "
            f"t] = {list(tokens.shape)}. Name a site with one activation for each token."
        )
        raise ShapeError(msg)
    rows = activation.flatten(2).flatten(0, 1).cpu()
    _check.finite_rows(op, "activations", rows)
    return rows
