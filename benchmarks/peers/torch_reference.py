"""What everybody would write: the product, torch.topk, embedding_bag, autograd, torch's Adam."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.checks import check_code, check_decode, check_loss
from benchmarks.harness import Subject
from benchmarks.inputs import Inputs
from benchmarks.step import LEARNING_RATE

linear, embedding_bag = torch.nn.functional.linear, torch.nn.functional.embedding_bag


def encode(inputs: Inputs) -> Subject:
    """Product, then torch.topk."""

    def run() -> tuple[Tensor, Tensor]:
        return linear(inputs.x - inputs.b_dec, inputs.W_enc, inputs.b_enc).topk(
            inputs.case.k, sorted=False
        )

    return Subject(run, lambda: check_code(inputs, *run()))


def _code(inputs: Inputs) -> tuple[Tensor, Tensor]:
    values, indices = linear(inputs.x - inputs.b_dec, inputs.W_enc, inputs.b_enc).topk(
        inputs.case.k, sorted=False
    )
    return values.relu(), indices


def decode(inputs: Inputs) -> Subject:
    """embedding_bag with weights."""
    values, indices = _code(inputs)

    def run() -> Tensor:
        return (
            embedding_bag(indices, inputs.W_dec, per_sample_weights=values, mode="sum")
            + inputs.b_dec
        )

    return Subject(run, lambda: check_decode(run(), values, indices, inputs.W_dec, inputs.b_dec))


def loss(inputs: Inputs) -> Subject:
    """The reconstruction's squared error and the gradient of the values, by autograd."""
    values, indices = _code(inputs)

    def run() -> tuple[Tensor, Tensor, Tensor]:
        active = values.clone().requires_grad_()
        out = (
            embedding_bag(indices, inputs.W_dec, per_sample_weights=active, mode="sum")
            + inputs.b_dec
        )
        error = out - inputs.x
        error.pow(2).sum().backward()
        assert active.grad is not None
        # A value that the ReLU cut gets no gradient.
        return (
            error.detach().pow(2).sum(1),
            2 * error.detach(),
            active.grad.masked_fill(values == 0, 0.0),
        )

    return Subject(
        run, lambda: check_loss(run(), inputs.x, values, indices, inputs.W_dec, inputs.b_dec)
    )


class Trainer:
    """A TopK SAE in plain torch: autograd, projection, fused Adam, renorm; the loss is the FVU."""

    def __init__(self, weights: tuple[Tensor, ...], k: int) -> None:
        self.params = [torch.nn.Parameter(w.clone()) for w in weights]
        self.k = k
        self.optimizer = torch.optim.Adam(self.params, lr=LEARNING_RATE, fused=True)

    def step(self, x: Tensor) -> float:
        """One step on a batch [n, d]; returns its FVU before the step."""
        W_enc, b_enc, W_dec, b_dec = self.params
        values, indices = linear(x - b_dec, W_enc, b_enc).topk(self.k, sorted=False)
        out = embedding_bag(indices, W_dec, per_sample_weights=values.relu(), mode="sum") + b_dec
        fvu = (out - x).pow(2).sum() / (x - x.mean(0)).pow(2).sum()
        fvu.backward()
        with torch.no_grad():
            assert W_dec.grad is not None
            W_dec.grad -= (W_dec.grad * W_dec).sum(1, keepdim=True) * W_dec
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            W_dec /= W_dec.norm(dim=1, keepdim=True)
        return float(fvu.detach())


def whole_step(inputs: Inputs) -> Subject:
    """The step on the timed activations, and the FVU after training."""
    trainer = Trainer(inputs.weights, inputs.case.k)

    def train(steps: int) -> Any:
        fresh = Trainer(inputs.initial, inputs.case.k)
        for i in range(steps):
            fresh.step(inputs.batch(i))
        return tuple(fresh.params)

    return Subject(lambda: trainer.step(inputs.x), train=train)


OPS = {"topk_encode": encode, "sparse_decode": decode, "sae_loss": loss, "step": whole_step}
