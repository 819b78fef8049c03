"""Every Triton kernel compiles for sm_80 and sm_90 within its recorded budget. No GPU is needed.

After a change that is meant to cost more, record the new budget and commit it with the reason:
`MICROTOME_RECORD_BUDGET=1 pytest tests/test_triton_compile.py`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")
pytestmark = pytest.mark.triton

HERE = Path(__file__).parent
BUDGET = HERE / "triton_budget.json"
ARCHITECTURES = ("sm_80", "sm_90")
RECORD = os.environ.get("MICROTOME_RECORD_BUDGET") == "1"


@pytest.fixture(scope="module")
def measured() -> dict[str, dict[str, dict[str, int]]]:
    """Architecture -> kernel -> what the compiler made of it, in processes that do not
    interpret."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    processes = {
        arch: subprocess.Popen(
            [sys.executable, str(HERE / "triton_aot.py"), arch.removeprefix("sm_")],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for arch in ARCHITECTURES
    }
    result = {}
    for arch, process in processes.items():
        out, error = process.communicate(timeout=600)
        assert process.returncode == 0, f"{arch} does not compile:\n{error[-3000:]}"
        result[arch] = json.loads(out)
    if RECORD:
        BUDGET.write_text(json.dumps(result, indent=1) + "\n")
    return result


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_no_kernel_spills(arch: str, measured: dict[str, dict[str, dict[str, int]]]) -> None:
    spilling = {name: m for name, m in measured[arch].items() if m["stack"] or m["local"]}
    assert not spilling


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_products_run_on_tensor_cores(
    arch: str, measured: dict[str, dict[str, dict[str, int]]]
) -> None:
    names = tuple(f"delta_linear.{way}" for way in ("few", "fused", "prepared"))
    names += tuple(f"mlp_shapley.{what}" for what in ("bf16_128", "bf16_256", "ends"))
    for name in names:
        assert measured[arch][name]["tensor_core"] > 0, name


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_what_promises_every_rounding_fuses_no_product_into_a_sum(
    arch: str, measured: dict[str, dict[str, dict[str, int]]]
) -> None:
    # patch_rows gives the bits of its formula; attention and
    # mlp_shapley's fp32 are float32 and not its tensor-core kin.
    assert measured[arch]["patch_rows"]["fused"] == 0
    exact = [m for name, m in measured[arch].items() if name.startswith("mlp_shapley.fp32")]
    assert exact
    assert all(m["tensor_core"] == 0 < m["fused"] for m in exact)
    attention = [m for name, m in measured[arch].items() if "attention" in name]
    assert attention
    assert all(m["tensor_core"] == 0 < m["fused"] for m in attention)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_no_kernel_outgrows_its_budget(
    arch: str, measured: dict[str, dict[str, dict[str, int]]]
) -> None:
    budget = json.loads(BUDGET.read_text())[arch]
    assert set(measured[arch]) == set(budget), "the kernels changed: record the budget again"
    grown = [
        f"{name}: {key} {got[key]}, budget {budget[name][key]}"
        for name, got in measured[arch].items()
        for key in ("registers", "shared", "instructions")
        if got[key] > 1.1 * budget[name][key]
    ]
    assert not grown
