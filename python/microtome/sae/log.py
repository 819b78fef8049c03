"""Where a run's numbers go: log.jsonl, and Weights & Biases or TensorBoard where asked for."""

from __future__ import annotations

import importlib
import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from microtome.errors import ArgumentError, CheckpointError
from microtome.sae import files
from microtome.sae.config import TrainConfig


class Sink(Protocol):
    """One place that takes numbers."""

    def write(self, line: dict[str, Any]) -> None:
        """Take one logged step; `line["step"]` is its number."""
        ...

    def close(self, *, failed: bool) -> None:
        """No more will come; `failed` where an error or an interrupt ended the run."""
        ...


class JsonLines:
    """log.jsonl: one JSON object a line.

    Args:
        path: the file. Lines after step `resumed`, and a last line cut short by a crash, are
            removed first.
        resumed: the step that the run continues from.

    Attributes:
        history: the lines that stayed.
    """

    def __init__(self, path: Path, resumed: int) -> None:
        self.path = path
        self.history: list[dict[str, Any]] = []
        with files.disk_errors(path):
            path.touch()
            kept = 0
            for line, size in _lines(path):
                if line["step"] > resumed:
                    break
                self.history.append(line)
                kept += size
            os.truncate(path, kept)
            self._file = path.open("a", encoding="utf-8")

    def write(self, line: dict[str, Any]) -> None:
        """Append one line."""
        with files.disk_errors(self.path):
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()

    def sync(self) -> None:
        """Flush to the disk."""
        with files.disk_errors(self.path):
            os.fsync(self._file.fileno())

    def close(self, *, failed: bool) -> None:
        """Close the file."""
        del failed
        with files.disk_errors(self.path):
            self._file.close()


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a log.jsonl up to the first that is not whole; none where there is no file."""
    return [line for line, _ in _lines(path)] if path.exists() else []


def _lines(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """The lines of a log and their bytes, up to the first that is not whole."""
    for raw in path.read_bytes().splitlines(keepends=True):
        line = _parse(raw)
        if line is None:
            return
        yield line, len(raw)


def _parse(raw: bytes) -> dict[str, Any] | None:
    """A whole line of the log, or None."""
    try:
        line = json.loads(raw) if raw.endswith(b"\n") else None
    except ValueError:
        return None
    return line if isinstance(line, dict) and isinstance(line.get("step"), int) else None


class _WandB:
    def __init__(self, project: str, config: TrainConfig, out: Path | None) -> None:
        init = _import("wandb", "init", "wandb", project)
        # The same folder continues the same run after a crash.
        name, resume = (None, None) if out is None else (_wandb_id(out), "allow")
        refused = getattr(importlib.import_module("wandb"), "Error", ())
        try:
            self.run = init(project=project, id=name, resume=resume, config=config.to_dict())
        except refused as error:
            msg = f"TrainConfig: Weights & Biases refuses wandb={project!r}: {error} Or set "
            msg += "WANDB_MODE=offline, or leave wandb=None."
            raise ArgumentError(msg) from error

    def write(self, line: dict[str, Any]) -> None:
        self.run.log({k: v for k, v in line.items() if k != "step"}, step=line["step"])

    def close(self, *, failed: bool) -> None:
        # Without an exit code a run that an exception ended would be shown as finished.
        self.run.finish(exit_code=int(failed))


def _wandb_id(out: Path) -> str:
    """The id of a folder's run at Weights & Biases, drawn once and kept in wandb.json.

    An id made of the path would let a run that begins anew there, or at the same path of another
    machine, go on with a run whose steps are higher, and those that come are then ignored.
    """
    path = out / "wandb.json"
    if path.exists():
        kept = files.read_json(path)
        if isinstance(kept, dict) and isinstance(kept.get("id"), str):
            return str(kept["id"])
        msg = f"train: {path} holds no id of a run. Remove it to begin another run there."
        raise CheckpointError(msg)
    drawn = uuid.uuid4().hex[:16]
    files.write_json(path, {"id": drawn})
    return drawn


class _TensorBoard:
    def __init__(self, folder: str, resumed: int) -> None:
        writer = _import("torch.utils.tensorboard", "SummaryWriter", "tensorboard", folder)
        # Steps after the checkpoint, which the run takes again, are hidden by those that come.
        self.writer = writer(folder, purge_step=resumed + 1)

    def write(self, line: dict[str, Any]) -> None:
        for name, value in line.items():
            if name != "step":
                self.writer.add_scalar(name, value, line["step"])

    def close(self, *, failed: bool) -> None:
        del failed
        self.writer.close()


def _import(module: str, name: str, package: str, value: str) -> Any:
    try:
        return getattr(importlib.import_module(module), name)
    # AttributeError: wandb writes into ./wandb, which python imports where the package is absent.
    except (ImportError, AttributeError) as error:
        msg = f"TrainConfig: {package}={value!r} needs the package {package!r}, which cannot be "
        msg += f"imported ({error}). "
        msg += f"Install it (pip install {package}) or leave {package}=None."
        raise ArgumentError(msg) from error


def extra_sinks(config: TrainConfig, out: Path | None, resumed: int) -> list[Sink]:
    """Weights & Biases and TensorBoard, as the config asks.

    Raises:
        ArgumentError: one is asked for and not installed.
        CheckpointError: the wandb.json of `out` cannot be read or written.
    """
    sinks: list[Sink] = []
    if config.wandb is not None:
        sinks.append(_WandB(config.wandb, config, out))
    if config.tensorboard is not None:
        sinks.append(_TensorBoard(config.tensorboard, resumed))
    return sinks
