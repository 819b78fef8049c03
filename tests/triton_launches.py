"""What ops would launch on a GPU, through the front end of Triton's compiler; failures as JSON.

Run in a process without TRITON_INTERPRET: `python tests/triton_launches.py 80` or 90. Tensors of
the CPU pass for a GPU's, so that host functions choose a GPU's tiles and options, and a launch is
not run but compiled, specialised as it would be: an integer that is 1 becomes a constant, a
multiple of 16 is known to be one. The interpreter shows neither, and stops where a kernel returns.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import test_on_a_gpu
import torch
import triton
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.runtime.jit import JITFunction

from microtome.ops import _registry
from microtome.testing.calls import calls

TYPES = {
    torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16",
    torch.float8_e4m3fn: "fp8e4nv", torch.int8: "i8", torch.int16: "i16", torch.int32: "i32",
    torch.int64: "i64", torch.uint8: "u8", torch.bool: "i1",
}  # fmt: skip
SHARED = {80: 163 << 10, 90: 227 << 10}  # bytes that a program may have


class Recorder:
    """Takes the place of JITFunction.run.

    Attributes:
        failed: why, by kernel and what was asked of it; each is tried once.
        called: the op that launches now.
    """

    def __init__(self, arch: int) -> None:
        self.target = GPUTarget("cuda", arch, 32)
        self.backend = make_backend(self.target)
        self.failed: dict[str, str] = {}
        self.tried: set[str] = set()
        self.called = ""

    def run(self, kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **more: Any) -> None:
        given = {**dict(zip(kernel.arg_names, args, strict=False)), **more}
        types, constants, multiples = {}, {}, {}
        for i, parameter in enumerate(kernel.params):
            value = given.pop(parameter.name, parameter.default)
            kind, multiple = self.kind(value, exact=not parameter.do_not_specialize)
            if parameter.is_constexpr or kind == "constexpr":
                kind = "constexpr"
                constants[parameter.name] = value
            elif multiple:
                multiples[(i,)] = [["tt.divisibility", 16]]
            types[parameter.name] = kind
        key = f"{kernel.__name__} {types} {constants} {sorted(multiples)} {given}"
        if key in self.tried:
            return
        self.tried.add(key)
        if "enable_fp_fusion" not in given:  # newer Tritons warn, and will change the default
            self.failed[f"{self.called}: {kernel.__name__}"] = "enable_fp_fusion is not named"
        source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=multiples)
        options, context = self.backend.parse_options(given), ir.context()
        ir.load_dialects(context)
        self.backend.load_dialects(context)
        codegen = self.backend.get_codegen_implementation(options)
        try:
            source.make_ir(self.target, options, codegen, self.backend.get_module_map(), context)
        except Exception as error:  # one kernel does not hide the others
            reason: BaseException = error
            while reason.__cause__ is not None:
                reason = reason.__cause__
            self.failed[f"{self.called}: {key}"] = str(reason)[-600:]

    @staticmethod
    def kind(value: Any, *, exact: bool) -> tuple[str, bool]:
        """Triton's type of an argument, and whether it is known to be a multiple of 16."""
        if isinstance(value, torch.Tensor):
            return "*" + TYPES[value.dtype], value.data_ptr() % 16 == 0
        if hasattr(value, "block_shape"):
            return f"tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)}>", False
        if isinstance(value, (bool, float)):
            return "u1" if isinstance(value, bool) else "fp32", False
        if isinstance(value, int) and not (exact and value == 1):
            return "i32" if -(2**31) <= value < 2**31 else "i64", exact and value % 16 == 0
        return "constexpr", False


class Driver:
    """As much of a GPU's driver as host functions ask."""

    def __init__(self, arch: int) -> None:
        self.utils, self.shared = self, SHARED[arch]

    def get_device_properties(self, _: object) -> dict[str, int]:
        return {"max_shared_mem": self.shared}


def pretend(arch: int) -> Recorder:
    """Make this process one on a GPU, as far as ops can tell."""
    recorder = Recorder(arch)
    JITFunction.run = lambda kernel, *args, **more: recorder.run(kernel, *args, **more)
    torch.Tensor.is_cuda = property(lambda _: True)
    torch.cuda.get_device_capability = lambda *_: divmod(arch, 10)
    torch.cuda.is_current_stream_capturing = lambda: False
    triton.runtime.driver.set_active(Driver(arch))
    # What no kernel writes must still be numbers that a host function may read back.
    torch.empty, torch.empty_like = torch.zeros, torch.zeros_like
    torch.Tensor.new_empty = torch.Tensor.new_zeros

    def choose(op: _registry.Op, *args: object) -> _registry.Backend:
        return next((b for b in op.backends if b.name == "triton"), op.backends[-1])

    _registry.Op.choose = choose
    return recorder


if __name__ == "__main__":
    arch = int(sys.argv[1])
    families = {name: family("cpu")[name] for name, family in test_on_a_gpu.FAMILIES.items()}
    small = {
        f"{name}, {n} rows": c for n in (1, 4) for name, c in calls(n=n, screen="bf16").items()
    }
    recorder = pretend(arch)
    for name, call in {**families, **small}.items():
        if arch < 89 and "fp8" in name:  # has no such products
            continue
        recorder.called = name
        call()
    print(json.dumps({"tried": len(recorder.tried), "failed": recorder.failed}))
