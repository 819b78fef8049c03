"""Any op against its own reference in float64, on the very inputs it is given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from benchmarks.agreement import DisagreementError, within
from microtome.ops import use_backend

Call = Callable[..., Any]
FEW = 32  # entries; over so few it is luck how far plain PyTorch is off
EXACT = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def widened(args: Any) -> Any:
    """The arguments with every floating tensor in float64, save packed bf16 weights."""

    def wide(t: Tensor) -> Tensor:
        packed = t.dtype == torch.bfloat16 and t.dim() == 4
        return t.double() if t.is_floating_point() and not packed else t

    return tree_map_only(Tensor, wide, args)


def against_reference(
    backend: str, call: Call, args: tuple[Any, ...], wide: tuple[Any, ...] | None = None,
    factor: float = 2.0,
) -> dict[str, Any]:  # fmt: skip
    """Compare every output with the reference's; integers and what is not finite must be equal.

    Args:
        backend: demanded for the call that is judged.
        call: the public function.
        args: its arguments.
        wide: the same in float64; `widened(args)` if None.
        factor: how many times as far from float64 as plain PyTorch an output may be.

    Raises:
        DisagreementError: an output is farther.
    """
    with use_backend(backend):
        got = _leaves(call(*args))
    with use_backend("reference"):
        plain = _leaves(call(*args))
        exact = _leaves(call(*(widened(args) if wide is None else wide)))
    found: dict[str, Any] = {}
    for i, (g, p, e) in enumerate(zip(got, plain, exact, strict=True)):
        found.update(compare(f"output {i}", g, p, e, factor))
    return found


def equal_to_reference(backend: str, call: Call, args: tuple[Any, ...]) -> dict[str, Any]:
    """Where every sum is exact, whatever its order: the very numbers of the reference."""
    with use_backend(backend):
        got = _leaves(call(*args))
    with use_backend("reference"):
        wanted = _leaves(call(*args))
    for i, (g, w) in enumerate(zip(got, wanted, strict=True)):
        if not torch.equal(g, w):
            msg = f"output {i}: {int((g != w).sum())} of {g.numel()} exact sums are off"
            raise DisagreementError(msg)
    return {"equal": True}


def compare(
    what: str, got: Tensor, plain: Tensor, exact: Tensor, factor: float = 2.0
) -> dict[str, float]:
    """One output; see `against_reference`."""
    if got.shape != exact.shape or got.dtype != plain.dtype:
        msg = f"{what}: {list(got.shape)} {got.dtype}, expected {list(exact.shape)} {plain.dtype}"
        raise DisagreementError(msg)
    if got.dtype in EXACT:
        if not torch.equal(got, exact.to(got.dtype)):
            msg = f"{what}: {int((got != exact).sum())} of {got.numel()} entries differ"
            raise DisagreementError(msg)
        return {}
    finite = exact.isfinite()
    if not torch.equal(got.isfinite(), finite):
        msg = f"{what}: {int((got.isfinite() != finite).sum())} entries are finite where the "
        msg += "reference's are not, or the other way round"
        raise DisagreementError(msg)
    if not torch.equal(got[~finite].isnan(), exact[~finite].isnan()):
        msg = f"{what}: NaN and infinity are not where the reference has them"
        raise DisagreementError(msg)
    factor *= 1 if exact.numel() > FEW else 2
    return within(what, got[finite], plain[finite], exact[finite], factor)


def _leaves(out: Any) -> list[Tensor]:
    return [t for t in tree_leaves(out) if isinstance(t, Tensor)]
