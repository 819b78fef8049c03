"""Permutation Shapley values of a multilayer perceptron, from its weights, with nothing stored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from microtome import _check, _native
from microtome._look import Look
from microtome.ops._mlp_shapley_inputs import (
    ACTIVATIONS,
    ELU,
    GELU,
    GELU_TANH,
    IDENTITY,
    LEAKY_RELU,
    PRECISIONS,
    RELU,
    SIGMOID,
    SILU,
    SOFTPLUS,
    TANH,
    check_game,
    check_model,
    check_player,
    check_ranks,
    disordered,
    raise_order,
    strange,
)
from microtome.ops._registry import Backend, Op, demanded_backend, why_not_common
from microtome.ops.pack_weights import FLOATS

__all__ = [
    "ELU",
    "GELU",
    "GELU_TANH",
    "IDENTITY",
    "LEAKY_RELU",
    "RELU",
    "SIGMOID",
    "SILU",
    "SOFTPLUS",
    "TANH",
    "mlp_shapley",
    "mlp_shapley_reference",
]

_ROWS = 1 << 16  # masked inputs that the reference holds at once


def mlp_shapley(
    x: Tensor,
    background: Tensor,
    ranks: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    activations: Sequence[int],
    player: Tensor | None = None,
    paired: bool = True,
    precision: str = "fp32",
) -> tuple[Tensor, Tensor]:
    """Sample the Shapley values of an MLP's inputs along permutations.

        v(C)    = f(x in the columns of the players of C, background[b] elsewhere)
        f(a)    = layer_D(... layer_1(a)),  layer_l(a) = act_l(a W_l^T + bias_l)
        gain    = v(players ranked up to j's) - v(players ranked before j's), in one order
        unit    = mean over A orders of gain; where paired, of the mean of gain and of the same in
                  the reversed order
        mean    = mean over U of unit;  m2 = sum over U of (unit - mean)^2

    With S == n background row s walks the orders ranks[s] only. With S == 1 every background row
    walks every order, and v is averaged over the background rows before gains are taken.

    Args:
        x: [e, m] float32 or float64. The rows to explain.
        background: [n, m], dtype of x. What stands in for columns of players that are absent.
        ranks: [S, U, A, p] int32 or int64: ranks[..., j] is the place of player j in its order, 0
            first. S is 1 or n; U units of A orders each.
        weights: W_l [o_l, o_{l-1}], dtype of x, one for each layer, as in torch.nn.Linear; o_0 = m.
        biases: [o_l], dtype of x, for each layer, or None (or an empty tensor) for zero.
        activations: a code for each layer, the last one's too: IDENTITY, RELU, GELU, GELU_TANH,
            SILU, TANH, SIGMOID, LEAKY_RELU (slope 0.01), ELU (alpha 1) or SOFTPLUS.
        player: [m] int32 or int64, the player of each column, each in [-1, p); -1 means that the
            column is always x's. None: p == m, and each column is its own player.
        paired: whether every order is walked back as well (antithetic sampling).
        precision: "fp32", or "bf16", which rounds what goes into the layers between the first and
            the last, and their weights, to bfloat16: each such layer's sums move by at most about
            2^-8 sum |W| |a|. Sums stay in float32, and so do the first and the last layer.

    Returns:
        mean [e, S, p, o] and m2 [e, S, p, o] in float64: the mean of the units and the sum of their
        squared deviations, for each stratum. Values are computed in the dtype of x, and averaged
        and subtracted in float64.

    Raises:
        ShapeError: the letters above do not agree.
        DtypeError: the dtypes differ, or are not those above.
        DeviceError: the tensors lie on different devices.
        ArgumentError: a code, a player or a precision does not exist, or an order is no
            permutation; on a GPU a later call raises for players and orders.
        BackendError: a demanded backend cannot run these inputs.

    Not differentiable. Deterministic: the same bits for any number of threads and whatever else is
    asked in the same call, at one instruction set. bf16 is computed by bfloat16 products where the
    processor has them (avx512bf16 and amx, which take subnormal numbers for zero), else by float32
    products of rounded numbers.
    Along a walk the first layer takes up one player's columns at a time, and is computed anew where
    a walk begins, so a NaN or an infinity in x or background may make every result NaN that its row
    takes part in; it never makes one finite. No masked input, hidden state or value is stored.
    Costs 2 S U A (p - 1) steps (n in place of S where S == 1; half where not paired), each of one
    addition to the first layer and the layers after it. After a ReLU, units that are zero in
    neighbouring steps of a walk are left out of the next layer, which changes no answer: a network
    may run faster than its products alone.
    Source: Castro et al. 2009, doi:10.1016/j.cor.2008.04.004; antithetic pairs: Mitchell et al.
    2022, arXiv:2104.12199.

    Example:
        >>> import torch
        >>> W, b = torch.tensor([[1.0, -2.0, 0.5]]), torch.tensor([7.0])
        >>> x, background = torch.tensor([[1.0, 1.0, 4.0]]), torch.zeros(1, 3)
        >>> ranks = torch.tensor([[[[2, 0, 1]]]])
        >>> mean, m2 = mlp_shapley(x, background, ranks, [W], [b], [IDENTITY])
        >>> mean.flatten().tolist()
        [1.0, -2.0, 2.0]
    """
    op = "mlp_shapley"
    sizes = _check.shapes(
        op,
        x=(x, "e m"),
        background=(background, "n m"),
        ranks=(ranks, "S U A p"),
        player=(player, "m"),
    )
    check_model(op, x, weights, biases, activations)
    _check.dtype(op, FLOATS, x=x)
    given = [x.new_empty(0) if bias is None else bias for bias in biases]
    floats = {f"weights[{layer}]": W for layer, W in enumerate(weights)}
    floats |= {f"biases[{layer}]": b for layer, b in enumerate(given)}
    _check.same_dtype(op, x=x, background=background, **floats)
    _check.dtype(op, _check.INDICES, ranks=ranks, player=player)
    _check.device(op, x=x, background=background, ranks=ranks, player=player, **floats)
    _check.one_of(op, "precision", precision, PRECISIONS)
    check_game(op, sizes, player)
    if player is not None and _check.readable(x):
        check_player(op, player, sizes["p"])
    if _check.readable(x) and not _checks_itself(x):
        check_ranks(op, ranks)
    mean: Tensor
    m2: Tensor
    mean, m2 = _shapley(
        x, background, ranks, list(weights), given, list(activations), player, paired, precision
    )
    return mean, m2


def _checks_itself(x: Tensor) -> bool:
    """Whether the backend to come checks the orders: the reference and the C++ kernel do."""
    return x.device.type == "cpu" and demanded_backend() != "triton"


def _look(
    look: Look, x: Tensor, background: Tensor, ranks: Tensor, weights: list[Tensor],
    biases: list[Tensor], activations: list[int], player: Tensor | None, *rest: Any,
) -> tuple[Any, ...]:  # fmt: skip
    """The arguments with -1 for players that do not exist. Any order is safe: the kernels walk the
    permutation that sorts it, and clamp its ranks."""
    op, p = "mlp_shapley", ranks.shape[3]
    if look.now:
        check_ranks(op, ranks)
        if player is not None:
            check_player(op, player, p)
    else:
        if player is not None:
            bad = strange(player, p)
            look.wrong("player", [(bad, f"player must lie in [-1, p={p}), and does not")])
            player = player.masked_fill(bad, -1)
        what = f"every order must be a permutation of 0 .. p-1={p - 1}, and is not"
        look.wrong("ranks", [(disordered(ranks), what)])
    return x, background, ranks, weights, biases, activations, player, *rest


def mlp_shapley_reference(
    x: Tensor,
    background: Tensor,
    ranks: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    activations: list[int],
    player: Tensor | None,
    paired: bool,
    precision: str,
) -> tuple[Tensor, Tensor]:
    """Masked inputs, the model, the mean over the background, differences: one after another."""
    check_ranks("mlp_shapley", ranks)
    n, (S, U, A, p) = background.shape[0], ranks.shape
    walked = ranks.long().expand(n, U, A, p)
    column = torch.arange(p, device=x.device) if player is None else player.long()  # [m]
    L, o = (2 * p + 1 if paired else p + 1), weights[-1].shape[0]
    step = max(1, _ROWS // (U * A * L))
    units = []
    for row in x:
        values = []
        for at in range(0, n, step):
            present = _present(walked[at : at + step], column, paired)  # [step, U, A, L, m]
            b = background[at : at + step, None, None, None]
            inputs = torch.where(present, row, b)  # [step, U, A, L, m]
            values.append(_model(inputs, weights, biases, activations, precision).double())
        v = torch.cat(values)  # [n, U, A, L, o]
        if S == 1:
            v = v.mean(0, keepdim=True)
        units.append(_gains(v, ranks.long(), paired).mean(2))
    if not units:
        empty = x.new_zeros(0, S, p, o, dtype=torch.float64)
        return empty, empty.clone()
    unit = torch.stack(units)  # [e, S, U, p, o]
    mean = unit.mean(2)
    return mean, (unit - mean[:, :, None]).square().sum(2)


def _present(ranks: Tensor, column: Tensor, paired: bool) -> Tensor:
    """Which columns are x's, [n, U, A, L, m], by ranks [n, U, A, p] and the player of each."""
    p = ranks.shape[-1]
    place = ranks[..., column.clamp(min=0)][..., None, :]  # [n, U, A, 1, m]
    t = torch.arange(p + 1, device=ranks.device)[:, None]  # [p + 1, 1]
    present = place < t
    if paired:
        present = torch.cat([present, place >= t[1:]], dim=3)
    return present | (column < 0)


