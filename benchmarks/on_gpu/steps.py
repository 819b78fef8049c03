"""A whole TopK training step: ours, plain torch, eai-sparsify, OpenAI-style kernels."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor

from benchmarks.agreement import DisagreementError
from benchmarks.floors import step_needs
from benchmarks.on_gpu import inputs
from benchmarks.on_gpu.device import Run
from benchmarks.on_gpu.encode import profile, screen_of
from benchmarks.on_gpu.goals import OPENAI, SPARSIFY, TORCH
from benchmarks.on_gpu.inputs import WARM_ROWS, Batch
from benchmarks.on_gpu.item import (
    REPEATS,
    AbsentError,
    Context,
    Item,
    Row,
    Subject,
    measure,
    said,
)
from microtome.ops import (
    Code,
    UpdateRule,
    moments_for,
    sae_loss,
    sae_update,
    screen_weights,
    topk_encode,
)

LR = 3e-4
TAKEN = 3  # steps after which two programs' losses are compared
# A step in bf16 picks other features near the border; its loss still says whether it trains.
LOSS_TOLERANCE = 0.02


def scale_of(x: Tensor) -> float:
    """One over the variance of a batch: with it the loss is the FVU."""
    return 1.0 / float((x - x.mean(0)).pow(2).sum())


class OurStep:
    """Encode, loss, gradients, projection, Adam, renorm and the screen by microtome's ops alone."""

    def __init__(self, b: Batch, state: str = "float32", kind: str = "bf16") -> None:
        self.params: Any = tuple(w.clone() for w in b.weights)
        self.k, self.rule, self.count = b.shape.k, UpdateRule(lr=LR), 0
        options = {}
        if state != "float32":
            if "state" not in inspect.signature(moments_for).parameters:
                msg = f"sae_update: {state} moments are not in this build"
                raise AbsentError(msg)
            options["state"] = state
        self.moments = moments_for(self.params, self.rule, **options)
        self.screen = screen_weights(self.params[0], kind)
        # Known before training: a trainer reads it off its data once, not back from every batch.
        self.scale = scale_of(b.x)

    @torch.no_grad()
    def step(self, x: Tensor) -> Tensor:
        """One step on a batch [n, d]; its FVU before the step."""
        W_enc, b_enc, W_dec, b_dec = self.params
        fp8 = self.screen.kind == "fp8"
        values, indices, _ = topk_encode(
            x, W_enc, b_enc, b_dec, k=self.k, screen=self.screen,
            precision="fp8" if fp8 else "exact",
        )  # fmt: skip
        values = values.relu_()
        sse, grad_out, grad_values = sae_loss(x, values, indices, W_dec, b_dec)
        self.count += 1
        code = Code(indices, values, grad_values, grad_out, self.scale)
        sae_update(
            code, x - b_dec, self.params, self.moments, self.rule, self.count,
            screen=None if fp8 else self.screen,
        )  # fmt: skip
        if fp8:  # which no update refreshes
            self.screen = screen_weights(W_enc, "fp8")
        return sse.sum() * self.scale

    def beside(self) -> list[Tensor]:
        """What is kept beside parameters and moments."""
        return list(self.screen[1:])


class MixedStep(OurStep):
    """The same on rows in bfloat16: sums and parameters are float32, copies of the weights are what
    the products and gathers read. `kind` is "mixed"."""

    def __init__(self, b: Batch, state: str = "float32", kind: str = "mixed") -> None:
        super().__init__(b, state, "bf16")
        del self.screen
        self.scale = scale_of(b.x.bfloat16().float())
        self.copies = (self.params[0].bfloat16(), self.params[2].bfloat16())

    @torch.no_grad()
    def step(self, x: Tensor) -> Tensor:
        """One step on a batch [n, d] in bfloat16; its FVU before the step."""
        centred = torch.sub(x, self.params[3], out=torch.empty_like(x))  # in float32, then rounded
        values, indices, _ = topk_encode(
            centred, self.copies[0], self.params[1].bfloat16(), k=self.k
        )
        values = values.relu_()
        sse, grad_out, grad_values = sae_loss(centred, values, indices, self.copies[1])
        self.count += 1
        code = Code(indices, values, grad_values, grad_out, self.scale)
        sae_update(
            code, centred, self.params, self.moments, self.rule, self.count, copies=self.copies
        )
        return sse.sum() * self.scale

    def beside(self) -> list[Tensor]:
        return list(self.copies)


