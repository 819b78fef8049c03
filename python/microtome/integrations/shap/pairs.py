"""Shapley-Taylor interactions of pairs, as shap's exact explainer lays them out."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from microtome.integrations.shap.solved import Solved
from microtome.ops import coalition_gram
from microtome.shapley.coalitions import pack
from microtome.shapley.exact import every_coalition
from microtome.shapley.game import Game
from microtome.shapley.link import Link


def interactions(game: Game, found: Solved, link: Link | None) -> Solved:
    """The values of pairs, [e, p, p, o]; on the diagonal the features' main effects.

        phi_jk = sum over S without j and k of
                 |S|! (p - |S| - 1)! / p!  (v(S, j, k) - v(S, j) - v(S, k) + v(S))

    which is half the Shapley-Taylor index, so that both triangles and the diagonal sum to full -
    base.

    Args:
        game: the game.
        found: its Shapley values, for the base and full values.
        link: of means over the background, or None.
    """
    p = len(game.players)
    e, o = found.full.shape
    by_size = [1 / (p * math.comb(p - 1, s)) for s in range(p)]
    w = torch.tensor([0.0, 0.0, *by_size, 0.0], dtype=torch.float64)  # w[s + 2] for size s
    everyone = torch.arange(e)
    nothing = w[2] * found.base + w[p] * found.full  # the ends, which are in no chunk
    single = torch.zeros(e, p, o, dtype=torch.float64)
    pairs = torch.zeros(e, p, p, o, dtype=torch.float64)
    for inside, v in every_coalition(game, everyone, link):
        s = inside.sum(1) + 2
        words = pack(inside)
        # Expanded in products of memberships, a coalition counts w(s) for every pair, less
        # w(s) + w(s - 1) for each of the two that is in it, and the rest if both are.
        one, both = w[s] + w[s - 1], w[s] + 2 * w[s - 1] + w[s - 2]
        nothing += (w[s][:, None] * v).sum(1)
        for j in range(o):
            single[..., j] += coalition_gram(words, one * v[..., j], v[..., :1], p)[0][:, 0, 1:]
            pairs[..., j] += coalition_gram(words, both * v[..., j], v[..., :1], p)[0][:, 1:, 1:]
    pairs += nothing[:, None, None] - single[:, :, None] - single[:, None]
    alone = found.with_main_effects(game, link).main_effects
    at = torch.arange(p)
    pairs[:, at, at] = alone
    return replace(found, values=pairs, error=torch.zeros_like(pairs))
