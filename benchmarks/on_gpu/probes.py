"""Correctness before any time: every op, every backend of the card, inputs that hurt.

A probe makes small inputs of a kind ("random", "ties", "nan", "dense"), and what a backend answers
is compared with float64. The same probes give the calls that are repeated, and those that run under
the sanitizer.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.agreement import DisagreementError
from benchmarks.on_gpu.against import against_reference
from benchmarks.on_gpu.device import Device, wait_for_checks
from benchmarks.on_gpu.inputs import Batch, Shape, batch
from benchmarks.on_gpu.item import AbsentError, Context, Item, Row, backends_here, refusal, said
from microtome.errors import BackendError, NonFiniteError
from microtome.ops import use_backend

KINDS = ("random", "ties", "nan", "dense")
FULL, SMALL, TINY = (
    Shape("", 1500, 300, 8192, 24),
    Shape("", 20, 48, 300, 6),
    Shape("", 3, 16, 40, 3),
)


@dataclass(frozen=True)
class Call:
    """One call and how it is judged.

    Attributes:
        call: a function of tensors.
        args: its arguments.
        judge: (backend) -> figures, raising DisagreementError; None for the reference in float64.
    """

    call: Callable[..., Any]
    args: tuple[Any, ...]
    judge: Callable[[str], dict[str, Any]] | None = None

    def verdict(self, backend: str) -> dict[str, Any]:
        """Figures, or DisagreementError."""
        if self.judge is not None:
            return self.judge(backend)
        return against_reference(backend, self.call, self.args)

    def once(self, backend: str) -> Any:
        """Just the call."""
        with use_backend(backend):
            return self.call(*self.args)


Make = Callable[[str, Shape, Device], "Call | None"]


@dataclass(frozen=True)
class Probe:
    """An op's inputs.

    Attributes:
        name: for the table.
        op: in the registry.
        make: (kind, shape, device) -> the call, or None where the op has no such kind.
    """

    name: str
    op: str
    make: Make


def problem(kind: str, shape: Shape, device: Device) -> Batch:
    """A batch of a kind.

    "ties": small integers, features in pairs that are equal. "dense": feature 0 is on every row.
    "nan": one row holds NaN.
    """
    b = batch(device, shape, seed=7)
    if kind == "ties":
        g = torch.Generator(device.torch).manual_seed(8)
        for tensor in (b.x, b.W_enc, b.b_enc, b.b_dec):
            tensor.copy_(torch.randint(-2, 3, tensor.shape, generator=g, device=device.torch))
        half = shape.f // 2
        b.W_enc[half : 2 * half] = b.W_enc[:half]
        b.b_enc[half : 2 * half] = b.b_enc[:half]
    elif kind == "dense":
        b.b_enc[0] = 50.0
    elif kind == "nan":
        b.x[shape.n // 2, shape.d // 2] = float("nan")
    return b


def raises_for_nan(call: Callable[..., Any], args: tuple[Any, ...], row: int) -> Any:
    """A judge: NonFiniteError that names the row must be raised, at the latest when waited for."""

    def judge(backend: str) -> dict[str, Any]:
        try:
            with use_backend(backend):
                call(*args)
                wait_for_checks()
        except NonFiniteError as error:
            if str(row) not in str(error):
                msg = f"the error names another row than {row}: {error}"
                raise DisagreementError(msg) from error
            return {"raised": str(error)}
        msg = f"row {row} holds NaN and nothing was raised"
        raise DisagreementError(msg)

    return judge


def items() -> list[Item]:
    """One item for each probe; they share the card."""
    from benchmarks.on_gpu import probes_rest, probes_sae

    table = [*probes_sae.probes(), *probes_rest.probes()]
    return [
        Item(
            1,
            probe.name,
            "",
            functools.partial(run, probe),
            seconds=40.0,  # most of it compiling, for the first time
            gib=2.0,
            alone=False,
            compiles=False,
        )
        for probe in table
    ]


def run(probe: Probe, context: Context) -> list[Row]:
    """A row for each backend of the op, over all kinds."""
    device = context.device
    return [verdicts(probe, backend, device) for backend in backends_here(probe.op)]


def verdicts(probe: Probe, backend: str, device: Device) -> Row:
    """One row: every kind's figures, and the first that went wrong."""
    base = {"part": 1, "item": probe.name, "shape": "", "backend": backend}
    found: dict[str, Any] = {}
    wrong, failed, refused = [], [], []
    # The small size is what the sanitizer runs: its kernels are compiled here, lanes side by side.
    sizes = {"": TINY} if device.dry else {"": FULL, " small": SMALL}
    for size, kind in itertools.product(sizes, KINDS[:2] if device.dry else KINDS):
        try:
            call = probe.make(kind, sizes[size], device)
            if call is None:
                continue
            found[kind + size] = call.verdict(backend)
            device.synchronise()
        except AbsentError as error:
            return {**base, "status": "absent", "note": str(error)}
        except BackendError as error:
            refused.append(f"{kind}{size}: {refusal(error)}")
        except DisagreementError as error:
            wrong.append(f"{kind}{size}: {error}")
        except Exception as error:  # one kind that breaks does not hide the others
            failed.append(f"{kind}{size}: {said(error)}")
    status = "WRONG" if wrong else "FAILED" if failed else "ok" if found else "absent"
    right = ["right on " + ", ".join(found)] if found else []
    note = "; ".join([*wrong, *failed, *right, *refused])
    return {**base, "status": status, "check": found, "note": note}


def floats(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Detached copies that require grad."""
    return tuple(t.detach().clone().requires_grad_() for t in tensors)
