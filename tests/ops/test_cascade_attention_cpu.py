"""The C++ kernels of both attention ops: the same bits however the work is split."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from microtome import _native
from microtome.ops import cascade_attention, swap_key_attention, use_backend
from microtome.ops.cascade_attention import _attend
from microtome.testing import ATTENTION_CASES, SWAP_CASES, AttentionCase, SwapCase

pytestmark = pytest.mark.skipif(_native.why_absent() is not None, reason="the extension is absent")


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """torch.set_num_threads, undone afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def attend(case: AttentionCase, inputs: dict[str, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    with use_backend("cpu"):
        return cascade_attention(**(inputs or case.inputs()), **case.options)


def swap(case: SwapCase) -> tuple[Tensor, Tensor, Tensor]:
    """z, lse of the base run, and the swapped rows."""
    inputs = case.inputs()
    b, t, h, _ = inputs["q"].shape
    with use_backend("cpu"):
        z, lse = cascade_attention(**case.causal(inputs), **case.options)
        z, lse = z.view(b, t, h, -1), lse.view(b, t, h)
        return z, lse, swap_key_attention(z, lse, **inputs, **case.options)


def answers() -> dict[str, list[Tensor]]:
    """Every answer of every case, by a name of its own."""
    return {
        **{f"attend {case.name}": list(attend(case)) for case in ATTENTION_CASES},
        **{f"swap {case.name}": list(swap(case)) for case in SWAP_CASES},
    }


def test_one_two_and_three_threads_give_the_same_bits(threads: Callable[[int], None]) -> None:
    runs = []
    for count in (1, 2, 3):
        threads(count)
        runs.append(answers())
    for other in runs[1:]:
        for name, usual in runs[0].items():
            assert all(map(torch.equal, usual, other[name])), name


@pytest.mark.parametrize("level", ["generic", "avx2", "avx512", "amx"])
def test_instruction_sets_agree(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MICROTOME_CPU_ISA", level)
    if _native.isa() != level:
        pytest.skip(f"this processor has no {level}")
    got = answers()
    monkeypatch.setenv("MICROTOME_CPU_ISA", "avx2")
    usual = answers()
    for name, parts in usual.items():
        if level != "generic":
            assert all(map(torch.equal, got[name], parts)), name
            continue
        # It has no fused multiply-add, so other bits; a score of 10^4 is off by 10^-3 in float32.
        error = 2e-2 if "huge" in name else 1e-5
        for one, other in zip(got[name], parts, strict=True):
            torch.testing.assert_close(one, other, rtol=error, atol=error)


def test_a_row_alone_has_the_bits_it_has_among_others() -> None:
    for name in ("grouped", "long", "packed"):
        case = next(case for case in ATTENTION_CASES if case.name == name)
        inputs = case.inputs()
        together = attend(case, inputs)
        for row in inputs["rows"]:
            _, start, kv_at, kv_count, q_at, q_count = row.tolist()
            queries, keys = slice(q_at, q_at + q_count), slice(kv_at, kv_at + kv_count)
            alone = {
                **inputs,
                "q": inputs["q"][queries],
                "k": inputs["k"][keys],
                "v": inputs["v"][keys],
                "rows": torch.tensor([[row[0], start, 0, kv_count, 0, q_count]], dtype=torch.int32),
                "q_positions": inputs["q_positions"][queries],
            }
            for part, whole in zip(attend(case, alone), together, strict=True):
                assert torch.equal(part, whole[queries]), name


def test_a_row_that_changes_nothing_has_the_bits_of_the_base_run() -> None:
    for case in SWAP_CASES:
        inputs = case.inputs()
        z, lse, _ = swap(case)
        for example, start, stop in case.rows:
            if start == stop:
                continue
            tokens = slice(start, stop)
            row = [example, start, 0, stop - start, 0, stop - start]
            with use_backend("cpu"):
                same = cascade_attention(
                    *(inputs[name][example, tokens] for name in ("q", "k_base", "v_base")),
                    inputs["k_base"],
                    inputs["v_base"],
                    torch.tensor([row], dtype=torch.int32),
                    torch.arange(start, stop, dtype=torch.int32),
                    inputs["first"],
                    **case.options,
                )
            assert torch.equal(same[0], z[example, tokens]), case.name
            assert torch.equal(same[1], lse[example, tokens]), case.name


def test_every_element_of_every_output_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Tensor] = []
    real = torch.empty

    def poisoned(*args: object, **options: object) -> Tensor:
        made.append(real(*args, **options))  # type: ignore[call-overload]
        return made[-1].fill_(float("nan")) if made[-1].is_floating_point() else made[-1].fill_(-9)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", poisoned)
        outputs = [part for parts in answers().values() for part in parts]
    addresses = {tensor.data_ptr() for tensor in made}
    for output in outputs:
        assert output.numel() == 0 or output.data_ptr() in addresses, "the patch went unused"
        assert not output.isnan().any()


def test_what_comes_later_does_not_reach_an_earlier_token() -> None:
    # Causality, to the bit: key 5 may hold anything but NaN, and tokens 0 .. 4 do not notice.
    case = AttentionCase("causal", 2, 2, 16, 16, 0, 0, ((0, 0, 9, 9),))
    inputs = case.inputs()
    before = attend(case, inputs)
    inputs["k"][5], inputs["v"][5] = -3e4, 1e30
    after = attend(case, inputs)
    assert all(torch.equal(b[:5], a[:5]) for b, a in zip(before, after, strict=True))
    assert not torch.equal(before[0][5:], after[0][5:])


def test_heads_apart_in_memory_are_read_where_they_lie() -> None:
    # [b, h, t, dh], as attention caches are laid out, seen as [b, t, h, dh].
    case = next(case for case in ATTENTION_CASES if case.name == "stairs")
    inputs = case.inputs()
    apart = dict(inputs)
    for name in ("q", "k", "v", "k_base", "v_base"):
        apart[name] = inputs[name].transpose(-3, -2).contiguous().transpose(-3, -2)
        assert not apart[name].is_contiguous()
    assert all(map(torch.equal, attend(case, inputs), attend(case, apart)))
    every_other = {**inputs, "k": torch.stack([inputs["k"]] * 2, -1)[..., 0]}
    assert every_other["k"].stride(-1) == 2
    assert all(map(torch.equal, attend(case, inputs), attend(case, every_other)))


def test_compiled_graphs_answer_as_eager_ones_do() -> None:
    case, swapped = ATTENTION_CASES[3], SWAP_CASES[2]
    z, lse, usual = swap(swapped)
    total = len(usual)
    with use_backend("cpu"):
        compiled = torch.compile(cascade_attention, fullgraph=True, backend="aot_eager")
        assert all(map(torch.equal, compiled(**case.inputs(), **case.options), attend(case)))
        compiled = torch.compile(swap_key_attention, fullgraph=True, backend="aot_eager")
        again = compiled(z, lse, **swapped.inputs(), **swapped.options, total=total)
    assert torch.equal(again, usual)


def test_float64_falls_to_the_reference() -> None:
    case = ATTENTION_CASES[2]
    inputs = case.inputs(torch.float64)
    options = (case.options["scale"], case.softcap, case.window)
    assert _attend.choose(*inputs.values(), *options).name == "reference"
    assert cascade_attention(**inputs, **case.options)[0].dtype == torch.float64
