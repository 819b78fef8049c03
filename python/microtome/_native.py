"""The compiled extension, imported on first use, after torch, so both share one libgomp."""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from types import ModuleType

import torch
from torch import Tensor

from microtome.errors import ArgumentError

LEVELS = ("generic", "avx2", "avx512", "avx512bf16", "amx")
_LARGE = 8 << 20  # bytes; a page is 2 MiB, so four of them


@functools.cache
def load() -> tuple[ModuleType | None, str]:
    """The extension module and an empty string, or None and the reason why it is absent."""
    try:
        return importlib.import_module("microtome._native_ext"), ""
    except ImportError as error:
        return None, f"the compiled extension is not there ({error}); reinstall with a C++ compiler"


def module() -> ModuleType:
    """The extension; call only where `why_absent()` returned None."""
    native, reason = load()
    if native is None:
        raise ImportError(reason)
    return native


def why_absent() -> str | None:
    """None when the extension is there, else the reason."""
    return load()[1] or None


def emulates_cuda() -> bool:
    """Whether the CUDA kernels run on the CPU, one thread at a time, which tests ask for."""
    return os.environ.get("MICROTOME_EMULATE_CUDA") == "1"


@functools.cache
def _emulator() -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module("microtome._emulated_ext"), ""
    except ImportError as error:
        why = "build with -C cmake.define.MICROTOME_EMULATE_CUDA=ON"
        return None, f"the emulated CUDA kernels are not there ({error}); {why}"


def why_no_cuda() -> str | None:
    """None when the CUDA kernels are there, compiled or emulated, else the reason."""
    if emulates_cuda():
        return _emulator()[1] or None
    return why_absent() or (
        None if hasattr(module(), "cuda") else "the extension holds no CUDA kernels"
    )


def cuda() -> ModuleType:
    """The CUDA kernels; call only where `why_no_cuda()` returned None."""
    native = _emulator()[0] if emulates_cuda() else module().cuda
    if native is None:
        raise ImportError(_emulator()[1])
    return native


@functools.cache
def why_not_on(device: torch.device) -> str | None:
    """None when the CUDA kernels were compiled for a device's architecture, else the reason."""
    if device.type != "cuda":
        return None
    with torch.cuda.device(device):
        if cuda().compiled_for_device():
            return None
    major, minor = torch.cuda.get_device_capability(device)
    return (
        f"the CUDA kernels were not compiled for compute capability {major}.{minor} (build with "
        f"-C cmake.define.CMAKE_CUDA_ARCHITECTURES)"
    )


def device_of(tensor: Tensor) -> AbstractContextManager[None]:
    """Inside the block, launches and allocations go to the tensor's device."""
    return torch.cuda.device_of(tensor)  # type: ignore[no-untyped-call]


def stream(tensor: Tensor) -> int:
    """The current stream of the tensor's device, 0 where the kernels are emulated."""
    return int(torch.cuda.current_stream(tensor.device).cuda_stream) if tensor.is_cuda else 0


def forced_isa() -> str:
    """The level demanded by `MICROTOME_CPU_ISA`, "" for the best; read anew at every call.

    One above what the processor has stands for the best that it has. ArgumentError for a name that
    is no level.
    """
    name = os.environ.get("MICROTOME_CPU_ISA", "")
    if name and name not in LEVELS:
        msg = f"MICROTOME_CPU_ISA: no level {name!r}; choose one of {', '.join(LEVELS)}, "
        msg += "or unset it for the best that is there."
        raise ArgumentError(msg)
    return name


def isa() -> str:
    """The instruction-set level in use, one of LEVELS."""
    return str(module().isa_level(forced_isa()))


def emulates_amx() -> bool:
    """Whether the level in use is amx and its tile unit is emulated, which tests ask for."""
    return isa() == "amx" and bool(module().amx_is_emulated())


def threads() -> int:
    """Threads a kernel may use. OpenMP's own count is per Python thread, torch's is not."""
    return torch.get_num_threads()


def address(tensor: Tensor | None) -> int:
    """Where a tensor's elements lie, 0 for None. The caller keeps it alive, and contiguous."""
    return 0 if tensor is None else tensor.data_ptr()


def rows(matrix: Tensor) -> Tensor:
    """The matrix itself where the elements of a row are neighbours, else a contiguous copy."""
    return matrix if matrix.stride(1) == 1 or matrix.shape[1] == 1 else matrix.contiguous()


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """An uninitialised result on the CPU; a large one is backed by large pages."""
    out = torch.empty(*shape, dtype=dtype, device="cpu")
    if out.nbytes >= _LARGE:
        module().ask_for_large_pages(out.data_ptr(), out.nbytes)
    return out


def int32(indices: Tensor, f: int) -> Tensor:
    """Contiguous int32 indices; an int64 index that int32 cannot hold stays outside [0, f)."""
    if indices.dtype == torch.int64:
        indices = indices.clamp(-1, f)
    return indices.to(torch.int32).contiguous()


def saturated(table: Tensor) -> Tensor:
    """A table as contiguous int32; what int32 cannot hold becomes its least or largest number."""
    if table.dtype == torch.int32:
        return table.contiguous()
    if table.dtype == torch.int64:
        table = table.clamp(-(2**31), 2**31 - 1)
    return table.to(torch.int32).contiguous()


def raise_outside(op: str, indices: Tensor, f: int, position: int) -> None:
    """Raise ArgumentError for the flat position that a kernel found outside [0, f); -1 is none."""
    if position >= 0:
        msg = f"{op}: indices must lie in [0, f={f}), got {int(indices.flatten()[position])}."
        raise ArgumentError(msg)


def run_code(op: str, tensors: Sequence[Tensor | None], indices: Tensor, *sizes: int) -> None:
    """Run a kernel over a sparse code: n, k, d, f are its sizes, the first tensor's dtype decides.

    Raises ArgumentError for an index outside [0, f); the kernel has then written nothing.
    """
    first = tensors[0]
    half = first is not None and first.dtype == torch.bfloat16
    pointers = [address(tensor) for tensor in tensors]
    bad = getattr(module(), op)(half, *pointers, *sizes, isa(), threads())
    raise_outside(op, indices, sizes[-1], bad)
