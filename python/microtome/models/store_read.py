"""The shards of an activation store on disk: opening, checking and gathering rows."""

from __future__ import annotations

import bisect
import hashlib
import json
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from microtome.errors import StoreError
from microtome.models.store_write import DTYPES, FORMAT, MANIFEST, VERSION

# Mapped shards kept open: more than a shuffle window holds, far below the 65,530 mappings that
# Linux allows a process.
_OPEN = 1024


class Shards:
    """The files of one store, mapped into memory on first use.

    A path with a scheme (s3://, memory://) is read through fsspec: each shard is copied to a local
    temporary file when it is first needed.

    Args:
        path: directory or URL.

    Raises:
        StoreError: no finished store is there, or a shard is missing or has another size than when
            it was written.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        self.remote = "://" in self.path
        self.manifest = self._read_manifest()
        self.offsets = [0]
        for shard in self.manifest["shards"]:
            self.offsets.append(self.offsets[-1] + shard["rows"])
            self._check_size(shard)
        if self.offsets[-1] != self.manifest["tokens"]:
            self._fail(
                f"the manifest counts {self.manifest['tokens']} tokens, its shards hold "
                f"{self.offsets[-1]}"
            )
        self.dtype = DTYPES[self.manifest["dtype"]]
        self._open: OrderedDict[int, tuple[Tensor, Tensor]] = OrderedDict()
        self._lock = threading.Lock()

    def verify(self) -> None:
        """Read every shard and compare its sha256; StoreError names the first that differs."""
        for shard in self.manifest["shards"]:
            digest = hashlib.sha256()
            try:
                with self._local(shard["file"]).open("rb") as file:
                    while chunk := file.read(1 << 20):
                        digest.update(chunk)
            except OSError as error:
                self._unreadable(shard["file"], error)
            if digest.hexdigest() != shard["sha256"]:
                self._fail(
                    f"shard {shard['file']} is corrupt: its sha256 is not that of the manifest"
                )

    def slice(self, start: int, stop: int, *, tokens: bool) -> Tensor:
        """Rows start to stop, [m, d] in float32, or their tokens, [m] int64."""
        parts = []
        first = bisect.bisect_right(self.offsets, start) - 1
        for i in range(first, len(self.offsets) - 1):
            low, high = self.offsets[i], self.offsets[i + 1]
            if low >= stop:
                break
            parts.append(self._mapped(i)[tokens][max(start, low) - low : min(stop, high) - low])
        kind = torch.int64 if tokens else torch.float32
        if not parts:
            return torch.empty((0,) if tokens else (0, self.manifest["d"]), dtype=kind)
        joined = torch.cat(parts) if len(parts) > 1 else parts[0].clone()
        return joined.to(kind)

    def gather(self, index: Tensor, *, tokens: bool) -> Tensor:
        """The rows of `index` [m] in its order, [m, d] in float32, or their tokens, [m] int64."""
        ordered, order = index.sort()
        shape = (len(index),) if tokens else (len(index), self.manifest["d"])
        out = torch.empty(shape, dtype=torch.int64 if tokens else torch.float32)
        cuts = torch.searchsorted(ordered, torch.tensor(self.offsets)).tolist()
        for i, low in enumerate(self.offsets[:-1]):
            here = slice(cuts[i], cuts[i + 1])
            if cuts[i] < cuts[i + 1]:
                out[order[here]] = self._mapped(i)[tokens][ordered[here] - low].to(out.dtype)
        return out

    def _mapped(self, i: int) -> tuple[Tensor, Tensor]:
        """(rows, tokens) of one shard as tensors over the mapped file, read as they are used."""
        with self._lock:
            if i in self._open:
                self._open.move_to_end(i)
                return self._open[i]
        from safetensors import SafetensorError, safe_open

        shard = self.manifest["shards"][i]
        try:
            with safe_open(self._local(shard["file"]), framework="pt") as file:
                pair = (file.get_tensor("rows"), file.get_tensor("tokens"))
        except SafetensorError as error:
            self._fail(f"shard {shard['file']} is corrupt ({error})")
        except OSError as error:
            self._unreadable(shard["file"], error)
        expected = (shard["rows"], self.manifest["d"])
        if (
            pair[0].shape != expected
            or pair[0].dtype != self.dtype
            or pair[1].shape != expected[:1]
        ):
            self._fail(
                f"shard {shard['file']} does not hold the {list(expected)} rows of the manifest"
            )
        with self._lock:
            self._open[i] = pair
            if len(self._open) > _OPEN:
                self._open.popitem(last=False)
        return pair

    def _read_manifest(self) -> dict[str, Any]:
        try:
            if self.remote:
                fs, root = _filesystem(self.path)
                text = fs.cat_file(f"{root}/{MANIFEST}").decode()
            else:
                text = (Path(self.path) / MANIFEST).read_text(encoding="utf-8")
        except (FileNotFoundError, NotADirectoryError):
            self._fail(f"there is no finished store: {MANIFEST} is missing")
        except StoreError:
            raise
        except OSError as error:
            self._fail(f"{MANIFEST} cannot be read ({error.strerror or error})")
        except UnicodeDecodeError as error:
            self._fail(f"{MANIFEST} is corrupt ({error})")
        try:
            manifest: dict[str, Any] = json.loads(text)
            kind, version = manifest["format"], manifest["version"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            self._fail(f"{MANIFEST} is corrupt ({type(error).__name__}: {error})")
        if kind != FORMAT or version != VERSION:
            self._fail(
                f"{MANIFEST} has format {kind!r} version {version!r}, this release reads "
                f"{FORMAT!r} {VERSION}"
            )
        wrong = _wrong(manifest)
        if wrong:
            self._fail(f"{MANIFEST} is corrupt ({wrong} missing or wrong)")
        return manifest

    def _check_size(self, shard: dict[str, Any]) -> None:
        try:
            if self.remote:
                fs, root = _filesystem(self.path)
                size = fs.size(f"{root}/{shard['file']}")
            else:
                size = (Path(self.path) / shard["file"]).stat().st_size
        except OSError as error:
            self._unreadable(shard["file"], error)
        if size != shard["bytes"]:
            self._fail(
                f"shard {shard['file']} has {size} bytes where {shard['bytes']} were written"
            )

    def _local(self, file: str) -> Path:
        """A local path of one file, fetched if it is remote."""
        if not self.remote:
            return Path(self.path) / file
        fsspec = _fsspec(self.path)
        return Path(fsspec.open_local(f"simplecache::{self.path}/{file}"))

    def _unreadable(self, file: str, error: OSError) -> Any:
        gone = isinstance(error, FileNotFoundError)
        self._fail(f"shard {file} {'is missing' if gone else f'cannot be read ({error})'}")

    def _fail(self, why: str) -> Any:
        msg = (
            f"ActivationStore: {self.path}: {why}. Write the store again with capture_to_store, "
            "or restore the file."
        )
        raise StoreError(msg)


def _wrong(manifest: dict[str, Any]) -> str:
    """The entries of a manifest that are missing or not what they must be, "" for none."""
    whole = ("d", "context_length", "tokens")
    right = {key: type(manifest.get(key)) is int and manifest[key] > 0 for key in whole}
    right |= {key: isinstance(manifest.get(key), str) for key in ("model", "site", "dtype")}
    right["dtype"] = right["dtype"] and manifest["dtype"] in DTYPES
    shards = manifest.get("shards")
    kinds = {"file": str, "rows": int, "bytes": int, "sha256": str}
    right["shards"] = isinstance(shards, list) and all(
        isinstance(shard, dict) and all(type(shard.get(k)) is kind for k, kind in kinds.items())
        for shard in shards
    )
    if right["tokens"] and right["context_length"]:
        right["context_length"] = manifest["tokens"] % manifest["context_length"] == 0
    return ", ".join(key for key, fits in right.items() if not fits)


def _filesystem(url: str) -> tuple[Any, str]:
    core = _fsspec(url).core
    try:
        fs, root = core.url_to_fs(url)
    except (ValueError, ImportError) as error:  # an unknown scheme; one whose package is absent
        msg = f"ActivationStore: fsspec cannot open {url} ({error}). Use a scheme that it knows, "
        msg += "or install the package it names."
        raise StoreError(msg) from error
    return fs, root


def _fsspec(url: str) -> Any:
    try:
        import fsspec
    except ImportError as error:
        msg = (
            f"ActivationStore: {url} is remote, which needs fsspec. Run: pip install fsspec (and "
            "s3fs for s3://)."
        )
        raise StoreError(msg) from error
    return fsspec
