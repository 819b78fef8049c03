"""Every Triton kernel compiles for sm_80 and sm_90 within its recorded budget. No GPU is needed.

By two Tritons: the installed one, and 3.6.0, which GPU machines have (`make .venv/.triton36` puts
it into a folder of its own). After a change that is meant to cost more, record the new budget and
commit it with the reason: `MICROTOME_RECORD_BUDGET=1 pytest tests/test_triton_compile.py`.
"""

from __future__ import annotations

import ast
import importlib.metadata
import json
import os
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed")

HERE = Path(__file__).parent
BUDGET = HERE / "triton_budget.json"
RECORDED = ("registers", "shared", "instructions", "tensor_core", "load_16")
RECORD = os.environ.get("MICROTOME_RECORD_BUDGET") == "1"
DEMANDED = "triton" in os.environ.get("MICROTOME_REQUIRE", "").split(",")

INSTALLED, OLDEST = importlib.metadata.version("triton"), "3.6.0"
FOLDER = Path(sys.prefix) / f"triton-{OLDEST}"
ABSENT = f"no Triton {OLDEST} in {FOLDER}: run `make {Path(sys.prefix).name}/.triton36`"
WAYS = [
    pytest.param((version, arch), id=f"{version}-sm_{arch}")
    for version in dict.fromkeys((OLDEST, INSTALLED))
    for arch in (80, 90)
]
pytestmark = [pytest.mark.triton, pytest.mark.parametrize("way", WAYS)]

Way = tuple[str, int]
Measured = dict[str, dict[str, Any]]


def compile_all(way: Way) -> Measured:
    """What the compiler made of every kernel, in a process that does not interpret."""
    version, arch = way
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if version != INSTALLED:
        environment["PYTHONPATH"] = str(FOLDER)
    done = subprocess.run(
        [sys.executable, str(HERE / "triton_aot.py"), str(arch)],
        env=environment, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"Triton {version}, sm_{arch}: {done.stderr[-3000:]}"
    return json.loads(done.stdout)  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def compiling() -> dict[Way, Future[Measured]]:
    """All ways at once, as many at a time as there are processors."""
    ways = [parameter.values[0] for parameter in WAYS]
    ways = [way for way in ways if way[0] == INSTALLED or FOLDER.is_dir()]
    pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)))
    return {way: pool.submit(compile_all, way) for way in ways}


@pytest.fixture
def measured(way: Way, compiling: dict[Way, Future[Measured]]) -> Measured:
    if way not in compiling:
        assert not DEMANDED, ABSENT
        pytest.skip(ABSENT)
    result = compiling[way].result()
    if RECORD:
        record(way, result)
    return result


def record(way: Way, result: Measured) -> None:
    """Write a way's counts into the budget, a kernel a line."""
    budget = json.loads(BUDGET.read_text())
    budget.setdefault(way[0], {})[f"sm_{way[1]}"] = {
        name: {key: result[name][key] for key in RECORDED} for name in sorted(result)
    }
    for version in set(budget) - {OLDEST, INSTALLED}:
        del budget[version]
    versions = (
        f'"{version}": {{\n'
        + ",\n".join(
            f'"{arch}": {{\n'
            + ",\n".join(f'"{name}": {json.dumps(counts)}' for name, counts in kernels.items())
            + "\n}"
            for arch, kernels in sorted(budget[version].items())
        )
        + "\n}"
        for version in sorted(budget)
    )
    BUDGET.write_text("{\n" + ",\n".join(versions) + "\n}\n")


def test_no_kernel_spills(way: Way, measured: Measured) -> None:
    spilling = {name: m for name, m in measured.items() if m["stack"] or m["local"]}
    assert not spilling


def test_every_kernel_has_the_instructions_it_promises_and_none_it_forswears(
    way: Way, measured: Measured
) -> None:
    missing = [
        f"{name}: no {key}" for name, m in measured.items() for key in m["needs"] if not m[key]
    ]
    broken = [
        f"{name}: {m[key]} {key}" for name, m in measured.items() for key in m["lacks"] if m[key]
    ]
    assert not missing + broken


def test_no_place_in_a_tensor_is_a_32_bit_product(way: Way, measured: Measured) -> None:
    """Widen a factor in the kernel; where a product is small whatever comes, say why in the case's
    `narrow`."""
    narrow = sorted({product for m in measured.values() for product in m["narrow"]})
    assert not narrow


def test_no_kernel_outgrows_its_budget(way: Way, measured: Measured) -> None:
    versions = json.loads(BUDGET.read_text())
    # A Triton newer than the record is held to the newest that was recorded.
    newest = max(versions, key=lambda v: tuple(map(int, v.split("."))))
    budget = versions.get(way[0], versions[newest])[f"sm_{way[1]}"]
    assert set(measured) == set(budget), "the kernels changed: record the budget again"
    grown = [
        f"{name}: {key} {got[key]}, budget {budget[name][key]}"
        for name, got in measured.items()
        for key in ("registers", "shared", "instructions")
        if got[key] > 1.1 * budget[name][key]
    ]
    assert not grown


def launched() -> set[str]:
    """module.function of every @triton.jit function in kernels/ that a host function launches.

    Those are the ones that no other kernel calls, and those that are indexed by a grid.
    """
    defined, called, indexed = set(), set(), set()
    for path in (HERE.parent / "kernels").glob("*.py"):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                jitted = any("jit" in ast.unparse(d) for d in node.decorator_list)
                if jitted:
                    defined.add(f"{path.stem}.{node.name}")
                    calls = (n.func for n in ast.walk(node) if isinstance(n, ast.Call))
                    called |= {getattr(c, "id", getattr(c, "attr", "")) for c in calls}
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                indexed.add(ast.unparse(node.func.value).rpartition(".")[2])
    return {name for name in defined if (own := name.split(".")[1]) not in called or own in indexed}


def test_every_kernel_that_is_launched_is_compiled_here(way: Way, measured: Measured) -> None:
    assert len(launched()) > 20
    assert not launched() - {m["kernel"] for m in measured.values()}
