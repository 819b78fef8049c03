"""Late checks, with a GPU of paper: events pass when the test says so, copies arrive with them."""

from __future__ import annotations

import doctest
import subprocess
import sys
import threading
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import microtome as mt
from microtome import _pending, errors
from microtome._look import Look, look_after_writing
from microtome.ops import sparse_decode
from microtome.ops._registry import Op
from microtome.testing.paper import PaperGpu

CPU = torch.device("cpu")
NAN = float("nan")


def ask(op: str = "an_op", *bad: int, rows: int = 4, name: str = "x") -> Tensor | None:
    """A look at x [rows, 3] with NaN in the rows named."""
    x = torch.zeros(rows, 3)
    x[list(bad), 1] = NAN
    look = Look(op, CPU)
    look.finite(name, x)
    return look.submit()


def an_op_runs() -> None:
    sparse_decode(torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int64), torch.ones(2, 3))


def test_the_next_op_raises_for_the_earlier_call_and_names_it(gpu: PaperGpu) -> None:
    ask("topk_encode", 2, 3)
    an_op_runs()  # nothing has arrived: nothing is waited for, nothing said
    assert [event.waited for event in gpu.events] == [0]
    gpu.arrive()
    with pytest.raises(errors.NonFiniteError) as raised:
        an_op_runs()
    assert str(raised.value) == (
        "topk_encode: x holds NaN or infinity in row 2, the first such row, in an earlier call on "
        "cpu: what it returned, and what was made of it, is not to be trusted. Use "
        "microtome.check_now() or MICROTOME_SYNC_CHECKS=1 to raise in the call itself."
    )
    assert raised.value.late
    an_op_runs()  # it is told once
    assert not any(_pending._waiting.values())


def test_rows_are_counted_in_the_input_that_holds_them(gpu: PaperGpu) -> None:
    for at, (name, row) in enumerate([("x", 1), ("W_enc", 4), ("b_enc", 0), ("b_dec", 0)]):
        inputs = {"x": torch.ones(3, 2), "W_enc": torch.ones(5, 2), "b_enc": torch.ones(5)}
        inputs["b_dec"] = torch.ones(1, 2)
        inputs[name][row] = -float("inf")
        look = Look("op", CPU)
        for each, tensor in inputs.items():
            look.finite(each, tensor)
        look.finite("absent", None)
        look.finite("empty", torch.ones(0, 2))
        look.submit()
        gpu.events[at].arrive()
        with pytest.raises(errors.NonFiniteError, match=f"^op: {name} holds .* in row {row},"):
            mt.synchronize()


def test_of_several_inputs_the_first_is_named_and_the_largest_finite_numbers_pass(
    gpu: PaperGpu,
) -> None:
    huge = torch.full((2, 3), torch.finfo(torch.float32).max)
    look = Look("op", CPU)
    look.finite("x", huge)
    look.finite("y", -huge)
    look.submit()
    mt.synchronize()
    look = Look("op", CPU)
    look.finite("x", huge)
    look.finite("y", torch.tensor([[0.0], [NAN]]))
    look.finite("z", torch.tensor([[NAN]]))
    look.submit()
    with pytest.raises(errors.NonFiniteError, match=r"^op: y holds NaN or infinity in row 1,"):
        mt.synchronize()


def test_norms_are_read_in_place_of_the_tensor(gpu: PaperGpu) -> None:
    look = Look("op", CPU)
    look.finite("W_enc", torch.full((2, 2), 1e30), norms=torch.tensor([1.0, float("inf")]))
    look.submit()
    with pytest.raises(errors.NonFiniteError, match="W_enc holds NaN, infinity or numbers whose"):
        mt.synchronize()


def test_indices_are_clamped_at_once_and_told_later(gpu: PaperGpu) -> None:
    look = Look("gather", CPU)
    indices = torch.tensor([[0, 3], [1, -2], [9, 0]])
    assert look.indices("indices", indices, 4).tolist() == [[0, 3], [1, 0], [3, 0]]
    assert look.indices("index", torch.tensor([1, 5]), 4, "r").tolist() == [1, 3]
    look.submit()
    text = (
        r"^gather: indices must lie in \[0, f=4\), and do not in row 1, the first such row, in an"
    )
    with pytest.raises(errors.ArgumentError, match=text):
        mt.synchronize()


def test_the_verdict_stays_on_the_device_for_kernels_that_must_not_write(gpu: PaperGpu) -> None:
    sound, wrong = ask(), ask("op", 1)
    assert sound is not None
    assert wrong is not None
    assert sound.tolist() == [0.0]
    assert bool(wrong.isnan())
    gpu.captures = True
    assert ask("op", 1) is not None
    assert len(gpu.events) == 2  # a captured graph reads nothing back


def test_answers_are_taken_in_order_and_later_errors_counted(gpu: PaperGpu) -> None:
    for number in range(4):
        ask(f"op_{number}", *([0] if number else []))
    for event in gpu.events[:3]:
        event.arrive()
    with pytest.raises(errors.NonFiniteError, match=r"^op_1: .* 1 later calls were wrong, too\.$"):
        an_op_runs()
    an_op_runs()
    with pytest.raises(errors.NonFiniteError, match=r"^op_3: "):
        mt.synchronize()


