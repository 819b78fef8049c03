"""shapley_reduce: by hand, then every backend against a loop over single players."""

from __future__ import annotations

import doctest
import importlib

import pytest
import torch

from microtome.ops import shapley_reduce, use_backend
from microtome.ops.shapley_reduce import _reduce
from microtome.testing import backends_of

on_every_backend = pytest.mark.parametrize("backend", backends_of(_reduce))


@on_every_backend
def test_forward_walks_agree_with_numbers_worked_by_hand(backend: str) -> None:
    # Two units of one order each: (1, 2, 0) visits 0, 1, 4, 9; (0, 1, 2) visits 0, 3, 3, 9.
    values = torch.tensor([[0.0, 1.0, 4.0, 9.0], [0.0, 3.0, 3.0, 9.0]]).reshape(1, 1, 2, 1, 4, 1)
    ranks = torch.tensor([[2, 0, 1], [0, 1, 2]], dtype=torch.int32).reshape(1, 2, 1, 3)
    with use_backend(backend):
        mean, m2 = shapley_reduce(values, ranks, paired=False)
    # Player 0 adds 5 and 3, player 1 adds 1 and 0, player 2 adds 3 and 6.
    assert mean.shape == m2.shape == (1, 1, 3, 1)
    assert mean.flatten().tolist() == [4.0, 0.5, 4.5]
    assert m2.flatten().tolist() == [2.0, 0.5, 4.5]


@on_every_backend
def test_paired_walks_agree_with_numbers_worked_by_hand(backend: str) -> None:
    # The order (1, 0). Forward: v() = 0, v(1) = 2, v(1, 0) = 10. Back: v(0) = 6, v() = 0.
    values = torch.tensor([[0.0, 2.0, 10.0, 6.0, 0.0]]).reshape(1, 1, 1, 1, 5, 1)
    ranks = torch.tensor([1, 0], dtype=torch.int32).reshape(1, 1, 1, 2)
    with use_backend(backend):
        mean, m2 = shapley_reduce(values, ranks, paired=True)
    # Player 0 adds 8 to player 1 and 6 to nobody; player 1 adds 2 to nobody and 4 to player 0.
    assert mean.flatten().tolist() == [7.0, 3.0]
    assert m2.flatten().tolist() == [0.0, 0.0]


@on_every_backend
def test_orders_of_a_unit_are_averaged_before_units_are_compared(backend: str) -> None:
    values = torch.tensor([0.0, 1.0, 0.0, 5.0, 0.0, 2.0, 0.0, 8.0]).reshape(1, 1, 2, 2, 2, 1)
    ranks = torch.zeros(1, 2, 2, 1, dtype=torch.int32)
    with use_backend(backend):
        mean, m2 = shapley_reduce(values, ranks, paired=False)
    assert mean.item() == 4.0  # units 3 and 5
    assert m2.item() == 2.0


def test_the_examples_of_the_docstring_hold() -> None:
    assert doctest.testmod(importlib.import_module("microtome.ops.shapley_reduce")).failed == 0
