"""The rule by which an answer is right: at most twice plain PyTorch's error against float64."""

from __future__ import annotations

import torch
from torch import Tensor


class DisagreementError(Exception):
    """The op's answer is further from float64 than the rule allows."""


def largest_difference(got: Tensor, exact: Tensor) -> float:
    """Largest absolute difference, in float64; NaN counts as infinite."""
    if got.shape != exact.shape:
        msg = f"shape {list(got.shape)}, expected {list(exact.shape)}"
        raise DisagreementError(msg)
    if exact.numel() == 0:
        return 0.0
    difference = (got.double() - exact.double()).abs().nan_to_num(nan=float("inf"))
    return float(difference.max())


def within(
    what: str, got: Tensor, plain: Tensor, exact: Tensor, factor: float = 2.0
) -> dict[str, float]:
    """Compare by the rule, or raise DisagreementError.

    Args:
        what: name for the message.
        got: the op's answer.
        plain: the same by plain PyTorch, in got's dtype.
        exact: the same in float64.
        factor: how many times plain PyTorch's error is allowed, beside one unit in the last place
            of the largest entry (512 of them for float64, where the exact answer is rounded too).

    Returns:
        {"<what>_error": ..., "<what>_allowed": ...}.
    """
    unit = torch.finfo(got.dtype if got.dtype.is_floating_point else torch.float32).eps
    unit *= 512 if got.dtype == torch.float64 else 1
    rounding = unit * float(exact.abs().max()) if exact.numel() else 0.0
    error = largest_difference(got, exact)
    allowed = factor * largest_difference(plain, exact) + rounding
    if not error <= allowed:
        msg = f"{what}: error {error:.3e}, plain PyTorch allows {allowed:.3e}"
        raise DisagreementError(msg)
    return {f"{what}_error": error, f"{what}_allowed": allowed}
