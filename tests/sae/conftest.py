"""Small data with known structure, and one thread: these sizes lose time on more."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from microtome._seed import generator


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def data() -> Tensor:
    """600 rows of width 12: sparse sums of 24 directions about an offset."""
    g = generator(0, "test data")
    directions = torch.nn.functional.normalize(torch.randn(24, 12, generator=g), dim=1)
    mask = torch.rand(600, 24, generator=g) < 0.1
    return (torch.rand(600, 24, generator=g) * mask) @ directions + 2.0
