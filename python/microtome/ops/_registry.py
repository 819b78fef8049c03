"""The one dispatcher: an op is a torch op whose body picks the first backend that can run.

The choice is made inside the opaque body, so an already compiled graph follows `use_backend`. The
signature is written once, in the reference; the schema, hence every backend, follows it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import inspect
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from microtome import _autocast, _look, _memory, _native, _pending
from microtome.errors import ArgumentError, BackendError

NAMES = ("cuda", "triton", "cpu", "reference")
OPS: dict[str, Op] = {}
_LIB = torch.library.Library("microtome", "DEF")  # type: ignore[no-untyped-call]
_NOTHING: Any = nullcontext()
_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.AutocastCUDA
)
_demanded: list[
    str
] = []  # process-wide, like torch.set_num_threads: backward may run on another thread


asking: ContextVar[bool] = ContextVar("asking", default=False)  # `explain` is, in this thread


class Asked(BaseException):
    """The answer to `explain`: it ends the call, and no `except Exception` keeps it."""


@dataclass(frozen=True)
class Backend:
    """One way to run an op.

    Attributes:
        name: "cuda", "triton", "cpu" or "reference".
        impl: "package.module:function", imported on first use; takes the op's arguments, all by
            position.
        why_not: takes the same arguments; None when it can run them, else the reason in a few
            words.
        on_demand: it runs only where it is demanded: no measurement says yet that it is the faster.
        calls: other backends whose kernels it launches too.
    """

    name: str
    impl: str
    why_not: Callable[..., str | None]
    on_demand: bool = False
    calls: tuple[str, ...] = ()

    @functools.cached_property
    def run(self) -> Callable[..., Any]:
        module, function = self.impl.split(":")
        return getattr(importlib.import_module(module), function)  # type: ignore[no-any-return]


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None  # 60 us, at every call of every op


@functools.cache
def _interpreter_fails() -> str | None:
    """Why Triton's interpreter cannot run beside the numpy that is there, or None."""
    has = {package: importlib.metadata.version(package) for package in ("triton", "numpy")}
    number = {package: tuple(map(int, has[package].split(".")[:2])) for package in has}
    if number["triton"] < (3, 7) and number["numpy"] >= (2, 4):
        return (
            f"the interpreter of triton {has['triton']} needs numpy below 2.4, this is "
            f"{has['numpy']}"
        )
    return None


def unavailable(name: str) -> str | None:
    """None when a backend exists on this machine, else why not."""
    if name == "cpu":
        return _native.why_absent()
    if name in ("cuda", "triton"):
        if name == "triton":
            if not _has_triton():
                return "triton is not installed (pip install triton)"
            if os.environ.get("TRITON_INTERPRET") == "1":
                return _interpreter_fails()
        elif _native.why_no_cuda():
            return _native.why_no_cuda()
        elif _native.emulates_cuda():
            return None
        if not torch.cuda.is_available():
            return "torch finds no CUDA device"
    return None


def why_not_common(
    backend: str, tensors: Sequence[Tensor | None], dtypes: Sequence[torch.dtype]
) -> str | None:
    """The reasons every native backend shares: absent, wrong device, wrong floating dtype."""
    reason = unavailable(backend)
    if reason:
        return reason
    on_cpu = {
        "cpu": True,
        "triton": os.environ.get("TRITON_INTERPRET") == "1",
        "cuda": _native.emulates_cuda(),
    }
    wanted = "cpu" if on_cpu[backend] else "cuda"
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.device.type != wanted:
            return f"device is {tensor.device.type} (needs {wanted})"
        if tensor.is_floating_point() and tensor.dtype not in dtypes:
            has = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
            return f"dtype {str(tensor.dtype).removeprefix('torch.')} (has {has})"
        if backend == "cuda" and _native.why_not_on(tensor.device):
            return _native.why_not_on(tensor.device)
    return None


def triton_backend(impl: str, *dtypes: torch.dtype) -> Backend:
    """The Triton backend of calls whose floating tensors each have one of `dtypes`."""

    def why_not(*args: object) -> str | None:
        return why_not_common("triton", [a for a in args if isinstance(a, Tensor)], dtypes)

    return Backend("triton", impl, why_not)


