"""Shuffled batches: every row once an epoch, a function of (seed, i), and a thread that ends."""

from __future__ import annotations

import gc
import itertools
import threading
from pathlib import Path

import pytest
import torch

from microtome.errors import ArgumentError, StoreError
from microtome.models import ActivationStore
from microtome.models.batches import Prefetched

N, SHARD, T = 50, 8, 5


@pytest.fixture
def store(tmp_path: Path) -> ActivationStore:
    """Row r holds the number r."""
    rows = torch.arange(N, dtype=torch.float32).view(N, 1)
    options = {"site": "s", "model_name": "m", "d": 1, "context_length": T, "shard_rows": SHARD}
    with ActivationStore.write(tmp_path / "store", **options) as writer:
        writer.add(rows, torch.arange(N))
    return ActivationStore(tmp_path / "store")


def numbers(batches: object, count: int) -> list[list[int]]:
    return [batch.flatten().int().tolist() for batch in itertools.islice(batches, count)]


@pytest.mark.parametrize("window_rows", [1 << 20, 20, 1])
def test_an_epoch_visits_every_row_once_and_the_rest_rolls_over(store, window_rows: int):
    batches = numbers(store.batches(7, seed=0, prefetch=0, window_rows=window_rows), 50)
    visited = list(itertools.chain.from_iterable(batches))  # 350 = 7 epochs of 50
    epochs = [visited[i : i + N] for i in range(0, 350, N)]
    assert all(sorted(epoch) == list(range(N)) for epoch in epochs)
    assert all(a != b for a, b in itertools.combinations(epochs, 2))
    assert epochs[0] != list(range(N))
    assert all(len(batch) == 7 for batch in batches)


def test_a_store_within_one_window_is_shuffled_as_a_whole(store):
    first = numbers(store.batches(SHARD, seed=0, prefetch=0), 1)[0]
    assert len({row // SHARD for row in first}) > 2


def test_a_window_holds_whole_shards_of_about_its_size(store):
    visited = list(
        itertools.chain.from_iterable(numbers(store.batches(5, seed=3, window_rows=16), 10))
    )
    order = list(dict.fromkeys(row // SHARD for row in visited))
    assert order != sorted(order)
    spans = [[i for i, row in enumerate(visited) if row // SHARD == s] for s in range(7)]
    assert all(span[-1] - span[0] < 2 * SHARD for span in spans)


@pytest.mark.parametrize("prefetch", [0, 1, 3])
def test_batch_i_depends_on_the_seed_and_i_alone(store, prefetch: int):
    options = {"seed": 5, "prefetch": prefetch, "window_rows": 20}
    whole = numbers(store.batches(7, **options), 40)
    for start in (0, 1, 6, 7, 8, 23):
        resumed = store.batches(7, start=start, **options)
        assert numbers(resumed, 10) == whole[start : start + 10]
        resumed.close()
    assert numbers(store.batches(7, **{**options, "seed": 6}), 40) != whole


def test_a_batch_may_exceed_the_store(store):
    batch = next(store.batches(3 * N + 5, seed=0, prefetch=0)).flatten().int()
    assert batch.bincount(minlength=N).tolist().count(3) == N - 5


def test_a_view_gives_its_own_rows_only(store):
    train, held = store.split(0.3)
    assert sorted(numbers(train.batches(35, seed=0, prefetch=0), 1)[0]) == list(range(35))
    assert sorted(numbers(held.batches(15, seed=0, prefetch=0), 1)[0]) == list(range(35, 50))


def test_batches_are_float32_tensors_of_the_callers_own(store):
    batches = store.batches(4, seed=0)
    first = next(batches)
    assert first.dtype == torch.float32
    assert first.shape == (4, 1)
    expected = first.clone()
    first.zero_()
    assert torch.equal(next(store.batches(4, seed=0)), expected)


def prefetchers() -> int:
    return sum(thread.name == "microtome-prefetch" for thread in threading.enumerate())


def wait_for_threads(count: int) -> bool:
    for thread in threading.enumerate():
        if thread.name == "microtome-prefetch" and prefetchers() > count:
            thread.join(timeout=5)
    return prefetchers() == count


def test_the_thread_ends_when_the_iterator_is_closed_or_dropped(store):
    gc.collect()
    assert wait_for_threads(0)
    batches = store.batches(4, seed=0)
    next(batches)
    assert prefetchers() == 1
    batches.close()
    assert prefetchers() == 0
    assert list(batches) == []
    batches.close()
    dropped = store.batches(4, seed=0)
    next(dropped)
    del dropped
    gc.collect()
    assert wait_for_threads(0)


def test_no_more_than_the_asked_number_is_read_ahead():
    made, reached = [], threading.Event()

    def make(i: int) -> torch.Tensor:
        made.append(i)
        if i == 2:
            reached.set()
        return torch.tensor(i)

    ahead = Prefetched(make, 0, 3)
    assert reached.wait(5)
    assert made == [0, 1, 2]
    assert int(next(ahead)) == 0
    ahead.close()
    assert len(made) <= 4


@pytest.mark.parametrize("prefetch", [0, 2])
def test_what_fails_while_reading_is_raised_in_the_consumer(store, prefetch: int):
    shard = Path(store.path) / "shard_00003.safetensors"
    shard.write_bytes(b"\xff" * shard.stat().st_size)
    batches = store.batches(N, seed=0, prefetch=prefetch)
    for _ in range(2):
        with pytest.raises(StoreError, match=r"shard_00003.safetensors is corrupt"):
            next(batches)
    assert wait_for_threads(0)


def test_options_out_of_range_are_refused(store):
    for wrong, message in (
        ({"batch_size": 0}, "batch_size must be between 1"),
        ({"start": -1}, "start must be between 0"),
        ({"prefetch": -1}, "prefetch must be between 0"),
        ({"window_rows": 0}, "window_rows must be between 1"),
    ):
        with pytest.raises(ArgumentError, match=message):
            store.batches(**{"batch_size": 2, "seed": 0, **wrong})
