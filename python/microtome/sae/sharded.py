"""A sparse autoencoder whose features are shared out to the ranks of torch.distributed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from microtome.errors import ArgumentError, ShapeError
from microtome.ops import sparse_decode, topk_encode
from microtome.sae import saelens_layout
from microtome.sae.code import SparseCode
from microtome.sae.ranks import Ranks, fingerprint, same_rows
from microtome.sae.sae import SAE, TopK
from microtome.sae.sharded_top_k import own_entries, top_k_of_ranks

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

FEATURE = "feature"


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

    def __init__(self, sae: SAE, mesh: DeviceMesh, ranks: Ranks) -> None:
        from torch.distributed.tensor import DTensor, Replicate, Shard

        super().__init__()
        self.d_model, self.n_features = sae.d_model, sae.n_features
        self.activation, self.center = sae.activation, sae.center
        self.mesh, self.ranks = mesh, ranks
        f, d, size = sae.n_features, sae.d_model, self.ranks.size
        each = -(-f // size)
        self.counts = [min(f, (r + 1) * each) - r * each for r in range(size)]
        first = self.ranks.rank * each
        self.features = range(first, first + self.counts[self.ranks.rank])

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

    def _apply(self, *args: Any, **kwargs: Any) -> ShardedSAE:
        msg = "ShardedSAE: cannot be moved or cast; do that to the SAE before shard()."
        raise ArgumentError(msg)


_NAMES = ("W_enc", "b_enc", "W_dec", "b_dec")
