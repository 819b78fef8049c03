"""The codes of mlp_shapley's activations, and what its arguments must be."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from microtome.errors import ArgumentError, ShapeError

IDENTITY, RELU, GELU, GELU_TANH, SILU, TANH, SIGMOID, LEAKY_RELU, ELU, SOFTPLUS = range(10)

# By code. The parameters are torch's defaults: slope 0.01, alpha 1, beta 1.
ACTIVATIONS: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda h: h,
    torch.relu,
    F.gelu,
    lambda h: F.gelu(h, approximate="tanh"),
    F.silu,
    torch.tanh,
    torch.sigmoid,
    F.leaky_relu,
    F.elu,
    F.softplus,
)
PRECISIONS = ("fp32", "bf16")


def check_model(
    op: str,
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    activations: Sequence[int],
) -> None:
    """Raise unless the layers follow on each other and on x."""
    if not weights or not len(weights) == len(biases) == len(activations):
        msg = (
            f"{op}: weights, biases and activations must have one entry for each layer, got "
            f"{len(weights)}, {len(biases)} and {len(activations)}."
        )
        raise ShapeError(msg)
    inputs, before = x.shape[1], "the columns of x"
    for layer, (W, bias, code) in enumerate(zip(weights, biases, activations, strict=True)):
        if W.dim() != 2 or W.shape[1] != inputs:
            msg = (
                f"{op}: weights[{layer}] must be [o, {inputs}], {inputs} being {before}, got shape "
                f"{list(W.shape)}."
            )
            raise ShapeError(msg)
        inputs, before = W.shape[0], f"the outputs of weights[{layer}]"
        if bias is not None and bias.numel() and bias.shape != (inputs,):
            msg = (
                f"{op}: biases[{layer}] must be [{inputs}], as weights[{layer}] has outputs, or "
                f"None, got shape {list(bias.shape)}."
            )
            raise ShapeError(msg)
        if not 0 <= code < len(ACTIVATIONS):
            msg = (
                f"{op}: activations[{layer}] must be a code from IDENTITY=0 to "
                f"SOFTPLUS={SOFTPLUS}, got {code}."
            )
            raise ArgumentError(msg)


def check_game(op: str, sizes: dict[str, int], player: Tensor | None) -> None:
    """Raise unless strata, units and players are counts that fit each other."""
    n, m, S, U, A, p = (sizes[letter] for letter in "nmSUAp")
    if n < 1:
        msg = f"{op}: background must have at least one row, got shape [{n}, {m}]."
        raise ShapeError(msg)
    if S not in (1, n):
        msg = (
            f"{op}: ranks must be [S, U, A, p] with S=1 (all background rows walk the same orders) "
            f"or S=n={n} (each its own), got S={S}."
        )
        raise ShapeError(msg)
    if min(U, A, p) < 1:
        msg = f"{op}: ranks must have U, A and p of at least 1, got shape {[S, U, A, p]}."
        raise ShapeError(msg)
    if player is None and p != m:
        msg = (
            f"{op}: without player, ranks must have p={m} players, one for each column of x, got "
            f"p={p}. Pass player [m] to group columns."
        )
        raise ShapeError(msg)


def check_player(op: str, player: Tensor, p: int) -> None:
    """Raise ArgumentError unless every player lies in [-1, p)."""
    if player.numel() == 0:
        return
    low, high = (int(v) for v in torch.aminmax(player))
    if low < -1 or high >= p:
        bad = low if low < -1 else high
        msg = f"{op}: player must lie in [-1, p={p}), -1 for a column of no player, got {bad}."
        raise ArgumentError(msg)


def check_ranks(op: str, ranks: Tensor) -> None:
    """Raise ArgumentError unless every order ranks[s, u, a] is a permutation. Sorts `ranks`."""
    wrong = disordered(ranks)
    if bool(wrong.any()):
        raise_order(op, ranks, int(wrong.nonzero()[0]))


def disordered(ranks: Tensor) -> Tensor:
    """[S U A]: which orders are no permutation. Sorts `ranks`."""
    places = torch.arange(ranks.shape[-1], dtype=ranks.dtype, device=ranks.device)
    return (ranks.sort(-1).values != places).any(-1).flatten()


def strange(player: Tensor, p: int) -> Tensor:
    """[m]: which columns have a player that does not exist."""
    return (player < -1) | (player >= p)


def raise_order(op: str, ranks: Tensor, position: int) -> None:
    """Raise ArgumentError for the order at `position` of the flattened [S, U, A]."""
    s, rest = divmod(position, ranks.shape[1] * ranks.shape[2])
    u, a = divmod(rest, ranks.shape[2])
    shown = ranks[s, u, a].tolist()
    text = str(shown) if len(shown) <= 8 else f"{str(shown[:8])[:-1]}, ...]"
    msg = (
        f"{op}: every order must be a permutation of 0 .. p-1={ranks.shape[3] - 1}, got "
        f"ranks[{s}, {u}, {a}] = {text}."
    )
    raise ArgumentError(msg)
