"""coalition_inputs: by hand, then every backend bit for bit against a loop over single numbers."""

from __future__ import annotations

import doctest
import importlib

import pytest
import torch
from torch import Tensor

from microtome.ops import coalition_inputs, use_backend
from microtome.ops.coalition_inputs import _inputs
from microtome.testing import backends_of

on_every_backend = pytest.mark.parametrize("backend", backends_of(_inputs))


def int32(*rows: list[int]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int32)


@on_every_backend
def test_it_agrees_with_numbers_worked_by_hand(backend: str) -> None:
    x = torch.tensor([[1.0, 2.0, 3.0], [10.0, 20.0, 30.0]])
    background = torch.tensor([[-1.0, -2.0, -3.0], [-4.0, -5.0, -6.0]])
    ranks = int32([2, 0, 1], [0, 1, 2])  # orders (1, 2, 0) and (0, 1, 2)
    rows = int32(
        [0, 0, 0, 0, 1], [1, 1, 0, 1, 3], [1, 0, 1, 2, 3], [0, 1, 1, 0, 3], [0, 1, 1, 2, 2]
    )
    with use_backend(backend):
        got = coalition_inputs(x, background, ranks, rows)
    assert got.tolist() == [
        [-1.0, 2.0, -3.0],  # player 1
        [10.0, -5.0, 30.0],  # players 2 and 0
        [-1.0, -2.0, 30.0],  # player 2
        [1.0, 2.0, 3.0],  # all
        [-4.0, -5.0, -6.0],  # none
    ]


@on_every_backend
def test_groups_of_columns_move_together_and_minus_one_is_never_absent(backend: str) -> None:
    x, background = torch.tensor([[1, 2, 3, 4, 5]]), torch.zeros(1, 5, dtype=torch.int64)
    player = torch.tensor([1, 0, -1, 1, 0], dtype=torch.int32)
    rows = int32([0, 0, 0, 0, 1], [0, 0, 0, 1, 2], [0, 0, 0, 1, 1], [0, 0, 0, 0, 2])
    with use_backend(backend):
        got = coalition_inputs(x, background, int32([1, 0]), rows, player)
    assert got.tolist() == [[1, 0, 3, 4, 0], [0, 2, 3, 0, 5], [0, 0, 3, 0, 0], [1, 2, 3, 4, 5]]


def test_the_examples_of_the_docstring_hold() -> None:
    assert doctest.testmod(importlib.import_module("microtome.ops.coalition_inputs")).failed == 0
