"""Index tables that a GPU is given: made safe at once, told of later, and nobody waits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import microtome as mt
from microtome import errors
from microtome._seed import generator
from microtome.ops import _attention_rows
from microtome.ops._registry import OPS
from microtome.ops.coalition_inputs import _problems as coalition_problems
from microtome.ops.patch_rows import _POSITION, _TOTAL
from microtome.ops.patch_rows import _problems as patch_problems
from microtome.testing.calls import calls
from microtome.testing.paper import PaperGpu
from microtome.testing.triton import INTERPRETED, RUNS

CPU = torch.device("cpu")
NAMES = (
    "patch_rows", "cascade_attention", "swap_key_attention", "coalition_inputs", "shapley_reduce",
    "mlp_shapley",
)  # fmt: skip


def arguments(name: str, monkeypatch: pytest.MonkeyPatch, **inputs: Any) -> dict[str, Any]:
    """What a small call of the op gives to its backends, by name."""
    op, seen, call = OPS[name], [], calls(n=4)[name]
    usual = op.choose

    def choose(*args: Any) -> Any:
        seen.append(args)
        return usual(*args)

    monkeypatch.setattr(op, "choose", choose)
    call({**call.inputs, **inputs})
    return dict(zip(op.arguments, seen[0], strict=True))


def within(name: str, given: dict[str, Any]) -> dict[str, Any]:
    """What the op makes of arguments on a GPU."""
    op = OPS[name]
    return dict(zip(op.arguments, op._within(CPU, tuple(given.values())), strict=True))


def changed(table: Tensor, at: tuple[int, ...], value: int) -> Tensor:
    table = table.clone()
    table[at] = value
    return table


@pytest.mark.parametrize("name", NAMES)
def test_sound_tables_reach_the_backend_as_they_are_and_nothing_is_read_back(
    name: str, gpu: PaperGpu, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = arguments(name, monkeypatch)
    reads.clear()
    safe = within(name, given)
    assert reads == []
    for key, value in given.items():
        if isinstance(value, Tensor):
            assert torch.equal(safe[key], value), key
    mt.synchronize()
    assert len(gpu.events) == 1


# Op, argument, where, what, and what a later call says of it. The row is the table's.
WRONG: list[tuple[str, str, tuple[int, ...], int, str]] = [
    ("patch_rows", "rows", (1, 0), 2, r"in rows \(.*\) example must lie in \[0, b=2\), which"),
    ("patch_rows", "rows", (0, 2), 5, r"in rows \(.*\) 0 <= start <= stop <= t=4 must hold, which"),
    ("patch_rows", "rows", (0, 2), 3, r"total=7 must be the sum of stop - start, which fails"),
    ("patch_rows", "table", (1, 0), -1, r"in table \(.*\) row must lie in \[0, n=2\), which fails"),
    ("patch_rows", "table", (1, 1), 0, r"in table \(.*\) position must lie in the row's \[start"),
    ("patch_rows", "table", (0, 3), 7, r"in table \(.*\) 0 <= lo <= hi <= w=6 must hold, which"),
    ("patch_rows", "table", (0, 5), 4, r"in table \(.*\) op must be REPLACE=0, .* which fails"),
    ("patch_rows", "table", (1, 4), 1, r"in table \(.*\) source must lie in \[0, S=1\), which"),
    ("cascade_attention", "rows", (0, 0), 1, r"in rows \(.*\) example must lie in \[0, b=1\)"),
    ("cascade_attention", "rows", (0, 1), 4, r"in rows \(.*\) start must lie in \[0, t=3\], or up"),
    ("cascade_attention", "rows", (0, 3), 5, r"in rows \(.*\) kv_at .. kv_at \+ kv_count must lie"),
    ("cascade_attention", "rows", (0, 5), 5, r"in rows \(.*\) q_at .. q_at \+ q_count must lie in"),
    ("cascade_attention", "rows", (0, 5), 3, r"of the queries each must belong to exactly one row"),
    ("cascade_attention", "q_positions", (2,), 7, "of the queries its row must hold a key of its"),
    ("swap_key_attention", "rows", (0, 0), -1, r"in rows \(.*\) example must lie in \[0, b=1\)"),
    ("swap_key_attention", "rows", (0, 2), 5, r"in rows \(.*\) 0 <= position <= stop <= t=4 must"),
    ("swap_key_attention", "rows", (0, 1), 2, r"total=3 must be the sum of stop - position, which"),
    ("coalition_inputs", "rows", (3, 0), 2, r"in rows \(.*\) explicand must lie in \[0, e=2\)"),
    ("coalition_inputs", "rows", (2, 1), 1, r"in rows \(.*\) background must lie in \[0, n=1\)"),
    ("coalition_inputs", "rows", (1, 2), 4, r"in rows \(.*\) order must lie in \[0, q=4\), which"),
    ("coalition_inputs", "rows", (1, 4), 4, r"in rows \(.*\) 0 <= lo <= hi <= p=3 must hold"),
    ("shapley_reduce", "ranks", (0, 1, 0, 2), 3, r"ranks must lie in \[0, p=3\), and do not"),
    ("mlp_shapley", "ranks", (0, 1, 1, 0), 9, r"every order must be a permutation of 0 .. p-1=2"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "key", "at", "value", "text"), WRONG)
def test_what_is_wrong_is_told_later_by_its_row(
    name: str, key: str, at: tuple[int, ...], value: int, text: str, gpu: PaperGpu,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    given = arguments(name, monkeypatch)
    within(name, {**given, key: changed(given[key], at, value)})
    row = at[0]
    if "total=" in text:
        row = 0
    elif "each must belong" in text:
        row = 3
    elif len(at) == 4:
        row = 2 * at[1] + at[2]  # of [S U A], A being 2
    with pytest.raises(errors.ArgumentError, match=rf"^{name}: {text}.* in row {row}, the first"):
        mt.synchronize()
    with mt.check_now(), pytest.raises(errors.ArgumentError) as raised:
        within(name, {**given, key: changed(given[key], at, value)})
    assert not raised.value.late


@pytest.mark.parametrize("name", ["coalition_inputs", "mlp_shapley"])
def test_a_player_that_does_not_exist_is_nobody(
    name: str, gpu: PaperGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    player = torch.tensor([2, 0, 1])
    given = arguments(name, monkeypatch, player=player)
    safe = within(name, {**given, "player": torch.tensor([2, 3, -2])})
    assert safe["player"].tolist() == [2, -1, -1]
    with pytest.raises(
        errors.ArgumentError,
        match=rf"^{name}: player must lie in \[-1, p=3\), and does not in row 1",
    ):
        mt.synchronize()


def random_tables(given: dict[str, Any], seed: int) -> dict[str, Any]:
    """The arguments with some numbers about the edges, and a few far beyond, in every table."""
    g, out = generator(seed, "tables"), dict(given)
    for key in ("rows", "table", "q_positions", "ranks"):
        if isinstance(given.get(key), Tensor):
            shape, which = given[key].shape, torch.rand(given[key].shape, generator=g)
            near = torch.randint(-3, 9, shape, generator=g)
            far = torch.randint(-(2**62), 2**62, shape, generator=g)
            out[key] = torch.where(which < 0.1, torch.where(which < 0.02, far, near), given[key])
    return out


@pytest.mark.parametrize("name", NAMES[:4])
def test_whatever_the_tables_hold_what_is_left_lies_within_the_tensors(
    name: str, gpu: PaperGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, checked = arguments(name, monkeypatch), 0
    for seed in range(100):
        s = within(name, random_tables(given, seed))
        if name == "patch_rows":
            tables = s["base"], s["sources"], s["rows"], s["table"], s["total"]
            problems = dict(patch_problems(*tables))
            del problems[_TOTAL]
            # An entry of a row that is no longer there falls on no token, or on another's.
            del problems[_POSITION]
        elif name == "cascade_attention":
            sizes = _attention_rows.cascade_sizes(s["q"], s["k"], s["k_base"])
            tables = s["rows"], s["q_positions"], s["first"], sizes
            problems = dict(_attention_rows._cascade_problems(*tables))
            seen = s["q_positions"] >= 0
            checked += int(seen.sum())
            for code in (_attention_rows.COVER, _attention_rows.POSITION):
                problems[code] = problems[code] & seen
        elif name == "swap_key_attention":
            problems = dict(_attention_rows._swap_problems(s["q"], s["rows"], s["total"]))
            del problems[_attention_rows.TOTAL]
        else:
            tables = s["x"], s["background"], s["ranks"], s["rows"]
            problems = {0: coalition_problems(*tables)}
        assert not any(bool(bad.any()) for bad in problems.values())
    assert checked or name != "cascade_attention"


def test_tables_without_rows_raise_at_once_where_the_sizes_say_so(
    gpu: PaperGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in [
        ("patch_rows", "total must be the sum of stop - start=0, got 7"),
        ("swap_key_attention", "total must be the sum of stop - position=0, got 3"),
        ("cascade_attention", "query 0 at position 3: each must belong to exactly one row"),
    ]:
        given = arguments(name, monkeypatch)
        with pytest.raises(errors.ArgumentError, match=rf"^{name}: {text}"):
            within(name, {**given, "rows": given["rows"][:0]})
    given = arguments("coalition_inputs", monkeypatch)
    with pytest.raises(errors.ArgumentError, match=r"explicand must lie in \[0, e=0\)"):
        within("coalition_inputs", {**given, "x": given["x"][:0]})


def test_tables_without_rows_are_sound_where_nothing_is_asked_of_them(
    gpu: PaperGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, empty in [
        ("patch_rows", {"rows", "table", "factors"}),
        ("cascade_attention", {"rows", "q", "q_positions"}),
        ("swap_key_attention", {"rows", "q_new", "k_new", "v_new"}),
        ("coalition_inputs", {"rows", "x"}),
    ]:
        given = arguments(name, monkeypatch)
        none: dict[str, Any] = {key: given[key][:0] for key in empty}
        if "total" in given:
            none["total"] = 0
        safe = within(name, {**given, **none})
        assert safe["rows"].shape[0] == 0
    mt.synchronize()


def test_a_captured_call_asks_nothing(gpu: PaperGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        given = arguments(name, monkeypatch)
        gpu.captures = True
        within(name, given)
        gpu.captures = False
    assert gpu.events == []


@pytest.mark.triton
@pytest.mark.skipif(not (RUNS and INTERPRETED), reason="TRITON_INTERPRET is not 1")
@pytest.mark.parametrize("name", NAMES)
def test_a_kernel_reads_nothing_back_and_answers_for_the_rows_that_are_sound(
    name: str, gpu: PaperGpu, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = arguments(name, monkeypatch)
    launch = next(b for b in OPS[name].backends if b.name == "triton").run
    want = launch(*given.values())
    reads.clear()
    got = launch(*within(name, given).values())
    assert reads == []
    for a, b in zip(*((x,) if isinstance(x, Tensor) else x for x in (got, want)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.triton
@pytest.mark.skipif(not (RUNS and INTERPRETED), reason="TRITON_INTERPRET is not 1")
def test_tokens_that_no_row_has_are_nan(gpu: PaperGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    from microtome.kernels import cascade_attention
    from microtome.kernels import patch_rows as kernel

    given = arguments("patch_rows", monkeypatch)
    want = kernel.launch(*given.values())
    for total in (5, 9):
        got = kernel.launch(*within("patch_rows", {**given, "total": total}).values())
        assert torch.equal(got[:7], want[:total])
        assert bool(got[7:].isnan().all())
    given = arguments("swap_key_attention", monkeypatch)
    want = cascade_attention.launch_swap(*given.values())
    got = cascade_attention.launch_swap(
        *within("swap_key_attention", {**given, "total": 5}).values()
    )
    assert torch.equal(got[:3], want)
    assert bool(got[3:].isnan().all())


@pytest.mark.triton
@pytest.mark.skipif(not (RUNS and INTERPRETED), reason="TRITON_INTERPRET is not 1")
def test_a_rank_outside_counts_as_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    from microtome.kernels import shapley_reduce

    given = arguments("shapley_reduce", monkeypatch)
    wild = given["ranks"].clone()
    wild[0, 0] = torch.tensor([[-5, 1, 2], [0, 1, 40]])
    tame = wild.clamp(0, 2)
    for got, want in zip(
        shapley_reduce.launch(given["values"], wild, True),
        shapley_reduce.launch(given["values"], tame, True),
        strict=True,
    ):
        assert torch.equal(got, want)
