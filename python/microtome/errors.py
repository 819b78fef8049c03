"""Every error microtome raises on purpose: what was asked, what came, what is allowed, what to do."""


class MicrotomeError(Exception):
    """Base of all errors raised by microtome."""


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
    """A demanded backend cannot run these inputs; the message lists every input and every reason."""


class SiteError(MicrotomeError, KeyError):
    """No such site in the model, or the model's architecture is unknown."""

    def __str__(self) -> str:
        # KeyError shows the repr of its argument; a sentence should read as a sentence.
        return str(self.args[0]) if self.args else ""


class StoreError(MicrotomeError, OSError):
    """An activation store or checkpoint is missing, truncated, corrupt, or could not be written."""


class CheckpointError(StoreError):
    """A saved SAE or training state cannot be read or written; nothing was changed."""


class PackageError(MicrotomeError, ImportError):
    """An optional package is not installed; the message says which and how to get it."""
