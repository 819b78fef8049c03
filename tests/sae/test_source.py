"""Batches from memory, and where b_dec starts."""

import itertools

import pytest
import torch

from microtome import SAE, TopK, TrainConfig
from microtome.errors import ArgumentError, NonFiniteError, ShapeError
from microtome.sae import ActivationSource, InMemory
from microtome.sae.init import geometric_median, start_b_dec_
from microtome.sae.source import as_source


def numbered(n: int) -> InMemory:
    return InMemory(torch.arange(float(n))[:, None])


@pytest.mark.parametrize(("n", "size"), [(10, 4), (10, 5), (3, 8), (1, 2), (7, 7)])
def test_batch_i_is_a_function_of_seed_and_i(n, size):
    whole = list(itertools.islice(numbered(n).batches(size, seed=3), 9))
    assert all(batch.shape == (size, 1) for batch in whole)
    for start in (0, 1, 4, 8):
        for i, batch in enumerate(numbered(n).batches(size, seed=3, start=start), start):
            assert torch.equal(batch, whole[i])
            if i == 8:
                break


def test_every_row_comes_once_before_any_comes_twice():
    batches = itertools.islice(numbered(10).batches(4, seed=0), 5)
    drawn = torch.cat(list(batches)).flatten()
    assert sorted(drawn[:10].tolist()) == sorted(drawn[10:].tolist()) == list(range(10))
    assert not torch.equal(drawn[:10], drawn[10:])


def test_another_seed_gives_another_order():
    one, two = (next(numbered(50).batches(50, seed=s)) for s in (0, 1))
    assert not torch.equal(one, two)


def test_a_source_is_anything_with_the_four_methods():
    class Doubled:
        d = 3

        def __len__(self):
            return 2

        def rows(self, index):
            return torch.ones(2, 3)[index]

        def batches(self, batch_size, *, seed, start=0):
            while True:
                yield torch.ones(batch_size, 3)

    assert isinstance(Doubled(), ActivationSource)
    assert as_source("train", Doubled(), 3).d == 3
    with pytest.raises(ShapeError, match=r"must be \[rows, d=4\] as the SAE's d_model, got d=3"):
        as_source("train", Doubled(), 4)


def test_what_is_no_source_is_named():
    with pytest.raises(ArgumentError, match=r"must be a tensor \[rows, d\].*got list"):
        as_source("train", [[1.0]], 1)
    with pytest.raises(ShapeError, match=r"activations must be \[rows, d\], got shape \[3\]"):
        as_source("train", torch.ones(3), 3)
    with pytest.raises(ShapeError, match="at least one row"):
        as_source("train", torch.ones(0, 3), 3)


def test_the_geometric_median_of_a_triangle_is_its_fermat_point():
    # Equilateral: the Fermat point is the centroid. With an angle of 120 degrees: that corner.
    side = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, 3**0.5 / 2]])
    expected = torch.tensor([0.5, 3**0.5 / 6], dtype=torch.float64)
    torch.testing.assert_close(geometric_median(side), expected, rtol=0, atol=1e-5)
    flat = torch.tensor([[-10.0, 0.0], [0.0, 1.0], [10.0, 0.0]])
    corner = geometric_median(flat, max_iterations=2000)
    torch.testing.assert_close(corner, flat[1].double(), rtol=0, atol=2e-2)


def test_the_geometric_median_is_hardly_moved_by_massive_rows():
    x = torch.randn(500, 4, generator=torch.Generator().manual_seed(0)) + 1.0
    x[:5] = 1e4
    assert (geometric_median(x) - 1).abs().max() < 0.2
    assert (x.mean(0) - 1).abs().min() > 50


def test_equal_rows_are_their_own_median():
    assert geometric_median(torch.full((4, 2), 3.0)).tolist() == [3.0, 3.0]


def test_b_dec_starts_in_the_middle_unless_it_is_set(data):
    sae, source = SAE(12, 24, TopK(2)), InMemory(data)
    start_b_dec_(sae, source, TrainConfig(steps=1))
    torch.testing.assert_close(sae.b_dec.detach(), geometric_median(data).float())
    kept = sae.b_dec.detach().clone()
    start_b_dec_(sae, source, TrainConfig(steps=1, b_dec_init="mean"))
    assert torch.equal(sae.b_dec, kept)
    fresh = SAE(12, 24, TopK(2))
    start_b_dec_(fresh, source, TrainConfig(steps=1, b_dec_init="keep"))
    assert not fresh.b_dec.any()
    start_b_dec_(fresh, source, TrainConfig(steps=1, b_dec_init="mean", init_rows=600))
    torch.testing.assert_close(fresh.b_dec.detach(), data.mean(0))


def test_a_bad_row_in_the_sample_is_named_by_its_number(data):
    data[417, 3] = float("inf")
    with pytest.raises(NonFiniteError, match="activations holds NaN or infinity in row 417"):
        start_b_dec_(SAE(12, 24, TopK(2)), InMemory(data), TrainConfig(steps=1))
