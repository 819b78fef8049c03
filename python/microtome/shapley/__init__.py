"""Shapley values of inputs and of a model's own parts: exact, sampled, in closed form."""

from microtome.shapley.closed import closed
from microtome.shapley.exact import exact
from microtome.shapley.explain import explain
from microtome.shapley.game import Game, SetGame
from microtome.shapley.inputs import InputGame
from microtome.shapley.interaction_values import Interactions
from microtome.shapley.interactions import interactions
from microtome.shapley.kernel import kernel
from microtome.shapley.owen import partition
from microtome.shapley.permutation import permutation
from microtome.shapley.players import Players
from microtome.shapley.result import ShapleyValues

__all__ = [
    "Game",
    "InputGame",
    "Interactions",
    "Players",
    "SetGame",
    "ShapleyValues",
    "closed",
    "exact",
    "explain",
    "interactions",
    "kernel",
    "partition",
    "permutation",
]
