"""Groups of gloo processes that run cases together; tests/sae/test_parallel.py starts this file.

`python group.py FOLDER 2 3 4` runs the cases on 2, 3 and 4 processes, forks of this one, and prints
as JSON what went wrong where.
"""

import json
import os
import sys
import tempfile
import time
import traceback
from datetime import timedelta
from pathlib import Path

import exact
import grid
import lives
import runs
import torch
import torch._dynamo  # here, or every child would import it for its first DTensor
import torch.distributed as dist
import torch.distributed.tensor


def run(rank: int, size: int, folder: Path, cases) -> dict[str, str]:
    """What went wrong on this rank, by case."""
    wrong = {}
    for case in cases:
        began = time.perf_counter()
        try:
            case(rank, size, folder)
        except BaseException:
            wrong[case.__name__] = f"rank {rank}: {traceback.format_exc()}"
        if os.environ.get("TIMES") and rank == 0:
            print(f"{time.perf_counter() - began:6.2f} {case.__name__}", file=sys.stderr)
    return wrong


def group(size: int, folder: Path, cases) -> list[int]:
    """Start a group; the ranks leave wrong-RANK.json in the folder. Returns their process ids."""
    folder.mkdir(parents=True, exist_ok=True)
    meeting = Path(tempfile.mkdtemp()) / "ranks"
    children = []
    for rank in range(size):
        child = os.fork()
        if child:
            children.append(child)
            continue
        code = 1
        try:
            dist.init_process_group(
                "gloo", init_method=f"file://{meeting}", rank=rank, world_size=size,
                timeout=timedelta(seconds=60),
            )  # fmt: skip
            wrong = run(rank, size, folder, cases)
            (folder / f"wrong-{rank}.json").write_text(json.dumps(wrong))
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return children


def wait_for(children: list[int], size: int, folder: Path) -> dict[str, str]:
    """What went wrong on any rank, by case."""
    ended = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    wrong = {"group": f"exit codes {ended}"} if any(ended) else {}
    for rank in range(size):
        path = folder / f"wrong-{rank}.json"
        for case, said in (json.loads(path.read_text()) if path.exists() else {}).items():
            wrong[case] = said + "\n" + wrong.get(case, "")
        path.unlink(missing_ok=True)
    return wrong


def all_groups(began: Path, sizes: list[int]) -> dict[int, dict[str, str]]:
    """What went wrong, by size and case; on 4 processes only the cases of a grid are run."""
    wrong = {}
    for size in sizes:
        cases = grid.CASES if size == 4 else [*exact.CASES, *runs.CASES]
        folder = began / str(size)
        wrong[size] = wait_for(group(size, folder, cases), size, folder)
    for size in sizes:
        folder, cases = began / str(size), list(lives.CASES)
        if size == 4:
            continue
        if size == 2:
            cases += grid.CASES
        wrong[size] |= lives.killed(group, size, folder)
        wrong[size] |= wait_for(group(size, folder, cases), size, folder)
    return wrong


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(all_groups(Path(sys.argv[1]), [int(word) for word in sys.argv[2:]])))
