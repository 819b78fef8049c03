"""sae_update: the reference by hand and against autograd, every backend against float64."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from microtome import _native
from microtome._seed import generator
from microtome.ops import (
    Code,
    Screen,
    UpdateRule,
    moments_for,
    sae_update,
    screen_weights,
    use_backend,
)
from microtome.ops.sae_update import OPTIMIZERS, _update
from microtome.ops.screen_weights import REFRESHED
from microtome.testing import CASES, Case, assert_accurate, backends_of, factor_of
from microtome.testing import skip_if_interpreted as skip

on_every_backend = pytest.mark.parametrize("backend", backends_of(_update))
# The reference is the measure of accuracy, so it is not measured.
on_native_backends = pytest.mark.parametrize("backend", backends_of(_update)[:-1])
needs_extension = pytest.mark.skipif(
    _native.why_absent() is not None, reason="the extension is absent"
)
NAMES = ("W_enc", "b_enc", "W_dec", "b_dec")
ON_GPU = ("cuda", "triton")  # they refresh bf16 screens and refuse others by name
LARGE = ("dense", "massive", "medium")


@dataclass
class Problem:
    """One call's arguments; `tensors` are what it may change."""

    code: Code
    aux: Code | None
    x: Tensor
    params: tuple[Tensor, Tensor, Tensor, Tensor]
    moments: list[Tensor | None]
    rule: UpdateRule

    @property
    def tensors(self) -> dict[str, Tensor]:
        names = [f"{m}_{p}" for p in NAMES for m in "mv"]
        state = {n: m for n, m in zip(names, self.moments, strict=True) if m is not None}
        return {**dict(zip(NAMES, self.params, strict=True)), **state}

    def step(self, backend: str, **options: object) -> dict[str, Tensor]:
        with use_backend(backend):
            fired = sae_update(
                self.code, self.x, self.params, self.moments, self.rule, 5, aux=self.aux, **options
            )
        return {**self.tensors, "fired": fired}


def problem(
    case: Case, rule: UpdateRule, dtype: torch.dtype = torch.float32, *, aux: bool = False
) -> Problem:
    """The case's SAE in the middle of training: moments are not zero."""
    i = case.inputs(dtype)
    g = generator(1, case.name)

    def code(indices: Tensor, values: Tensor, scale: float) -> Code:
        grads = torch.randn(values.shape, generator=g).to(dtype) * (values != 0)
        grad_out = torch.randn(case.n, case.d, generator=g).to(dtype)
        return Code(indices, values, grads, grad_out, scale)

    main = code(i["indices"], i["values"], 0.1)
    second = None
    if aux:
        a = min(3, case.f)
        values = torch.randn(case.n, a, generator=g).relu().to(dtype)
        second = code(torch.randint(0, case.f, (case.n, a), generator=g).int(), values, 0.03)
    params = tuple(i[name].contiguous().clone() for name in NAMES)
    moments = moments_for(params, rule)  # type: ignore[arg-type]
    for j, m in enumerate(moments):
        if m is not None:
            random = 0.01 * torch.randn(m.shape, generator=g)
            m.copy_(random if j % 2 == 0 else random.square())
    return Problem(main, second, i["x"], params, moments, rule)  # type: ignore[arg-type]


def screen_for(backend: str, W_enc: Tensor, kind: str = "") -> Screen:
    """Made on the backend, of the kind or one that it refreshes; a GPU's by the reference."""
    kind = kind or ("bf16" if backend in ON_GPU else "auto")
    with use_backend("reference" if backend in ON_GPU else backend):
        return screen_weights(W_enc, kind)


def assert_right(case: Case, rule: UpdateRule, backend: str, *, aux: bool = False) -> None:
    got = problem(case, rule, aux=aux).step(backend)
    plain = problem(case, rule, aux=aux).step("reference")
    exact = problem(case, rule, torch.float64, aux=aux).step("reference")
    assert torch.equal(got.pop("fired"), exact.pop("fired"))
    for name, tensor in got.items():
        what = f"{name} ({rule}, aux={aux})"
        assert_accurate(tensor, plain[name], exact[name], what, factor_of(backend, tensor))


def two_by_two(dtype: torch.dtype = torch.float32) -> tuple[Code, Tensor, tuple[Tensor, ...]]:
    """One row, two features of width two; feature 0 fires with 3."""
    row = lambda *numbers: torch.tensor([numbers], dtype=dtype)  # noqa: E731
    code = Code(torch.tensor([[0]]), row(3.0), row(0.5), row(1.0, -2.0), scale=2.0)
    params = (
        torch.eye(2, dtype=dtype),
        row(0.0, 0.0)[0],
        torch.eye(2, dtype=dtype),
        row(0.0, 0.0)[0],
    )
    return code, row(2.0, 1.0), params


