"""Every CUDA kernel compiles for sm_80 and sm_90a within its recorded budget. No GPU is needed.

After a change that is meant to cost more, record the new budget and commit it with the reason:
`MICROTOME_RECORD_BUDGET=1 pytest tests/test_cuda_compile.py`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
BUDGET = Path(__file__).parent / "cuda_budget.json"
ARCHITECTURES = ("sm_80", "sm_90a")
RECORD = os.environ.get("MICROTOME_RECORD_BUDGET") == "1"
NVCC = os.environ.get("CUDACXX") or shutil.which("nvcc")

needs_nvcc = pytest.mark.skipif(
    NVCC is None and "cuda" not in os.environ.get("MICROTOME_REQUIRE", "").split(","),
    reason="nvcc is not on PATH and CUDACXX does not name it",
)

Kernels = dict[str, dict[str, int]]


def parse(log: str) -> dict[str, Kernels]:
    """Architecture -> mangled kernel -> what `ptxas -v` says of it."""
    result: dict[str, Kernels] = {}
    for part in log.split("Compiling entry function ")[1:]:
        head = re.match(r"'(\w+)' for '(\w+)'", part)
        frame = re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part
        )
        used = re.search(r"Used (\d+) registers", part)
        assert head, part
        assert frame, part
        assert used, part
        shared = re.search(r"(\d+) bytes smem", part)
        stack, stores, loads = map(int, frame.groups())
        result.setdefault(head[2], {})[head[1]] = {
            "registers": int(used[1]),
            "shared": int(shared[1]) if shared else 0,
            "stack": stack,
            "spilled": stores + loads,
        }
    return result


def readable(mangled: list[str]) -> dict[str, str]:
    """Mangled names -> "kernel<arguments>", without the hash that nvcc gives a namespace."""
    names = subprocess.run(
        ["c++filt"], input="\n".join(mangled), capture_output=True, text=True, check=True
    ).stdout.splitlines()
    short = [
        re.sub(r"microtome::cuda::|\(anonymous namespace\)::|\((int|bool)\)|^void ", "", name)
        for name in names
    ]
    return {key: re.sub(r"\(.*\)$", "", name) for key, name in zip(mangled, short, strict=True)}


def compiled(source: Path, folder: Path) -> dict[str, Kernels]:
    """Architecture -> kernel -> counts, of one source for both architectures."""
    assert NVCC, "MICROTOME_REQUIRE names cuda, and there is no nvcc: set PATH or CUDACXX"
    targets = [
        f"-gencode=arch={arch.replace('sm', 'compute')},code={arch}" for arch in ARCHITECTURES
    ]
    done = subprocess.run(
        [
            NVCC, "-std=c++17", "-O3", "-fmad=false", "-Xptxas=-v", *targets,
            f"-I{ROOT / 'csrc'}", "-c", str(source), "-o", str(folder / f"{source.stem}.o"),
        ],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, f"{source.name} does not compile:\n{done.stderr[-3000:]}"
    warnings = [line for line in done.stderr.splitlines() if "warning" in line]
    assert not warnings, f"{source.name}: {warnings}"
    found = parse(done.stderr)
    names = readable(sorted({name for kernels in found.values() for name in kernels}))
    return {
        arch: {f"{source.stem}: {names[key]}": counts for key, counts in kernels.items()}
        for arch, kernels in found.items()
    }


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Kernels]:
    """Architecture -> kernel -> registers, static shared memory, stack and spills in bytes."""
    folder = tmp_path_factory.mktemp("cuda")
    with ThreadPoolExecutor(max_workers=2) as pool:
        parts = list(pool.map(lambda source: compiled(source, folder), SOURCES))
    result: dict[str, Kernels] = {
        arch: {name: counts for part in parts for name, counts in part.get(arch, {}).items()}
        for arch in ARCHITECTURES
    }
    if RECORD:
        BUDGET.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")
    return result


@needs_nvcc
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_no_kernel_keeps_anything_in_local_memory(arch: str, measured: dict[str, Kernels]) -> None:
    assert not {name: m for name, m in measured[arch].items() if m["stack"] or m["spilled"]}


def grown(got: Kernels, budget: Kernels) -> list[str]:
    """What a tenth above the budget does not hold."""
    return [
        f"{name}: {key} {got[name][key]}, budget {budget[name][key]}"
        for name in budget
        for key in ("registers", "shared")
        if got[name][key] > 1.1 * budget[name][key]
    ]


@needs_nvcc
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_no_kernel_outgrows_its_budget(
    arch: str, measured: dict[str, Kernels], tmp_path: Path
) -> None:
    budget = json.loads(BUDGET.read_text())[arch]
    assert set(measured[arch]) == set(budget), "the kernels changed: record the budget again"
    over = grown(measured[arch], budget)
    if over:  # nvcc does not give every kernel the same registers in every run
        stems = {line.partition(":")[0] for line in over}
        again = [compiled(source, tmp_path)[arch] for source in SOURCES if source.stem in stems]
        second = {name: counts for part in again for name, counts in part.items()}
        over = grown(second, {name: budget[name] for name in second})
    assert not over


def test_the_report_of_the_compiler_is_read_to_the_byte() -> None:
    log = """ptxas info    : Compiling entry function '_Z1fPf' for 'sm_80'
ptxas info    : Function properties for _Z1fPf
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 1024 bytes smem, 360 bytes cmem[0]
ptxas info    : Compiling entry function '_Z1gPf' for 'sm_90a'
ptxas info    : Function properties for _Z1gPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 7 registers, 360 bytes cmem[0]
"""
    assert parse(log) == {
        "sm_80": {"_Z1fPf": {"registers": 40, "shared": 1024, "stack": 8, "spilled": 16}},
        "sm_90a": {"_Z1gPf": {"registers": 7, "shared": 0, "stack": 0, "spilled": 0}},
    }
