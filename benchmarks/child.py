"""Processes that measure: each contender starts from the same empty one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

RUN = Path(__file__).resolve().parent / "run.py"
Row = dict[str, Any]


def child(
    module: str, *arguments: str, threads: int = 2, timeout: float = 3600.0
) -> tuple[list[Row], str]:
    """Run `benchmarks.<module>.main(result_path, *arguments)` in a process of its own.

    Args:
        module: name under benchmarks.
        *arguments: passed on as strings.
        threads: OpenMP threads.
        timeout: seconds after which the process is ended.

    Returns:
        The rows it left, even if it died half-way, and its output with how it ended.
    """
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        # With triton installed sparsify picks its CUDA decoder, also on a CPU.
        "SPARSIFY_DISABLE_TRITON": "1",
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "disabled",
    }
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "rows.jsonl"
        command = [sys.executable, str(RUN), "--child", module, str(result), *arguments]
        try:
            done = subprocess.run(
                command,
                env=environment,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=timeout,
            )
            output, ended = (
                done.stdout,
                "" if done.returncode == 0 else f"\nchild: exit code {done.returncode}",
            )
        except subprocess.TimeoutExpired as error:
            output, ended = str(error.stdout or ""), f"\nchild: ended after {timeout:.0f} s"
        rows = (
            [json.loads(line) for line in result.read_text().splitlines()]
            if result.exists()
            else []
        )
    return rows, output + ended


def ended_badly(output: str) -> str:
    """The last lines of a child that `child` reports as ended early, or an empty string."""
    lines = [line for line in output.splitlines() if line.strip()]
    return " ".join(lines[-2:]) if lines and lines[-1].startswith("child: ") else ""
