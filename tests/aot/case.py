"""A kernel to compile ahead of time, as a host function launches it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# Arguments that mean the same in every kernel of an SAE: the house's letters and what is beside
# them. Triton compiles another kernel for a multiple of 16 ("i32/16"), as sizes and strides are.
LETTERS: dict[str, str] = {
    **dict.fromkeys(
        ("n", "d", "f", "rows", "m", "entries", "capacity", "groups", "stride", "x_stride",
         "w_stride", "stride_f", "stride_d", "shadow_stride"),
        "i32/16",
    ),
    **dict.fromkeys(("k", "slots", "rank", "turns"), "i32"),
    "unit": "fp32",
}  # fmt: skip
POINTERS: dict[str, str] = {
    **dict.fromkeys(
        ("indices", "index", "count", "failed", "failures", "candidates", "source", "latents",
         "touched", "scratch"),
        "i32",
    ),
    **dict.fromkeys(("offsets", "order"), "i64"),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One launch.

    Attributes:
        kernel: the @triton.jit function.
        constants: its constexpr arguments.
        pointers: element type by pointer argument, other than float32 and than POINTERS has it.
        options: num_warps, num_stages, enable_fp_fusion as the host function passes them.
        scalars: type by argument that is no pointer, where LETTERS has none: "i32", "i64", "fp32",
            or "i32/16" where the host function passes a multiple of 16.
        needs: counts of `triton_aot.measure` that may not be 0, such as "tensor_core".
        lacks: counts that must be 0, such as "fused" where every rounding is promised.
        narrow: reasons why a 32-bit product stays below 2^31, by "module: product" as
            `products.narrow_products` names it.

    An argument that none of these names is a pointer to float32; all pointers are aligned.
    """

    kernel: Any
    constants: Mapping[str, Any]
    pointers: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    scalars: Mapping[str, str] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()
    narrow: Mapping[str, str] = field(default_factory=dict)

    def signature(self) -> tuple[dict[str, str], dict[tuple[int], list[list[object]]]]:
        """Triton's type of each argument, and which are multiples of 16."""
        types: dict[str, str] = {}
        attributes: dict[tuple[int], list[list[object]]] = {}
        for i, name in enumerate(self.kernel.arg_names):
            if name in self.constants:
                types[name] = "constexpr"
                continue
            if name in self.pointers:
                kind, aligned = "*" + self.pointers[name], "16"
            elif scalar := self.scalars.get(name, LETTERS.get(name)):
                kind, _, aligned = scalar.partition("/")
            else:
                kind, aligned = "*" + POINTERS.get(name, "fp32"), "16"
            types[name] = kind
            if aligned:
                attributes[(i,)] = [["tt.divisibility", 16]]
        return types, attributes


def types(kind: str, *names: str) -> dict[str, str]:
    """The same type for each of the names, each a string of names with spaces between."""
    return dict.fromkeys(" ".join(names).split(), kind)
