"""Shapley values of inputs and of a model's own parts: exact, sampled, in closed form."""

from microtome.shapley import plots
from microtome.shapley.game import Game, SetGame
from microtome.shapley.image import image_game
from microtome.shapley.inputs import InputGame
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
    "explain_text",
    "image_game",
    "permutation",
    "plots",
    "series_game",
    "text_game",
]
