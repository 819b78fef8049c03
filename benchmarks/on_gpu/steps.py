"""A whole TopK training step: ours, plain torch, eai-sparsify, OpenAI-style kernels."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor

from benchmarks.agreement import DisagreementError
from benchmarks.floors import decode_need, encode_need, update_need
from benchmarks.on_gpu import inputs
from benchmarks.on_gpu.device import Run
from benchmarks.on_gpu.encode import profile, screen_of
from benchmarks.on_gpu.goals import OPENAI, SPARSIFY, TORCH
from benchmarks.on_gpu.inputs import Batch
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
        self.scale = 1.0 / float((b.x - b.x.mean(0)).pow(2).sum())

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


def step(context: Context, name: str, state: str = "float32", kind: str = "bf16") -> list[Row]:
    """The step at one shape.

    Args:
        context: device and ceilings.
        name: of the shape.
        state: of the moments.
        kind: of the screen.
    """
    shape = inputs.sized(context, name)
    b = inputs.batch(context.device, shape)
    if kind != "bf16":
        screen_of(b.W_enc[:1], kind)
    ours = OurStep(b, state, kind)
    item = "step" + {"float32": "", "bfloat16": " bf16"}.get(state, f" {state}")
    item += "" if kind == "bf16" else f" {kind} screen"
    n, d, f, k = shape.n, shape.d, shape.f, shape.k
    need = [
        encode_need(n, d, f, k),
        decode_need(n, d, f, k, 4, context.device.cache_bytes, loss=True),
        update_need(n, d, f, k, state),
    ]
    # Two more sets of parameters and moments do not fit beside each other at L.
    roomy = name != "L" or context.device.dry
    subject = Subject(
        lambda: ours.step(b.x),
        functools.partial(check, b, state, kind) if roomy else dict,
        need,
        repeat=functools.partial(fresh_steps, b, state, kind),
        figures=functools.partial(memory, b, ours),
    )
    if item == "step":
        subject.beside = {
            SPARSIFY: functools.partial(sparsify, b),
            OPENAI: functools.partial(openai, b),
            TORCH: functools.partial(dense, b, torch.bfloat16),
        }
        if name == "S":
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

    ours = OurStep(b, state, kind)
    mine = [float(ours.step(b.x)) for _ in range(TAKEN)]
    del ours
    plain = DenseStep(b.weights, b.shape.k, LR, torch.float32)
    theirs = [float(plain.step(b.x)) for _ in range(TAKEN)]
    off = max(abs(m - t) / abs(t) for m, t in zip(mine, theirs, strict=True))
    tolerance = LOSS_TOLERANCE if state != "float32" else 1e-3
    if not off <= tolerance:
        msg = f"FVU of {TAKEN} steps {mine}, plain torch {theirs}: {off:.2e} apart"
        raise DisagreementError(msg)
    return {"fvu": mine, "plain_fvu": theirs, "apart": off}


def fresh_steps(b: Batch, state: str, kind: str) -> list[Any]:
    """Everything after two steps from the same start."""
    ours = OurStep(b, state, kind)
    losses = [ours.step(b.x) for _ in range(2)]
    return [*losses, *ours.params, ours.moments, list(ours.screen[1:])]


def memory(b: Batch, ours: OurStep, row: Row) -> dict[str, Any]:
    """Peak memory beside that of the dense step, and beside what no step can do without."""
    from torch.utils._pytree import tree_leaves

    held = [*ours.params, *tree_leaves(ours.moments), *ours.screen[1:]]
    state = sum(t.numel() * t.element_size() for t in held if isinstance(t, Tensor)) / 2**20
    batch = 2 * 4 * b.x.numel() / 2**20  # x and the gradient of the reconstruction
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
    scale = 1.0 / float((b.x - b.x.mean(0)).pow(2).sum())
    return lambda: peer.step(b.x, scale)


def dense(b: Batch, dtype: torch.dtype) -> Run:
    """The dense step."""
    from benchmarks.peers.gpu_dense import DenseStep

    peer = DenseStep(b.weights, b.shape.k, LR, dtype)
    return lambda: peer.step(b.x)


def stages(context: Context) -> list[Row]:
    """The kernels of one step, by time."""
    b = inputs.batch(context.device, inputs.sized(context, "M"))
    ours = OurStep(b)
    base = {"part": 3, "item": "step stages", "shape": "M"}
    return profile(context, base, lambda: ours.step(b.x))


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
        Item(3, "step", "M", at(step, name="M"), 50, gib=40),
        Item(3, "step", "S", at(step, name="S"), 25, gib=12),
        Item(3, "losses", "S", peers_train, 15, gib=12, compiles=False),
        Item(3, "step stages", "M", stages, 10, gib=20, compiles=False),
        Item(3, "step", "L", at(step, name="L"), 60, gib=60),
        Item(3, "step fp8 screen", "L", at(step, name="L", kind="fp8"), 30, gib=40),
        Item(3, "step bf16", "M", at(step, name="M", state="bfloat16"), 20, gib=20),
        Item(3, "step int8", "M", at(step, name="M", state="int8"), 20, gib=20),
    ]
