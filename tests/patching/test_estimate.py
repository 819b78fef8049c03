"""How close an estimate comes, on numbers worked by hand."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace

import pytest
import torch

from microtome import errors
from microtome.patching import Attribution, Sweep, faithfulness


def sweep_of(effects: list[list[float]], written: list[list[int]] | None = None) -> Sweep:
    """Layers by positions, one prompt, an unpatched metric of 1."""
    by_prompt = torch.tensor(effects, dtype=torch.float64)[..., None] + 1.0
    return Sweep(
        scores=by_prompt[..., 0],
        by_prompt=by_prompt,
        axes=("layer", "position"),
        values=((4, 7), (0, 2, 5)),
        site="resid_pre",
        metric="logit difference",
        clean=torch.tensor([9.0], dtype=torch.float64),
        corrupted=torch.tensor([1.0], dtype=torch.float64),
        base="corrupted",
        written=torch.ones(2, 3).long() if written is None else torch.tensor(written),
        engine="native",
    )


def test_it_agrees_with_numbers_worked_by_hand() -> None:
    # Around their means 2 and 3 the four pairs are (-1, -3), (0, 0), (0, -1), (1, 4).
    estimate = sweep_of([[1.0, 2.0, 2.0], [3.0, 50.0, -50.0]])
    exact = sweep_of([[0.0, 3.0, 2.0], [7.0, 0.0, 0.0]], [[1, 1, 1], [1, 0, -1]])
    found = faithfulness(estimate, exact, k=2)
    assert found.cells == 4
    assert found.pearson == pytest.approx(7 / math.sqrt(2 * 26))
    # Ranks 0, 1.5, 1.5, 3 and 0, 2, 1, 3: products of what differs from 1.5 add up to 4.5.
    assert found.spearman == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert (found.k, found.overlap) == (2, 1.0)  # 7 and 3; of the equal estimates the first counts
    assert found.max_error == 4.0
    assert found.worst[0] == {
        "layer": 7, "position": 0, "estimate": 3.0, "exact": 7.0, "error": -4.0
    }  # fmt: skip
    assert [cell["error"] for cell in found.worst] == [-4.0, 1.0, -1.0, 0.0]
    json.dumps(found.to_dict())


def test_a_large_effect_that_the_estimate_misses_is_not_in_the_overlap() -> None:
    exact = sweep_of([[9.0, 1.0, -8.0], [0.0, 2.0, 0.5]])
    estimate = sweep_of([[0.1, 1.0, -7.0], [0.0, 2.0, 0.5]])
    assert faithfulness(estimate, exact, k=2).overlap == 0.5
    assert faithfulness(estimate, exact, k=100).k == 6
    assert faithfulness(exact, exact) == replace(
        faithfulness(exact, exact), pearson=1.0, spearman=1.0, overlap=1.0, max_error=0.0
    )


def test_a_side_that_does_not_vary_has_no_correlation() -> None:
    flat = faithfulness(sweep_of([[1.0] * 3] * 2), sweep_of([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]]))
    assert math.isnan(flat.pearson)
    assert math.isnan(flat.spearman)
    assert flat.max_error == 2.0


def test_an_attribution_compares_itself() -> None:
    exact = sweep_of([[9.0, 1.0, -8.0], [0.0, 2.0, 0.5]])
    estimate = Attribution(**vars(sweep_of([[8.0, 1.0, -7.0], [0.0, 2.0, 0.5]])), steps=5)
    assert estimate.against(exact, k=3) == faithfulness(estimate, exact, k=3)
    assert repr(estimate) == (
        "Attribution(resid_pre: 2 layers x 3 positions, logit difference, 5 steps)"
    )


GOOD = sweep_of([[9.0, 1.0, -8.0], [0.0, 2.0, 0.5]])


@pytest.mark.parametrize(
    ("exact", "k", "text"),
    [
        (
            replace(GOOD, site="z"),
            10,
            "estimate and exact differ in site: 'resid_pre' and 'z'. Run both over the same cells, "
            "prompts and direction.",
        ),
        (
            replace(GOOD, values=((4, 7), tuple(range(40)))),
            10,
            "estimate and exact differ in values: ((4, 7), (0, 2, 5)) and "
            "((4, 7), (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 1.... Run both over the same "
            "cells, prompts and direction.",
        ),
        (
            replace(GOOD, base="clean"),
            10,
            "estimate and exact differ in base: 'corrupted' and 'clean'. Run both over the same "
            "cells, prompts and direction.",
        ),
        (
            replace(GOOD, written=torch.zeros(2, 3).long()),
            10,
            "no patch of these cells changes anything. Do the runs differ there?",
        ),
        (GOOD, 0, f"k must be between 1 and {1 << 30}, got k=0."),
    ],
)
def test_sweeps_that_cannot_be_compared_are_named(exact: Sweep, k: int, text: str) -> None:
    with pytest.raises(errors.ArgumentError, match=f"^faithfulness: {re.escape(text)}$"):
        faithfulness(GOOD, exact, k=k)
