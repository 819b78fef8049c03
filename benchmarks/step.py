"""The whole training step, ours: encode, loss, gradients, projection, Adam, renorm."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from benchmarks.checks import check_code, check_loss, check_update
from benchmarks.harness import Subject
from benchmarks.inputs import Inputs
from benchmarks.ops.bench_topk_encode import survivors
from microtome.ops import sae_loss, sae_update, screen_weights, topk_encode
from microtome.ops.sae_update import Code, UpdateRule, moments_for

LEARNING_RATE = 3e-4


class Trainer:
    """Weights, Adam's state and the screen, stepped by microtome's ops alone."""

    def __init__(self, weights: tuple[Tensor, ...], k: int, lr: float = LEARNING_RATE) -> None:
        self.params = tuple(w.clone() for w in weights)
        self.k, self.rule, self.count = k, UpdateRule(lr=lr), 0
        self.moments = moments_for(self.params, self.rule)
        self.screen = screen_weights(self.params[0])

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pre-activations, indices and candidates of the top k."""
        W_enc, b_enc, _, b_dec = self.params
        return topk_encode(x, W_enc, b_enc, b_dec, k=self.k, screen=self.screen)

    def code(self, x: Tensor) -> tuple[Code, Tensor]:
        """The step's code with its gradients, and the squared error of each row."""
        values, indices, _ = self.encode(x)
        values = values.relu_()
        sse, grad_out, grad_values = sae_loss(x, values, indices, self.params[2], self.params[3])
        variance = float((x - x.mean(0)).pow_(2).sum())
        return Code(indices, values, grad_values, grad_out, 1.0 / variance), sse

    def step(self, x: Tensor) -> float:
        """One step on a batch [n, d]; returns its FVU before the step."""
        code, sse = self.code(x)
        self.count += 1
        sae_update(
            code,
            x - self.params[3],
            self.params,
            self.moments,
            self.rule,
            self.count,
            screen=self.screen,
        )
        return float(sse.sum()) * code.scale


def state_mib(inputs: Inputs) -> float:
    """Parameters, Adam's two moments of each, and x, in MiB: what no step can do without."""
    c = inputs.case
    return 4 * (3 * (2 * c.f * c.d + c.f + c.d) + c.n * c.d) / 2**20


def whole_step(inputs: Inputs) -> Subject:
    """The step on the timed activations, and the FVU after training."""
    trainer = Trainer(inputs.weights, inputs.case.k)

    def check() -> dict[str, Any]:
        x = inputs.x
        fresh = Trainer(inputs.weights, inputs.case.k)
        values, indices, _ = fresh.encode(x)
        code, sse = fresh.code(x)
        loss = (sse, code.grad_out, code.grad_values)
        # From zeroed moments Adam's first step is a sign; two steps on, the moments are the ops'
        # own.
        fresh.step(x)
        fresh.step(inputs.batch(0))
        later, _ = fresh.code(x)
        return {
            **check_code(inputs, values, indices),
            **check_loss(loss, x, code.values, code.indices, inputs.W_dec, inputs.b_dec),
            **check_update(
                later, x - fresh.params[3], fresh.params, fresh.moments, fresh.rule, 3, fresh.screen
            ),
        }

    def figures() -> dict[str, Any]:
        state = state_mib(inputs)
        return {
            "survivors": survivors(trainer.encode(inputs.x)[2], inputs.case.f),
            "state_mib": state,
            "allowed_mib": 1.1 * state
            + 64
            - 4 * inputs.x.numel() / 2**20,  # x lies below the baseline
        }

    def train(steps: int) -> tuple[Tensor, ...]:
        fresh = Trainer(inputs.initial, inputs.case.k)
        for i in range(steps):
            fresh.step(inputs.batch(i))
        return fresh.params

    return Subject(lambda: trainer.step(inputs.x), check, figures, train)


OPS = {"step": whole_step}
