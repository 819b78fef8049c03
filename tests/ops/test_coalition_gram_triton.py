"""coalition_gram in Triton: exact on integers, the same bits in any batch, at awkward sizes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from microtome._seed import generator
from microtome.ops.coalition_gram import coalition_gram_reference
from microtome.testing.triton import DEVICE, MARKS, RUNS

pytestmark = MARKS
if RUNS:
    kernel = pytest.importorskip("microtome.kernels.coalition_gram")

# K, p, e, o, g
SIZES = [
    (3, 1, 1, 1, 1),
    (130, 30, 1, 1, 1),  # in parts
    (9, 31, 2, 3, 2),
    (9, 32, 1, 1, 1),
    (9, 63, 1, 1, 1),
    (9, 64, 1, 20, 1),
    (7, 130, 1, 1, 1),
    (0, 5, 1, 1, 1),
    (4, 5, 0, 1, 1),
    (4, 5, 2, 0, 1),
]


def inputs(K: int, p: int, e: int, o: int, g: int) -> tuple[Tensor, Tensor, Tensor]:
    """Coalitions with bits beyond p, and integers below 2^16."""
    seed = generator(0, f"{K} {p} {e} {o} {g}")
    words = torch.randint(-(2**63), 2**63 - 1, (K, -(-p // 64)), generator=seed)
    weights = torch.randint(0, 2**16, (g, K), generator=seed).double()
    values = torch.randint(-(2**16), 2**16, (e, K, o), generator=seed).double()
    return words.to(DEVICE), weights.to(DEVICE), values.to(DEVICE)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_integers_are_summed_exactly(size: tuple[int, int, int, int, int]) -> None:
    args, p = inputs(*size), size[1]
    got, expected = kernel.launch(*args, p), coalition_gram_reference(*args, p)
    assert all(map(torch.equal, got, expected))


def test_weights_that_are_no_integers_are_summed_in_float64(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kernel, "SHORTEST", 4)
    words, weights, values = inputs(9, 40, 2, 2, 2)
    weights, values = weights.sqrt(), values / 7
    gram, moments = kernel.launch(words, weights, values, 40)
    expected = coalition_gram_reference(words, weights, values, 40)
    torch.testing.assert_close(gram, expected[0], rtol=1e-14, atol=0)
    size = coalition_gram_reference(words, weights, values.abs(), 40)[1]
    assert bool(((moments - expected[1]).abs() <= 1e-14 * size).all())
    assert torch.equal(gram, gram.mT)


def test_an_explicand_has_the_same_bits_in_any_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "SHORTEST", 4)
    words, weights, values = inputs(13, 5, 3, 1, 3)
    weights = weights.sqrt()
    gram, moments = kernel.launch(words, weights, values, 5)
    monkeypatch.setattr(kernel, "WORKSPACE", 1)  # an explicand at a time
    again = kernel.launch(words, weights, values, 5)
    assert torch.equal(gram, again[0])
    assert torch.equal(moments, again[1])
    alone = kernel.launch(words, weights[2:], values[2:], 5)
    assert torch.equal(gram[2:], alone[0])
    assert torch.equal(moments[2:], alone[1])


def test_a_value_that_is_nan_reaches_the_constant_and_the_players_of_its_coalition() -> None:
    words, weights, values = inputs(12, 40, 1, 2, 1)
    values[0, 3, 1] = torch.nan
    moments = kernel.launch(words, weights, values, 40)[1]
    inside = torch.tensor([True, *(bool(int(words[3, 0]) >> j & 1) for j in range(40))])
    assert torch.equal(moments[0, :, 1].isnan().cpu(), inside)
    assert moments[0, :, 0].isfinite().all()


@pytest.mark.parametrize("size", [(1, 1), (2108, 30), (5000, 784), (10**6, 2000), (0, 3)], ids=str)
def test_parts_cover_every_coalition_once(size: tuple[int, int]) -> None:
    parts, each = kernel.geometry(*size)
    assert parts <= kernel.PROGRAMS
    assert (parts - 1) * each < max(size[0], 1) <= parts * each