def made(b: Batch, state: str, kind: str) -> tuple[OurStep, Tensor]:
    """A step, and the batch as it takes it."""
    if kind == "mixed":
        return MixedStep(b, state), b.x.bfloat16()
    return OurStep(b, state, kind), b.x


def step(context: Context, name: str, state: str = "float32", kind: str = "bf16") -> list[Row]:
    """The step at one shape.

    Args:
        context: device and ceilings.
        name: of the shape.
        state: of the moments.
        kind: of the screen; "mixed" for rows in bfloat16, without one.
    """
    shape = inputs.sized(context, name)
    b = inputs.batch(context.device, shape)
    mixed = kind == "mixed"
    if kind not in ("bf16", "mixed"):
        screen_of(b.W_enc[:1], kind)
    ours, x = made(b, state, kind)
    item = "step" + {"float32": "", "bfloat16": " bf16"}.get(state, f" {state}")
    item += {"bf16": "", "mixed": " mixed"}.get(kind, f" {kind} screen")
    n, d, f, k = shape.n, shape.d, shape.f, shape.k
    need = step_needs(n, d, f, k, context.device.cache_bytes, state, mixed=mixed)
    # Two more sets of parameters and moments do not fit beside each other at L.
    roomy = name != "L" or context.device.dry
    subject = Subject(
        lambda: ours.step(x),
        functools.partial(check, b, state, kind) if roomy else dict,
        need,
        repeat=functools.partial(fresh_steps, b, state, kind),
        figures=functools.partial(memory, x, ours),
    )
    if item == "step" or (item == "step mixed" and name == "M"):
        subject.beside = {
            SPARSIFY: functools.partial(sparsify, b),
            OPENAI: functools.partial(openai, b),
            TORCH: functools.partial(dense, b, torch.bfloat16),
        }
        if name == "S" and not mixed:
            subject.beside["torch fp32"] = functools.partial(dense, b, torch.float32)
    base = {"part": 3, "item": item, "shape": name}
    rows = measure(context, base, subject, repeats=REPEATS if name == "S" else 3 if roomy else 0)
    for row in rows:
        if row.get("ms"):
            row["rows_per_second"] = round(1e3 * n / row["ms"])
    if context.device.dry:
        for row in rows:
            row.pop("rows_per_second", None)
    return rows


def check(b: Batch, state: str, kind: str) -> dict[str, Any]:
    """The loss of each of a few steps, beside plain torch's in float32 on the same batch."""
    from benchmarks.peers.gpu_dense import DenseStep

    ours, x = made(b, state, kind)
    mine = [float(ours.step(x)) for _ in range(TAKEN)]
    del ours
    plain = DenseStep(b.weights, b.shape.k, LR, torch.float32)
    theirs = [float(plain.step(x.float())) for _ in range(TAKEN)]
    off = max(abs(m - t) / abs(t) for m, t in zip(mine, theirs, strict=True))
    tolerance = LOSS_TOLERANCE if state != "float32" or kind == "mixed" else 1e-3
    if kind == "mixed" and b.shape.n < WARM_ROWS:
        tolerance *= 5  # a dry run's few rows, where one feature that changed places counts
    if not off <= tolerance:
        msg = f"FVU of {TAKEN} steps {mine}, plain torch {theirs}: {off:.2e} apart"
        raise DisagreementError(msg)
    return {"fvu": mine, "plain_fvu": theirs, "apart": off}


def fresh_steps(b: Batch, state: str, kind: str) -> list[Any]:
    """Everything after two steps from the same start."""
    ours, x = made(b, state, kind)
    losses = [ours.step(x) for _ in range(2)]
    return [*losses, *ours.params, ours.moments, ours.beside()]


