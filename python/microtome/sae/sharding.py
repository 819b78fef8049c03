"""Where features are shared out: the checks, the lines of a mesh, and what torchrun started."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from microtome.errors import ArgumentError, DistributedError
from microtome.sae.exchange import Line
from microtome.sae.ranks import Ranks
from microtome.sae.sae import SAE
from microtome.sae.sharded import FEATURE, ShardedSAE

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

DATA = "data"


def shard(sae: SAE, mesh: DeviceMesh | None = None) -> ShardedSAE:
    """Share an SAE's features out to the ranks of a device mesh.

    Args:
        sae: the same on every rank (built with the same seed, or read from the same file), where
            it is to be trained. It is not changed, and not needed afterwards.
        mesh: a DeviceMesh with a dimension "feature", over which the features are shared out, and
            perhaps one before it, "data": every row of the mesh then holds the whole SAE, and
            training shares each batch out to the rows. None for one row of all ranks.

    Returns:
        A ShardedSAE: rank r of a row holds features r * c to (r + 1) * c with c = f / ranks of a
        row, rounded up.

    Raises:
        ArgumentError: not an SAE, or a mesh that does not fit.
        DistributedError: no process group, too few features, or another SAE on another rank.
    """
    if not isinstance(sae, SAE):
        msg = f"shard: sae must be an SAE, got {type(sae).__name__}."
        if hasattr(sae, "module"):
            msg += " Its wrapper would wait for gradients that training never forms: pass .module."
        raise ArgumentError(msg)
    if not (dist.is_available() and dist.is_initialized()):
        msg = "shard: there is no process group. Start the program with torchrun and call "
        msg += "torch.distributed.init_process_group() first, or train the SAE itself."
        raise DistributedError(msg)
    if mesh is None:
        from torch.distributed.device_mesh import init_device_mesh

        kind, size = sae.W_enc.device.type, dist.get_world_size()
        mesh = init_device_mesh(kind, (size,), mesh_dim_names=(FEATURE,))
    names = mesh.mesh_dim_names or ()
    if names not in ((FEATURE,), (DATA, FEATURE)):
        msg = "shard: the mesh must have the dimensions ('feature',) or ('data', 'feature'), has "
        msg += f'{names}. Make it with init_device_mesh("cpu", (2,), '
        msg += 'mesh_dim_names=("feature",)).'
        raise ArgumentError(msg)
    members = mesh.mesh.flatten().tolist()
    if members != sorted(members):
        msg = f"shard: the mesh's ranks must ascend, are {members}."
        raise ArgumentError(msg)
    size, f = mesh.size(names.index(FEATURE)), sae.n_features
    each = -(-f // size)
    if each * (size - 1) >= f:
        most = -(-f // each)
        msg = f"shard: f={f} features over {size} ranks, {each} each, leave some without any. Use "
        msg += f"at most {most} ranks or more features."
        raise DistributedError(msg)
    ranks = _ranks_of(mesh, sae.W_enc.device)
    _check_same(sae, ranks)
    return ShardedSAE(sae, mesh, ranks)


@contextmanager
def torchrun(sae: SAE) -> Iterator[SAE | ShardedSAE]:
    """The SAE shared out to the processes that torchrun started, where it did; else the SAE.

    Opens the process group for the block, by gloo on a CPU and NCCL on a GPU.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield sae
        return
    dist.init_process_group("nccl" if sae.W_enc.is_cuda else "gloo")
    try:
        yield shard(sae)
    finally:
        dist.destroy_process_group()


def _ranks_of(mesh: DeviceMesh, device: torch.device) -> Ranks:
    """The lines of a mesh that `shard` has let pass."""
    features = Line(mesh.get_group(FEATURE))
    if mesh.ndim == 1:
        return Ranks(features, None, features, device)
    members = mesh.mesh.flatten().tolist()
    everyone = (
        dist.group.WORLD
        if len(members) == dist.get_world_size()
        else dist.new_group(members, use_local_synchronization=True)
    )
    assert everyone is not None  # there is a process group
    return Ranks(features, Line(mesh.get_group(DATA)), Line(everyone), device)


def _check_same(sae: SAE, ranks: Ranks) -> None:
    """Raise unless the ranks were given the same SAE."""
    digest = hashlib.sha256(repr((sae, sae.W_enc.dtype)).encode())
    for parameter in sae.parameters_in_order:
        raw = parameter.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(memoryview(raw.numpy()))
    mine = torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)
    (all_,) = ranks.everyone.gather(mine.to(ranks.device))
    differ = (all_ != all_[0]).any(1).nonzero().flatten().tolist()
    if differ:
        msg = f"shard: the SAE of rank {differ[0]} is not that of rank 0. Build it with the "
        msg += "same arguments and seed on every rank, or read it from the same file."
        raise DistributedError(msg)
