"""Out of memory: the message, the error's bases, and no state written halfway."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from microtome import errors
from microtome._memory import WAYS, amount, ran_out
from microtome.ops import sparse_decode
from microtome.ops._registry import OPS, Backend, Op
from microtome.testing import backends_of, interpreted
from microtome.testing.calls import Call, calls

CUDA = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB\nmore"
)


def out_of_memory(*args: object) -> Any:
    raise torch.OutOfMemoryError(CUDA)


@pytest.fixture
def exhausted(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Give an op a backend that runs out of memory."""

    def give(op: str, impl: Callable[..., Any] = out_of_memory) -> None:
        fake = Backend("cpu", "absent:absent", lambda *_: None)
        fake.__dict__["run"] = impl
        monkeypatch.setattr(OPS[op], "backends", (fake,))

    return give


def test_the_message_names_every_input_with_its_bytes_and_a_way_out(
    exhausted: Callable[[str], None],
) -> None:
    exhausted("sparse_decode")
    values, indices = torch.ones(500, 2), torch.zeros(500, 2, dtype=torch.int64)
    with pytest.raises(errors.OutOfMemoryError) as raised:
        sparse_decode(values, indices, torch.ones(300, 1000).bfloat16().float(), torch.ones(1000))
    assert str(raised.value) == (
        "sparse_decode: out of memory on cpu; backend 'cpu' was given\n"
        "  values: [500, 2] float32, 4.0 kB\n"
        "  indices: [500, 2] int64, 8.0 kB\n"
        "  W_dec: [300, 1000] float32, 1.2 MB\n"
        "  b_dec: [1000] float32, 4.0 kB\n"
        "  together 1.2 MB\n"
        "and asked for more: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total "
        "capacity of 79.11 GiB\n"
        "Pass fewer rows of values and indices at once."
    )
    assert isinstance(raised.value.__cause__, torch.OutOfMemoryError)


@pytest.mark.parametrize(
    "handler",
    [errors.MicrotomeError, torch.OutOfMemoryError, RuntimeError, MemoryError],
    ids=lambda kind: kind.__name__,
)
def test_handlers_written_for_torch_still_catch_it(
    exhausted: Callable[[str], None], handler: type[Exception]
) -> None:
    exhausted("sparse_decode")
    values, indices = torch.ones(1, 1, requires_grad=True), torch.zeros(1, 1, dtype=torch.int64)
    with pytest.raises(handler, match=r"^sparse_decode: out of memory"):
        sparse_decode(values, indices, torch.ones(1, 1))


def test_a_gradient_that_runs_out_of_memory_says_so_out_of_backward(
    exhausted: Callable[[str], None],
) -> None:
    exhausted("sparse_decode_grad_W_dec")
    W_dec = torch.ones(3, 4, requires_grad=True)
    out = sparse_decode(torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int64), W_dec)
    text = "sae_update takes a step without forming it"
    with pytest.raises(torch.OutOfMemoryError, match=text):
        out.sum().backward()


def test_a_cpu_allocation_that_fails_is_the_same_error(
    exhausted: Callable[..., None],
) -> None:
    exhausted("sparse_decode", lambda *_: torch.empty(10**14))
    code = torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int64)
    with pytest.raises(errors.OutOfMemoryError, match=r"tried to allocate 400000000000000 bytes"):
        sparse_decode(*code, torch.ones(1, 1))


def test_other_errors_pass_as_they_are(exhausted: Callable[..., None]) -> None:
    def fail(*args: object) -> None:
        msg = "boom"
        raise RuntimeError(msg)

    exhausted("sparse_decode", fail)
    code = torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int64)
    with pytest.raises(RuntimeError, match=r"^boom$") as raised:
        sparse_decode(*code, torch.ones(1, 1))
    assert not ran_out(raised.value)
    assert not ran_out(errors.OutOfMemoryError("already told"))


def test_every_op_has_a_way_out() -> None:
    helpers = {"screen_weights", "pack_weights"}  # what they write is what was asked for
    assert not [op for op in OPS if op not in WAYS and op not in helpers]


def test_the_error_can_be_pickled_and_amounts_are_in_powers_of_1000() -> None:
    error = pickle.loads(pickle.dumps(errors.OutOfMemoryError("op: out of memory")))
    assert type(error) is errors.OutOfMemoryError
    assert [amount(n) for n in (0, 999, 1000, 999_960, 1_500_000_000)] == [
        "0 bytes", "999 bytes", "1.0 kB", "1.0 MB", "1.5 GB",
    ]  # fmt: skip
    with pytest.raises(AttributeError, match="no attribute 'Oops'"):
        _ = errors.Oops


class _Failing(TorchDispatchMode):
    """The i-th call that returns a new tensor fails, as when memory is short there."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.left, self.failed = at, False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        returned = func._schema.returns
        if any(r.alias_info is None and str(r.type) == "Tensor" for r in returned):
            if self.left == 0:
                self.failed = True
                raise torch.OutOfMemoryError(CUDA)
            self.left -= 1
        return func(*args, **kwargs)


def spare_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Triton's interpreter allocates to launch a kernel is nothing that a GPU would."""
    from torch.utils._python_dispatch import _disable_current_modes
    from triton.runtime.interpreter import GridExecutor

    launch = GridExecutor.__call__

    def spared(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            return launch(self, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", spared)


def attempts(op: Op, backend: Backend, monkeypatch: pytest.MonkeyPatch) -> Iterator[_Failing]:
    """Modes under which the first, the second, ... allocation of the backend fails, to the last."""
    native = Backend(backend.name, backend.impl, backend.why_not)
    for at in range(200):
        mode = _Failing(at)

        def run(*args: Any, mode: _Failing = mode) -> Any:
            with mode:
                return backend.run(*args)

        native.__dict__["run"] = run
        monkeypatch.setattr(op, "backends", (native,))
        yield mode
        if not mode.failed:
            return
    pytest.fail("200 allocations")


MUTATING = [op for op in OPS.values() if op.mutates]
# The reference is plain PyTorch, a step of many; it makes no promise.
PROMISED = [
    pytest.param(op, p.values[0], marks=p.marks, id=f"{op.name}-{p.id}")  # type: ignore[attr-defined]
    for op in MUTATING
    for p in backends_of(op)
    if p.values[0] != "reference"  # type: ignore[attr-defined]
]


@pytest.mark.parametrize(("op", "backend"), PROMISED)
def test_no_allocation_that_fails_leaves_state_half_written(
    op: Op, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    call: Call = calls(screen="auto" if backend == "cpu" else "bf16")[op.name]
    chosen = next(b for b in op.backends if b.name == backend)
    before = {name: t.clone() for name, t in call.inputs.items() if isinstance(t, Tensor)}
    if interpreted(backend) and backend == "triton":
        spare_the_interpreter(monkeypatch)
    failures = 0
    for mode in attempts(op, chosen, monkeypatch):
        state = {**call.inputs, **{name: before[name].clone() for name in call.mutates}}
        try:
            call(state)
            raised = False  # or what failed was the look at what is already written
        except errors.OutOfMemoryError:
            raised = True
        failures += mode.failed
        moved = [name for name in call.mutates if not torch.equal(state[name], before[name])]
        assert not (raised and moved), f"allocation {failures} failed after {moved} changed"
        assert raised or moved
    assert failures > 0
