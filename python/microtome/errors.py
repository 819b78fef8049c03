"""The errors microtome raises on purpose: what was asked, what came, what to do."""

from __future__ import annotations

from typing import TYPE_CHECKING


class MicrotomeError(Exception):
    """Base of all errors raised by microtome.

    Attributes:
        late: whether it is about an earlier call, whose check came back from a GPU only now.
        agreed: whether every rank of a distributed run raises the same.
    """

    late = False
    agreed = False


class ShapeError(MicrotomeError, ValueError):
    """Shapes do not agree with each other or with the letters in the docstring."""


class DtypeError(MicrotomeError, TypeError):
    """A tensor's dtype is not one the function takes."""


class DeviceError(MicrotomeError, ValueError):
    """Tensors lie on different devices."""


class ArgumentError(MicrotomeError, ValueError):
    """A scalar or option is out of its range."""


class NonFiniteError(MicrotomeError, ValueError):
    """NaN or infinity where a number is needed; the message names the rows."""


class BackendError(MicrotomeError, RuntimeError):
    """A demanded backend cannot run these inputs; the message lists inputs and reasons."""


class SiteError(MicrotomeError, KeyError):
    """No such site in the model, or the model's architecture is unknown."""

    def __str__(self) -> str:
        # KeyError shows the repr of its argument; a sentence should read as a sentence.
        return str(self.args[0]) if self.args else ""


class StoreError(MicrotomeError, OSError):
    """An activation store or checkpoint is missing, truncated, corrupt, or could not be written."""


class CheckpointError(StoreError):
    """A saved SAE or training state cannot be read or written; nothing was changed."""


class DistributedError(MicrotomeError, RuntimeError):
    """The ranks of a distributed run do not fit together, or one of them failed: which, and why."""


class PackageError(MicrotomeError, ImportError):
    """An optional package is not installed; the message says which and how to get it."""


if TYPE_CHECKING:

    class OutOfMemoryError(MicrotomeError, RuntimeError, MemoryError):
        """Described below."""

else:

    def __getattr__(name: str) -> type[Exception]:
        """OutOfMemoryError, made on first use: its base is torch's, and this module costs none."""
        if name != "OutOfMemoryError":
            msg = f"module {__name__!r} has no attribute {name!r}"
            raise AttributeError(msg)
        import torch

        class OutOfMemoryError(MicrotomeError, torch.OutOfMemoryError, MemoryError):
            """An op ran out of memory; the message names its inputs' bytes and a way out."""

            __qualname__ = "OutOfMemoryError"

        return globals().setdefault(name, OutOfMemoryError)
