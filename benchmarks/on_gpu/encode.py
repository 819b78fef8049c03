"""topk_encode and its kin: beside the bare product, torch.topk, and where the time goes."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from benchmarks.agreement import DisagreementError, largest_difference, within
from benchmarks.floors import encode_need
from benchmarks.on_gpu import inputs
from benchmarks.on_gpu.device import Run
from benchmarks.on_gpu.goals import CUBLAS, TORCH
from benchmarks.on_gpu.inputs import Batch, Shape, sample
from benchmarks.on_gpu.item import (
    REPEATS,
    AbsentError,
    Context,
    Item,
    Row,
    Subject,
    backends_here,
    measure,
    under,
)
from microtome.ops import screen_weights, topk_encode, topk_encode_fp8


def bare_product(b: Batch) -> Run:
    """The bf16 product into a buffer that is there: what any encoder must do."""
    x, W = (b.x - b.b_dec).bfloat16(), b.W_enc.bfloat16()
    out = torch.empty(x.shape[0], W.shape[0], dtype=torch.bfloat16, device=x.device)
    return lambda: torch.mm(x, W.T, out=out)


def dense_topk(b: Batch, dtype: torch.dtype) -> Run:
    """Every pre-activation, then torch.topk."""
    x, W = (b.x - b.b_dec).to(dtype), b.W_enc.to(dtype)
    bias, k = b.b_enc.to(dtype), b.shape.k
    return lambda: linear(x, W, bias).topk(k)


def preactivations(b: Batch, rows: Tensor) -> tuple[Tensor, Tensor]:
    """z of a few rows, [r, f]: by plain float32, and in float64 a panel of W_enc at a time."""
    plain = linear(b.x[rows] - b.b_dec, b.W_enc, b.b_enc)
    wide = b.x[rows].double() - b.b_dec.double()
    panels = zip(b.W_enc.split(8192), b.b_enc.split(8192), strict=True)
    exact = torch.cat([wide @ W.double().T + bias.double() for W, bias in panels], dim=1)
    return plain, exact


def check_rows(
    b: Batch, rows: Tensor, values: list[Tensor], indices: list[Tensor], least: Tensor
) -> dict[str, float]:
    """Compare rows of a code with float64: the values, the order, and that nothing was left out.

    Args:
        b: what was encoded.
        rows: [r] row numbers.
        values: the entries of each of these rows, value descending.
        indices: their features.
        least: [r] what every entry must reach and every feature above it must be among them, up to
            the rounding of float32: the k-th largest, or a threshold.
    """
    plain, exact = preactivations(b, rows)
    border = 2 * largest_difference(plain, exact)
    worst: dict[str, float] = {}
    for i in range(len(rows)):
        at = indices[i].long()
        if len(set(at.tolist())) != len(at):
            msg = f"row {int(rows[i])}: a feature is named twice"
            raise DisagreementError(msg)
        found = within("values", values[i], plain[i, at], exact[i, at])
        worst = max(worst, found, key=lambda f: f.get("values_error", -1.0))
        if len(at) and float(exact[i, at].min()) < float(least[i]) - border:
            msg = f"row {int(rows[i])}: an entry lies below the smallest that belongs there"
            raise DisagreementError(msg)
        rest = exact[i].clone()
        rest[at] = float("-inf")
        if float(rest.max()) > float(least[i]) + border:
            msg = f"row {int(rows[i])}: a feature clearly above the smallest entry was left out"
            raise DisagreementError(msg)
    return {**worst, "rows": float(len(rows)), "border": border}


def check_topk(b: Batch, values: Tensor, indices: Tensor) -> dict[str, float]:
    """A few rows of a top k against float64."""
    rows = sample(b.x.shape[0]).to(b.x.device)
    if bool((values[:, :-1] < values[:, 1:]).any()):
        msg = "values do not descend"
        raise DisagreementError(msg)
    least = preactivations(b, rows)[1].topk(b.shape.k).values[:, -1]
    return check_rows(b, rows, list(values[rows]), list(indices[rows]), least)


def survivors(candidates: Tensor, shape: Shape) -> dict[str, Any]:
    """How many features a row were computed in float32, as a histogram in units of k."""
    c = candidates.double().cpu() / shape.k
    edges = torch.tensor([0, 1.25, 1.5, 2, 2.5, 3, 4, 6, 8, 16, float("inf")], dtype=torch.float64)
    counts = torch.histogram(c.clamp(max=1e6), edges.clamp(max=1e7)).hist
    return {
        "candidates_mean": float(c.mean()),
        "candidates_p99": float(c.quantile(0.99)),
        "candidates_edges": edges.tolist()[:-1],
        "candidates_counts": counts.long().tolist(),
        "rows_repaired": int((candidates >= shape.f).sum()),
    }


def topk(context: Context, name: str, variant: str = "") -> list[Row]:
    """topk_encode with the screen at hand, by every backend that is there.

    Args:
        context: device and ceilings.
        name: of the shape.
        variant: "" float32 weights, "bf16" weights, "fp8" screen, "cold" without a screen.
    """
    shape = inputs.sized(context, name)
    item = f"topk_encode {variant}".strip()
    out = []
    here = backends_here("topk_encode")
    if variant == "fp8":  # the others answer exactly, which is measured already
        here = [name for name in backends_here("topk_encode_fp8") if name == "triton"]
    for backend in here:
        b = inputs.batch(context.device, shape)
        subject = topk_subject(context, b, backend, variant)
        base = {"part": 2, "item": item, "shape": name}
        out += measure(context, base, subject, repeats=0 if name in ("L", "XL") else REPEATS)
        del b, subject
        context.device.free()
    return out


def topk_subject(context: Context, b: Batch, backend: str, variant: str) -> Subject:
    """One variant of topk_encode by one backend."""
    dtype = torch.bfloat16 if variant == "bf16" else torch.float32
    x, W_enc, b_enc, b_dec = (t.to(dtype) for t in (b.x, b.W_enc, b.b_enc, b.b_dec))
    if variant == "bf16":  # the answer to these very numbers
        b = Batch(b.shape, *(t.float() for t in (x, W_enc, b_enc)), b.W_dec, b_dec.float())
    kinds = {"": "bf16", "fp8": "fp8"}
    screen = screen_of(W_enc, kinds[variant]) if variant in kinds else None
    k = b.shape.k
    seen: list[Tensor] = []  # the certificate of the last call

    def call() -> tuple[Tensor, Tensor, Tensor]:
        if variant == "fp8":
            *answer, observed = topk_encode_fp8(x, W_enc, b_enc, b_dec, k=k, screen=screen)
            seen[:] = [observed]
            return answer[0], answer[1], answer[2]
        return topk_encode(x, W_enc, b_enc, b_dec, k=k, screen=screen)

    run = under(backend, call)
    subject = Subject(run, need=encode_need(*sizes(b)), backend=backend)

    def check() -> dict[str, Any]:
        values, indices, _ = run()
        if dtype == torch.bfloat16:
            return check_bf16(b, values, indices)
        return check_topk(b, values, indices)

    subject.check = check

    def figures(row: Row) -> dict[str, Any]:
        found = survivors(run()[2], b.shape)
        if seen:
            found["observed_max"] = float(seen[0].max())
            found["observed_median"] = float(seen[0].median())
        if not context.device.dry:
            mean, repaired = found["candidates_mean"], found["rows_repaired"]
            row["note"] = f"{mean:.2f} k candidates a row, {repaired} rows computed whole"
            if seen:
                row["note"] += f", errors of up to {found['observed_max']:.1f} deviations"
        return found

    subject.figures = figures
    if variant == "":
        subject.beside = {
            CUBLAS: functools.partial(bare_product, b),
            TORCH: functools.partial(dense_topk, b, torch.float32),
            "torch bf16": functools.partial(dense_topk, b, torch.bfloat16),
            "eai-sparsify": functools.partial(sparsify_encode, b),
        }
        if b.shape.name in ("L", "XL") and not context.device.dry:
            del subject.beside[TORCH]  # a third of a second a call, and 8.6 GB
        if b.shape.name == "XL":
            subject.beside = {CUBLAS: subject.beside[CUBLAS]}
    else:
        subject.beside = {CUBLAS: functools.partial(bare_product, b)}
    return subject


def screen_of(W_enc: Tensor, kind: str) -> Any:
    """A screen of that kind; raises AbsentError where this build has no such kind."""
    from microtome.ops.screen_weights import KINDS

    if kind not in KINDS:
        msg = f"topk_encode: no {kind} screen in this build"
        raise AbsentError(msg)
    return screen_weights(W_enc, kind)


def check_bf16(b: Batch, values: Tensor, indices: Tensor) -> dict[str, float]:
    """A bf16 answer: each value is the float64 one to a bf16 rounding, and none is far below."""
    rows = sample(b.x.shape[0]).to(b.x.device)
    _, exact = preactivations(b, rows)
    got = exact.gather(1, indices[rows].long())
    best = exact.topk(b.shape.k).values
    slack = 2.0**-7 * float(exact.abs().max())
    error = largest_difference(values[rows].double(), got)
    short = float((best[:, -1] - got.min(1).values).max())
    if not (error <= slack and short <= slack):
        msg = f"bf16: values off by {error:.3e}, an entry {short:.3e} short; allowed {slack:.3e}"
        raise DisagreementError(msg)
    return {"values_error": error, "short": short, "allowed": slack}


def sizes(b: Batch) -> tuple[int, int, int, int]:
    """n, d, f, k."""
    return b.x.shape[0], b.shape.d, b.shape.f, b.shape.k


def sparsify_encode(b: Batch) -> Run:
    """eai-sparsify's SparseCoder.encode under bf16 autocast, as its trainer runs it."""
    from benchmarks.peers.gpu_sparsify import coder

    sae = coder(b.weights, b.shape.k)

    @torch.no_grad()
    def run() -> object:
        with torch.autocast(b.x.device.type, torch.bfloat16):
            return sae.encode(b.x)

    return run