class Op:
    """A torch op `torch.ops.microtome.<name>` with an ordered list of backends, reference last."""

    def __init__(
        self,
        reference: Callable[..., Any],
        *,
        fake: Callable[..., Any],
        backends: Sequence[Backend] = (),
        backward: Callable[..., Any] | None = None,
        setup_context: Callable[..., Any] | None = None,
        mutates: Sequence[str] = (),
        gathers: Mapping[str, tuple[str, str]] | None = None,
        looks: Callable[..., tuple[Any, ...]] | None = None,
    ) -> None:
        """What an op asks of its index arguments on a GPU, where nobody waits for the answer.

        Args:
            reference: the op in plain PyTorch; its name less "_reference" is the op's.
            fake: shapes and dtypes alone.
            backends: in order of choice, the reference being the last.
            backward: as in torch.library.register_autograd.
            setup_context: likewise.
            mutates: arguments that are written into.
            gathers: an index argument -> the argument whose rows it numbers, and their letter.
            looks: (look, *arguments) -> the arguments, made safe for every backend whatever their
                tables hold; for tables of which more is asked than a range.
        """
        self.name = reference.__name__.removesuffix("_reference")
        self.arguments = tuple(inspect.signature(reference).parameters)
        self.mutates = frozenset(mutates)
        self.gathers = [
            (self.arguments.index(index), index, self.arguments.index(table), letter)
            for index, (table, letter) in (gathers or {}).items()
        ]
        self.looks = looks
        last = Backend("reference", f"{reference.__module__}:{reference.__name__}", lambda *_: None)
        self.backends = (*backends, last)
        schema = torch.library.infer_schema(reference, mutates_args=tuple(mutates))
        _LIB.define(self.name + schema)  # type: ignore[no-untyped-call]
        for key in ("CPU", "CUDA"):
            _LIB.impl(self.name, self._run, key)  # type: ignore[no-untyped-call]
            if self.name in _autocast.DECISIONS:
                _LIB.impl(self.name, self._cast, "Autocast" + key)  # type: ignore[no-untyped-call]
        qualified = f"microtome::{self.name}"
        torch.library.register_fake(qualified, fake, lib=_LIB)
        if backward is not None:
            torch.library.register_autograd(
                qualified, backward, setup_context=setup_context, lib=_LIB
            )
        self.torch_op = getattr(torch.ops.microtome, self.name).default
        OPS[self.name] = self

    def __call__(self, *args: Any) -> Any:
        return self.torch_op(*args)

    def choose(self, *args: Any) -> Backend:
        """The backend that would run these arguments.

        Raises:
            BackendError: a demanded backend cannot; the message lists every input and every reason.
        """
        demanded = demanded_backend()
        for backend in self.backends:
            wanted = not backend.on_demand if demanded is None else demanded == backend.name
            if wanted and backend.why_not(*args) is None:
                return backend
        why = self.explain(*args)
        msg = (
            f"{self.name}: backend {demanded!r} was demanded but cannot run here.\n{why}\n"
            'Demand another with use_backend("reference"), or none to let microtome choose.'
        )
        raise BackendError(msg)

    def explain(self, *args: Any) -> str:
        """Every input with its shape, dtype and device, and what each backend says to it."""
        lines = []
        for name, value in zip(self.arguments, args, strict=False):
            if isinstance(value, Tensor):
                kind = str(value.dtype).removeprefix("torch.")
                lines.append(f"  {name}: {list(value.shape)} {kind} {value.device}")
            else:
                lines.append(f"  {name}: {value!r}")
        lines.append("because" if demanded_backend() else "backends, in order of choice")
        known = {b.name: b for b in self.backends}
        for backend in NAMES:
            reason = (
                known[backend].why_not(*args) if backend in known else "not written for this op"
            )
            idle = backend in known and known[backend].on_demand and not demanded_backend()
            lines.append(f"  {backend}: {reason or 'can run it' + ', if demanded' * idle}")
        return "\n".join(lines)

    def _run(self, *args: Any) -> Any:
        device = next((a.device for a in args if isinstance(a, Tensor)), torch.device("cpu"))
        if asking.get():
            answer = f"{self.name}\n{self.explain(*args)}"
            raise Asked(answer)
        _pending.raise_finished(device)
        backend = self.choose(*args)
        # Inside the body autocast would turn a reference's products into bf16 unasked.
        off = torch.autocast(device.type, enabled=False) if _autocast.enabled(device) else _NOTHING
        try:
            with off:
                return backend.run(*(self._within(device, args) if device.type == "cuda" else args))
        except (RuntimeError, MemoryError) as error:
            if not _memory.ran_out(error):
                raise
            raise _memory.described(self.name, backend.name, self.arguments, args, error) from error

    def _within(self, device: torch.device, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Indices on a GPU are looked at without waiting, and clamped: no backend reads outside."""
        if not (self.gathers or self.looks):
            return args
        look, safe = _look.Look(self.name, device), list(args)
        for at, name, table, letter in self.gathers:
            safe[at] = look.indices(name, args[at], args[table].shape[0], letter)
        if self.looks:
            safe = list(self.looks(look, *safe))
        look.submit()
        return tuple(safe)

    def _cast(self, *args: Any) -> Any:
        """The op inside `torch.autocast`: autograd sees the casts, a compiled graph too."""
        given = self.arguments[: len(args)]  # the dispatcher leaves out defaults at the end
        names = ["" if name in self.mutates else name for name in given]
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
            return self.torch_op(*_autocast.cast(self.name, names, args))


def demanded_backend() -> str | None:
    """The backend demanded by `use_backend` or MICROTOME_BACKEND, or None."""
    name = _demanded[-1] if _demanded else os.environ.get("MICROTOME_BACKEND", "")
    if name in ("", "auto"):
        return None
    if name not in NAMES:
        known = ", ".join(map(repr, NAMES))
        msg = f"use_backend: no backend {name!r}; choose one of {known} or 'auto'."
        raise ArgumentError(msg)
    return name


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Demand one backend for all ops inside the block.

    `name` is "cuda", "triton", "cpu" or "reference"; "auto" lifts a demand. Process-wide, like
    `torch.set_num_threads`. An op that the backend cannot run raises BackendError.

    Example:
        >>> import microtome as mt
        >>> with mt.use_backend("reference"):
        ...     pass
    """
    _demanded.append(name)
    try:
        demanded_backend()
        yield
    finally:
        _demanded.pop()


def info() -> dict[str, str]:
    """Each backend and 'available' or why not; raises where MICROTOME_REQUIRE's are missing."""
    report = {name: unavailable(name) or "available" for name in NAMES}
    required = [name for name in os.environ.get("MICROTOME_REQUIRE", "").split(",") if name]
    missing = [
        f"{name}: {report.get(name, 'no such backend')}"
        for name in required
        if report.get(name) != "available"
    ]
    if missing:
        raise BackendError(
            "MICROTOME_REQUIRE names backends that are missing. " + "; ".join(missing)
        )
    return report