def test_synchronize_asks_only_the_device_named(gpu: PaperGpu) -> None:
    ask("op", 0)
    mt.synchronize("cuda")
    mt.synchronize("cuda:1")
    with pytest.raises(errors.NonFiniteError):
        mt.synchronize("cpu")
    mt.synchronize()


def test_what_waits_is_bounded_and_forgotten_once_answered(gpu: PaperGpu) -> None:
    for _ in range(_pending.LIMIT + 3):
        ask()
    waiting = _pending._waiting[CPU]
    assert len(waiting) == _pending.LIMIT
    assert sum(event.waited for event in gpu.events) == 3  # the oldest, each time one too many
    gpu.arrive()
    an_op_runs()
    assert not waiting


def test_every_error_is_raised_in_exactly_one_thread(gpu: PaperGpu) -> None:
    for _ in range(64):
        ask("op", 0)
    raised: list[str] = []

    def look() -> None:
        for event in gpu.events:
            event.arrive()
            try:
                _pending.raise_finished(CPU)
            except errors.NonFiniteError as error:
                raised.append(str(error))

    threads = [threading.Thread(target=look) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    told = [1 + (int(text.split(". ")[-1].split()[0]) if "later" in text else 0) for text in raised]
    assert sum(told) == 64
    assert not _pending._waiting[CPU]


@pytest.mark.parametrize("way", ["block", "environment"])
def test_while_debugging_every_check_raises_at_once(
    gpu: PaperGpu, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = r"^op: x holds NaN or infinity in row 2\. Drop or repair"
    if way == "environment":
        monkeypatch.setenv("MICROTOME_SYNC_CHECKS", "1")
        with pytest.raises(errors.NonFiniteError, match=text):
            ask("op", 2)
        monkeypatch.setenv("MICROTOME_SYNC_CHECKS", "0")
    else:
        with mt.check_now(), pytest.raises(errors.NonFiniteError, match=text):
            ask("op", 2)
    assert gpu.events == []
    ask("op", 2)
    assert len(gpu.events) == 1


def test_while_a_graph_is_captured_nothing_is_asked_or_looked_at(gpu: PaperGpu) -> None:
    ask("op", 0)
    gpu.arrive()
    gpu.captures = True
    with mt.check_now():  # which could not wait either
        ask("op", 1)
    an_op_runs()
    gpu.captures = False
    with pytest.raises(errors.NonFiniteError, match="in row 0"):
        an_op_runs()


def test_what_nobody_came_by_for_is_a_warning_at_the_end(gpu: PaperGpu) -> None:
    ask("op", 0)
    ask("op", 1)
    gpu.events[0].arrive()
    with pytest.warns(RuntimeWarning, match=r"^op: x holds NaN or infinity in row 0,"):
        _pending._warn_at_exit()
    with warnings.catch_warnings():
        _pending._warn_at_exit()  # the second has not arrived, and an end does not wait


def test_the_interpreters_end_warns() -> None:
    code = (
        "import torch\nfrom microtome import _pending\nfrom microtome._look import Look\n"
        "class Passed:\n    query = lambda self: True\n"
        "class Paper(_pending.Gpu):\n    waits = lambda self, device: True\n"
        "    capturing = lambda self: False\n    fetch = lambda self, ts: (ts, Passed())\n"
        "_pending.gpu = Paper()\n"
        "look = Look('op', torch.device('cpu'))\nlook.finite('x', torch.tensor([[float('nan')]]))\n"
        "look.submit()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "RuntimeWarning: op: x holds NaN or infinity in row 0" in done.stderr


def test_on_a_cpu_every_look_is_made_now() -> None:
    with pytest.raises(errors.NonFiniteError, match="in row 2"):
        ask("op", 2)
    look = Look("op", CPU)
    with pytest.raises(errors.ArgumentError, match=r"must lie in \[0, f=2\), got 2\."):
        look.indices("indices", torch.tensor([[2]]), 2)
    assert look.submit() is None


def test_a_check_after_writing_is_let_go_where_memory_is_short(
    gpu: PaperGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    def short(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.")  # noqa: EM101

    monkeypatch.setattr(gpu, "fetch", short)
    look_after_writing("op", "W", torch.ones(2, 2), torch.ones(2))
    monkeypatch.setattr(gpu, "fetch", lambda tensors: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        look_after_writing("op", "W", torch.ones(2, 2), torch.ones(2))


def test_an_op_on_a_gpu_gathers_within_its_table(gpu: PaperGpu) -> None:
    op = Op.__new__(Op)  # no dispatcher: a CPU tensor would not get there
    op.name, op.gathers, op.looks = "gather", [(1, "indices", 0, "f")], None
    table, safe = op._within(CPU, (torch.ones(3, 2), torch.tensor([[5, 1]])))
    assert table.shape == (3, 2)
    assert safe.tolist() == [[2, 1]]
    with pytest.raises(errors.ArgumentError, match=r"^gather: indices must lie in \[0, f=3\)"):
        mt.synchronize()


def test_the_examples_of_the_module_hold() -> None:
    assert doctest.testmod(_pending).failed == 0
