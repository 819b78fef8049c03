"""The stock patch setters: what a cell of a sweep copies from the clean run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from microtome.errors import ArgumentError

# (corrupted activation [b, ...], index, clean activation) -> the patched activation.
PatchSetter = Callable[[Tensor, Sequence[int], Tensor], "Tensor | None"]


@dataclass(frozen=True)
class StockSetter:
    """What a stock setter does, as data.

    Attributes:
        name: the function's name.
        axes: for each entry of an index after the layer, what it counts and which axis of the
            activation it picks from; the axes that no entry picks from are copied whole.
    """

    name: str
    axes: tuple[tuple[str, int], ...]

    def where(self, index: Sequence[int]) -> tuple[slice | int, ...]:
        """The part of an activation that a cell replaces, as an index into it."""
        picked: list[slice | int] = [slice(None)] * (1 + max(axis for _, axis in self.axes))
        for (_, axis), i in zip(self.axes, index[1:], strict=True):
            picked[axis] = i
        return tuple(picked)


_TABLE = {
    stock.name: stock
    for stock in (
        StockSetter("layer_pos_patch_setter", (("pos", 1),)),
        StockSetter("layer_pos_head_vector_patch_setter", (("pos", 1), ("head", 2))),
        StockSetter("layer_head_vector_patch_setter", (("head", 2),)),
        StockSetter("layer_head_pattern_patch_setter", (("head", 1),)),
        StockSetter("layer_head_pos_pattern_patch_setter", (("head", 1), ("dest_pos", 2))),
        StockSetter(
            "layer_head_dest_src_pos_pattern_patch_setter",
            (("head", 1), ("dest_pos", 2), ("src_pos", 3)),
        ),
    )
}


def stock_setter(setter: PatchSetter) -> StockSetter | None:
    """What a setter does if it is a stock one, ours or TransformerLens's, or None."""
    ours = globals().get(getattr(setter, "__name__", ""))
    theirs = getattr(setter, "__module__", None) == "transformer_lens.patching"
    if setter is ours or theirs:
        return _TABLE.get(getattr(setter, "__name__", ""))
    return None


def layer_pos_patch_setter(
    corrupted_activation: Tensor, index: Sequence[int], clean_activation: Tensor
) -> Tensor:
    """Copy one position; index [layer, pos], activation [b, pos, ...]. Writes in place."""
    return _copy("layer_pos_patch_setter", corrupted_activation, index, clean_activation)


def layer_pos_head_vector_patch_setter(
    corrupted_activation: Tensor, index: Sequence[int], clean_activation: Tensor
) -> Tensor:
    """Copy one head at one position; index [layer, pos, head], activation [b, pos, head, ...]."""
    return _copy(
        "layer_pos_head_vector_patch_setter", corrupted_activation, index, clean_activation
    )


def layer_head_vector_patch_setter(
    corrupted_activation: Tensor, index: Sequence[int], clean_activation: Tensor
) -> Tensor:
    """Copy one head at every position; index [layer, head], activation [b, pos, head, ...]."""
    return _copy("layer_head_vector_patch_setter", corrupted_activation, index, clean_activation)


def layer_head_pattern_patch_setter(
    corrupted_activation: Tensor, index: Sequence[int], clean_activation: Tensor
) -> Tensor:
    """Copy one head's pattern; index [layer, head], activation [b, head, dest, source]."""
    return _copy("layer_head_pattern_patch_setter", corrupted_activation, index, clean_activation)


def layer_head_pos_pattern_patch_setter(
    corrupted_activation: Tensor, index: Sequence[int], clean_activation: Tensor
) -> Tensor:
    """Copy one row of a pattern; index [layer, head, dest], activation [b, head, dest, source]."""
    return _copy(
        "layer_head_pos_pattern_patch_setter", corrupted_activation, index, clean_activation
    )


def layer_head_dest_src_pos_pattern_patch_setter(
    corrupted_activation: Tensor, index: Sequence[int], clean_activation: Tensor
) -> Tensor:
    """Copy one entry of a pattern; index [layer, head, dest, source]."""
    return _copy(
        "layer_head_dest_src_pos_pattern_patch_setter",
        corrupted_activation,
        index,
        clean_activation,
    )


def check_index(stock: StockSetter, index: Sequence[int]) -> None:
    """Raise ArgumentError unless an index has an entry for each axis of a stock setter."""
    if len(index) != 1 + len(stock.axes):
        wants = ", ".join(["layer", *(name for name, _ in stock.axes)])
        msg = (
            f"{stock.name}: an index must be [{wants}], got {len(index)} entries: {list(index)!r}."
        )
        raise ArgumentError(msg)


def _copy(name: str, corrupted: Tensor, index: Sequence[int], clean: Tensor) -> Tensor:
    check_index(_TABLE[name], index)
    where = _TABLE[name].where(index)
    corrupted[where] = clean[where]
    return corrupted