def memory(x: Tensor, ours: OurStep, row: Row) -> dict[str, Any]:
    """Peak memory beside that of the dense step, and beside what no step can do without."""
    from torch.utils._pytree import tree_leaves

    held = [*ours.params, *tree_leaves(ours.moments), *ours.beside()]
    state = sum(t.numel() * t.element_size() for t in held if isinstance(t, Tensor)) / 2**20
    batch = 2 * x.nbytes / 2**20  # x and the gradient of the reconstruction
    found: dict[str, Any] = {"state_mib": state, "batch_mib": batch}
    peak = row.get("peak_mib")
    dense_peak = row.get("beside", {}).get(TORCH, {}).get("peak_mib")
    if peak is not None:
        found["memory_ratio"] = (state + batch / 2 + peak) / (state + batch + 64)
        if dense_peak:
            found["memory_share"] = peak / dense_peak
    return found


def sparsify(b: Batch) -> Run:
    """eai-sparsify's step."""
    from benchmarks.peers.gpu_sparsify import SparsifyStep

    peer = SparsifyStep(b.weights, b.shape.k, LR)
    return lambda: peer.step(b.x)


def openai(b: Batch) -> Run:
    """The step by OpenAI-style kernels."""
    from benchmarks.peers.openai_style import OpenAIStep

    peer = OpenAIStep(b.weights, b.shape.k, LR)
    scale = scale_of(b.x)
    return lambda: peer.step(b.x, scale)


def dense(b: Batch, dtype: torch.dtype) -> Run:
    """The dense step."""
    from benchmarks.peers.gpu_dense import DenseStep

    peer = DenseStep(b.weights, b.shape.k, LR, dtype)
    return lambda: peer.step(b.x)


def stages(context: Context, kind: str) -> list[Row]:
    """The kernels of one step, by time."""
    b = inputs.batch(context.device, inputs.sized(context, "M"))
    ours, x = made(b, "float32", kind)
    item = "step mixed stages" if kind == "mixed" else "step stages"
    return profile(context, {"part": 3, "item": item, "shape": "M"}, lambda: ours.step(x))


def peers_train(context: Context) -> list[Row]:
    """Whether the contenders do the same work: their losses over a few steps, beside torch's."""
    shape = inputs.sized(context, "S")
    b = inputs.batch(context.device, shape)
    out = []
    contenders = {
        SPARSIFY: sparsify,
        OPENAI: openai,
        TORCH: functools.partial(dense, dtype=torch.bfloat16),
    }
    plain = [float(loss) for loss in _losses(dense(b, torch.float32))]
    for name, build in contenders.items():
        base = {"part": 3, "item": f"losses of {name}", "shape": "S"}
        try:
            losses = [float(loss) for loss in _losses(build(b))]
        except AbsentError as error:
            out.append({**base, "status": "absent", "note": str(error)})
            continue
        except Exception as error:  # one contender that breaks does not hide the others
            out.append({**base, "status": "FAILED", "note": said(error)})
            continue
        off = max(abs(a - p) / abs(p) for a, p in zip(losses, plain, strict=True))
        status = "ok" if off <= 5 * LOSS_TOLERANCE else "WRONG"
        note = "" if status == "ok" else f"FVU {losses}, plain float32 torch {plain}"
        out.append({**base, "status": status, "note": note, "check": {"apart": off}})
    return out


def _losses(run: Run) -> list[Any]:
    return [run() for _ in range(TAKEN)]


def items() -> list[Item]:
    """Steps in part 3."""
    at = functools.partial
    return [
        Item(3, "step mixed", "M", at(step, name="M", kind="mixed"), 45, gib=40),
        Item(3, "step", "M", at(step, name="M"), 50, gib=40),
        Item(3, "step", "S", at(step, name="S"), 25, gib=12),
        Item(3, "losses", "S", peers_train, 15, gib=12, compiles=False),
        Item(3, "step stages", "M", at(stages, kind="bf16"), 10, gib=20, compiles=False),
        Item(3, "step mixed stages", "M", at(stages, kind="mixed"), 10, gib=20, compiles=False),
        Item(3, "step mixed", "L", at(step, name="L", kind="mixed"), 25, gib=40),
        Item(3, "step", "L", at(step, name="L"), 60, gib=60),
        Item(3, "step fp8 screen", "L", at(step, name="L", kind="fp8"), 30, gib=40),
        Item(3, "step bf16", "M", at(step, name="M", state="bfloat16"), 20, gib=20),
        Item(3, "step int8", "M", at(step, name="M", state="int8"), 20, gib=20),
    ]
