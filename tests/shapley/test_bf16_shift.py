"""The bound on what bf16 products shift values by, which decides where they may be taken."""

from __future__ import annotations

import torch

from microtome.shapley.mlp import bound_of_mean


def test_the_bound_is_that_worked_by_hand() -> None:
    # <d, d'> / 2 of the pairs of (2, 0), (0, 2), (2, 2): 0, 2, 2; their mean 4/3, spread 8/9.
    # Rows' means are 1, 1, 2: variance 1/3 less the spread's half is below zero, so 0.
    sample = torch.tensor([[[2.0, 0.0], [0.0, 2.0], [2.0, 2.0]]], dtype=torch.float64)
    own = (2 + 2 + 4) / 3
    wanted = (4 / 3 + 2 * (2 * (8 / 9) / 6) ** 0.5 + own / 10) ** 0.5
    torch.testing.assert_close(float(bound_of_mean(sample, 10)[0]), wanted)


def test_it_is_above_the_shift_in_95_of_100_draws_and_not_far_above() -> None:
    g = torch.Generator().manual_seed(0)
    draws, s, k, cells = 2000, 25, 30, 400
    for systematic in (0.0, 0.1, 1.0):
        center = systematic * torch.randn(k, generator=g, dtype=torch.float64)
        noise = torch.randn(draws, s, k, generator=g, dtype=torch.float64)
        mean = center + torch.randn(draws, k, generator=g, dtype=torch.float64) / cells**0.5
        bound = bound_of_mean(center + noise, cells)
        shift = mean.square().mean(1).sqrt()  # of as many cells as the answer has
        assert (bound >= shift).double().mean() > 0.95
        # Of noise alone, a bound on each entry would be at 0.6.
        assert bound.median() < 1.2 * systematic + 0.2


def test_a_rows_bound_does_not_depend_on_other_rows() -> None:
    sample = torch.randn(40, 24, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole = bound_of_mean(sample, 100)
    for e in range(40):
        assert torch.equal(bound_of_mean(sample[e : e + 1], 100), whole[e : e + 1])
