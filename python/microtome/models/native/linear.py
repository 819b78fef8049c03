"""One linear map of a block, run on packed rows: exact in float32, or as a bf16 difference."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from microtome.ops import _registry, delta_linear, pack_weights, packed_linear

PANEL = 32  # output columns in one panel of packed weights


@dataclass(frozen=True)
class Base:
    """What a linear map saw and gave in the base run, for the rows that differ from it.

    Attributes:
        x: [r, i], its inputs, one row per token of the base run.
        y: [r, o], its outputs, bias included.
        index: [T] int32, the base token that each packed row stands on.
        exact: [e] int64, packed rows to multiply in float32 all the same, for they differ most.
    """

    x: Tensor
    y: Tensor
    index: Tensor
    exact: Tensor


class Linear:
    """y = x W^T + b, with W packed once for all the calls of a sweep.

    Args:
        weight: [o, i]; a transposed view is welcome. Kept, never copied until it is packed.
        bias: [o] or None.

    In float32 on the CPU the weights are packed on first use, which costs as much memory as they
    take; elsewhere torch's own product runs.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight = weight.detach()
        self.bias = None if bias is None else bias.detach()
        self._packed: dict[str, Tensor] = {}
        self._parts: dict[tuple[int, int], Linear] = {}
        self._whole: tuple[Linear, int, int] | None = (
            None  # a part of it: panels first ... last - 1
        )

    @property
    def out_features(self) -> int:
        """How many outputs there are."""
        return int(self.weight.shape[0])

    def __call__(self, x: Tensor, add: Tensor | None = None, base: Base | None = None) -> Tensor:
        """Apply the map to packed rows.

        Args:
            x: [T, i].
            add: [T, o], added to the result.
            base: the base run of this map; with it only the difference from it is multiplied, in
                bf16, so that the rounding scales with the difference.

        Returns:
            [T, o], accumulated in float32 (float64 for float64).
        """
        if base is not None:
            packed, e = self.packed("bf16"), base.exact
            y = delta_linear(x, base.x, base.y, base.index, packed, self.out_features, add)
            if len(e):
                y[e] = self(x[e], None if add is None else add[e])
            return y
        if _packs(x):
            return packed_linear(x, self.packed("fp32"), self.out_features, self.bias, add)
        y = F.linear(x, self.weight, self.bias)
        return y if add is None else y + add

    def columns(self, low: int, high: int) -> Linear:
        """The map to outputs low ... high - 1 alone, made once.

        It shares the packed weights where the cut falls between panels; elsewhere it packs its own.
        """
        if (low, high) not in self._parts:
            bias = None if self.bias is None else self.bias[low:high]
            part = Linear(self.weight[low:high], bias)
            if low % PANEL == 0 and (high % PANEL == 0 or high == self.out_features):
                part._whole = (self, low // PANEL, -(-high // PANEL))
            self._parts[low, high] = part
        return self._parts[low, high]

    def packed(self, kind: str) -> Tensor:
        """The weights as `packed_linear` ("fp32") or `delta_linear` ("bf16") read them."""
        if self._whole is not None:
            whole, first, last = self._whole
            return whole.packed(kind)[first:last]
        if kind not in self._packed:
            self._packed[kind] = pack_weights(self.weight, kind)
        return self._packed[kind]


def _packs(x: Tensor) -> bool:
    """Whether the packed product is the one to take: float32 rows on a CPU that has the kernel."""
    return (
        x.dtype == torch.float32
        and x.device.type == "cpu"
        and _registry.unavailable("cpu") is None
        and _registry.demanded_backend() in (None, "cpu")
    )
