"""jump_relu and gated codes against the papers' dense formulas, gradients included."""

from __future__ import annotations

import doctest
import importlib
import re

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear, mse_loss

from microtome import SparseCode
from microtome._seed import generator
from microtome.errors import ArgumentError, DtypeError, ShapeError
from microtome.ops import Entries, jump_relu, sparse_decode, threshold_encode, use_backend
from microtome.ops.threshold_encode import _encode
from microtome.testing import assert_accurate, backends_of

on_every_backend = pytest.mark.parametrize("backend", backends_of(_encode))


def weights_of(n: int = 9, d: int = 7, f: int = 40) -> dict[str, Tensor]:
    """An SAE, thresholds from 0.2 to 1.2, and activations."""
    g = generator(0, "jump")
    draw = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    return {
        "x": draw(n, d),
        "W_enc": draw(f, d) / d**0.5,
        "b_enc": 0.1 * draw(f),
        "W_dec": draw(f, d) / d**0.5,
        "b_dec": 0.1 * draw(d),
        "threshold": 0.2 + torch.rand(f, generator=g),
    }


class Step(torch.autograd.Function):
    """The paper's H(z - threshold) with its pseudo-derivative, dense."""

    @staticmethod
    def forward(ctx, z, threshold, bandwidth):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(z, threshold)
        ctx.bandwidth = bandwidth
        return (z > threshold).to(z.dtype)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        z, threshold = ctx.saved_tensors
        inside = ((z - threshold).abs() < ctx.bandwidth / 2).to(z.dtype)
        return None, (-inside / ctx.bandwidth * grad).sum(0), None


class JumpReLU(torch.autograd.Function):
    """The paper's z H(z - threshold) with its pseudo-derivative, dense."""

    @staticmethod
    def forward(ctx, z, threshold, bandwidth):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(z, threshold)
        ctx.bandwidth = bandwidth
        return z * (z > threshold)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        z, threshold = ctx.saved_tensors
        inside = ((z - threshold).abs() < ctx.bandwidth / 2).to(z.dtype)
        return (z > threshold) * grad, (-threshold / ctx.bandwidth * inside * grad).sum(0), None


def dense_loss(w: dict[str, Tensor], bandwidth: float) -> list[Tensor]:
    z = linear(w["x"] - w["b_dec"], w["W_enc"], w["b_enc"])
    out = JumpReLU.apply(z, w["threshold"], bandwidth) @ w["W_dec"] + w["b_dec"]
    return [mse_loss(out, w["x"].detach()), Step.apply(z, w["threshold"], bandwidth).sum(1).mean()]


def sparse_loss(w: dict[str, Tensor], bandwidth: float, capacity: int | None) -> list[Tensor]:
    code, window, _ = threshold_encode(
        w["x"], w["W_enc"], w["b_enc"], w["b_dec"],
        threshold=w["threshold"], bandwidth=bandwidth, capacity=capacity,
    )  # fmt: skip
    (values, indices, offsets), l0 = jump_relu(code, window, w["threshold"], bandwidth)
    out = sparse_decode(values, indices, w["W_dec"], w["b_dec"], offsets)
    return [mse_loss(out, w["x"].detach()), l0.mean()]


def with_gradients(losses: list[Tensor], w: dict[str, Tensor]) -> list[Tensor]:
    grads = [torch.autograd.grad(loss, list(w.values()), retain_graph=True, materialize_grads=True)
             for loss in losses]  # fmt: skip
    return [*losses, *grads[0], *grads[1]]


