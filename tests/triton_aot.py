"""Compile Triton kernels for GPUs that need not be here; print what came of it as JSON.

Run in a process without TRITON_INTERPRET: `python tests/triton_aot.py 80` or 90, with an older
Triton first on PYTHONPATH to compile by that one, and parts of names to compile some cases alone.
The cases are those of every file in tests/aot.
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import triton
from aot.case import Case
from aot.products import narrow_products
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
# Counts of instructions, each by how its name in the disassembly begins.
COUNTS = {
    "tensor_core": r"[HQI]G?MMA",
    "HMMA": r"HMMA",
    "HGMMA": r"HGMMA",
    "QGMMA": r"QGMMA",
    "UTMALDG": r"UTMALDG",
    "fused": r"FFMA",
    "load_16": r"LDG\.E(?:\.\w+)*\.128",  # 16 bytes a thread
    "local": r"(?:LDL|STL)",
}


def cases() -> dict[str, Case]:
    """The cases of every file in tests/aot that has any."""
    found: dict[str, Case] = {}
    for path in sorted((Path(__file__).parent / "aot").glob("*.py")):
        of = getattr(importlib.import_module(f"aot.{path.stem}"), "cases", None)
        for name, case in (of() if of else {}).items():
            if name in found:
                message = f"{path.name}: another file has a case {name!r} already"
                raise SystemExit(message)
            found[name] = case if isinstance(case, Case) else Case(*case)
    return found


def measure(case: Case, arch: int) -> dict[str, Any]:
    """What the compiler made of a kernel.

    Registers, bytes of stack and of what spilled to it (each a thread), bytes of shared memory,
    instructions (16 bytes each) and how many are of each kind in COUNTS; seconds, next to none
    where Triton's cache has the kernel.
    """
    types, attributes = case.signature()
    source = ASTSource(
        fn=case.kernel, signature=types, constexprs=dict(case.constants), attrs=attributes
    )
    begun = time.perf_counter()
    compiled = triton.compile(
        source, target=GPUTarget("cuda", arch, 32), options=dict(case.options)
    )
    seconds = time.perf_counter() - begun
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, sass = (
            subprocess.run(
                [TOOLS / tool, option, file.name], capture_output=True, text=True, check=True
            )
            for tool, option in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
    held = dict(re.findall(r"(REG|STACK):(\d+)", usage.stdout + usage.stderr))
    instructions = re.findall(
        r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][A-Z0-9_.]*)", sass.stdout, re.M
    )
    spilled = [i for i in instructions if i.startswith("STL")]
    return {
        "kernel": f"{case.kernel.__module__.rpartition('.')[2]}.{case.kernel.__name__}",
        "needs": case.needs,
        "lacks": case.lacks,
        "narrow": [p for p in narrow_products(compiled.asm["ttir"]) if p not in case.narrow],
        "registers": int(held["REG"]),
        "stack": int(held["STACK"]),
        "spill": sum(int((re.search(r"\.(64|128)", i) or [0, 32])[1]) // 8 for i in spilled),
        "shared": compiled.metadata.shared,
        "instructions": len(instructions),
        **{
            key: sum(re.match(rf"{pattern}(?![A-Z0-9_])", i) is not None for i in instructions)
            for key, pattern in COUNTS.items()
        },
        "seconds": round(seconds, 2),
    }


if __name__ == "__main__":
    arch, *wanted = sys.argv[1:]
    print(
        json.dumps(
            {
                name: measure(case, int(arch))
                for name, case in cases().items()
                if not wanted or any(part in name for part in wanted)
            }
        )
    )
