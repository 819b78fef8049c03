"""coalition_gram: by hand, then every backend exactly, where the weights are integers."""

from __future__ import annotations

import doctest
import importlib

import pytest
import torch

from microtome.ops import coalition_gram, use_backend
from microtome.ops.coalition_gram import _gram
from microtome.testing import backends_of

on_every_backend = pytest.mark.parametrize("backend", backends_of(_gram))


@on_every_backend
def test_it_agrees_with_numbers_worked_by_hand(backend: str) -> None:
    coalitions = torch.tensor([[0b011], [0b100], [0b111]])
    weights = torch.tensor([[1.0, 2.0, 4.0]]).double()
    values = torch.tensor([[[1.0], [10.0], [100.0]], [[1.0], [0.0], [-1.0]]]).double()
    with use_backend(backend):
        gram, moments = coalition_gram(coalitions, weights, values, p=3)
    assert gram.tolist() == [
        [
            [7.0, 5.0, 5.0, 6.0],
            [5.0, 5.0, 5.0, 4.0],
            [5.0, 5.0, 5.0, 4.0],
            [6.0, 4.0, 4.0, 6.0],
        ]
    ]
    assert moments[..., 0].tolist() == [[421.0, 401.0, 401.0, 420.0], [-3.0, -3.0, -3.0, -4.0]]


@on_every_backend
def test_each_explicand_may_bring_its_own_weights(backend: str) -> None:
    coalitions = torch.tensor([[0b1], [0b0]])
    weights = torch.tensor([[1.0, 3.0], [5.0, 0.0]]).double()
    values = torch.tensor([[[2.0, 1.0], [4.0, 1.0]], [[3.0, 1.0], [9.0, 1.0]]]).double()
    with use_backend(backend):
        gram, moments = coalition_gram(coalitions, weights, values, p=1)
    assert gram.tolist() == [[[4.0, 1.0], [1.0, 1.0]], [[5.0, 5.0], [5.0, 5.0]]]
    assert moments.tolist() == [[[14.0, 4.0], [2.0, 1.0]], [[15.0, 5.0], [15.0, 5.0]]]


def test_the_examples_of_the_docstring_hold() -> None:
    assert doctest.testmod(importlib.import_module("microtome.ops.coalition_gram")).failed == 0
