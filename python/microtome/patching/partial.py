"""Finished cells of an interrupted sweep, in a file of their own."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from microtome.errors import StoreError


class Partial:
    """Keeps `scores` and `written` of the first cells in a file while a sweep runs.

    Args:
        path: the file, or None to keep nothing.
        fingerprint: of the sweep; a file of another one is refused.
        scores, written: filled in place by `load`.
    """

    def __init__(
        self, path: str | Path | None, fingerprint: str, scores: Tensor, written: Tensor
    ) -> None:
        self.path = None if path is None else Path(path)
        self.fingerprint, self.scores, self.written = fingerprint, scores, written

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
                tensors = {name: file.get_tensor(name) for name in ("scores", "written")}
        except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
            msg = (
                f"sweep: {self.path} holds no interrupted sweep ({error}). Delete it to start anew."
            )
            raise StoreError(msg) from error
        if about["fingerprint"] != self.fingerprint:
            msg = (
                f"sweep: {self.path} belongs to another sweep (other prompts, model, metric or "
                "cells). Name another file, or delete it."
            )
            raise StoreError(msg)
        done = int(about["done"])
        self.scores[:done], self.written[:done] = tensors["scores"], tensors["written"]
        return done

    def save(self, done: int) -> None:
        """Write the first `done` cells; a file is whole or not there."""
        if self.path is None:
            return
        about = json.dumps({"fingerprint": self.fingerprint, "done": done})
        tensors = {"scores": self.scores[:done].clone(), "written": self.written[:done].clone()}
        fresh = self.path.with_name(self.path.name + ".new")
        try:
            save_file(tensors, fresh, metadata={"microtome": about})
            fresh.replace(self.path)
        except (SafetensorError, OSError) as error:
            msg = f"sweep: cannot write {self.path} ({error}). Free space, or name another file."
            raise StoreError(msg) from error
