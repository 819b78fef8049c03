"""Shapley values of inputs and of a model's own parts: exact, sampled, in closed form."""

from microtome.shapley import plots
from microtome.shapley.exact import exact
from microtome.shapley.game import Game, SetGame
from microtome.shapley.image import image_game
from microtome.shapley.inputs import InputGame
from microtome.shapley.kernel import kernel
from microtome.shapley.permutation import permutation
from microtome.shapley.players import Players
from microtome.shapley.result import ShapleyValues
from microtome.shapley.series import series_game
from microtome.shapley.text import explain_text, text_game

__all__ = [
    "Game",
    "InputGame",
    "Players",
    "SetGame",
    "ShapleyValues",
    "exact",
    "explain_text",
    "image_game",
    "kernel",
    "permutation",
    "plots",
    "series_game",
    "text_game",
]
