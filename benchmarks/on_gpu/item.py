"""One thing to measure: what is built, how it is judged, and the row that comes of it."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from benchmarks.agreement import DisagreementError
from benchmarks.floors import Need
from benchmarks.on_gpu import sheet
from benchmarks.on_gpu.device import Device, Run
from microtome.errors import BackendError
from microtome.ops import _registry, use_backend

Row = dict[str, Any]
REPEATS = 20
ON_CARD = ("cuda", "triton")


class AbsentError(Exception):
    """This build, or this card, cannot do it; the message says why."""


@dataclass
class Context:
    """What an item is given.

    Attributes:
        device: where it runs.
        limits: the card's ceilings, by the names of `floors.Need.ms`.
        warm: only compile: few rows, one call, no row.
    """

    device: Device
    limits: Mapping[str, float] = field(default_factory=dict)
    warm: bool = False


@dataclass
class Subject:
    """Something ready to be measured.

    Attributes:
        run: what is timed; takes no argument.
        check: compares with float64 and raises DisagreementError; returns figures.
        need: what no implementation can do without, or several that follow on each other.
        beside: contenders; each is called once to build it, and answers what is to be timed. One
            that raises is a note in the row.
        figures: more numbers, asked after the timing, given the row.
        repeat: a call from a state that is the same each time; its tensors must have the same bits
            each time. None for `run` itself.
        backend: the backend that was demanded, for the table.
    """

    run: Run
    check: Callable[[], dict[str, Any]] = dict
    need: Need | list[Need] | None = None
    beside: dict[str, Callable[[], Run]] = field(default_factory=dict)
    figures: Callable[[Row], dict[str, Any]] | None = None
    repeat: Run | None = None
    backend: str = ""


@dataclass(frozen=True)
class Item:
    """A line of the plan.

    Attributes:
        part: 1, 2 or 3.
        name: for the table and the goals.
        shape: likewise.
        go: does it, and returns rows.
        seconds: about how long it takes; it is skipped where less is left.
        gib: card memory it needs.
        alone: whether it must have the card to itself (what is timed) or may share it.
        compiles: whether its kernels are compiled ahead, in processes beside each other.
    """

    part: int
    name: str
    shape: str
    go: Callable[[Context], list[Row]]
    seconds: float = 10.0
    gib: float = 0.0
    alone: bool = True
    compiles: bool = True

    @property
    def key(self) -> str:
        """Unique in its part."""
        return f"{self.name} {self.shape}".strip()


def guarded(item: Item, context: Context) -> list[Row]:
    """The item's rows; whatever goes wrong becomes a row that says so."""
    base = {"part": item.part, "item": item.name, "shape": item.shape}
    try:
        free = context.device.gib_free()
        if free < item.gib:
            note = f"needs {item.gib:.0f} GiB of card memory, {free:.0f} are free"
            return [{**base, "status": "skipped", "note": note}]
        return item.go(context)
    except AbsentError as error:
        return [{**base, "status": "absent", "note": str(error)}]
    except BackendError as error:
        return [{**base, "status": "absent", "note": refusal(error)}]
    except DisagreementError as error:
        return [{**base, "status": "WRONG", "note": str(error)}]
    except Exception as error:  # an item that breaks is a row of the table, not the end of it
        return [{**base, "status": "FAILED", "note": said(error)}]


def said(error: Exception) -> str:
    """An exception in one line, with where it was raised."""
    where = traceback.extract_tb(error.__traceback__)
    at = f" ({where[-1].filename.rsplit('/', 1)[-1]}:{where[-1].lineno})" if where else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}{at}"


def refusal(error: BackendError) -> str:
    """Why a demanded backend does not take these inputs: its own line of the message, if any."""
    lines = str(error).splitlines()
    own = [line.strip() for line in lines if line.strip().startswith(ON_CARD) and ":" in line]
    demanded = [line for line in own if f"'{line.split(':')[0]}' was demanded" in lines[0]]
    return f"{lines[0].split(':')[0]} by {(demanded or own or lines)[0]}"


