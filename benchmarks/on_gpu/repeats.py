"""Twenty calls of every op on the same inputs, compared bit by bit."""

from __future__ import annotations

import functools

from benchmarks.agreement import DisagreementError
from benchmarks.on_gpu import probes_rest, probes_sae
from benchmarks.on_gpu.item import (
    REPEATS,
    AbsentError,
    Context,
    Item,
    Row,
    backends_here,
    refusal,
    same_bits,
)
from benchmarks.on_gpu.probes import FULL, TINY, Probe
from microtome.errors import BackendError


def run(probe: Probe, context: Context) -> list[Row]:
    """A row for each backend: with a latent on every row where the op has such a kind."""
    shape, rows = TINY if context.device.dry else FULL, []
    for backend in backends_here(probe.op):
        base = {"part": 3, "item": f"repeats of {probe.name}", "shape": "", "backend": backend}
        call = probe.make("dense", shape, context.device)
        call = probe.make("random", shape, context.device) if call is None else call
        if call is None:
            msg = f"{probe.name}: no inputs to repeat"
            raise AbsentError(msg)
        once = functools.partial(call.once, backend)
        count = 2 if context.device.dry else REPEATS
        if context.warm:
            once()
            continue
        try:
            same_bits(once, count)
        except DisagreementError as error:
            rows.append({**base, "status": "WRONG", "note": str(error)})
        except BackendError as error:
            rows.append({**base, "status": "absent", "note": refusal(error)})
        else:
            rows.append({**base, "status": "ok", "note": f"{count} calls, the same bits"})
    return rows


def items() -> list[Item]:
    """One item for each probe."""
    table = [*probes_sae.probes(), *probes_rest.probes()]
    return [
        Item(3, f"repeats of {p.name}", "", functools.partial(run, p), seconds=4.0, gib=2.0)
        for p in table
    ]
