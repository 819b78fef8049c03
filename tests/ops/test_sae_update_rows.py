"""sae_update with rows and copies in bfloat16: the step is that of float32; what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from microtome._seed import generator
from microtome.errors import ArgumentError, DtypeError
from microtome.ops import (
    Code,
    UpdateRule,
    moments_for,
    sae_update,
    screen_weights,
    use_backend,
)
from microtome.ops.sae_update import _update
from microtome.testing import assert_accurate, backends_of, factor_of

NAMES = ("W_enc", "b_enc", "W_dec", "b_dec")
on_every_backend = pytest.mark.parametrize("backend", backends_of(_update))


class Step:
    """A step at n rows whose numbers bfloat16 holds; latent 0 is on every row.

    Attributes:
        codes: the main and the aux code, in bfloat16.
        x: [n, d] bfloat16.
        params, moments: float32.
    """

    def __init__(self, n: int, d: int, f: int, rule: UpdateRule) -> None:
        g = generator(n + d + f, "bfloat16 rows")
        draw = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
        self.rule = rule
        self.codes = []
        for k in (3, 2):
            indices = torch.randint(0, f - 1, (n, k), generator=g)
            indices[:, 0] = 0
            rows = (draw(n, k).relu(), draw(n, k), draw(n, d))
            self.codes.append(Code(indices.int(), *(t.bfloat16() for t in rows), 0.1 / k))
        self.x = draw(n, d).bfloat16()
        self.params = (draw(f, d), draw(f), torch.nn.functional.normalize(draw(f, d)), draw(d))
        self.moments = moments_for(self.params, rule)
        for i, m in enumerate(self.moments):
            if m is not None:
                m.copy_(0.1 * draw(*m.shape) if i % 2 == 0 else (0.1 * draw(*m.shape)).square())

    def to(self, dtype: torch.dtype) -> Step:
        """Every number in another dtype; the parameters too where it is float64."""
        self.codes = [
            replace(c, **{name: getattr(c, name).to(dtype) for name in
                          ("values", "grad_values", "grad_out")})
            for c in self.codes
        ]  # fmt: skip
        self.x = self.x.to(dtype)
        if dtype == torch.float64:
            self.params = tuple(p.double() for p in self.params)  # type: ignore[assignment]
            self.moments = [None if m is None else m.double() for m in self.moments]
        return self

    def take(self, backend: str, *, aux: bool = True, **options: object) -> dict[str, Tensor]:
        """All that the step writes, by name."""
        code, second = self.codes
        with use_backend(backend):
            fired = sae_update(
                code, self.x, self.params, self.moments, self.rule, 4,
                aux=second if aux else None, **options,
            )  # fmt: skip
        names = [f"{m}_{name}" for name in NAMES for m in "mv"]
        kept = {n: m for n, m in zip(names, self.moments, strict=True) if m is not None}
        return {**dict(zip(NAMES, self.params, strict=True)), **kept, "fired": fired}


@on_every_backend
def test_a_step_on_bfloat16_rows_is_that_on_the_same_numbers_in_float32(backend: str) -> None:
    for size, rule, aux in (
        ((130, 9, 5), UpdateRule(lr=0.01, weight_decay=0.1), False),  # one latent has two chunks
        ((6, 20, 9), UpdateRule("signsgd", lr=0.01, rowsparse=True), True),
    ):
        narrow = Step(*size, rule).take(backend, aux=aux)
        wide = Step(*size, rule).to(torch.float32).take(backend, aux=aux)
        for name, t in wide.items():
            if name.endswith("b_dec") and backend == "triton":  # torch sums grad_out
                torch.testing.assert_close(narrow[name], t, rtol=1e-5, atol=1e-6, msg=name)
            else:
                assert torch.equal(narrow[name], t), (name, rule)


@on_every_backend
def test_a_step_on_bfloat16_rows_is_as_accurate_as_plain_pytorch_in_float32(backend: str) -> None:
    rule = UpdateRule(lr=0.01, weight_decay=0.1)
    got = Step(30, 20, 9, rule).take(backend)
    plain = Step(30, 20, 9, rule).to(torch.float32).take("reference")
    exact = Step(30, 20, 9, rule).to(torch.float64).take("reference")
    assert torch.equal(got.pop("fired"), exact["fired"])
    for name, t in got.items():
        assert t.dtype == torch.float32
        assert_accurate(t, plain[name], exact[name], name, factor_of(backend, t))


@on_every_backend
@pytest.mark.parametrize("d", [20, 21])
def test_copies_are_the_new_weights_rounded_to_nearest_even(backend: str, d: int) -> None:
    for rule in (UpdateRule(lr=0.01), UpdateRule("adamw", lr=0.01, rowsparse=True)):
        alone = Step(6, d, 9, rule).take(backend)
        step = Step(6, d, 9, rule)
        copies = (step.params[0].bfloat16(), step.params[2].bfloat16())
        before = [c.clone() for c in copies]
        # Latent 8 is in no code: what stands in its copy stays where its row does.
        for c in copies:
            c[8] = 7.0
        after = step.take(backend, copies=copies)
        assert all(torch.equal(after[name], t) for name, t in alone.items())
        for name, copy, old in zip(("W_enc", "W_dec"), copies, before, strict=True):
            touched = (after[name].bfloat16() != old).any(1)
            assert int(touched.sum()) > 3
            right = after[name].bfloat16()
            if rule.rowsparse:
                right[8] = 7.0
            assert torch.equal(copy, right), name


@on_every_backend
def test_a_screen_and_copies_are_refreshed_beside_each_other(backend: str) -> None:
    step = Step(6, 20, 9, UpdateRule(lr=0.01))
    with use_backend("reference"):
        screen = screen_weights(step.params[0], "bf16")
    copies = (step.params[0].bfloat16(), step.params[2].bfloat16())
    after = step.take(backend, screen=screen, copies=copies)
    assert torch.equal(copies[0], after["W_enc"].bfloat16())
    assert torch.equal(copies[0], screen.shadow[:, :20].view(torch.bfloat16))


def test_a_copy_of_another_shape_dtype_or_layout_is_refused() -> None:
    step = Step(6, 20, 9, UpdateRule())
    good = step.params[0].bfloat16()
    for copy, got in (
        (good[:8], r"\[8, 20\] bfloat16 on cpu"),
        (good.float(), r"\[9, 20\] float32 on cpu"),
        (good.t().contiguous().t(), r"\[9, 20\] bfloat16 on cpu, not contiguous"),
    ):
        message = (
            r"^sae_update: the copy of W_dec must be \[9, 20\] bfloat16 on cpu, contiguous, got "
            rf"{got}; make it with W_dec\.bfloat16\(\)\.$"
        )
        with pytest.raises(ArgumentError, match=message):
            step.take("reference", copies=(good, copy))


def test_rows_of_two_dtypes_and_parameters_in_bfloat16_are_refused() -> None:
    step = Step(6, 20, 9, UpdateRule())
    step.x = step.x.float()
    with pytest.raises(
        DtypeError,
        match=r"^sae_update: x and the codes must share one dtype, got x float32, values bfloat16, "
        r"grad_values bfloat16, grad_out bfloat16, aux_values bfloat16, aux_grad_values bfloat16, "
        r"aux_grad_out bfloat16\. Cast them with \.to\(\)\.$",
    ):
        step.take("reference")
    for dtype in (torch.bfloat16, torch.float64):
        step = Step(6, 20, 9, UpdateRule())
        step.params = tuple(p.to(dtype) for p in step.params)  # type: ignore[assignment]
        name = str(dtype).removeprefix("torch.")
        message = rf"^sae_update: W_enc must be float32, got {name}\. Cast it with \.to\(\)\.$"
        with pytest.raises(DtypeError, match=message):
            step.take("reference")


def test_a_compiled_step_on_bfloat16_rows_has_the_bits_of_an_eager_one() -> None:
    answers = []
    for compiled in (False, True):
        step = Step(6, 20, 9, UpdateRule(lr=0.01))
        copies = (step.params[0].bfloat16(), step.params[2].bfloat16())

        def take(code: Code, x: Tensor, step: Step = step, copies: object = copies) -> Tensor:
            return sae_update(  # type: ignore[no-any-return]
                code, x, step.params, step.moments, step.rule, 4, copies=copies,
            )  # fmt: skip

        run = torch.compile(take, fullgraph=True, backend="aot_eager") if compiled else take
        answers.append([run(step.codes[0], step.x), *step.params, *copies])
    assert all(map(torch.equal, *answers))


def test_autocast_widens_rows_and_leaves_the_parameters() -> None:
    wide = Step(6, 20, 9, UpdateRule()).take("reference")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = Step(6, 20, 9, UpdateRule()).take("reference")
    assert all(torch.equal(got[name], t) for name, t in wide.items())
