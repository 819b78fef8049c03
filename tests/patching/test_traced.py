"""Logits that are computed where a metric looks are, to the metric, logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from microtome.models import ToyConfig, ToyModel
from microtome.models.native.block import Stack
from microtome.patching import Write, execute, naive_sweep, patch, sweep
from microtome.patching.traced import BeyondError, Logits, reads_of
from microtome.testing import families
from microtome.testing.patching import apart, changed, last_difference, naive_twin

SHAPE = B, T, V = 3, 7, 11
FULL = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
EVERY = list(range(T))
ROWS = torch.arange(B)


def serve(positions: Tensor, tokens: Tensor | None) -> Tensor:
    return FULL[:, positions] if tokens is None else FULL[:, positions][..., tokens]


def lazy(fetch: Callable[[Tensor, Tensor | None], Tensor] = serve) -> Logits:
    return Logits(SHAPE, FULL, fetch)


def written_to(logits: Tensor) -> Tensor:
    logits[:, 2] = 5.0
    logits.clamp_(max=1.0)
    return logits[:, 2, 3] + logits[:, 3].sum(-1)


def changed_after(logits: Tensor) -> Tensor:
    last = logits[:, -1]
    last -= last.amax(-1, keepdim=True)
    return last[:, 3]


# Metric, positions and tokens it reads (None: all of them).
METRICS: list[tuple[Callable[[Any], Any], list[int], list[int] | None]] = [
    (lambda x: x[0, -1, 4] - x[0, -1, 5], [6], [4, 5]),
    (lambda x: x[:, -1], [6], None),
    (lambda x: x[:, -1, :].log_softmax(-1)[:, 3], [6], None),
    (lambda x: x[..., -1, 2], [6], [2]),
    (lambda x: x[..., 3], EVERY, [3]),
    (lambda x: x[-1, ..., 3], EVERY, [3]),
    (lambda x: x[range(3), [1, 2, 3], [4, 4, 5]], [1, 2, 3], [4, 5]),
    (lambda x: x[ROWS, -1, torch.tensor([1, 2, 3])], [6], [1, 2, 3]),
    (lambda x: x[ROWS, ROWS - 3], [4, 5, 6], None),
    (lambda x: x[0, torch.tensor(-1), torch.tensor(4).int()], [6], [4]),
    (lambda x: x[:, torch.tensor([[1, 2], [2, 5]]), 3], [1, 2, 5], [3]),
    (lambda x: x[:, 2:5].mean((1, 2)), [2, 3, 4], None),
    (lambda x: x[:, ::2, 3].sum(1), [0, 2, 4, 6], [3]),
    (lambda x: x[:, -2:, 4:9:2], [5, 6], [4, 6, 8]),
    (lambda x: x[:, -1, [3, 4, 3]], [6], [3, 4]),
    (lambda x: x[:, [-1, -2]][:, :, 4], [5, 6], None),
    (lambda x: x[:, -1].gather(1, torch.tensor([[1], [2], [3]])), [6], None),
    (lambda x: x[:, 5:5].sum(), [], None),
    (lambda x: x.new_zeros(3), EVERY, None),
    (lambda x: torch.full(x.shape[:1], float(len(x) * x.size(-1))), [], []),
    # Whatever else a tensor does, all of them do.
    (lambda x: x[1], EVERY, None),
    (lambda x: x[None], EVERY, None),
    (lambda x: x[x > 0], EVERY, None),
    (lambda x: x[torch.tensor([True, False, True]), -1], EVERY, None),
    (lambda x: x[np.arange(3), -1], EVERY, None),
    (lambda x: torch.softmax(x, -1)[:, 0, 0], EVERY, None),
    (lambda x: (x - 1.0)[:, 0] + (2.0 / x)[:, 1] - (-x)[:, 2] + abs(x)[:, 3], EVERY, None),
    (lambda x: (x == x.max()).sum() + (x != 0.0).sum() + (x // 2).sum(), EVERY, None),
    (lambda x: x.argmax(-1), EVERY, None),
    (lambda x: x.mT @ x, EVERY, None),
    (lambda x: torch.stack([row[-1, 2] for row in x]), EVERY, None),
    (lambda x: torch.cat([x, x])[-1], EVERY, None),
    (lambda x: F.cross_entropy(x.flatten(0, 1), torch.zeros(21).long()), EVERY, None),
    (lambda x: torch.vmap(lambda row: row[-1, 3] - row[-1, 4])(x), EVERY, None),
    (lambda x: torch.einsum("btv->b", x), EVERY, None),
    (lambda x: torch.as_tensor(np.asarray(x).sum((1, 2))), EVERY, None),
    (lambda x: torch.tensor(x.tolist()).sum(), EVERY, None),
    (lambda x: torch.add(input=x, other=1), EVERY, None),
    (written_to, EVERY, None),
    (changed_after, [6], None),
]  # fmt: skip


@pytest.mark.parametrize("which", range(len(METRICS)))
def test_a_metric_gets_what_it_would_of_a_tensor_and_pays_for_what_it_reads(which):
    metric, positions, tokens = METRICS[which]
    before = FULL.clone()
    wanted = metric(FULL.clone())
    found = metric(lazy())
    assert type(found) is Tensor
    assert torch.equal(found, wanted)
    reads = reads_of(metric, SHAPE, FULL, serve)
    assert reads.positions.tolist() == positions
    assert (None if reads.tokens is None else reads.tokens.tolist()) == tokens
    table = serve(reads.positions, reads.tokens)
    kept = table.clone()
    assert torch.equal(metric(lazy(reads.table(table))), wanted)
    assert torch.equal(table, kept)  # nothing done in place came through
    assert torch.equal(FULL, before)


def test_shape_dtype_and_device_cost_nothing():
    def refuse(positions: Tensor, tokens: Tensor | None) -> Tensor:
        raise AssertionError((positions, tokens))

    logits = Logits((3, 7, 11), FULL.double(), refuse)
    assert isinstance(logits, Tensor)
    assert logits.shape == logits.size() == torch.Size((3, 7, 11))
    assert (logits.size(-1), logits.dim(), logits.ndim, len(logits)) == (11, 3, 3, 3)
    assert (logits.numel(), logits.dtype, logits.device) == (231, torch.float64, FULL.device)
    assert logits.is_floating_point()


def test_all_of_them_are_computed_once():
    asked = []

    def count(positions: Tensor, tokens: Tensor | None) -> Tensor:
        asked.append(len(positions))
        return serve(positions, tokens)

    logits = lazy(count)
    assert torch.equal(logits.exp() + logits.sum(), FULL.exp() + FULL.sum())
    assert torch.equal(logits[:, -1], FULL[:, -1])
    assert asked == [7]
    assert repr(logits) == repr(FULL)


@pytest.mark.parametrize(
    "index",
    [(0, 7), (0, 0, 11), (3,), (0, 0, -12), (0, [7]), (0, torch.tensor([0.0])), (0, 0, 0, 0)],
    ids=str,
)  # fmt: skip
def test_an_index_that_a_tensor_refuses_is_refused(index):
    with pytest.raises(IndexError):
        FULL[index]
    with pytest.raises(IndexError):
        lazy()[index]


def test_what_was_not_read_before_is_not_made_up():
    reads = reads_of(lambda x: x[:, [2, 4], 3:5], SHAPE, FULL, serve)
    logits = lazy(reads.table(serve(reads.positions, reads.tokens)))
    assert torch.equal(logits[:, 4, 3], FULL[:, 4, 3])
    for beyond in (
        lambda x: x[:, 3, 3], lambda x: x[:, 2, 5], lambda x: x[:, 2], lambda x: x.sum(),
        lambda x: x[:, 6, 3],
    ):  # fmt: skip
        with pytest.raises(BeyondError):
            beyond(logits)
    nothing = reads_of(lambda x: 0.0, SHAPE, FULL, serve)
    with pytest.raises(BeyondError):
        nothing.table(serve(nothing.positions, nothing.tokens))(torch.tensor([0]), None)


def test_writing_into_one_of_two_parts_needs_real_logits():
    """Parts of a tensor are views of it: what is written into one shows in the other."""

    def read_again(logits: Tensor) -> Tensor:
        last = logits[:, -1]
        last -= 1.0
        return logits[:, -1, 3]

    def behind_its_back(logits: Tensor) -> Tensor:
        last = logits[:, -1]
        logits.clamp_(max=0.0)
        return last[:, 3]

    def through_a_view(logits: Tensor) -> Tensor:
        last = logits[:, -1]
        logits.mT[:, 3] += 1.0
        return last[:, 3]

    for metric in (read_again, behind_its_back, through_a_view):
        with pytest.raises(BeyondError):
            reads_of(metric, SHAPE, FULL, serve)


# In a sweep

CORRUPTED = families.tokens(2, 6)
CLEAN = changed(CORRUPTED, (0, 1), (1, 2))


@pytest.fixture(scope="module")
def toy() -> ToyModel:
    return ToyModel(ToyConfig(num_hidden_layers=2, hidden_size=16, vocab_size=50)).double()


@pytest.fixture
def unembedded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, int]]]:
    """(rows, columns) of every unembedding."""
    seen = []
    original = Stack.logits

    def count(self: Stack, stream: Tensor, columns: Tensor | None = None) -> Tensor:
        out = original(self, stream, columns)
        seen.append(tuple(out.shape))
        return out

    monkeypatch.setattr(Stack, "logits", count)
    return seen


def test_a_metric_of_the_last_position_unembeds_that_position_alone(toy, unembedded):
    def surprise(logits: Tensor) -> Tensor:
        return -logits[:, -1].log_softmax(-1)[:, 3]

    sweep(toy, CLEAN, CORRUPTED, surprise, progress=False)  # verified: reads the model's logits
    unembedded.clear()
    found = sweep(toy, CLEAN, CORRUPTED, surprise, progress=False)
    cells = int(found.written.sum())
    assert {columns for _, columns in unembedded if columns > 1} == {50}
    rows = sum(rows for rows, columns in unembedded if columns > 1)
    assert rows == cells + 3 * 2  # the recording, and both unpatched runs
    assert apart(found, naive_twin(toy, found, CORRUPTED, CLEAN, surprise)) < 1e-12
    unembedded.clear()
    sweep(toy, CLEAN, CORRUPTED, last_difference, progress=False)
    assert max(columns for _, columns in unembedded) == 2
    assert sum(rows for rows, columns in unembedded if columns == 2) == cells + 2 * 2


@pytest.mark.parametrize("engine", ["native", "blocks"])
def test_reads_that_depend_on_the_numbers_are_answered_from_all_logits(
    toy, engine, monkeypatch, tmp_path
):
    """Position 4 is read where the model's guess at the end is what it was, else position 3."""
    with torch.no_grad():
        guess = toy(CORRUPTED).logits[:, -1].argmax(-1)

    def moody(logits: Tensor) -> Tensor:
        same = logits[:, -1].argmax(-1) == guess
        try:
            return torch.stack(
                [logits[i, 4, 3] if s else logits[i, 3, 5] for i, s in enumerate(same.tolist())]
            )
        except Exception as error:  # as careless metrics do
            return logits.new_full((2,), len(str(error)))

    runs = []
    original = execute._execute

    def count(*given: Any) -> Any:
        runs.append(given[3].positions)
        return original(*given)

    monkeypatch.setattr(execute, "_execute", count)
    monkeypatch.setattr(execute, "TOKENS", 12)  # a group is one cell, and the first do not flip
    cells = [Write("resid_pre.1", positions=p, op="scale", factor=f) for p in range(6)
             for f in (1.5, -4.0)]  # fmt: skip
    wanted = naive_sweep(toy, CORRUPTED, None, moody, [[cell] for cell in cells])
    found = patch(toy, CORRUPTED, None, moody, [[cell] for cell in cells], engine=engine)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    assert [None if r is None else r.tolist() for r in runs] == [[[4, 5]], None]
    with torch.no_grad():
        plain = naive_sweep(
            toy, CORRUPTED, None, lambda x: x[:, 4, 3], [[cell] for cell in cells]
        )  # fmt: skip
    assert bool((wanted != plain).any())
    # What was finished before it was noticed stays finished.
    how = {"engine": engine, "progress": False, "resume": tmp_path / "sweep"}
    again = [sweep(toy, CLEAN, CORRUPTED, moody, "resid_post", **how) for _ in range(2)]
    assert torch.equal(again[0].by_prompt, again[1].by_prompt)
    assert apart(again[0], naive_twin(toy, again[0], CORRUPTED, CLEAN, moody)) < 1e-9


@pytest.mark.parametrize("engine", ["native", "blocks"])
def test_a_metric_may_write_into_its_logits_or_read_none(toy, engine):
    def rude(logits: Tensor) -> Tensor:
        logits[:, 4] *= 2.0
        last = logits[:, -1]
        last.clamp_(max=0.3)
        return logits[:, 4, 3] + last.sum(-1) + logits[:, -1].sum(-1)

    def twice(logits: Tensor) -> Tensor:
        last = logits[:, -1]
        last.clamp_(max=0.3)
        return logits[:, -1].sum(-1)

    for metric in (rude, twice):
        found = sweep(toy, CLEAN, CORRUPTED, metric, engine=engine, progress=False)
        assert apart(found, naive_twin(toy, found, CORRUPTED, CLEAN, metric)) < 1e-9

    def constant(logits: Tensor) -> Tensor:
        return torch.full((len(logits),), 0.25)

    found = sweep(toy, CLEAN, CORRUPTED, constant, engine=engine, progress=False)
    assert torch.equal(found.by_prompt, torch.full((2, 6, 2), 0.25, dtype=torch.float64))
