"""A sparse autoencoder whose features are shared out to the ranks of torch.distributed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from microtome.errors import ArgumentError, DistributedError, ShapeError
from microtome.ops import sparse_decode, topk_encode
from microtome.sae import saelens_layout
from microtome.sae.code import SparseCode
from microtome.sae.exchange import Line
from microtome.sae.ranks import Ranks
from microtome.sae.sae import SAE, TopK
from microtome.sae.sharded_top_k import own_entries, top_k_of_ranks

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

FEATURE, DATA = "feature", "data"


def shard(sae: SAE, mesh: DeviceMesh | None = None) -> ShardedSAE:
    """Share an SAE's features out to the ranks of a device mesh.

    Args:
        sae: the same on every rank (built with the same seed, or read from the same file). It is
            not changed, and not needed afterwards.
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
    return ShardedSAE(sae, mesh)


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


class ShardedSAE(nn.Module):
    """An SAE of which every rank holds some features. `shard` makes it.

    All ranks call its methods in the same order with the same inputs, and get the same bits back.
    It takes the place of an SAE in `train` and `evaluate`.

    Attributes:
        d_model, n_features, activation, center: those of the whole SAE.
        W_enc [f, d], b_enc [f], W_dec [f, d]: DTensor parameters, Shard(0) over "feature".
        b_dec: [d] DTensor, Replicate.
        mesh: the device mesh.
        ranks: how the ranks talk to each other.
        features: the range that this rank holds.
        counts: how many features each rank holds.
        local: an SAE of this rank's features; it shares its memory with the DTensors.

    The parameters take no gradient: training never forms one, and DDP or FSDP must not wrap it
    (leave it out by their ignored parameters). Moving it or changing its dtype is an error: do that
    before `shard`.
    """

    def __init__(self, sae: SAE, mesh: DeviceMesh) -> None:
        from torch.distributed.tensor import DTensor, Replicate, Shard

        super().__init__()
        self.d_model, self.n_features = sae.d_model, sae.n_features
        self.activation, self.center = sae.activation, sae.center
        self.mesh = mesh
        self.ranks = _ranks_of(mesh, sae.W_enc.device)
        f, d, size = sae.n_features, sae.d_model, self.ranks.size
        each = -(-f // size)
        self.counts = [min(f, (r + 1) * each) - r * each for r in range(size)]
        first = self.ranks.rank * each
        self.features = range(first, first + self.counts[self.ranks.rank])
        self._check_same(sae)

        mine = SAE(d, len(self.features), TopK(self.k_of(self.ranks.rank)), center=sae.center,
                   seed=None).to(sae.W_enc.device, sae.W_enc.dtype)  # fmt: skip
        mine.requires_grad_(False)
        rows, names = slice(self.features.start, self.features.stop), mesh.mesh_dim_names or ()
        for name, whole in zip(_NAMES, sae.parameters_in_order, strict=True):
            own = getattr(mine, name)
            own.copy_(whole.detach() if name == "b_dec" else whole.detach()[rows])
            kind = Replicate() if name == "b_dec" else Shard(0)
            placements = [kind if dim == FEATURE else Replicate() for dim in names]
            spread = DTensor.from_local(
                own.detach(), mesh, placements, run_check=False,
                shape=whole.shape, stride=(d, 1) if whole.dim() == 2 else (1,),
            )  # fmt: skip
            self.register_parameter(name, nn.Parameter(spread, requires_grad=False))
        # In a tuple, so that its parameters do not count a second time.
        self._local = (mine,)
        self._version = self.W_enc._version

    @property
    def local(self) -> SAE:
        """The SAE of this rank's features."""
        mine = self._local[0]
        if self.W_enc._version != self._version:  # written through the DTensor: no count of ours
            self._version = self.W_enc._version
            mine.drop_screen()
        return mine

    @property
    def parameters_in_order(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """This rank's rows of W_enc, b_enc, W_dec, and b_dec, as plain tensors."""
        return self.local.parameters_in_order

    def k_of(self, rank: int) -> int:
        """How many candidates a rank has: k, or all its features."""
        return min(self.activation.k, self.counts[rank])

    def extra_repr(self) -> str:
        """What `print` shows."""
        own = f"features {self.features.start} to {self.features.stop - 1} on rank "
        whole = f"d_model={self.d_model}, n_features={self.n_features}, {self.activation}"
        return f"{whole}, {own}{self.ranks.rank} of {self.ranks.size}"

    @torch.no_grad()
    def encode(self, x: Tensor) -> SparseCode:
        """The active features of x, the same on every rank.

        Args:
            x: [..., d], any floating dtype, the same on every rank.

        Returns:
            A SparseCode of k entries a row with indices into all f features: where the processor's
            kernels run, the bits that one process would find.

        Raises:
            ShapeError: the last dimension is not d.
            NonFiniteError: x holds NaN or infinity; the message names the rows.
            DistributedError: another rank was given other rows.

        Not differentiable. Each rank multiplies with its own features, and sends 8 bytes for each
        of about 2 k / ranks candidates a row to every other.
        """
        if x.dim() == 0 or x.shape[-1] != self.d_model:
            msg = f"ShardedSAE.encode: x must be [..., d={self.d_model}], got shape "
            msg += f"{list(x.shape)}."
            raise ShapeError(msg)
        rows = x.reshape(-1, self.d_model).to(self.local.W_enc.dtype)
        b_dec = self.local.b_dec if self.center else None
        values, indices, heads = self.top_k(rows, b_dec, fingerprint(rows)[None])
        same_rows("encode", [head[0] for head in heads])
        return SparseCode(values.relu(), indices, self.n_features, None, tuple(x.shape[:-1]))

    def top_k(
        self, x: Tensor, b_dec: Tensor | None, numbers: Tensor
    ) -> tuple[Tensor, Tensor, list[list[float]]]:
        """The k largest pre-activations of rows [n, d] less b_dec; see `top_k_of_ranks`."""

        def here() -> tuple[Tensor, Tensor]:
            local = self.local
            values, indices, _ = topk_encode(
                x, local.W_enc, local.b_enc, b_dec, k=local.activation.k, screen=local.screen()
            )
            return values, indices + self.features.start

        available = [self.k_of(rank) for rank in range(self.ranks.size)]
        return top_k_of_ranks(self.ranks, here, x, self.activation.k, available, numbers)

    @torch.no_grad()
    def decode(self, code: SparseCode) -> Tensor:
        """The activations that a code stands for, [*leading, d], the same on every rank.

        Each rank decodes its own features; every row is summed by one rank in the order of the
        ranks, so the bits depend on their number alone. Not differentiable.

        Raises:
            ShapeError: the code has another number of features.
        """
        if code.n_features != self.n_features:
            msg = f"ShardedSAE.decode: the code must have f={self.n_features} features, got "
            msg += f"{code.n_features}."
            raise ShapeError(msg)
        values, indices = code.padded()
        values = values.to(self.local.W_dec.dtype)
        values, indices = own_entries(values, indices, self.features)
        block = self.decoded_rows(values, indices) + self.local.b_dec
        n = len(values)
        _, (blocks,) = self.ranks.gather(self.ranks.features.padded(block, n))
        out = self.ranks.features.joined(blocks, n)
        return out.reshape(*code.shape[:-1], self.d_model)

    def decoded_rows(self, values: Tensor, indices: Tensor) -> Tensor:
        """This rank's rows of the reconstruction without b_dec, from each rank's own entries."""
        n, W_dec = len(values), self.local.W_dec
        partial = self.ranks.attempt(
            lambda: sparse_decode(values, indices, W_dec), lambda: W_dec.new_zeros(n, self.d_model)
        )
        return self.ranks.features.sum_rows(partial)

    def forward(self, x: Tensor) -> Tensor:
        """The reconstruction of x, [..., d]."""
        return self.decode(self.encode(x))

    @torch.no_grad()
    def squared_errors(self, x: Tensor, code: SparseCode) -> Tensor:
        """|x - x_hat|^2 of every row."""
        return (self.decode(code) - x).square().sum(-1)

    @torch.no_grad()
    def collect(self) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        """W_enc, b_enc, W_dec, b_dec whole on the first rank, None on the others."""
        W_enc, b_enc, W_dec, b_dec = self.parameters_in_order
        if not self.ranks.in_first_row:
            return None
        whole = [self.ranks.features.collect(t, self.counts) for t in (W_enc, b_enc, W_dec)]
        if whole[0] is None or whole[1] is None or whole[2] is None:
            return None
        return whole[0], whole[1], whole[2], b_dec

    def save_pretrained(
        self, path: str | Path, metadata: Mapping[str, object] | None = None
    ) -> None:
        """Write the ordinary SAELens folder, which needs no ranks to be read.

        The first rank gathers the weights and writes; as `SAE.save_pretrained` otherwise.
        """
        whole = self.collect()
        with self.ranks.together():
            if whole is not None:
                k = self.activation.k
                saelens_layout.write(Path(path), whole, k, self.center, dict(metadata or {}))

    def _check_same(self, sae: SAE) -> None:
        """Raise unless the ranks were given the same SAE."""
        digest = hashlib.sha256(repr((sae, sae.W_enc.dtype)).encode())
        for parameter in sae.parameters_in_order:
            raw = parameter.detach().cpu().contiguous().flatten().view(torch.uint8)
            digest.update(memoryview(raw.numpy()))
        mine = torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)
        (all_,) = self.ranks.everyone.gather(mine.to(self.ranks.device))
        differ = (all_ != all_[0]).any(1).nonzero().flatten().tolist()
        if differ:
            msg = f"shard: the SAE of rank {differ[0]} is not that of rank 0. Build it with the "
            msg += "same arguments and seed on every rank, or read it from the same file."
            raise DistributedError(msg)

    def _apply(self, *args: Any, **kwargs: Any) -> ShardedSAE:
        msg = "ShardedSAE: cannot be moved or cast; do that to the SAE before shard()."
        raise ArgumentError(msg)


_NAMES = ("W_enc", "b_enc", "W_dec", "b_dec")


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


def fingerprint(x: Tensor) -> Tensor:
    """A float64 made of all bits of x, whatever the order in which they are added up."""
    words = {8: torch.int64, 4: torch.int32, 2: torch.int16}[x.element_size()]
    total = x.contiguous().view(words).sum(dtype=torch.int64)
    return total.remainder(2**52).double()


def same_rows(op: str, seen: list[float]) -> None:
    """Raise unless all ranks were given the same rows."""
    for rank, one in enumerate(seen):
        if one != seen[0]:
            msg = f"{op}: rank {rank} was given other rows than rank 0. Every rank reads every "
            msg += "batch: use the same activations and seed."
            raise DistributedError(msg)
