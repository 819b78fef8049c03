"""random_ranks: Philox by its published answers, then every backend to the bit, and uniform."""

from __future__ import annotations

import doctest
import importlib
import re
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from microtome import _native, errors
from microtome.ops import random_ranks, use_backend
from microtome.ops.random_ranks import _ranks, philox
from microtome.testing import backends_of
from microtome.testing.cuda import EMULATED, ORDERS, set_order

on_every_backend = pytest.mark.parametrize("backend", backends_of(_ranks))
P = (1, 2, 3, 30, 64, 65, 700, 1500)


def drawn(backend: str, samples: Tensor, p: int, seed: int) -> Tensor:
    with use_backend(backend):
        return random_ranks(samples, p, seed)


def by_numpy(samples: list[int], p: int, seed: int) -> np.ndarray:
    """The formula of the docstring, one number at a time, in Python's integers."""
    bits = max(12, (p - 1).bit_length())
    ranks = np.empty((len(samples), p), dtype=np.int32)
    for i, sample in enumerate(samples):
        keys = []
        for j in range(p):
            x, y, z, w = j // 2, 0, sample & 0xFFFFFFFF, sample >> 32 & 0xFFFFFFFF
            k0, k1 = seed & 0xFFFFFFFF, seed >> 32
            for _ in range(10):
                first, second = x * 0xD2511F53, z * 0xCD9E8D57
                x, y = second >> 32 ^ y ^ k0, second & 0xFFFFFFFF
                z, w = first >> 32 ^ w ^ k1, first & 0xFFFFFFFF
                k0, k1 = k0 + 0x9E3779B9 & 0xFFFFFFFF, k1 + 0xBB67AE85 & 0xFFFFFFFF
            word = w << 32 | z if j % 2 else y << 32 | x
            keys.append(word >> bits << bits | j)
        ranks[i, np.argsort(np.array(keys, dtype=np.uint64))] = np.arange(p)
    return ranks