@pytest.mark.parametrize("bandwidth", [0.05, 0.6])
@pytest.mark.parametrize("capacity", [None, 300])
@on_every_backend
def test_loss_and_sparsity_have_the_gradients_of_the_papers_formulas(
    backend: str, capacity: int | None, bandwidth: float
) -> None:
    answers = []
    for dtype, dense in ((torch.float32, False), (torch.float32, True), (torch.float64, True)):
        w = {n: t.to(dtype).requires_grad_() for n, t in weights_of().items()}
        with use_backend("auto" if dense else backend):
            losses = dense_loss(w, bandwidth) if dense else sparse_loss(w, bandwidth, capacity)
            answers.append([t.detach() for t in with_gradients(losses, w)])
    names = ["mse", "l0", *(f"{n} of mse" for n in w), *(f"{n} of l0" for n in w)]
    for name, got, plain, exact in zip(names, *answers, strict=True):
        assert_accurate(got, plain, exact, name, factor=8.0 if exact.numel() <= 64 else 2.0)
    threshold = dict(zip(names, answers[0], strict=True))
    assert bool((threshold["threshold of mse"] != 0).any())
    assert bool((threshold["threshold of l0"] != 0).any())


def test_the_gradient_of_a_threshold_is_the_mean_slope_over_its_window() -> None:
    # 20,001 rows spread z evenly over [0, 2]: the share above the threshold falls with slope 1/2.
    z = torch.linspace(0, 2, 20001, dtype=torch.float64)[:, None]
    one = torch.ones(1, 1, dtype=torch.float64)
    for theta in (0.5, 1.3):
        threshold = torch.tensor([theta], dtype=torch.float64, requires_grad=True)
        code, window, _ = threshold_encode(z, one, threshold=threshold, bandwidth=0.2)
        (values, _, _), l0 = jump_relu(code, window, threshold, 0.2)
        (slope,) = torch.autograd.grad(l0.mean(), threshold)
        assert float(slope) == pytest.approx(-0.5, rel=1e-3)
        # The mean of z H(z - theta) over [0, 2] is 1 - theta^2 / 4.
        (slope,) = torch.autograd.grad(values.sum() / len(z), threshold)
        assert float(slope) == pytest.approx(-theta / 2, rel=1e-3)


def test_the_code_keeps_its_order_and_the_window_joins_it_as_zeros() -> None:
    x = torch.tensor([[3.0, 0.9, 1.1], [0.0, 0.0, 0.0], [1.2, 5.0, 0.0]])
    threshold = torch.ones(3, requires_grad=True)
    code, window, _ = threshold_encode(x, torch.eye(3), threshold=threshold, bandwidth=0.5)
    (values, indices, offsets), l0 = jump_relu(code, window, threshold, 0.5)
    assert values.tolist() == pytest.approx([3.0, 1.1, 0.0, 0.0, 1.2, 5.0, 0.0])
    assert indices.tolist() == [0, 2, 1, 2, 0, 1, 0]
    assert offsets.tolist() == [0, 4, 4, 7]
    assert l0.tolist() == [2.0, 0.0, 2.0]
    assert torch.equal(SparseCode(values, indices, 3, offsets).to_dense(), x * (x > 1))
    # Features 1 and 2 of row 0 and feature 0 of row 2 lie in the window, theta / bandwidth = 2.
    weight = torch.tensor([0.0, 0.0, 10.0, 1.0, 0.0, 0.0, 100.0])
    (grad,) = torch.autograd.grad((values * weight).sum(), threshold, retain_graph=True)
    assert grad.tolist() == [-200.0, -20.0, -2.0]
    (grad,) = torch.autograd.grad((l0 * torch.tensor([1.0, 9.0, 10.0])).sum(), threshold)
    assert grad.tolist() == [-20.0, -2.0, -2.0]


def test_no_rows_give_no_code() -> None:
    threshold = torch.ones(3, requires_grad=True)
    encoded = threshold_encode(torch.empty(0, 3), torch.eye(3), threshold=threshold, bandwidth=0.5)
    (values, _, offsets), l0 = jump_relu(*encoded[:2], threshold, 0.5)
    assert (values.shape, l0.shape, offsets.tolist()) == ((0,), (0,), [0])
    assert torch.autograd.grad(values.sum() + l0.sum(), threshold)[0].tolist() == [0.0] * 3