@on_every_backend
def test_a_plain_step_is_the_one_worked_by_hand(backend: str) -> None:
    # dW_dec[0] = 2 * 3 * (1, -2) = (6, -12), without its part along W_dec[0] = (1, 0): (0, -12).
    # dW_enc[0] = 2 * 0.5 * (2, 1) = (2, 1);  db_enc[0] = 1.
    # db_dec = 2 * (1, -2) - 1 * W_enc[0] = (1, -4).  Each p moves by -0.25 times that;
    # W_dec[0] = (1, 3) is then scaled to length 1.
    code, x, params = two_by_two()
    rule = UpdateRule("sgd", lr=0.25, beta1=0.0)
    with use_backend(backend):
        fired = sae_update(code, x, params, moments_for(params, rule), rule, 1)
    W_enc, b_enc, W_dec, b_dec = params
    assert fired.tolist() == [1, 0]
    assert fired.dtype == torch.int32
    assert W_enc.tolist() == [[0.5, -0.25], [0.0, 1.0]]
    assert b_enc.tolist() == [-0.25, 0.0]
    assert W_dec.flatten().tolist() == pytest.approx([10**-0.5, 3 * 10**-0.5, 0.0, 1.0])
    assert b_dec.tolist() == [-0.25, 1.0]


@on_every_backend
def test_the_first_step_of_adam_is_lr_in_the_gradients_sign(backend: str) -> None:
    # From zero moments: m / (1 - beta1) = g and sqrt(v / (1 - beta2)) = |g|.
    code, x, params = two_by_two()
    rule = UpdateRule("adam", lr=0.5, project=False, renorm=False)
    moments = moments_for(params, rule)
    with use_backend(backend):
        sae_update(code, x, params, moments, rule, 1, center=False)
    assert params[0].flatten().tolist() == pytest.approx([0.5, -0.5, 0.0, 1.0])
    assert params[1].tolist() == pytest.approx([-0.5, 0.0])
    assert params[2].flatten().tolist() == pytest.approx([0.5, 0.5, 0.0, 1.0])
    assert params[3].tolist() == pytest.approx([-0.5, 0.5])
    m, v = moments[4], moments[5]
    assert m is not None
    assert v is not None
    assert m.flatten().tolist() == pytest.approx([0.6, -1.2, 0.0, 0.0])
    assert v.flatten().tolist() == pytest.approx([0.036, 0.144, 0.0, 0.0])


@on_every_backend
def test_decay_acts_on_weights_only_and_is_decoupled_for_adamw_and_signsgd(backend: str) -> None:
    # No entry, no gradient. L2: g = 0.5 * 1, so SGD moves 1 by -0.1 * 0.5 and Adam by -0.1.
    # Decoupled: 1 * (1 - 0.1 * 0.5).
    for optimizer, moved in (("sgd", 0.95), ("signsgd", 0.95), ("adamw", 0.95), ("adam", 0.9)):
        _, _, params = two_by_two()
        params[1].fill_(1.0)
        nothing = Code(
            torch.zeros(0, 1).int(), torch.zeros(0, 1), torch.zeros(0, 1), torch.zeros(0, 2)
        )
        rule = UpdateRule(optimizer, lr=0.1, beta1=0.0, weight_decay=0.5, renorm=False)
        with use_backend(backend):
            sae_update(nothing, torch.zeros(0, 2), params, moments_for(params, rule), rule, 1)
        for p in (params[0], params[2]):
            assert p.diagonal().tolist() == pytest.approx([moved, moved], rel=1e-6), optimizer
        assert params[1].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("with_aux", [True, False])