def _model(
    a: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    activations: list[int],
    precision: str,
) -> Tensor:
    last = len(weights) - 1
    for layer, (W, bias, code) in enumerate(zip(weights, biases, activations, strict=True)):
        if precision == "bf16" and 0 < layer < last:
            a, W = a.bfloat16().to(a.dtype), W.bfloat16().to(W.dtype)
        a = ACTIVATIONS[code](F.linear(a, W, bias if bias.numel() else None))
    return a


def _gains(v: Tensor, ranks: Tensor, paired: bool) -> Tensor:
    """[S, U, A, L, o] values and ranks [S, U, A, p] -> [S, U, A, p, o] each player's gain."""
    p = ranks.shape[-1]
    place = ranks[..., None].expand(*ranks.shape, v.shape[-1])
    gain = (v[:, :, :, 1 : p + 1] - v[:, :, :, :p]).gather(3, place)
    if not paired:
        return gain
    back = (v[:, :, :, p : 2 * p] - v[:, :, :, p + 1 :]).gather(3, place)
    return (gain + back) / 2


def _fake(
    x: Tensor,
    background: Tensor,
    ranks: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    activations: list[int],
    player: Tensor | None,
    paired: bool,
    precision: str,
) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], ranks.shape[0], ranks.shape[3], weights[-1].shape[0])
    mean = x.new_empty(shape, dtype=torch.float64)
    return mean, torch.empty_like(mean)


