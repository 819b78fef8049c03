"""Games of small multilayer perceptrons, and their Shapley values by loops in float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from microtome._seed import generator
from microtome.ops._mlp_shapley_inputs import ACTIVATIONS, IDENTITY, RELU


@dataclass(frozen=True)
class MlpCase:
    """One input to mlp_shapley.

    Attributes:
        name: shown by pytest and in benchmark tables.
        e: explicands.
        n: background rows.
        m: columns.
        widths: outputs of each layer.
        S: strata, 1 or n.
        U: units.
        A: orders of a unit.
        p: players; where it is m, each column is its own player.
        codes: the activation of each layer; () for RELU, the last one IDENTITY.
        paired: whether the orders are walked back as well.
        biased: whether the layers have biases.
    """

    name: str
    e: int
    n: int
    m: int
    widths: tuple[int, ...]
    S: int
    U: int
    A: int
    p: int
    codes: tuple[int, ...] = ()
    paired: bool = True
    biased: bool = True

    def inputs(self, seed: int = 0) -> dict[str, Tensor | list[Tensor] | list[int] | bool | None]:
        """The arguments of mlp_shapley by name, without precision; floats in float32.

        Grouped columns belong to random players, some to none; the last player may have none.
        """
        g = generator(seed, self.name)
        draw = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
        orders = torch.rand(self.S, self.U, self.A, self.p, generator=g).argsort(-1)
        layers = list(zip((self.m, *self.widths[:-1]), self.widths, strict=True))
        player = torch.randint(-1, self.p, (self.m,), generator=g, dtype=torch.int32)
        return {
            "x": draw(self.e, self.m),
            "background": draw(self.n, self.m),
            "ranks": orders.argsort(-1).to(torch.int32),
            "weights": [draw(o, i) / max(i, 1) ** 0.5 for i, o in layers],
            "biases": [draw(o if self.biased else 0) for o in self.widths],
            "activations": list(self.codes or (*[RELU] * (len(layers) - 1), IDENTITY)),
            "player": None if self.p == self.m else player,
            "paired": self.paired,
        }


MLP_CASES = (
    MlpCase("linear", 2, 3, 5, (2,), 3, 2, 2, 5, (IDENTITY,)),
    MlpCase("one_of_all", 1, 1, 1, (1, 1, 1), 1, 1, 1, 1),
    MlpCase("one_player", 2, 3, 4, (17, 3), 3, 3, 1, 1),
    MlpCase("two_players", 2, 4, 2, (17, 17, 1), 1, 1, 2, 2),
    MlpCase("one_background", 5, 1, 6, (33, 40, 1), 1, 3, 2, 6),
    MlpCase("crossed", 2, 20, 9, (130, 70, 3), 1, 3, 2, 9),
    MlpCase("nested", 2, 5, 12, (128, 128, 1), 5, 2, 1, 12),
    MlpCase("plain", 1, 4, 11, (64, 31, 1), 4, 1, 2, 11, paired=False),
    MlpCase("groups", 2, 3, 40, (65, 33, 2), 3, 2, 1, 7),
    MlpCase("groups_crossed", 1, 9, 23, (31, 64, 1), 1, 2, 1, 3, biased=False),
    MlpCase("more_players_than_columns", 1, 2, 3, (16, 16, 1), 2, 1, 1, 8),
    MlpCase("deep", 2, 2, 17, (130, 257, 40, 5, 1), 2, 2, 1, 17),
    MlpCase("wide", 1, 2, 16, (600, 48, 1), 2, 1, 1, 16),
    MlpCase("long_walk", 1, 1, 70, (40, 40, 1), 1, 1, 1, 70),
    MlpCase("narrow", 2, 3, 5, (1, 1, 2), 3, 1, 1, 5),
    MlpCase("no_explicands", 0, 3, 5, (8, 8, 2), 3, 2, 1, 5),
)


def model_of(inputs: dict[str, object], half: bool = False) -> Callable[[Tensor], Tensor]:
    """The network of `inputs` at the dtype of what it is given.

    Args:
        inputs: of a case.
        half: whether to round what `precision="bf16"` rounds.
    """
    layers = list(zip(inputs["weights"], inputs["biases"], inputs["activations"], strict=True))  # type: ignore[call-overload]

    def model(a: Tensor) -> Tensor:
        for layer, (W, bias, code) in enumerate(layers):
            if half and 0 < layer < len(layers) - 1:
                a, W = a.bfloat16().to(a.dtype), W.bfloat16()
            h = a @ W.to(a.dtype).T
            a = ACTIVATIONS[code](h + bias.to(a.dtype) if bias.numel() else h)
        return a

    return model


def values_by_loops(
    inputs: dict[str, object], model: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor, float]:
    """mean and m2 as mlp_shapley defines them, set by set, and the largest value in size."""
    x, background = inputs["x"].double(), inputs["background"].double()  # type: ignore[attr-defined]
    ranks, m = inputs["ranks"], x.shape[1]
    player = list(range(m)) if inputs["player"] is None else inputs["player"].tolist()  # type: ignore[attr-defined]
    S, U, A, p = ranks.shape  # type: ignore[attr-defined]
    o, largest = inputs["weights"][-1].shape[0], 0.0  # type: ignore[index]
    here, instead = x.tolist(), background.tolist()
    unit = torch.zeros(len(x), S, U, p, o, dtype=torch.float64)
    for e, s, u, a in itertools.product(*map(range, (len(x), S, U, A))):
        rank = ranks[s, u, a].tolist()  # type: ignore[index]
        order = sorted(range(p), key=rank.__getitem__)
        sets = [{-1, *order[:t]} for t in range(p + 1)] + [{-1, *order[t:]} for t in range(p + 1)]
        value = torch.zeros(len(sets), o, dtype=torch.float64)
        rows = range(len(background)) if S == 1 else [s]
        for b in rows:
            masked = [
                [
                    here[e][c] if g < 0 or g in members else instead[b][c]
                    for c, g in enumerate(player)
                ]
                for members in sets
            ]
            value += model(torch.tensor(masked, dtype=torch.float64).reshape(-1, m)) / len(rows)
        largest = max(largest, float(value.abs().max()))
        for t, j in enumerate(order):
            gain = value[t + 1] - value[t]
            if inputs["paired"]:
                gain = (gain + value[p + 1 + t] - value[p + 2 + t]) / 2
            unit[e, s, u, j] += gain / A
    mean = unit.mean(2)
    return mean, (unit - mean[:, :, None]).square().sum(2), largest