def test_gradients_are_those_of_autograd_on_the_loss(center: bool, with_aux: bool) -> None:
    g = generator(0, "autograd")
    n, d, f, k, a = 12, 7, 20, 4, 3
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    x, leaves = draw(n, d), [draw(f, d), draw(f) - 3, draw(f, d), draw(d)]
    for leaf in leaves:
        leaf.requires_grad_()
    W_enc, b_enc, W_dec, b_dec = leaves
    seen = x - b_dec if center else x
    pre = seen @ W_enc.T + b_enc
    dead = torch.arange(f) % 2 == 1
    top = pre.masked_fill(dead, -torch.inf).topk(k, dim=1)
    values = top.values.relu()
    x_hat = b_dec + (values[..., None] * W_dec[top.indices]).sum(1)
    loss = 0.5 * (x_hat - x).square().sum()
    dead_top = pre.masked_fill(~dead, -torch.inf).topk(a, dim=1)
    dead_values = dead_top.values.relu()
    dead_hat = (dead_values[..., None] * W_dec[dead_top.indices]).sum(1)
    target = (x - x_hat).detach()
    if with_aux:
        loss = loss + 0.25 * (dead_hat - target).square().sum()
    wanted = torch.autograd.grad(loss, leaves)

    with torch.no_grad():

        def code(values: Tensor, indices: Tensor, grad_out: Tensor, scale: float) -> Code:
            slopes = (grad_out[:, None] * W_dec[indices]).sum(-1) * (values != 0)
            return Code(indices, values, slopes, grad_out, scale)

        main = code(values, top.indices, 2 * (x_hat - x), 0.5)
        aux = (
            code(dead_values, dead_top.indices, 2 * (dead_hat - target), 0.25) if with_aux else None
        )
        params = tuple(leaf.detach().clone() for leaf in leaves)
        rule = UpdateRule("sgd", lr=1.0, beta1=0.0, project=False, renorm=False)
        sae_update(main, seen, params, moments_for(params, rule), rule, 1, aux=aux, center=center)  # type: ignore[arg-type]
    for name, leaf, moved, grad in zip(NAMES, leaves, params, wanted, strict=True):
        torch.testing.assert_close(leaf.detach() - moved, grad, rtol=1e-9, atol=1e-9, msg=name)
    assert bool((values == 0).any())
    if with_aux:  # some features got their whole gradient from the aux code
        fires = lambda v, i: torch.bincount(i[v > 0], minlength=f) > 0  # noqa: E731
        only = fires(dead_values, dead_top.indices) & ~fires(values, top.indices)
        assert bool(only.any())
        assert bool(((leaves[0].detach() - params[0])[only].abs().amax(1) > 0).all())


@on_native_backends
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_errors_are_at_most_twice_those_of_plain_pytorch(
    backend: str, optimizer: str, case: Case
) -> None:
    if case.name in LARGE and (case.name, optimizer) != ("massive", "adam"):
        skip(backend, "takes seconds for a large case; massive-adam stands for them")
    for rowsparse, both, aux in (
        (False, True, False),
        (False, False, True),
        (True, True, True),
        (True, False, False),
    ):
        # At d=1 the projected gradient is zero but for rounding, and a sign is not a number.
        project = both and case.d > 1
        rule = UpdateRule(
            optimizer,
            lr=0.01,
            weight_decay=0.1 * aux,
            rowsparse=rowsparse,
            project=project,
            renorm=both,
        )
        assert_right(case, rule, backend, aux=aux)


@on_native_backends
@pytest.mark.parametrize("optimizer", ["sgd", "signsgd"])
def test_no_momentum_keeps_no_moments(backend: str, optimizer: str) -> None:
    rule = UpdateRule(optimizer, lr=0.01, beta1=0.0)
    assert set(problem(CASES[3], rule).tensors) == set(NAMES)
    assert_right(CASES[3], rule, backend)


@on_native_backends
def test_a_latent_on_every_one_of_3000_rows_is_summed_well(backend: str) -> None:
    case = Case("long", 3000, 20, 8, 2, "dense")
    assert_right(case, UpdateRule("sgd", lr=0.01), backend, aux=True)


@on_native_backends
def test_repeated_indices_in_a_row_add_up(backend: str) -> None:
    def repeated(dtype: torch.dtype) -> Problem:
        p = problem(CASES[2], UpdateRule("sgd", lr=0.1), dtype)
        p.code.indices = torch.full_like(p.code.indices, 3)
        return p

    got = repeated(torch.float32).step(backend)
    plain, exact = (repeated(t).step("reference") for t in (torch.float32, torch.float64))
    assert int(got.pop("fired")[3]) == int((repeated(torch.float32).code.values > 0).sum())
    for name in got:
        assert_accurate(got[name], plain[name], exact[name], name, factor_of(backend, got[name]))


@on_every_backend
def test_an_empty_batch_still_moves_every_moment(backend: str) -> None:
    p = problem(next(c for c in CASES if c.n == 0), UpdateRule("adam", beta1=0.5, beta2=0.25))
    before = {name: t.clone() for name, t in p.tensors.items()}
    after = p.step(backend)
    for name in NAMES:
        assert torch.equal(after[f"m_{name}"], before[f"m_{name}"] * 0.5)
        assert torch.equal(after[f"v_{name}"], before[f"v_{name}"] * 0.25)
        assert not torch.equal(after[name], before[name])
    assert after["fired"].sum() == 0


@on_every_backend
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_rowsparse_leaves_untouched_rows_as_they_are(backend: str, optimizer: str) -> None:
    p = problem(CASES[-1], UpdateRule(optimizer, rowsparse=True, weight_decay=0.1))
    p.code.indices = p.code.indices % 300
    before = {name: t.clone() for name, t in p.tensors.items()}
    screen = screen_for(backend, p.params[0])
    shadow = screen.shadow.clone()
    after = p.step(backend, screen=screen)
    touched = torch.zeros(1000, dtype=torch.bool)
    touched[p.code.indices[p.code.values != 0]] = True
    assert 0 < int(touched.sum()) <= 300
    for name, t in before.items():
        if not name.endswith("b_dec"):
            assert torch.equal(after[name][~touched], t[~touched]), name
            assert not torch.equal(after[name][touched], t[touched]), name
    assert torch.equal(screen.shadow[~touched], shadow[~touched])