def stages(context: Context, name: str) -> list[Row]:
    """Where topk_encode's time goes: the kernels that the profiler sees in one call, by time."""
    shape = inputs.sized(context, name)
    out = []
    for backend in backends_here("topk_encode"):
        b = inputs.batch(context.device, shape)
        run = topk_subject(context, b, backend, "").run
        base = {"part": 2, "item": "topk_encode stages", "shape": name, "backend": backend}
        out += profile(context, base, run)
    return out


def profile(context: Context, base: Row, run: Run) -> list[Row]:
    """One row that names the kernels of a call and their milliseconds."""
    from torch.profiler import ProfilerActivity, profile

    device = context.device
    run()
    device.synchronise()
    if context.warm:
        return []
    kind = ProfilerActivity.CPU if device.dry else ProfilerActivity.CUDA
    calls = 1 if device.dry else 5
    with profile(activities=[kind]) as seen:
        for _ in range(calls):
            run()
        device.synchronise()
    column = "self_cpu_time_total" if device.dry else "self_device_time_total"
    events = sorted(seen.key_averages(), key=lambda e: -getattr(e, column))[:12]
    kernels = {e.key[:60]: round(getattr(e, column) / 1e3 / calls, 4) for e in events}
    if device.dry:
        kernels = dict.fromkeys(kernels, 0.0)
    note = ", ".join(f"{name} {ms}" for name, ms in kernels.items())
    return [{**base, "status": "ok", "kernels_ms": kernels, "note": note}]


def items() -> list[Item]:
    """Encoding in part 2."""
    return [
        Item(2, "topk_encode", "M", lambda c: topk(c, "M"), 25, gib=8),
        Item(2, "topk_encode", "S", lambda c: topk(c, "S"), 15, gib=4),
        Item(2, "topk_encode", "L", lambda c: topk(c, "L"), 40, gib=24),
        Item(2, "topk_encode stages", "M", lambda c: stages(c, "M"), 10, gib=4, compiles=False),
        Item(2, "topk_encode bf16", "M", lambda c: topk(c, "M", "bf16"), 10, gib=6),
        Item(2, "topk_encode cold", "M", lambda c: topk(c, "M", "cold"), 10, gib=6),
        Item(2, "topk_encode fp8", "M", lambda c: topk(c, "M", "fp8"), 10, gib=6),
        Item(2, "topk_encode fp8", "L", lambda c: topk(c, "L", "fp8"), 20, gib=24),
    ]


def huge() -> list[Item]:
    """What only a large card holds: a million features."""
    return [Item(2, "topk_encode", "XL", lambda c: topk(c, "XL"), 40, gib=72, compiles=False)]