@pytest.mark.parametrize(
    ("counter", "seed", "expected"),
    [
        ("00000000" * 4, "00000000" * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff" * 4, "ffffffff" * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            "243f6a8885a308d313198a2e03707344",
            "299f31d0a4093822",  # the key's second word first
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_gives_the_published_answers(counter: str, seed: str, expected: str) -> None:
    words = [torch.tensor([int(counter[i : i + 8], 16)]) for i in range(0, 32, 8)]
    got = " ".join(f"{int(word):08x}" for word in philox(words, int(seed, 16)))
    assert got == expected


@on_every_backend
@pytest.mark.parametrize("p", P)
def test_every_backend_gives_the_bits_of_the_formula(backend: str, p: int) -> None:
    samples = [0, 1, 5, 2**40 + 3, 7] if p <= 65 else [2**33 + 1]
    for seed in (0, 2**63 - 1):
        got = drawn(backend, torch.tensor(samples), p, seed)
        assert got.dtype == torch.int32
        assert np.array_equal(got.numpy(), by_numpy(samples, p, seed))


def test_orders_of_more_players_than_a_block_sorts_are_permutations() -> None:
    with use_backend("reference"):
        ranks = random_ranks(torch.arange(2), 5000, 1)
    assert torch.equal(ranks.sort(1).values, torch.arange(5000).int().expand(2, 5000))


@on_every_backend
def test_an_order_depends_on_its_number_alone(backend: str) -> None:
    whole = drawn(backend, torch.arange(100), 20, 3)
    for cut in ([0, 1, 99], list(range(37, 61)), [64]):
        assert torch.equal(drawn(backend, torch.tensor(cut).int(), 20, 3), whole[cut])
    twice = drawn(backend, torch.tensor([5, 5]), 20, 3)
    assert torch.equal(twice[0], twice[1])
    assert not torch.equal(drawn(backend, torch.arange(100), 20, 4), whole)
    strided = torch.arange(200)[::2]
    assert torch.equal(drawn(backend, strided, 20, 3)[:50], whole[::2])


@on_every_backend
def test_every_order_of_four_players_is_as_likely(backend: str) -> None:
    n = 4800
    ranks = drawn(backend, torch.arange(n), 4, 11)
    code = (ranks.long() * torch.tensor([64, 16, 4, 1])).sum(1)
    _, counts = code.unique(return_counts=True)
    assert len(counts) == 24
    # Chi-squared with 23 degrees of freedom is below 60 but once in 30,000 draws.
    assert float(((counts - n / 24) ** 2 / (n / 24)).sum()) < 60


@on_every_backend
def test_every_player_is_as_likely_at_every_place(backend: str) -> None:
    n, p = 3000, 17
    ranks = drawn(backend, torch.arange(n), p, 5).long()
    counts = torch.zeros(p, p).index_put_(
        (torch.arange(p).expand(n, p), ranks), torch.ones(()), accumulate=True
    )
    # 256 degrees of freedom: below 360 but once in 30,000 draws.
    assert float(((counts - n / p) ** 2 / (n / p)).sum()) < 360


@pytest.mark.skipif(not EMULATED, reason="the emulator chooses the order of threads")
def test_the_order_of_threads_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MICROTOME_EMULATE_CUDA", "1")
    answers = []
    for order in ORDERS:
        set_order(order, 3)
        try:
            answers.append(drawn("cuda", torch.arange(3), 200, 9))
        finally:
            set_order("forward")
    assert all(torch.equal(answers[0], other) for other in answers[1:])


@on_every_backend
def test_it_passes_opcheck_and_takes_no_samples(backend: str) -> None:
    with use_backend(backend):
        torch.library.opcheck(_ranks.torch_op, (torch.arange(3), 5, 1))
        assert random_ranks(torch.arange(0), 5, 1).shape == (0, 5)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((torch.zeros(2, 2).long(), 3, 0), errors.ShapeError, "samples must be [s], got shape"),
        ((torch.zeros(2), 3, 0), errors.DtypeError, "samples must be int32, int64, got float32."),
        ((torch.arange(2), 0, 0), errors.ArgumentError, "p must be between 1 and"),
        ((torch.arange(2), 3, -1), errors.ArgumentError, "seed must be between 0 and"),
    ],
)
def test_what_does_not_fit_is_named(
    arguments: tuple[Tensor, int, int], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=f"^random_ranks: {re.escape(text)}"):
        random_ranks(*arguments)


@pytest.mark.skipif(not EMULATED, reason="needs the emulated kernels")
def test_more_players_than_a_block_sorts_are_refused_by_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MICROTOME_EMULATE_CUDA", "1")
    with pytest.raises(errors.BackendError, match=r"cuda: p=4097 \(a block sorts up to 4096"):
        drawn("cuda", torch.arange(1), 4097, 0)


@pytest.mark.skipif(not EMULATED, reason="needs the emulated kernels")
def test_a_device_that_the_kernels_were_not_compiled_for_gets_the_reference(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MICROTOME_EMULATE_CUDA", "1")
    monkeypatch.setattr(_native, "why_not_on", lambda device: f"no kernels for {device}")
    assert _ranks.choose(torch.arange(1), 3, 0).name == "reference"
    with pytest.raises(errors.BackendError, match="cuda: no kernels for cpu"):
        drawn("cuda", torch.arange(1), 3, 0)


@pytest.mark.parametrize("compiled", [True, False])
def test_the_kernels_say_which_devices_they_were_compiled_for(
    compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        _native, "cuda", lambda: SimpleNamespace(compiled_for_device=lambda: compiled)
    )
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    reason = _native.why_not_on.__wrapped__(torch.device("cuda", 0))
    assert _native.why_not_on(torch.device("cpu")) is None
    assert reason is None if compiled else "for compute capability 10.0 (build with" in reason


def test_the_example_of_the_docstring_holds() -> None:
    assert doctest.testmod(importlib.import_module("microtome.ops.random_ranks")).failed == 0
