"""compute-sanitizer over every op at the smallest sizes, in a process of its own."""

from __future__ import annotations

import functools
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from benchmarks.on_gpu import probes_rest, probes_sae
from benchmarks.on_gpu.device import Device
from benchmarks.on_gpu.item import AbsentError, Context, Item, Row, backends_here, said
from benchmarks.on_gpu.probes import SMALL, TINY
from microtome.errors import BackendError

TOOLS = ("memcheck", "racecheck")
SECONDS = 120.0
FOUND = 7  # exit code that the tool is told to give where it found an error
MAIN = Path(__file__).resolve().parents[1] / "gpu.py"
NAME = "compute-sanitizer"


def program() -> str | None:
    """compute-sanitizer, if it is there: on the path, or beside nvcc or in CUDA_HOME."""
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), nvcc and str(Path(nvcc).resolve().parents[1])]
    folders = [f"{home}/{part}" for home in homes if home for part in ("bin", NAME)]
    return shutil.which(NAME) or shutil.which(NAME, path=os.pathsep.join(folders))


def once(which: str) -> int:
    """Every op once, small: what the sanitizer watches. `which` is "card" or "dry".

    Prints a line for each op, so that a report's place can be told.
    """
    device = Device(dry=which == "dry")
    shape = TINY if device.dry else SMALL
    table = [*probes_sae.probes(), *probes_rest.probes()]
    for probe in table[::5] if device.dry else table:
        try:
            for backend in backends_here(probe.op):
                for kind in ("random",) if device.dry else ("random", "dense"):
                    call = probe.make(kind, shape, device)
                    if call is not None:
                        call.once(backend)
                        device.synchronise()
                print(f"sanitize: {probe.name} {backend} done", flush=True)
        except (AbsentError, BackendError) as error:
            print(f"sanitize: {' '.join(str(error).split())[:200]}", flush=True)
        except Exception as error:
            print(f"sanitize: {probe.name} raised {said(error)}", flush=True)
            if not device.healthy():
                return 1
    return 0


def run(tool: str, context: Context) -> list[Row]:
    """One row for a tool."""
    base = {"part": 1, "item": tool, "shape": ""}
    binary = program()
    dry = context.device.dry
    if binary is None and not dry:
        return [{**base, "status": "absent", "note": "compute-sanitizer is not on this machine"}]
    watched = [sys.executable, str(MAIN), "--sanitize", "dry" if dry else "card"]
    command = [binary or "", "--tool", tool, "--error-exitcode", str(FOUND), *watched]
    if dry:
        code = once("dry") if tool == TOOLS[0] else 0  # without a card the tools are one
        return [{**base, "status": "ok" if code == 0 else "FAILED", "note": f"exit code {code}"}]
    return [{**base, **judged(*watch(command, SECONDS))}]


def watch(command: list[str], seconds: float) -> tuple[int | None, str]:
    """Run a command in a session of its own; its exit code, None for too long, and its output."""
    # Freed memory must not be handed out again, or an access out of bounds hits a neighbour unseen.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    process = subprocess.Popen(
        command, env=environment, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        return None, output
    return process.returncode, output


def judged(code: int | None, output: str) -> Row:
    """Status and note of what the tool said."""
    done = len(re.findall(r"^sanitize: .* done$", output, re.MULTILINE))
    raised = re.findall(r"^sanitize: .* raised .*$", output, re.MULTILINE)
    summary = re.findall(r"ERROR SUMMARY: (.*)|RACECHECK SUMMARY: (.*)", output)
    said_last = " ".join("".join(pair) for pair in summary) or output.strip()[-200:]
    if code is None:
        return {"status": "skipped", "note": f"ended after {SECONDS:.0f} s; {done} ops were clean"}
    if code == FOUND:
        return {"status": "WRONG", "note": said_last, "output": output[-4000:]}
    if code or raised:
        note = f"exit code {code}; {'; '.join(raised) or said_last}"
        return {"status": "FAILED", "note": note, "output": output[-4000:]}
    return {"status": "ok", "note": f"{done} ops; {said_last}"}


def items() -> list[Item]:
    """A run for each tool, after the correctness of all ops."""
    return [
        Item(1, tool, "", functools.partial(run, tool), SECONDS, gib=4.0, compiles=False)
        for tool in TOOLS
    ]
