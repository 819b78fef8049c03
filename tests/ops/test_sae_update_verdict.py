"""A step of an SAE on a GPU asks whether its inputs are sound, and writes nothing where they are
not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import microtome as mt
from microtome import _pending, errors
from microtome._seed import generator
from microtome.ops import sae_update, screen_weights, use_backend
from microtome.ops.sae_update import Code, UpdateRule, moments_for
from microtome.testing import cuda
from microtome.testing.paper import PaperGpu
from microtome.testing.triton import INTERPRETED

# A GPU of paper takes CPU tensors, so Triton is interpreted here and CUDA emulated.
BACKENDS = [
    pytest.param(
        "triton",
        marks=[
            pytest.mark.triton,
            pytest.mark.skipif(not INTERPRETED, reason="TRITON_INTERPRET is not 1"),
        ],
    ),
    pytest.param(
        "cuda",
        marks=pytest.mark.skipif(
            not cuda.EMULATED, reason="the emulated CUDA kernels are not there"
        ),
    ),
    "reference",
]
n, d, f, k = 5, 20, 7, 2
NAN = float("nan")


@pytest.fixture(autouse=True)
def _emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    if cuda.EMULATED:
        monkeypatch.setenv("MICROTOME_EMULATE_CUDA", "1")


class Step:
    """A step's inputs and state.

    Attributes:
        kept: all that the step may write, by name.
    """

    def __init__(self, state: str = "float32", optimizer: str = "adam") -> None:
        g = generator(7, "verdict")
        draw = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
        self.rule = UpdateRule(optimizer, lr=0.1)
        self.params = (draw(f, d), draw(f), draw(f, d), draw(d))
        self.moments = moments_for(self.params, self.rule, state)
        self.screen = screen_weights(self.params[0], "bf16")
        self.x = draw(n, d)
        self.codes = [
            Code(torch.randint(0, f, (n, k), generator=g), draw(n, k).abs(), draw(n, k), draw(n, d))
            for _ in range(2)
        ]
        self.copies = (self.params[0].bfloat16(), self.params[2].bfloat16())
        self.kept = [*self.params, *self.moments, *self.screen[1:], *self.copies]

    def take(self) -> Tensor:
        code, aux = self.codes
        return sae_update(
            code, self.x, self.params, self.moments, self.rule, 1, aux=aux, screen=self.screen,
            copies=self.copies,
        )  # fmt: skip

    def state(self) -> list[Tensor]:
        return [t.clone() for t in self.kept if t is not None]

    def spoil(self, what: str) -> None:
        code, aux = self.codes
        if what == "x":
            self.x[2, 3] = NAN
        elif what == "indices":
            code.indices[1, 1] = f + 3
        elif what == "aux_indices":
            aux.indices[4, 0] = -2
        else:
            getattr(code, what)[3, 1] = float("inf")


WRONG = {
    "x": "x holds NaN or infinity in row 2",
    "indices": rf"indices must lie in \[0, f={f}\), and do not in row 1",
    "aux_indices": rf"aux_indices must lie in \[0, f={f}\), and do not in row 4",
    "grad_out": "grad_out holds NaN or infinity in row 3",
}


def bits(t: Tensor) -> Tensor:
    return t.view(torch.int32) if t.dtype == torch.float32 else t


@pytest.mark.parametrize("what", WRONG)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_wrong_input_changes_not_a_bit_and_is_told_later(
    gpu: PaperGpu, backend: str, what: str
) -> None:
    step = Step("int8" if backend == "triton" and what != "x" else "float32")
    before = step.state()
    step.spoil(what)
    with use_backend(backend):
        fired = step.take()
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(before, step.state(), strict=True))
    assert backend == "cuda" or not fired.any()
    assert [event.waited for event in gpu.events] == [0] * len(gpu.events)
    with pytest.raises(
        (errors.NonFiniteError, errors.ArgumentError), match=rf"^sae_update: {WRONG[what]}, the"
    ):
        mt.synchronize()
    mt.synchronize()


@pytest.mark.parametrize("backend", BACKENDS[:2])
def test_a_captured_step_writes_nothing_where_its_inputs_are_wrong(
    gpu: PaperGpu, backend: str
) -> None:
    step = Step(optimizer="signsgd")
    before = step.state()
    step.spoil("x")
    gpu.captures = True
    with use_backend(backend):
        step.take()
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(before, step.state(), strict=True))
    assert gpu.events == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_with_sound_inputs_the_verdict_changes_not_a_bit(backend: str) -> None:
    asked, plain = Step(), Step()
    with use_backend(backend), pytest.MonkeyPatch.context() as patch:
        fired = plain.take()
        patch.setattr(_pending, "gpu", PaperGpu())
        again = asked.take()
        mt.synchronize()
    assert torch.equal(fired, again)
    assert all(
        torch.equal(bits(a), bits(b)) for a, b in zip(plain.state(), asked.state(), strict=True)
    )
    assert not torch.equal(asked.params[0], Step().params[0])


def test_on_a_cpu_the_step_raises_before_anything_else() -> None:
    step = Step()
    before = step.state()
    step.spoil("indices")
    with pytest.raises(errors.ArgumentError, match=rf"indices must lie in \[0, f={f}\), got 10"):
        step.take()
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(before, step.state(), strict=True))
