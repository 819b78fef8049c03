"""Runs of several ranks: folders, resuming, errors, interrupts, the command."""

import errno
import os
import shutil
import signal
import socket
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from shared import D, F, mine_of, moved, refuses, rows, same
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from microtome import SAE, TopK, TrainConfig, cli, evaluate, shard, train
from microtome.errors import (
    ArgumentError,
    CheckpointError,
    DistributedError,
    NonFiniteError,
    ShapeError,
    StoreError,
)
from microtome.models import ActivationStore
from microtome.sae import InMemory, files, sharded_step
from microtome.sae.log import JsonLines
from microtome.sae.sharded_step import ShardedStep

SETTINGS = {"steps": 12, "batch_size": 20, "lr": 5e-3, "log_every": 1, "dead_after_tokens": 60}
DATA = rows(11, 240)


class Trips(InMemory):
    """Activations whose batch number 6 (the seventh) does something first."""

    def __init__(self, what) -> None:
        super().__init__(DATA)
        self.what = what

    def batches(self, batch_size, *, seed, start=0):
        batches = super().batches(batch_size, seed=seed, start=start)
        for number, batch in enumerate(batches, start):
            yield self.what(batch) if number == 6 else batch


class Unreadable(InMemory):
    """Activations that something happens to when they are read."""

    def __init__(self, what) -> None:
        super().__init__(DATA)
        self.what = what

    def rows(self, index):
        return self.what(super().rows(index))


def training(ours, out: Path | None, source=DATA, **changes):
    config = TrainConfig(**{**SETTINGS, "checkpoint_every": 5, **changes})
    return train(ours, source, config, out=out, progress=False)


def same_as_a_whole_run(ours, **changes) -> None:
    """The weights are those of a run of as many ranks that nobody stopped."""
    whole = shard(moved(5))
    training(whole, None, **changes)
    for a, b in zip(ours.parameters_in_order, whole.parameters_in_order, strict=True):
        same(a, b)


def a_run_leaves_what_one_process_would_leave(rank, size, folder):
    ours, sae = shard(moved(5)), moved(5)
    held = rows(12, 50)
    config = TrainConfig(**{**SETTINGS, "checkpoint_every": 5, "eval_every": 6})
    result = train(ours, DATA, config, held_out=held, out=folder / "run", progress=False)
    alone = train(sae, DATA, config, held_out=held, progress=False)
    assert result.sae is ours
    assert [line["step"] for line in result.history] == list(range(1, 13))
    for name, value in alone.metrics.items():
        assert abs(result.metrics[name] - value) <= 1e-4 * abs(value), name
    assert "held_out_fvu" in result.history[5]
    left = sorted(path.name for path in (folder / "run" / "checkpoints").iterdir())
    assert left == ["step_10", "step_12"]
    shards = {f"shard_{r}.safetensors" for r in range(size)}
    files_there = {path.name for path in (folder / "run/checkpoints/step_12").iterdir()}
    assert files_there == {"training.json", "sha256.json", *shards}
    kinds = {path.suffix for path in (folder / "run").rglob("*") if path.is_file()}
    assert kinds == {".json", ".jsonl", ".safetensors"}, "no pickle"
    read = SAE.from_pretrained(folder / "run" / "sae")
    for a, b in zip(ours.parameters_in_order, read.parameters_in_order, strict=True):
        same(a, b if b.shape == (D,) else mine_of(ours, b))
    again = training(ours, folder / "run", eval_every=6)  # nothing is left to do
    assert again.history == result.history or rank
    assert len((folder / "run" / "log.jsonl").read_text().splitlines()) == 12


def an_interrupt_on_one_rank_stops_all_after_the_same_step(rank, size, folder):
    def pressed(batch):
        if rank == size - 1:
            os.kill(os.getpid(), signal.SIGINT)
        return batch

    ours = shard(moved(5))
    refuses(KeyboardInterrupt, "", lambda: training(ours, folder / "stopped", Trips(pressed)))
    left = sorted(path.name for path in (folder / "stopped" / "checkpoints").iterdir())
    assert left == ["step_5", "step_7"]
    # Other numbers of ranks, and one process, go on from copies: cases of `lives`.
    dist.barrier()
    if rank == 0:
        for name in ("elsewhere", "alone"):
            shutil.copytree(folder / "stopped", folder.parent / f"{name}-{size}")
    dist.barrier()
    ours = shard(moved(5))
    result = training(ours, folder / "stopped")
    assert [line["step"] for line in result.history] == list(range(1, 13))
    same_as_a_whole_run(ours)


