"""Whatever an op launches on a GPU gets through the front end of Triton's compiler."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

HERE = Path(__file__).parent
INSTALLED, OLDEST = importlib.metadata.version("triton"), "3.6.0"
FOLDER = Path(sys.prefix) / f"triton-{OLDEST}"
ABSENT = f"no Triton {OLDEST} in {FOLDER}: run `make {Path(sys.prefix).name}/.triton36`"
DEMANDED = "triton" in os.environ.get("MICROTOME_REQUIRE", "").split(",")


@pytest.mark.triton
@pytest.mark.parametrize(("version", "arch"), [(OLDEST, 90), (INSTALLED, 80)])
def test_every_launch_of_small_calls_compiles_as_a_gpu_would_specialise_it(
    version: str, arch: int
) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if version != INSTALLED:
        if not FOLDER.is_dir():
            assert not DEMANDED, ABSENT
            pytest.skip(ABSENT)
        environment["PYTHONPATH"] = str(FOLDER)
    done = subprocess.run(
        [sys.executable, str(HERE / "triton_launches.py"), str(arch)],
        env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["tried"] > 100
    assert not result["failed"]