def _cpu(
    x: Tensor,
    background: Tensor,
    ranks: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    activations: list[int],
    player: Tensor | None,
    paired: bool,
    precision: str,
) -> tuple[Tensor, Tensor]:
    """Walk by walk in C++, csrc/cpu/mlp_shapley.cpp."""
    x, background, biases = (
        x.contiguous(),
        background.contiguous(),
        [b.contiguous() for b in biases],
    )
    orders = _native.saturated(ranks)
    columns = None if player is None else player.to(torch.int32).contiguous()
    (e, m), n, (S, U, A, p) = x.shape, background.shape[0], ranks.shape
    mean = torch.empty(e, S, p, weights[-1].shape[0], dtype=torch.float64)
    m2 = torch.empty_like(mean)
    bad = _native.module().mlp_shapley(
        x.data_ptr(),
        background.data_ptr(),
        orders.data_ptr(),
        (e, n, m, S, U, A, p),
        [(W.data_ptr(), *W.shape, *W.stride()) for W in weights],
        [b.data_ptr() if b.numel() else 0 for b in biases],
        activations,
        _native.address(columns),
        paired,
        precision == "bf16",
        mean.data_ptr(),
        m2.data_ptr(),
        _native.forced_isa(),
        _native.threads(),
    )
    if bad >= 0:
        raise_order("mlp_shapley", ranks, bad)
    return mean, m2


def _tensors(args: tuple[Any, ...]) -> list[Tensor]:
    """The tensors among the op's arguments, and in their lists."""
    flat = [one for a in args for one in (a if isinstance(a, list) else [a])]
    return [one for one in flat if isinstance(one, Tensor)]


def _why_not_cpu(*args: Any) -> str | None:
    return why_not_common("cpu", _tensors(args), (torch.float32,))


def _why_not_triton(*args: Any) -> str | None:
    weights: list[Tensor] = args[3]
    depth, o = len(weights), weights[-1].shape[0]
    widths = [W.shape[0] for W in weights[:-1]] or [o]
    if depth > 3:
        return f"{depth} layers (has 1 to 3)"
    if max(widths) > 256:
        return f"a layer of width {max(widths)} (has up to 256)"
    if depth > 1 and o > 64:
        return f"o={o} outputs (has up to 64)"
    return why_not_common("triton", _tensors(args), (torch.float32,))


_shapley = Op(
    mlp_shapley_reference,
    fake=_fake,
    backends=[
        Backend("triton", "microtome.kernels.mlp_shapley:launch", _why_not_triton),
        Backend("cpu", f"{__name__}:_cpu", _why_not_cpu),
    ],
    looks=_look,
)