def rounded_moments_resume_bit_for_bit(rank, size, folder):
    for moments in ("bfloat16", "int8"):
        out, changes = folder / moments, {"moments": moments, "checkpoint_every": 3}

        def stop(batch):
            msg = "gone"
            raise StoreError(msg)

        ours = shard(moved(5))
        refuses(StoreError, "gone", lambda: training(ours, out, Trips(stop), **changes))  # noqa: B023
        ours = shard(moved(5))
        training(ours, out, **changes)
        same_as_a_whole_run(ours, **changes)


def an_error_of_one_rank_ends_all_with_the_same_message(rank, size, folder):
    last = size - 1

    def spoiled(batch):
        batch[3] = float("nan")
        return batch

    before = None
    ours = shard(moved(5))
    refuses(
        NonFiniteError,
        "train: step 7 (batch 6 of seed 0): topk_encode: x holds NaN or infinity in row 3.",
        lambda: training(ours, None, Trips(spoiled)),
    )
    before = [p.clone() for p in ours.parameters_in_order]
    step = ShardedStep(ours, TrainConfig(steps=1))
    refuses(NonFiniteError, "row 3", lambda: step.take(spoiled(rows()), 1.0, 1))
    assert all(torch.equal(a, b) for a, b in zip(before, ours.parameters_in_order, strict=True))

    def gone(batch):
        if rank == last:
            msg = "shard 4 is gone."
            raise StoreError(msg)
        return batch

    refuses(StoreError, f"rank {last}: shard 4 is gone.", lambda: training(ours, None, Trips(gone)))

    def odd(batch):
        return 1 / 0 if rank == last else batch

    kind, said = (
        (ZeroDivisionError, "division by zero")
        if rank == last
        else (DistributedError, f"rank {last}: ZeroDivisionError: division by zero")
    )
    refuses(kind, said, lambda: training(ours, None, Trips(odd)))
    refuses(kind, said, lambda: evaluate(ours, Unreadable(odd)))

    def broken(*_, **__):
        return 1 / 0

    usual, out = sharded_step.sae_update, folder / "half"
    step = lambda batch: setattr(sharded_step, "sae_update", broken if rank == last else usual)  # noqa: E731
    try:  # a rank that is half updated: no checkpoint is made of it
        refuses(
            kind, said,
            lambda: training(ours, out, Trips(lambda x: (step(x), x)[1]), checkpoint_every=7),
        )  # fmt: skip
    finally:
        sharded_step.sae_update = usual
    assert not list((out / "checkpoints").glob("step_*"))
    with torch.no_grad():
        if rank == last:
            ours.local.W_enc[2, 1] = float("inf")
    refuses(NonFiniteError, f"rank {last}: ", lambda: ours.encode(rows()))
    where = "W_enc holds NaN or infinity in row 2. Drop or repair these rows"
    refuses(NonFiniteError, where, lambda: ours.encode(rows()))
    refuses(
        DistributedError,
        f"encode: rank {last} was given other rows than rank 0. Every rank reads every batch",
        lambda: shard(moved(5)).encode(rows(rank // last)),
    )


def a_full_disk_on_one_rank_ends_all_and_leaves_the_checkpoint_before(rank, size, folder):
    usual, last = files._open, size - 1

    def full(path):
        if rank == last and ".step_10." in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        return usual(path)

    files._open = full
    try:
        said = f"rank {last}: cannot write {folder}"
        call = lambda: training(shard(moved(5)), folder / "full")  # noqa: E731
        refuses(CheckpointError, said, call)
        dist.barrier()
        left = sorted(path.name for path in (folder / "full" / "checkpoints").iterdir())
        assert left == ["step_5"], left
    finally:
        files._open = usual
    usual = JsonLines.write

    def full_log(self, line):
        if line["step"] == 8:
            with files.disk_errors(self.path):
                raise OSError(errno.ENOSPC, "No space left on device")
        usual(self, line)

    JsonLines.write = full_log  # of the first rank, which alone has a log
    try:
        refuses(CheckpointError, "rank 0: cannot write ", call)
    finally:
        JsonLines.write = usual
    ours = shard(moved(5))
    training(ours, folder / "full")
    same_as_a_whole_run(ours)


def a_shard_that_is_damaged_sends_all_ranks_to_the_checkpoint_before(rank, size, folder):
    out = folder / "damaged"
    training(shard(moved(5)), out)
    dist.barrier()
    if rank == 0:
        for step in ("step_12", "step_10"):
            path = out / "checkpoints" / step / f"shard_{size - 1}.safetensors"
            path.write_bytes(path.read_bytes()[:-20])
            if step == "step_12":
                (out / "checkpoints" / ".step_9.shards.part").mkdir()
    dist.barrier()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        refuses(
            CheckpointError,
            f"rank {size - 1}: no whole checkpoint in {out / 'checkpoints'}: checkpoint",
            lambda: training(shard(moved(5)), out),
        )
    assert len(said) == (2 if rank == size - 1 else 0)
    dist.barrier()
    assert not (out / "checkpoints" / ".step_9.shards.part").exists()
    if rank == 0:
        shutil.rmtree(out / "checkpoints" / "step_12")
        shutil.rmtree(out / "checkpoints" / "step_10")
    dist.barrier()
    ours = shard(moved(5))
    training(ours, out)
    same_as_a_whole_run(ours)


def what_does_not_fit_is_refused_by_every_rank(rank, size, folder):
    sae = moved(5)
    ours = shard(sae)
    wrapped = torch.nn.parallel.DistributedDataParallel(sae)
    refuses(ArgumentError, "shard: sae must be an SAE, got DistributedDataParallel. Its wrapper "
            "would wait for gradients that training never forms: pass .module.",
            lambda: shard(wrapped))  # fmt: skip
    refuses(ArgumentError, "got DistributedDataParallel. Training forms no gradients that a wrapper"
            " could reduce: pass shard(sae.module)", lambda: training(wrapped, None))  # fmt: skip
    mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("data",))
    refuses(ArgumentError, "shard: the mesh must have the dimensions ('feature',) or ('data', "
            "'feature'), has ('data',).", lambda: shard(sae, mesh))  # fmt: skip
    turned = DeviceMesh("cpu", list(range(size))[::-1], mesh_dim_names=("feature",))
    refuses(ArgumentError, "shard: the mesh's ranks must ascend, are [", lambda: shard(sae, turned))
    few = SAE(D, size - 1, TopK(1))
    refuses(DistributedError, f"shard: f={size - 1} features over {size} ranks, 1 each, leave some "
            f"without any. Use at most {size - 1} ranks", lambda: shard(few))  # fmt: skip
    refuses(DistributedError, "shard: the SAE of rank 1 is not that of rank 0. Build it with",
            lambda: shard(SAE(D, F, TopK(5), seed=rank)))  # fmt: skip
    refuses(ArgumentError, "a sharded SAE is trained by the fused optimizers 'adam', 'adamw', 'sgd'"
            " and 'signsgd', got the callable torch.optim.adam:Adam.",
            lambda: training(ours, None, optimizer=torch.optim.Adam))  # fmt: skip
    refuses(ArgumentError, "a sharded SAE is trained with precision='float32', got precision='bfl",
            lambda: training(ours, None, precision="bfloat16"))  # fmt: skip
    refuses(ArgumentError, "ShardedSAE: cannot be moved or cast", lambda: ours.double())
    refuses(ShapeError, "x must be [..., d=12], got shape [3].",
            lambda: ours.encode(rows(0, 1, 3)[0]))  # fmt: skip
    refuses(ShapeError, "the code must have f=50 features, got 6.",
            lambda: ours.decode(moved(5, 6).encode(rows())))  # fmt: skip
    refuses(CheckpointError, "holds a run with other settings: lr was", lambda: [
        training(ours, folder / "other", lr=rate) for rate in (0.1, 0.2)])  # fmt: skip


def the_command_trains_under_torchrun(rank, size, folder):
    if size == 2:
        _cli(rank, size, folder)


def _cli(rank, size, folder):
    store = folder / "store"
    if rank == 0:
        kind = {"site": "resid_pre.0", "model_name": "toy", "d": D, "context_length": 8}
        with ActivationStore.write(store, **kind) as writer:
            writer.add(rows(3, 400), torch.zeros(400, dtype=torch.int64))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = torch.tensor([free.getsockname()[1]])
        dist.broadcast(port, 0)
        dist.destroy_process_group()
    out = folder / "cli"
    words = ["train", "--store", str(store), "--out", str(out), "--features", "51", "--k", "4"]
    words += ["--steps", "5", "--batch-size", "32"]
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank),
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(int(port)))  # fmt: skip
    log = folder / f"said-{rank}"
    with log.open("w") as said:
        stdout, sys.stdout = sys.stdout, said
        try:
            assert cli.main(words) == 0
        finally:
            sys.stdout = stdout
    assert not dist.is_initialized()
    assert ("fvu" in log.read_text()) == (rank == 0)
    assert (out / "checkpoints" / "step_5" / f"shard_{rank}.safetensors").exists()
    assert SAE.from_pretrained(out / "sae").n_features == 51


CASES = [
    a_run_leaves_what_one_process_would_leave,
    an_interrupt_on_one_rank_stops_all_after_the_same_step,
    rounded_moments_resume_bit_for_bit,
    an_error_of_one_rank_ends_all_with_the_same_message,
    a_full_disk_on_one_rank_ends_all_and_leaves_the_checkpoint_before,
    a_shard_that_is_damaged_sends_all_ranks_to_the_checkpoint_before,
    what_does_not_fit_is_refused_by_every_rank,
    the_command_trains_under_torchrun,
]
