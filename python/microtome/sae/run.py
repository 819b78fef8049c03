"""The folder of a run: settings, log, checkpoints, the trained SAE, metrics."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from microtome import __version__
from microtome.errors import CheckpointError
from microtome.sae import checkpoint, files, sharded_checkpoint
from microtome.sae.config import TrainConfig
from microtome.sae.log import JsonLines, Sink, extra_sinks, read
from microtome.sae.loss import Losses
from microtome.sae.ranks import ALONE
from microtome.sae.sae import SAE
from microtome.sae.sharded import ShardedSAE
from microtome.sae.source import ActivationSource


class Stepper(Protocol):
    """`FusedStep`, `UnfusedStep` or `ShardedStep`."""

    since_fired: Tensor
    settings: dict[str, str]

    def take(self, x: Tensor, factor: float, step: int) -> Losses:
        """One training step."""
        ...

    def state(self) -> tuple[dict[str, Tensor], Any]:
        """What a checkpoint must hold."""
        ...

    def load(self, tensors: dict[str, Tensor], described: Any) -> None:
        """Take over a checkpoint."""
        ...


class Run:
    """A run in memory, and on disk when it has a folder.

    Of a sharded SAE every rank has a Run; the first one writes all but the shards of a checkpoint.

    Args:
        out: the folder, or None. A folder that holds a run with these settings is continued.
        sae: trained in place.
        stepper: what trains it.
        source: the activations.
        config: the settings.

    Attributes:
        step: steps taken so far; above zero after a resume.
        history: the logged lines.

    Raises:
        CheckpointError: the folder holds a run with other settings, or cannot be read or written.
    """

    def __init__(
        self,
        out: Path | None,
        sae: SAE | ShardedSAE,
        stepper: Stepper,
        source: ActivationSource,
        config: TrainConfig,
    ) -> None:
        self.out, self.sae, self.stepper, self.config = out, sae, stepper, config
        self.ranks = sae.ranks if isinstance(sae, ShardedSAE) else ALONE
        self.step, self.saved = 0, -1
        self.history: list[dict[str, Any]] = []
        self._log: JsonLines | None = None
        self._sinks: list[Sink] = []
        if out is not None:
            self._open(out, source)
        try:
            with self.ranks.together():
                if self.ranks.first:
                    self._sinks = extra_sinks(config, out, self.step)
        except BaseException:
            self.close(failed=True)
            raise
        if self._log is not None:
            self._sinks.insert(0, self._log)

    def _open(self, out: Path, source: ActivationSource) -> None:
        """Check that the folder is one of this run, and go on from where it is."""
        with self.ranks.together():
            if self.ranks.first:
                _check_same(out, _identity(self.sae, self.stepper, source, self.config))
        with self.ranks.together():
            if not (out / "config.json").exists():
                msg = f"train: {out} is not there for rank {self.ranks.number}: all ranks must see "
                msg += "the same folder. Choose an out= on a file system that they share."
                raise CheckpointError(msg)
        checkpoints = out / "checkpoints"
        if isinstance(self.sae, ShardedSAE):
            found = checkpoint.newest_of_ranks(checkpoints, self.sae)
        else:
            found = checkpoint.newest(checkpoints)
        if found is not None:
            self._take_over(found)
        with self.ranks.together():
            if self.ranks.first:
                self._log = JsonLines(out / "log.jsonl", self.step)
                self.history = list(self._log.history)
        if not self.ranks.first:
            with self.ranks.hold():
                self.history = read(out / "log.jsonl")

    def _take_over(self, found: checkpoint.Checkpoint) -> None:
        with torch.no_grad():
            tensors = found.saved.tensors
            for parameter, tensor in zip(self.sae.parameters_in_order, tensors, strict=True):
                parameter.copy_(tensor)
        self.stepper.load(found.tensors, found.described)
        self.step = self.saved = found.step

    def log(self, line: dict[str, Any]) -> None:
        """Record one line everywhere."""
        self.history.append(line)
        with self.ranks.hold():
            for sink in self._sinks:
                sink.write(line)

    def checkpoint(self) -> None:
        """Write a checkpoint of this step, unless there is one or nothing has been trained."""
        if self.out is None or self.step in (0, self.saved):
            return
        if self._log is not None:
            with self.ranks.hold():
                self._log.sync()
        tensors, described = self.stepper.state()
        folder, keep = self.out / "checkpoints", self.config.keep_checkpoints
        if isinstance(self.sae, ShardedSAE):
            sharded_checkpoint.save(folder, self.step, self.sae, tensors, described, keep)
        else:
            checkpoint.save(folder, self.step, self.sae, tensors, described, keep)
        self.saved = self.step

    def finish(self, metrics: dict[str, Any], metadata: dict[str, Any]) -> None:
        """Write the trained SAE and the metrics."""
        if self.out is not None:
            self.sae.save_pretrained(self.out / "sae", metadata)
        with self.ranks.together():
            if self.out is not None and self.ranks.first:
                files.write_json(self.out / "metrics.json", metrics)

    def close(self, *, failed: bool) -> None:
        """Close the log and the loggers; `failed` where training did not come to its end."""
        for sink in self._sinks or [s for s in (self._log,) if s is not None]:
            sink.close(failed=failed)


def _identity(
    sae: SAE | ShardedSAE, stepper: Stepper, source: ActivationSource, config: TrainConfig
) -> dict[str, Any]:
    """What must be the same for a run to be continued, and the versions, which need not be."""
    n = len(source)
    sample = source.rows(torch.linspace(0, n - 1, min(n, 16)).long()).cpu().contiguous()
    digest = hashlib.sha256(sample.numpy().tobytes()).hexdigest()
    shape = {"d_model": sae.d_model, "n_features": sae.n_features, "k": sae.activation.k}
    return {
        "config": config.to_dict(),
        "sae": {**shape, "center": sae.center},
        "data": {"rows": n, "d": source.d, "sample_sha256": digest},
        "versions": {"microtome": __version__, "torch": str(torch.__version__)},
        "computed": {**config.what_is_computed(), **stepper.settings},
    }


def _check_same(out: Path, mine: dict[str, Any]) -> None:
    """Write config.json, or compare with the one that is there."""
    path = out / "config.json"
    if path.exists():
        theirs = files.read_json(path)
        here = json.loads(json.dumps(mine))
        differ = []
        for part in ("computed", "sae", "data"):
            was = theirs.get(part) if isinstance(theirs, dict) else None
            if not isinstance(was, dict):
                msg = f"train: {path} is not the config.json of a run; choose another out=."
                raise CheckpointError(msg)
            names = sorted({*was, *here[part]})
            differ += [
                f"{name} was {was.get(name)!r}, is {here[part].get(name)!r}"
                for name in names
                if was.get(name) != here[part].get(name)
            ]
        if differ:
            msg = f"train: {out} holds a run with other settings: {'; '.join(differ)}. Choose "
            msg += "another out=, or move the folder away to start again."
            raise CheckpointError(msg)
    files.make_folder(out)
    files.write_json(path, mine)
