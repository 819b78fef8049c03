"""Files either whole or absent: written aside, flushed to the disk, then renamed. No pickle."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from microtome.errors import CheckpointError

_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn the system's refusal to write into a CheckpointError that says what to do."""
    try:
        yield
    except CheckpointError:
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            msg = f"cannot write {path}: the disk is full ({error.strerror}). Earlier files are "
            msg += "intact; free some space and run again."
        else:
            msg = f"cannot write {path}: {error.strerror or error}. Earlier files are intact."
        raise CheckpointError(msg) from error


def make_folder(path: Path) -> None:
    """Make a folder and its parents where absent."""
    with disk_errors(path):
        path.mkdir(parents=True, exist_ok=True)


def sync_folder(path: Path) -> None:
    """Flush a folder's list of names to the disk, except on Windows, which cannot open folders."""
    if os.name == "nt":
        return
    with disk_errors(path):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


class _Hashed:
    """A file that keeps the sha256 of what goes through it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest = file, hashlib.sha256()

    def write(self, data: bytes | memoryview) -> None:
        self.file.write(data)
        self.digest.update(data)


def _open(path: Path) -> BinaryIO:
    return path.open("wb")


@contextmanager
def replacing(path: Path) -> Iterator[_Hashed]:
    """Write a file aside, then put it in the place of `path`; an error leaves `path` as it was."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    with disk_errors(path):
        try:
            with _open(aside) as file:
                hashed = _Hashed(file)
                yield hashed
                file.flush()
                os.fsync(file.fileno())
            aside.replace(path)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise
    sync_folder(path.parent)


def write_json(path: Path, value: Any) -> str:
    """Write JSON; returns the sha256 of the file."""
    with replacing(path) as file:
        file.write((json.dumps(value, indent=2) + "\n").encode())
    return file.digest.hexdigest()


def write_safetensors(path: Path, tensors: dict[str, Tensor]) -> str:
    """Write tensors without a second copy of them in memory; returns the sha256 of the file.

    The format: 8 bytes of header length, a JSON header of dtypes, shapes and offsets, then the
    bytes. Wide dtypes go first, so that every tensor is aligned to its own size.
    """
    names = sorted(tensors, key=lambda n: (-tensors[n].element_size(), n))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in names:
        tensor = tensors[name]
        end = offset + tensor.numel() * tensor.element_size()
        shape = list(tensor.shape)
        code = _CODES[tensor.dtype]
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            flat = tensors[name].detach().cpu().contiguous().flatten()
            if flat.numel():
                file.write(memoryview(flat.view(torch.uint8).numpy()))
    return file.digest.hexdigest()


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        CheckpointError: missing, truncated or not JSON.
    """
    try:
        return json.loads(path.read_text())
    except OSError as error:
        msg = f"cannot read {path}: {error.strerror or error}."
        raise CheckpointError(msg) from error
    except (ValueError, RecursionError) as error:
        msg = f"cannot read {path}: it is not JSON ({error}); the file is truncated or corrupt."
        raise CheckpointError(msg) from error


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a file.

    Raises:
        CheckpointError: missing, truncated or not safetensors.
    """
    if not path.is_file():
        msg = f"cannot read {path}: no such file."
        raise CheckpointError(msg)
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        msg = f"cannot read {path}: it is not a whole safetensors file ({error})."
        raise CheckpointError(msg) from error


def sha256(path: Path) -> str:
    """The sha256 of a file, read in pieces."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
    except OSError as error:
        msg = f"cannot read {path}: {error.strerror or error}."
        raise CheckpointError(msg) from error
    return digest.hexdigest()