@on_every_backend
@pytest.mark.parametrize("kind", REFRESHED)
@pytest.mark.parametrize("rowsparse", [True, False])
def test_the_shadow_is_that_of_the_new_weights(backend: str, kind: str, rowsparse: bool) -> None:
    if backend in ON_GPU and kind != "bf16":
        pytest.skip("on a GPU bf16 screens are refreshed; others are refused by name")
    p = problem(CASES[-1], UpdateRule(rowsparse=rowsparse))
    screen = screen_for(backend, p.params[0], kind)
    old = screen.shadow.clone()
    p.step(backend, screen=screen)
    fresh = screen_for(backend, p.params[0], kind)
    assert torch.equal(screen.shadow, fresh.shadow)
    assert not torch.equal(screen.shadow, old)
    # On a GPU norms are rounded up further; test_triton_interpreter.py sees that they are bounds.
    rtol, atol = (1e-3, 1e-15) if backend in ON_GPU else (0.0, 0.0)
    torch.testing.assert_close(screen.stats, fresh.stats, rtol=rtol, atol=atol)


@needs_extension
@pytest.mark.parametrize(
    "case", [CASES[-1], Case("long", 3000, 20, 8, 2, "dense")], ids=lambda c: c.name
)
def test_one_and_two_threads_give_the_same_bits(case: Case) -> None:
    answers = []
    before = torch.get_num_threads()
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        try:
            p = problem(case, UpdateRule(), aux=True)
            screen = screen_weights(p.params[0])
            answers.append({**p.step("cpu", screen=screen), "shadow": screen.shadow})
        finally:
            torch.set_num_threads(before)
    for other in answers[1:]:
        assert all(torch.equal(other[name], t) for name, t in answers[0].items())


@needs_extension
@pytest.mark.parametrize("level", ["generic", "avx2", "avx512", "amx"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_instruction_set_is_accurate(
    level: str, optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MICROTOME_CPU_ISA", level)
    for case in (CASES[3], CASES[7], CASES[-1]):
        assert_right(case, UpdateRule(optimizer, lr=0.01, weight_decay=0.1), "cpu", aux=True)


@needs_extension
def test_moments_of_dead_features_do_not_stay_denormal() -> None:
    p = problem(CASES[5], UpdateRule())
    for m in p.moments:
        assert m is not None
        m.fill_(2.0**-140)
    p.step("cpu")
    assert p.moments[0] is not None
    assert p.moments[0].abs().max() == 0


@on_every_backend
def test_parameters_that_require_grad_and_strided_inputs_are_taken(backend: str) -> None:
    plain, odd = (problem(CASES[3], UpdateRule()) for _ in range(2))
    odd.params = tuple(torch.nn.Parameter(p) for p in odd.params)  # type: ignore[assignment]
    wide = torch.empty(odd.x.shape[0], 2 * odd.x.shape[1])
    wide[:, ::2] = odd.x
    odd.x = wide[:, ::2]
    odd.code.values = odd.code.values.t().contiguous().t()
    odd.code.grad_out = odd.code.grad_out.t().contiguous().t()
    odd.code.indices = odd.code.indices.int().t().contiguous().t()
    wanted, got = plain.step(backend), odd.step(backend)
    for name, t in wanted.items():
        torch.testing.assert_close(got[name].detach(), t, rtol=1e-5, atol=1e-6, msg=name)


@on_every_backend
def test_opcheck(backend: str) -> None:
    p = problem(CASES[2], UpdateRule("sgd"), aux=True)
    screen = screen_weights(p.params[0], "bf16" if backend in ON_GPU else "q15")
    assert p.aux is not None
    codes = [(c.indices, c.values, c.grad_values, c.grad_out, c.scale) for c in (p.code, p.aux)]
    place = torch.arange(-1, len(p.params[1]) - 1, dtype=torch.int32)
    extra = () if backend == "cuda" else (place, *(0.1 * w for w in p.params[:3]))
    extra = extra or (None,) * 4  # which CUDA C++ does not take
    arguments = (
        *codes[0], *codes[1], p.x, *p.params, *p.moments, *screen,
        *(p.params[i].bfloat16() for i in (0, 2)), *extra,
        "sgd", 0.1, 0.9, 0.999, 1e-8, 0.0, 1, False, True, True, True,
    )  # fmt: skip
    with use_backend(backend):
        torch.library.opcheck(torch.ops.microtome.sae_update.default, arguments)
