"""Shapley values of inputs and of a model's own parts: exact, sampled, in closed form."""

from microtome.shapley import parts, plots
from microtome.shapley.adaptive import adaptive
from microtome.shapley.closed import closed
from microtome.shapley.exact import exact
from microtome.shapley.explain import explain
from microtome.shapley.game import Game, MeanGame, SetGame
from microtome.shapley.image import image_game
from microtome.shapley.inputs import InputGame
from microtome.shapley.interaction_values import Interactions
from microtome.shapley.interactions import interactions
from microtome.shapley.kernel import kernel
from microtome.shapley.owen import partition
from microtome.shapley.permutation import permutation
from microtome.shapley.players import Players
from microtome.shapley.result import ShapleyValues
from microtome.shapley.series import series_game
from microtome.shapley.text import explain_text, text_game

__all__ = [
    "Game",
    "InputGame",
    "Interactions",
    "MeanGame",
    "Players",
    "SetGame",
    "ShapleyValues",
    "adaptive",
    "closed",
    "exact",
    "explain",
    "explain_text",
    "image_game",
    "interactions",
    "kernel",
    "partition",
    "parts",
    "permutation",
    "plots",
    "series_game",
    "text_game",
]
