"""Games shared by the tests of Shapley estimators."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from microtome.shapley import SetGame


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Calls of these sizes wait for their threads more than they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def table_game() -> Callable[[Tensor], SetGame]:
    """A game from the values [2^p] or [2^p, o] of its coalitions, by their bits."""

    def make(values: Tensor) -> SetGame:
        p = len(values).bit_length() - 1
        bit = 2 ** torch.arange(p)
        return SetGame(lambda inside: values[(inside * bit).sum(1)], p)

    return make


@pytest.fixture(scope="session")
def smooth() -> tuple[Callable[[Tensor], Tensor], Tensor, Tensor]:
    """A function of 12 columns with two outputs, 3 rows and 5 background rows.

    It works row by row, so that a row's answer does not depend on the others in a call.
    """
    stream = torch.Generator().manual_seed(5)
    w = torch.randn(12, 8, generator=stream, dtype=torch.float64)
    v = torch.randn(8, 2, generator=stream, dtype=torch.float64)

    def f(rows: Tensor) -> Tensor:
        hidden = (rows[:, :, None] * w).sum(1)
        return (torch.tanh(hidden / 2)[:, :, None] * v).sum(1)

    x, background = torch.randn(8, 12, generator=stream, dtype=torch.float64).split([3, 5])
    return f, x, background