def backends_here(op: str) -> list[str]:
    """The card's backends that this build has for an op.

    Raises:
        AbsentError: there is no such op, or none of them runs here; the message says why.
    """
    if op not in _registry.OPS:
        msg = f"{op}: not in this build"
        raise AbsentError(msg)
    own = {b.name for b in _registry.OPS[op].backends}
    here = [name for name in ON_CARD if name in own and _registry.unavailable(name) is None]
    if not here:
        reasons = "; ".join(
            f"{name}: {_registry.unavailable(name) if name in own else 'not written for this op'}"
            for name in ON_CARD
        )
        msg = f"{op}: no backend for a card. {reasons}"
        raise AbsentError(msg)
    return here


def under(backend: str, run: Run) -> Run:
    """`run` with a backend demanded."""

    def demanded() -> object:
        with use_backend(backend):
            return run()

    return demanded


def same_bits(run: Run, repeats: int = REPEATS) -> None:
    """Call again and again; raises DisagreementError where a bit differs from the first call's."""
    first = [_bits(t).clone() for t in tree_leaves(run()) if isinstance(t, Tensor)]
    for turn in range(1, repeats):
        again = [_bits(t) for t in tree_leaves(run()) if isinstance(t, Tensor)]
        for which, (a, b) in enumerate(zip(first, again, strict=True)):
            if not torch.equal(a, b):
                msg = (
                    f"call {turn + 1} of {repeats} on the same inputs gave other bits: output "
                    f"{which}, {int((a != b).sum())} of {a.numel()} bytes"
                )
                raise DisagreementError(msg)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().flatten().view(torch.uint8)


def measure(context: Context, base: Row, subject: Subject, *, repeats: int = 0) -> list[Row]:
    """Check, then time; peak memory, contenders and repeats after it.

    Args:
        context: device and ceilings.
        base: part, item, shape.
        subject: what to measure.
        repeats: calls that must give the same bits; 0 for none.

    Returns:
        One row, or none where the context only compiles.
    """
    device = context.device
    out = {**base, "status": "ok", "backend": subject.backend}
    if context.warm:
        subject.run()
        for build in subject.beside.values():
            _quietly(lambda build=build: build()())
        device.synchronise()
        return []
    try:
        out["check"] = subject.check()
        device.synchronise()
        if repeats:
            repeats = 2 if device.dry else repeats
            same_bits(subject.repeat or subject.run, repeats)
            out["bit_equal_repeats"] = repeats
    except DisagreementError as error:
        return [{**out, "status": "WRONG", "note": str(error)}]
    except AbsentError as error:
        return [{**out, "status": "absent", "note": str(error)}]
    except BackendError as error:
        return [{**out, "status": "absent", "note": refusal(error)}]
    except Exception as error:
        return [{**out, "status": "FAILED", "note": said(error)}]
    try:
        out["peak_mib"] = device.peak(subject.run)
        out.update(device.time(subject.run).figures())
    except Exception as error:
        return [{**out, "status": "FAILED", "note": said(error)}]
    needs = subject.need if isinstance(subject.need, list) else [subject.need]
    known = [need for need in needs if need is not None]
    if known:
        out["floor_ms"] = sum(need.ms(context.limits) for need in known)
        out["floor"] = " + ".join(need.words() for need in known)
    out["beside"] = {name: contender(device, build) for name, build in subject.beside.items()}
    if subject.figures is not None:
        try:
            out["figures"] = subject.figures(out)
        except Exception as error:
            out["note"] = f"figures: {said(error)}"
    return [sheet.judged(out)]


def contender(device: Device, build: Callable[[], Run]) -> dict[str, Any]:
    """Time and peak memory of who stands beside, or a note why not."""
    run: Run | None = None
    try:
        run = build()
        peak = device.peak(run)
        return {**device.time(run).figures(), "peak_mib": peak}
    except AbsentError as error:
        return {"note": str(error)}
    except Exception as error:
        return {"note": said(error)}
    finally:
        del run
        device.free()


def _quietly(run: Run) -> None:
    try:
        run()
    except Exception:  # compiled ahead only; the measured call will say what is wrong
        return
