"""Feature-parallel SAEs on 2, 3 and 4 gloo processes: the cases of tests/sae/ranks."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from microtome import SAE, TopK, shard
from microtome.errors import DistributedError, NonFiniteError, OutOfMemoryError, StoreError
from microtome.sae.ranks import _packed, _unpacked

RANKS = Path(__file__).parent / "ranks"
ONE_ROW = ("exact", "runs", "lives")
FILES = {2: (*ONE_ROW, "grid"), 3: ONE_ROW, 4: ("grid",)}


def cases(size: int) -> list[str]:
    """The names in the lists CASES: read, not imported, for only forks of a fresh process run."""
    names = []
    for file in FILES[size]:
        for node in ast.parse((RANKS / f"{file}.py").read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "CASES":
                names += ast.unparse(node.value).strip("[]").split(", ")
    return names


@pytest.fixture(scope="module")
def wrong(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """What went wrong, by number of ranks and case; all in one process and its forks."""
    folder = str(tmp_path_factory.mktemp("ranks"))
    command = [sys.executable, "-W", "error", str(RANKS / "group.py"), folder, *map(str, FILES)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = "lo"  # a machine's own name may lead nowhere
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=500, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    for size in found:
        unknown = set(found[size]) - set(cases(int(size)))
        assert not unknown, "\n".join(found[size][name] for name in unknown)
    return found


@pytest.mark.parametrize(("size", "case"), [(size, case) for size in FILES for case in cases(size)])
def test_on_several_ranks(size, case, wrong):
    assert case not in wrong[str(size)], wrong[str(size)][case]


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (StoreError("half\na file"), StoreError, "half\na file"),
        (NonFiniteError(), NonFiniteError, ""),
        (OutOfMemoryError("3 GB"), OutOfMemoryError, "3 GB"),
        (KeyError("k"), DistributedError, "KeyError: 'k'"),
        (StoreError("é" * 5000), StoreError, None),
    ],
)
def test_an_error_goes_from_rank_to_rank_as_bytes(error, kind, message):
    error.late = isinstance(error, StoreError)
    found, late, said = _unpacked(_packed(error))
    assert (found, late) == (kind, error.late)
    assert said == message or (message is None and said.startswith("é" * 1000))
    assert _unpacked(_packed(None)) is None


def test_without_a_process_group_sharding_is_refused():
    with pytest.raises(DistributedError, match=r"no process group. Start the program with torchr"):
        shard(SAE(4, 8, TopK(2)))
    assert not torch.distributed.is_initialized()
