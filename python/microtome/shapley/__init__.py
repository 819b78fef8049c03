"""Shapley values of inputs and of a model's own parts: exact, sampled, in closed form."""

from microtome.shapley import parts
from microtome.shapley.adaptive import adaptive
from microtome.shapley.game import Game, MeanGame, SetGame
from microtome.shapley.inputs import InputGame
from microtome.shapley.permutation import permutation
from microtome.shapley.players import Players
from microtome.shapley.result import ShapleyValues

__all__ = [
    "Game",
    "InputGame",
    "MeanGame",
    "Players",
    "SetGame",
    "ShapleyValues",
    "adaptive",
    "parts",
    "permutation",
]
