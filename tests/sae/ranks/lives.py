"""Runs that die and go on: killed, or on another number of ranks."""

import os
import random
import shutil
import signal
import time
from pathlib import Path

import torch
from runs import DATA, SETTINGS, same_as_a_whole_run, training
from shared import D, mine_of, moved, same

from microtome import SAE, TrainConfig, shard, train
from microtome.sae import checkpoint

KILLS, LONG = 2, {"steps": 24, "checkpoint_every": 1}


def killed(group, size: int, folder: Path) -> dict[str, str]:
    """Kill one rank of a run at a random moment, again and again; what should not have been."""
    lots = random.Random(size)
    checkpoints = folder / "killed" / "checkpoints"
    for kill in range(KILLS):
        children = group(size, folder, [a_life])
        least = 3 * kill + 1  # progress at every life
        until = time.monotonic() + 30
        while checkpoint.numbered(checkpoints)[:1] < [least] and time.monotonic() < until:
            time.sleep(0.002)
        time.sleep(lots.uniform(0, 0.02))
        os.kill(children[lots.randrange(size)], signal.SIGKILL)
        ended = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        if sorted(ended)[0] != -signal.SIGKILL:
            return {"killed": f"the run was over before a rank was killed: {ended}"}
    for left in folder.glob("wrong-*.json"):  # those that survived lost their peer
        left.unlink()
    return {}


def a_life(rank, size, folder):
    training(shard(moved(5)), folder / "killed", **LONG)


def a_run_whose_ranks_are_killed_ends_with_the_bits_of_one_that_was_not(rank, size, folder):
    ours = shard(moved(5))
    result = training(ours, folder / "killed", **LONG)
    assert [line["step"] for line in result.history] == list(range(1, 25))
    same_as_a_whole_run(ours, **LONG)


def another_number_of_ranks_goes_on_with_the_same_weights(rank, size, folder):
    other = {2: 3, 3: 2}[size]
    out = folder.parent / f"elsewhere-{other}"
    ours = shard(moved(5))
    whole = checkpoint.load(out / "checkpoints" / "step_7")
    part = checkpoint.load(out / "checkpoints" / "step_7", ours.features)
    for name, tensor in part.tensors.items():
        there = whole.tensors[name]
        same(tensor, there if name.endswith("b_dec") else mine_of(ours, there), name)
    for mine, there in zip(part.saved.tensors, whole.saved.tensors, strict=True):
        same(mine, there if there.shape == (D,) else mine_of(ours, there))
    result = training(ours, out)
    assert [line["step"] for line in result.history] == list(range(1, 13))
    uninterrupted = shard(moved(5))
    training(uninterrupted, None)
    for a, b in zip(ours.parameters_in_order, uninterrupted.parameters_in_order, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def one_process_and_several_ranks_go_on_from_each_other(rank, size, folder):
    if rank == 0:
        sae = moved(5)
        config = TrainConfig(**{**SETTINGS, "checkpoint_every": 5})
        result = train(sae, DATA, config, out=folder.parent / f"alone-{size}", progress=False)
        assert [line["step"] for line in result.history] == list(range(1, 13))
        assert isinstance(result.sae, SAE)
        whole = moved(5)
        train(whole, DATA, config, out=folder / "one", progress=False)
        for a, b in zip(sae.parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
        (folder / "one" / "sae").rename(folder / "one" / "by one process")
        shutil.rmtree(folder / "one" / "checkpoints" / "step_12")
    torch.distributed.barrier()
    ours = shard(moved(5))
    result = training(ours, folder / "one")
    assert [line["step"] for line in result.history] == list(range(1, 13))
    read = SAE.from_pretrained(folder / "one" / "sae")
    before = SAE.from_pretrained(folder / "one" / "by one process")
    for a, b in zip(read.parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


CASES = [
    a_run_whose_ranks_are_killed_ends_with_the_bits_of_one_that_was_not,
    another_number_of_ranks_goes_on_with_the_same_weights,
    one_process_and_several_ranks_go_on_from_each_other,
]
