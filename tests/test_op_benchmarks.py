"""Benchmarks of single ops hold every way to float64, and refuse a time to a wrong answer."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Only `benchmarks` is wanted from the root, so the root does not stay on the path.
sys.path.insert(0, str(ROOT))
importlib.import_module("benchmarks")
sys.path.remove(str(ROOT))

from benchmarks import side_by_side  # noqa: E402
from benchmarks.checks import DisagreementError  # noqa: E402
from benchmarks.ops import (  # noqa: E402
    bench_feature_clamp,
    bench_jump_relu,
    bench_random_ranks,
    bench_solu,
    bench_topk_encode_fp8,
)

from microtome.testing import Case  # noqa: E402

TINY = Case("tiny", 12, 16, 96, 4)
CONTESTS: dict[str, tuple[Any, Callable[[], side_by_side.Contest]]] = {
    "feature_clamp": (bench_feature_clamp, lambda: bench_feature_clamp.steer(TINY, 3)),
    "jump_relu": (bench_jump_relu, lambda: bench_jump_relu.sparsity(TINY, 0.5)),
    "random_ranks": (bench_random_ranks, lambda: bench_random_ranks.orders(20, 7)),
    "solu": (bench_solu, lambda: bench_solu.neurons(5, 33)),
    "topk_encode_fp8": (bench_topk_encode_fp8, lambda: bench_topk_encode_fp8.encode(TINY)),
}


@pytest.mark.parametrize("op", CONTESTS)
def test_every_way_is_checked_and_timed_and_ours_is_the_measure(op: str) -> None:
    bench, contest = CONTESTS[op]
    row = side_by_side.measure(contest(), reps=2)
    assert next(iter(row["ways"])) == op
    assert row["ways"][op]["beside_ours"] == 1.0
    assert all(way["ms"] > 0 for way in row["ways"].values())
    assert f"tiny: {next(iter(row['figures']))} " in side_by_side.text("tiny", row)
    assert bench.CASES


@pytest.mark.parametrize("op", CONTESTS)
def test_a_wrong_answer_gets_no_time(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bench, contest = CONTESTS[op]
    right = getattr(bench, op)

    def wrong(*args: Any, **kwargs: Any) -> Any:
        answer = right(*args, **kwargs)
        if op == "jump_relu":
            return answer._replace(l0=2.0 * answer.l0)
        return (answer[0] + 1, *answer[1:]) if isinstance(answer, tuple) else answer + 1

    monkeypatch.setattr(bench, op, wrong)
    with pytest.raises(DisagreementError):
        side_by_side.measure(contest(), reps=1)
