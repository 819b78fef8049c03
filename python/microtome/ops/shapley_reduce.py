"""From values along walks of coalitions to each player's mean contribution and its spread."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from microtome import _check, _native
from microtome._look import Look
from microtome.errors import ShapeError
from microtome.ops._registry import Backend, Op, demanded_backend, triton_backend, why_not_common

_FLOATS = (torch.float32, torch.float64)


def shapley_reduce(values: Tensor, ranks: Tensor, paired: bool) -> tuple[Tensor, Tensor]:
    """Average what each player adds along every walk; measure how far the units are apart.

    A walk visits the spans of an order, v(lo, hi) being the value of the players whose ranks are
    lo <= rank < hi. Player j of rank r adds, in one order,

        v(0, r + 1) - v(0, r)                                                       not paired
        (v(0, r + 1) - v(0, r) + v(r, p) - v(r + 1, p)) / 2                         paired

        unit[u] = mean of that over the A orders of unit u
        mean = mean over u of unit[u]        m2 = sum over u of (unit[u] - mean)^2

    so that m2 / (U - 1) estimates a unit's variance, and m2 / (U - 1) / U that of the mean.

    Args:
        values: [e, S, U, A, L, o] float32 or float64: e explicands, S strata, U units a stratum, A
            orders a unit, o outputs. Not paired: L = p + 1, values[..., t, :] = v(0, t). Paired:
            L = 2 p + 1, and beyond those values[..., p + t, :] = v(t, p): index p is the full
            coalition, indices 0 and 2 p the empty one.
        ranks: [S, U, A, p] int32 or int64 in [0, p): the place of each player in its order.
        paired: whether each order is also walked from its end.

    Returns:
        mean, m2: [e, S, p, o] float64, accumulated in float64. Of one unit, m2 is 0.

    Raises:
        ShapeError: the letters above do not agree, or U or A is 0.
        DtypeError, DeviceError: see above; all lie on one device.
        ArgumentError: a rank lies outside [0, p). On a GPU a later call raises, and the kernels
            take the nearest rank that there is.
        BackendError: a demanded backend cannot run these inputs.

    Not differentiable. Deterministic: sums run in the order of A and of U, the same bits for any
    number of threads. In CUDA C++ the units are summed 128 at a time and the spread in the same
    pass (the order is in csrc/cuda/shapley_reduce.h). NaN reaches the players that read it, and
    only them. Reads the values once; every player gathers its own two, or four, of a walk.
    Source: Castro et al. 2009, doi:10.1016/j.cor.2008.04.004; pairs: Mitchell et al. 2022, JMLR
    23:43.

    Example:
        >>> import torch
        >>> values = torch.tensor([0.0, 1.0, 5.0]).reshape(1, 1, 1, 1, 3, 1)
        >>> ranks = torch.tensor([1, 0], dtype=torch.int32).reshape(1, 1, 1, 2)
        >>> mean, m2 = shapley_reduce(values, ranks, paired=False)
        >>> mean.flatten().tolist(), m2.flatten().tolist()
        ([4.0, 1.0], [0.0, 0.0])
    """
    op = "shapley_reduce"
    sizes = _check.shapes(op, values=(values, "e S U A L o"), ranks=(ranks, "S U A p"))
    p = sizes["p"]
    points = 2 * p + 1 if paired else p + 1
    if sizes["L"] != points:
        formula = "2 p + 1" if paired else "p + 1"
        msg = (
            f"{op}: values must be [e, S, U, A, L, o] with L = {formula} = {points} for p={p} and "
            f"paired={paired}, got L={sizes['L']}."
        )
        raise ShapeError(msg)
    if sizes["U"] == 0 or sizes["A"] == 0:
        msg = (
            f"{op}: U and A must be at least 1, got U={sizes['U']}, A={sizes['A']}: there is "
            "nothing to average."
        )
        raise ShapeError(msg)
    _check.dtype(op, _FLOATS, values=values)
    _check.dtype(op, _check.INDICES, ranks=ranks)
    _check.device(op, values=values, ranks=ranks)
    if _check.readable(values) and not _checks_itself(values):
        check_ranks(ranks)
    mean, m2 = _reduce(values, ranks, paired)
    return mean, m2


def _checks_itself(values: Tensor) -> bool:
    """Whether the backend to come checks the ranks: the reference and the C++ kernel do."""
    return values.device.type == "cpu" and demanded_backend() not in ("triton", "cuda")


def check_ranks(ranks: Tensor) -> None:
    """Raise ArgumentError unless every rank lies in [0, p)."""
    _check.index_range("shapley_reduce", ranks, ranks.shape[3], "p", "ranks")


def _look(look: Look, values: Tensor, ranks: Tensor, paired: bool) -> tuple[Any, ...]:
    """The arguments as they are: the kernels clamp ranks, so that none has to be written again."""
    p = ranks.shape[3]
    if look.now:
        check_ranks(ranks)
    elif ranks.numel():
        low, high = torch.aminmax(ranks.flatten(0, 2), dim=1)  # each [S U A]
        what = f"ranks must lie in [0, p={p}), and do not"
        look.wrong("ranks", [((low < 0) | (high >= p), what)])
    return values, ranks, paired


def shapley_reduce_reference(values: Tensor, ranks: Tensor, paired: bool) -> tuple[Tensor, Tensor]:
    """One order of every unit at a time."""
    check_ranks(ranks)
    (e, S, U, A, _, o), p = values.shape, ranks.shape[3]
    units = values.new_zeros(e, S, U, p, o, dtype=torch.float64)
    for a in range(A):
        v = values[:, :, :, a].double()  # [e, S, U, L, o]
        r = ranks[:, :, a].long()[None, ..., None].expand(e, S, U, p, o)
        step = v.gather(3, r + 1) - v.gather(3, r)
        if paired:
            step = (step + (v.gather(3, r + p) - v.gather(3, r + p + 1))) * 0.5
        units += step
    units /= A
    mean, m2 = (units.new_zeros(e, S, p, o) for _ in range(2))
    for unit in units.unbind(2):
        mean += unit
    mean /= U
    for unit in units.unbind(2):
        m2 += (unit - mean) * (unit - mean)
    return mean, m2


def _fake(values: Tensor, ranks: Tensor, paired: bool) -> tuple[Tensor, Tensor]:
    shape = (*values.shape[:2], ranks.shape[3], values.shape[5])
    return (
        values.new_empty(shape, dtype=torch.float64),
        values.new_empty(shape, dtype=torch.float64),
    )


def _cpu_reduce(values: Tensor, ranks: Tensor, paired: bool) -> tuple[Tensor, Tensor]:
    (e, S, U, A, _, o), p = values.shape, ranks.shape[3]
    values, places = values.contiguous(), _native.saturated(ranks)
    mean, m2 = (torch.empty(e, S, p, o, dtype=torch.float64) for _ in range(2))
    bad = _native.module().shapley_reduce(
        values.dtype == torch.float64, values.data_ptr(), places.data_ptr(), e, S, U, A, p, o,
        paired, mean.data_ptr(), m2.data_ptr(), _native.forced_isa(), _native.threads(),
    )  # fmt: skip
    if bad >= 0:
        check_ranks(ranks)
    return mean, m2


def _cuda_reduce(values: Tensor, ranks: Tensor, paired: bool) -> tuple[Tensor, Tensor]:
    (e, S, U, A, _, o), p = values.shape, ranks.shape[3]
    # A clamp in the kernel, which holds all the registers there are, would spill.
    values, places = values.contiguous(), _native.saturated(ranks).clamp(0, max(p - 1, 0))
    mean, m2 = (
        torch.empty(e, S, p, o, dtype=torch.float64, device=values.device) for _ in range(2)
    )
    chunks = -(-U // 128)  # kUnits of csrc/cuda/shapley_reduce.h
    parts = mean.new_empty((2, chunks, *mean.shape)) if chunks > 1 else None
    with _native.device_of(values):
        _native.cuda().shapley_reduce(
            values.dtype == torch.float64, values.data_ptr(), places.data_ptr(), e, S, U, A, p, o,
            paired, mean.data_ptr(), m2.data_ptr(), _native.address(parts), _native.stream(values),
        )  # fmt: skip
    return mean, m2


def _why_not_cpu(values: Tensor, ranks: Tensor, paired: bool) -> str | None:
    return why_not_common("cpu", (values, ranks), _FLOATS)


def _why_not_cuda(values: Tensor, ranks: Tensor, paired: bool) -> str | None:
    return why_not_common("cuda", (values, ranks), _FLOATS)


_reduce = Op(
    shapley_reduce_reference,
    fake=_fake,
    backends=[
        Backend("cuda", f"{__name__}:_cuda_reduce", _why_not_cuda, on_demand=True),
        triton_backend("microtome.kernels.shapley_reduce:launch", *_FLOATS),
        Backend("cpu", f"{__name__}:_cpu_reduce", _why_not_cpu),
    ],
    looks=_look,
)
