"""Rows of ranks, a mesh ("data", "feature"): beside one row of the same mesh that does it all."""

import os
import signal

import torch
import torch.distributed as dist
from exact import exchange_bytes, on_whole_numbers
from runs import Trips, training
from shared import D, N, mine_of, moved, refuses, rows, same, same_state
from torch.distributed.device_mesh import init_device_mesh

from microtome import TrainConfig, evaluate, shard
from microtome.errors import NonFiniteError, StoreError
from microtome.sae.sharded_step import ShardedStep
from microtome.sae.step import FusedStep


def mesh_of(size: int):
    """Two rows where there are four ranks, else rows of one rank each."""
    shape = (2, 2) if size == 4 else (size, 1)
    return init_device_mesh("cpu", shape, mesh_dim_names=("data", "feature"))


def rows_of_ranks_step_to_the_bits_of_one_row(rank, size, folder):
    mesh = mesh_of(size)
    for optimizer, moments, n in (("adam", "float32", N), ("sgd", "float32", 3),
                                  ("adamw", "int8", N), ("adam", "float32", 1)):  # fmt: skip
        sae = moved(5)
        with torch.no_grad():
            sae.b_enc[12:20], sae.b_enc[30:40] = -9.0, -9.0  # they never fire, so they die
        grid, line = shard(sae, mesh), shard(sae, mesh["feature"])
        assert (grid.counts, grid.features) == (line.counts, line.features)
        config = TrainConfig(
            steps=8, lr=1e-2, optimizer=optimizer, moments=moments, dead_after_tokens=3 * n, k_aux=5
        )
        both = ShardedStep(grid, config), ShardedStep(line, config)
        revived, before = 0, grid.ranks.received
        for s in range(1, 9):
            x = rows(s, n)
            one, all_ = (step.take(x, 1.0, s) for step in both[::-1])
            for name in ("fvu", "auxk", "loss", "l0", "n_dead", "lr"):
                assert getattr(one, name) == getattr(all_, name), name
            revived += all_.auxk > 0
        assert revived
        if n == N:  # a rank may hold all of a row's entries, and AuxK's come on top
            width, height = grid.ranks.size, size // grid.ranks.size
            least = exchange_bytes(N, D, 5, width, 0, height)["step"]
            most = exchange_bytes(N, D, 5 * width, width, 5 * width, height)["step"] + 1000 * size
            assert 8 * least <= grid.ranks.received - before <= 8 * most
        state = [[*step.sae.parameters_in_order, *step.state()[0].values()] for step in both]
        for a, b in zip(*state, strict=True):
            same(a, b)


def rows_of_ranks_step_on_whole_numbers_as_one_process(rank, size, folder):
    sae, x = on_whole_numbers(True)
    ours = shard(sae, mesh_of(size))
    config = TrainConfig(steps=1, lr=0.25, auxk_coefficient=0.25, k_aux=8)
    alone, step = FusedStep(sae, config), ShardedStep(ours, config)
    alone.since_fired[20:] = config.dead_after_tokens
    step.since_fired.copy_(mine_of(ours, alone.since_fired))
    one, all_ = alone.take(x, 1.0, 1), step.take(x, 1.0, 1)
    assert (one.auxk, one.loss, one.l0) == (all_.auxk, all_.loss, all_.l0)
    same_state(ours, step, sae, alone)


def a_run_of_rows_of_ranks_stops_together_and_goes_on(rank, size, folder):
    mesh, last, out = mesh_of(size), size - 1, folder / "grid"

    def pressed(batch):
        if rank == last:
            os.kill(os.getpid(), signal.SIGINT)
        return batch

    ours = shard(moved(5), mesh)
    refuses(KeyboardInterrupt, "", lambda: training(ours, out, Trips(pressed)))
    dist.barrier()
    shards = sorted(path.name for path in (out / "checkpoints" / "step_7").glob("shard_*"))
    assert shards == [f"shard_{r}.safetensors" for r in range(ours.ranks.size)]
    ours, line = shard(moved(5), mesh), shard(moved(5), mesh["feature"])
    training(ours, out)
    training(line, None)
    for a, b in zip(ours.parameters_in_order, line.parameters_in_order, strict=True):
        same(a, b)
    x = rows(3, 40)
    assert evaluate(ours, x).fvu == evaluate(line, x).fvu


def an_error_of_one_rank_ends_every_row(rank, size, folder):
    mesh, last = mesh_of(size), size - 1

    def gone(batch):
        if rank == last:
            msg = "shard 4 is gone."
            raise StoreError(msg)
        return batch

    def spoiled(batch):
        batch[17, D - 1] = float("inf")
        return batch

    ours = shard(moved(5), mesh)
    refuses(StoreError, f"rank {last}: shard 4 is gone.", lambda: training(ours, None, Trips(gone)))
    said = "train: step 7 (batch 6 of seed 0): train: x holds NaN or infinity in row 17."
    refuses(NonFiniteError, said, lambda: training(ours, None, Trips(spoiled)))


CASES = [
    rows_of_ranks_step_to_the_bits_of_one_row,
    rows_of_ranks_step_on_whole_numbers_as_one_process,
    a_run_of_rows_of_ranks_stops_together_and_goes_on,
    an_error_of_one_rank_ends_every_row,
]
