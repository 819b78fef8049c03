"""What users call, on a card: a compiled model, a patching sweep, Shapley values of a network."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.agreement import DisagreementError
from benchmarks.on_gpu import inputs
from benchmarks.on_gpu.device import Run
from benchmarks.on_gpu.item import AbsentError, Context, Item, Row, Subject, measure, said
from benchmarks.on_gpu.patching import drawer, small
from microtome.ops import sae_loss, topk_encode

TIGHT = 1e-5  # relative to the grid's range, float32


class Sparse(nn.Module):
    """A TopK SAE by our ops, differentiable."""

    def __init__(self, weights: tuple[Tensor, ...], k: int) -> None:
        super().__init__()
        self.W_enc, self.b_enc, self.W_dec, self.b_dec = (nn.Parameter(w.clone()) for w in weights)
        self.k = k

    def forward(self, x: Tensor) -> Tensor:
        """The summed squared error."""
        values, indices, _ = topk_encode(x, self.W_enc, self.b_enc, self.b_dec, k=self.k)
        return sae_loss(x, values.relu(), indices, self.W_dec, self.b_dec)[0].sum()


def compiled(context: Context) -> list[Row]:
    """torch.compile(fullgraph=True) through our ops, forward and backward, beside eager."""
    b = inputs.batch(context.device, inputs.sized(context, "S"))
    model = Sparse(b.weights, b.shape.k)
    kind = "aot_eager" if context.device.dry else "inductor"
    whole = torch.compile(model, fullgraph=True, backend=kind)

    def run(module: Any) -> list[Tensor | None]:
        model.zero_grad()
        loss = module(b.x)
        loss.backward()
        return [loss.detach(), *(p.grad for p in model.parameters())]

    def check() -> dict[str, Any]:
        eager = [t.clone() for t in run(model) if t is not None]
        ours = [t for t in run(whole) if t is not None]
        off = max(
            float((a - e).abs().max() / e.abs().max().clamp_min(1e-30))
            for a, e in zip(ours, eager, strict=True)
        )
        if not off <= 1e-4:
            msg = f"the compiled model is {off:.2e} from the eager one"
            raise DisagreementError(msg)
        return {"apart": off}

    subject = Subject(
        functools.partial(run, whole),
        check,
        beside={"eager": lambda: functools.partial(run, model)},
    )
    base = {"part": 3, "item": "torch.compile", "shape": "S"}
    return measure(context, base, subject)


def sweep(context: Context, site: str) -> list[Row]:
    """A patching sweep over a GPT-2-small-sized model, beside one batched forward a layer."""
    from microtome.models.toy import ToyConfig, ToyModel
    from microtome.patching import logit_difference
    from microtome.patching import sweep as patch

    dry = context.device.dry
    size = ToyConfig(64, 16, 2, 2, 32) if dry else ToyConfig(5000, 768, 12, 12, 256)
    model = ToyModel(size).to(context.device.torch).eval()
    t = small(context, 64, 6)
    g = inputs.host_generator("sweep")
    clean = torch.randint(0, size.vocab_size, (1, t), generator=g)
    corrupted = clean.clone()
    corrupted[0, t // 4] = (clean[0, t // 4] + 1) % size.vocab_size
    place = context.device.torch
    call = functools.partial(
        patch, model, clean.to(place), corrupted.to(place), logit_difference(1, 2), site,
        progress=False,
    )  # fmt: skip

    def check() -> dict[str, Any]:
        ours, plain = call().scores.double().cpu(), call(engine="forwards").scores.double().cpu()
        off = float((ours - plain).abs().max() / (plain.max() - plain.min()).clamp_min(1e-12))
        if not off <= 100 * TIGHT:
            msg = f"the grid is {off:.2e} of its range from that of whole forwards"
            raise DisagreementError(msg)
        return {"apart": off, "cells": plain.numel()}

    def forwards() -> Run:
        return functools.partial(call, engine="forwards")

    subject = Subject(lambda: call(), check, beside={"whole forwards": forwards})
    return measure(context, {"part": 3, "item": f"sweep {site}", "shape": "64"}, subject)


def explained(context: Context) -> list[Row]:
    """Shapley values of a 30-128-128-1 network through the public call, beside shap's sampler."""
    from microtome import shapley

    draw = drawer(context, 31)
    m, hidden = (4, 8) if context.device.dry else (30, 128)
    net = nn.Sequential(
        nn.Linear(m, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 1)
    )
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=inputs.host_generator(*p.shape)) * 0.2)
    net = net.to(context.device.torch)
    x, background = draw(small(context, 8, 1), m), draw(small(context, 100, 3), m)
    count = 2 if context.device.dry else 20
    call = functools.partial(
        shapley.permutation, net, x, background, n_permutations=count, shared=True, seed=0,
        progress=False, check=False,
    )  # fmt: skip

    def check() -> dict[str, Any]:
        values = call().values
        with torch.no_grad():
            whole = (net(x).flatten() - net(background).mean()).double()
        off = float((values.flatten(1).sum(1) - whole.to(values.device)).abs().max())
        if not off <= 1e-4 * max(1.0, float(whole.abs().max())):
            msg = f"the values add up to {off:.2e} beside f(x) - mean f(background)"
            raise DisagreementError(msg)
        return {"efficiency_error": off}

    def by_function() -> Run:
        function = functools.partial(net.forward)
        return functools.partial(
            shapley.permutation, lambda a: function(a), x, background, n_permutations=count,
            shared=True, seed=0, progress=False, check=False,
        )  # fmt: skip

    subject = Subject(lambda: call(), check, beside={"as a function": by_function})
    return measure(context, {"part": 3, "item": "shapley network", "shape": "30"}, subject)


def guarded(go: Any) -> Any:
    """`go`, where a concept that has no path on a card is a row that says so."""

    def run(context: Context) -> list[Row]:
        try:
            rows: list[Row] = go(context)
        except (ImportError, NotImplementedError) as error:
            raise AbsentError(said(error)) from error
        return rows

    return run


def items() -> list[Item]:
    """These in part 3; what they compile is compiled by their checks."""
    residual, heads = (functools.partial(sweep, site=site) for site in ("resid_pre", "z"))
    return [
        Item(3, "torch.compile", "S", guarded(compiled), 40, gib=6, compiles=False),
        *(
            Item(3, f"sweep {site}", "64", guarded(go), 20, gib=6, compiles=False)
            for site, go in (("resid_pre", residual), ("z", heads))
        ),
        Item(3, "shapley network", "30", guarded(explained), 15, gib=2, compiles=False),
    ]