@pytest.mark.parametrize("capacity", [None, 300])
def test_a_compiled_graph_runs_forward_and_backward(capacity: int | None) -> None:
    w = {n: t.requires_grad_() for n, t in weights_of().items()}
    loss = lambda: torch.stack(sparse_loss(w, 0.3, capacity)).sum()  # noqa: E731
    # Sizes that follow the data stay in a graph only if dynamo is told to keep them.
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=capacity is None):
        got = torch.compile(loss, fullgraph=True, backend="aot_eager")()
        grads = [torch.autograd.grad(value, list(w.values())) for value in (got, loss())]
    torch.testing.assert_close(got, loss())
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@on_every_backend
def test_a_gated_sae_has_the_code_and_gradients_of_the_dense_formula(backend: str) -> None:
    """arXiv:2404.16014: f = 1[gate > 0] relu(magnitude), W_mag = exp(r_mag) W_gate, and its loss.

    The sparsity loss is the sum of relu(gate); the gate of the reconstruction has no gradient.
    """
    g = generator(0, "gated")
    answers = []
    for dtype, dense in ((torch.float32, False), (torch.float32, True), (torch.float64, True)):
        w = {n: t.to(dtype).requires_grad_() for n, t in weights_of().items() if n != "threshold"}
        for name in ("b_mag", "r_mag"):
            w[name] = (0.3 * torch.randn(40, generator=g.manual_seed(1))).to(dtype).requires_grad_()
        if dense:
            gate = linear(w["x"] - w["b_dec"], w["W_enc"], w["b_enc"])
            shared = linear(w["x"] - w["b_dec"], w["W_enc"])
            magnitude = (shared * w["r_mag"].exp() + w["b_mag"]).relu() * (gate > 0)
            out = magnitude @ w["W_dec"] + w["b_dec"]
            sparsity = gate.relu().sum()
        else:
            with use_backend(backend):
                (z, i, offsets), _, _ = threshold_encode(w["x"], w["W_enc"], w["b_enc"], w["b_dec"])
                at = i.long()
                values = ((z - w["b_enc"][at]) * w["r_mag"][at].exp() + w["b_mag"][at]).relu()
                out = sparse_decode(values, i, w["W_dec"], w["b_dec"], offsets)
                sparsity = z.sum()
        losses = [mse_loss(out, w["x"].detach()), sparsity]
        with use_backend("auto" if dense else backend):
            answers.append([out.detach(), *(t.detach() for t in with_gradients(losses, w))])
    names = [
        "out",
        "mse",
        "sparsity",
        *(f"{n} of mse" for n in w),
        *(f"{n} of sparsity" for n in w),
    ]
    for name, got, plain, exact in zip(names, *answers, strict=True):
        assert_accurate(got, plain, exact, name, factor=8.0 if exact.numel() <= 64 else 4.0)


def test_messages_say_what_came_and_what_is_allowed() -> None:
    threshold = torch.ones(2)
    entries = Entries(torch.ones(1), torch.zeros(1, dtype=torch.int32), torch.tensor([0, 1]))
    text = "jump_relu: bandwidth must be above 0, got 0.0."
    with pytest.raises(ArgumentError, match=f"^{re.escape(text)}$"):
        jump_relu(entries, entries, threshold, 0.0)
    with pytest.raises(ShapeError, match=r"jump_relu: threshold must be \[f\], got shape \[1, 2\]"):
        jump_relu(entries, entries, threshold[None], 1.0)
    with pytest.raises(DtypeError, match="got code_values float32, threshold float64"):
        jump_relu(entries, entries, threshold.double(), 1.0)


@pytest.mark.parametrize("name", ["jump_relu", "threshold_encode", "batch_topk_encode"])
def test_the_examples_in_the_docstrings_run(name: str) -> None:
    results = doctest.testmod(importlib.import_module(f"microtome.ops.{name}"))
    assert results.attempted > 0
    assert results.failed == 0
