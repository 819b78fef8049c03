"""sae_update with gradients of rows that products have formed."""

from __future__ import annotations

import pytest
import torch
from tests.ops.test_sae_update import LARGE, Problem, problem, two_by_two
from torch import Tensor

from microtome._seed import generator
from microtome.errors import ArgumentError, DtypeError, NonFiniteError, ShapeError
from microtome.ops import RowGradients, UpdateRule, moments_for, sae_update, use_backend
from microtome.ops.sae_update import _update
from microtome.testing import CASES, Case, assert_accurate, backends_of, factor_of

BACKENDS = [b for b in backends_of(_update) if "cuda" not in str(b.values)]
NAMES = ("W_enc", "b_enc", "W_dec")


def rows_for(case: Case, dtype: torch.dtype = torch.float32) -> RowGradients:
    """For every third latent, in another order than theirs."""
    g = generator(2, case.name)
    latents = torch.arange(case.f)[::3]
    m = len(latents)
    place = torch.full((case.f,), -1, dtype=torch.int32)
    place[latents] = torch.randperm(m, generator=g).int()
    shapes = ((m, case.d), (m,), (m, case.d))
    return RowGradients(place, *((torch.randn(s, generator=g) * 0.1).to(dtype) for s in shapes))


def stepped(p: Problem, backend: str, extra: RowGradients) -> dict[str, Tensor]:
    return p.step(backend, extra=extra)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rowsparse", [False, True])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("case", [c for c in CASES if c.name not in LARGE], ids=lambda c: c.name)
def test_rows_are_added_to_what_the_entries_sum_to(
    case: Case, optimizer: str, rowsparse: bool, backend: str
) -> None:
    rule = UpdateRule(optimizer, lr=0.01, rowsparse=rowsparse)
    aux = optimizer == "sgd"
    got = stepped(problem(case, rule, aux=aux), backend, rows_for(case))
    plain = stepped(problem(case, rule, aux=aux), "reference", rows_for(case))
    wide = rows_for(case, torch.float64)
    exact = stepped(problem(case, rule, torch.float64, aux=aux), "reference", wide)
    assert torch.equal(got.pop("fired"), exact.pop("fired"))
    for name, tensor in got.items():
        assert_accurate(tensor, plain[name], exact[name], name, factor_of(backend, tensor))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_moves_a_latent_that_no_entry_names(backend: str) -> None:
    # Feature 1 has no entry. dW_enc = (1, 2), db_enc = 4, dW_dec = (4, 8), of which (0, 8) lies
    # along W_dec[1] = (0, 1); db_dec loses 4 * W_enc[1] = (0, 4) beside what entries give: (1, -4).
    code, x, params = two_by_two()
    row = torch.tensor([[1.0, 2.0]])
    extra = RowGradients(
        torch.tensor([-1, 0], dtype=torch.int32), row, torch.tensor([4.0]), 4 * row
    )
    rule = UpdateRule("sgd", lr=0.25, beta1=0.0, rowsparse=True, renorm=False)
    with use_backend(backend):
        fired = sae_update(code, x, params, moments_for(params, rule), rule, 1, extra=extra)
    W_enc, b_enc, W_dec, b_dec = params
    assert fired.tolist() == [1, 0]
    assert W_enc.tolist() == [[0.5, -0.25], [-0.25, 0.5]]
    assert b_enc.tolist() == [-0.25, -1.0]
    assert W_dec.tolist() == [[1.0, 3.0], [-1.0, 1.0]]
    assert b_dec.tolist() == [-0.25, 2.0]


def refused(extra: RowGradients, error: type[Exception], match: str) -> None:
    code, x, params = two_by_two()
    before = [p.clone() for p in params]
    rule = UpdateRule("sgd", lr=0.25, beta1=0.0)
    with pytest.raises(error, match=match):
        sae_update(code, x, params, moments_for(params, rule), rule, 1, extra=extra)
    assert all(map(torch.equal, params, before))


def test_rows_that_do_not_fit_are_refused_and_nothing_moves() -> None:
    row, one = torch.ones(1, 2), torch.ones(1)
    place = torch.tensor([0, -1], dtype=torch.int32)
    refused(RowGradients(place[:1], row, one, row), ShapeError, "extra_place")
    refused(RowGradients(place, row[:, :1], one, row), ShapeError, "extra_W_enc")
    refused(RowGradients(place, row, one, row.double()), DtypeError, "extra_W_dec float64")
    refused(RowGradients(place.long(), row, one, row), DtypeError, "extra_place must be int32")
    refused(
        RowGradients(place + 1, row, one, row),
        ArgumentError,
        r"extra_place \+ 1 must lie in \[0, m \+ 1=2\)",
    )
    refused(RowGradients(place, row / 0, one, row), NonFiniteError, "extra_W_enc holds NaN or inf")
