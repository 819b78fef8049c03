"""Finished cells of an interrupted sweep, in a file of their own."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from microtome.errors import StoreError

NAMES = ("scores", "written", "unpatched")


class Partial:
    """Keeps `scores` and `written` of the first cells in a file while a sweep runs.

    Args:
        op: name for messages.
        path: the file, or None to keep nothing.
        fingerprint: of the sweep; a file of another one is refused.
        unpatched: [u, b], the metric of the unpatched runs: it tells metrics apart that share a
            name, such as two lambdas.
        scores, written: filled in place by `load`.
    """

    def __init__(
        self,
        op: str,
        path: str | Path | None,
        fingerprint: str,
        unpatched: Tensor,
        scores: Tensor,
        written: Tensor,
    ) -> None:
        self.op, self.path = op, None if path is None else Path(path)
        self.fingerprint, self.unpatched = fingerprint, unpatched
        self.scores, self.written = scores, written

    def load(self) -> int:
        """How many cells are finished, after filling them in.

        Raises:
            StoreError: the file is damaged, or belongs to another sweep.
        """
        if self.path is None or not self.path.exists():
            return 0
        try:
            with safe_open(self.path, framework="pt") as file:
                about = json.loads(file.metadata()["microtome"])
                fingerprint, done = str(about["fingerprint"]), int(about["done"])
                tensors = {name: file.get_tensor(name) for name in NAMES}
        except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
            msg = (
                f"{self.op}: {self.path} holds no interrupted sweep ({error}). Delete it to start "
                "anew, or name another file."
            )
            raise StoreError(msg) from error
        if fingerprint != self.fingerprint or not _close(tensors["unpatched"], self.unpatched):
            msg = (
                f"{self.op}: {self.path} belongs to another sweep (other prompts, model, metric or "
                "cells). Name another file, or delete it."
            )
            raise StoreError(msg)
        self.scores[:done], self.written[:done] = tensors["scores"], tensors["written"]
        return done

    def save(self, done: int) -> None:
        """Write the first `done` cells; a file is whole or not there.

        Raises:
            StoreError: it cannot be written.
        """
        if self.path is None:
            return
        about = json.dumps({"fingerprint": self.fingerprint, "done": done})
        tensors = {
            "scores": self.scores[:done].clone(),
            "written": self.written[:done].clone(),
            "unpatched": self.unpatched,
        }
        fresh = self.path.with_name(self.path.name + ".new")
        try:
            save_file(tensors, fresh, metadata={"microtome": about})
            fresh.replace(self.path)
        except (SafetensorError, OSError) as error:
            msg = (
                f"{self.op}: cannot write {self.path} ({error}). Free space, or name another file."
            )
            raise StoreError(msg) from error


def _close(one: Tensor, other: Tensor) -> bool:
    """Equal but for the rounding of another machine or number of threads."""
    return one.shape == other.shape and torch.allclose(one.to(other), other, 1e-3, 1e-5)
