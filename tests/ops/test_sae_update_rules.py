"""sae_update beside torch.optim over many steps, and what it says to bad input."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from microtome._seed import generator
from microtome.errors import (
    ArgumentError,
    DtypeError,
    MicrotomeError,
    NonFiniteError,
    ShapeError,
)
from microtome.ops import Code, Screen, UpdateRule, moments_for, sae_update, use_backend
from microtome.ops.sae_update import _update
from microtome.testing import assert_accurate, backends_of, factor_of, interpreted

N, D, F, K = 8, 10, 24, 3
Batch = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def batches(count: int) -> list[Batch]:
    """indices, values, grad_values, grad_out, x in float32; features 20 to 23 stop firing."""
    g = generator(0, "optim")
    made = []
    for step in range(count):
        alive = F if step < 5 else 20
        indices = torch.argsort(torch.rand(N, alive, generator=g), dim=1)[:, :K]
        draw = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
        values = draw(N, K).abs()
        made.append((indices, values, draw(N, K), draw(N, D), draw(N, D)))
    return made


def start(dtype: torch.dtype) -> list[Tensor]:
    g = generator(1, "optim")
    shapes = ((F, D), (F,), (F, D), (D,))
    return [torch.randn(shape, generator=g).to(dtype) for shape in shapes]


@functools.cache
def by_torch(name: str, dtype: torch.dtype, steps: int) -> list[Tensor]:
    """The steps by torch.optim with ordinary gradients; sparse ones hold the touched rows."""
    _, optimizer, sparse = PAIRS[name]
    params = [torch.nn.Parameter(p) for p in start(dtype)]
    step = optimizer(params)
    for batch in batches(steps):
        indices, values, slopes, grad_out, x = (
            t.to(dtype) if t.is_floating_point() else t for t in batch
        )
        at = indices.flatten()
        gradients = (
            torch.zeros(F, D, dtype=dtype).index_add(
                0, at, (slopes[..., None] * x[:, None]).flatten(0, 1)
            ),
            torch.zeros(F, dtype=dtype).index_add(0, at, slopes.flatten()),
            torch.zeros(F, D, dtype=dtype).index_add(
                0, at, (values[..., None] * grad_out[:, None]).flatten(0, 1)
            ),
            grad_out.sum(0),
        )
        rows = at.unique()[None]
        for p, grad in zip(params, gradients, strict=True):
            if sparse:
                every = torch.arange(D)[None] if p is params[3] else rows
                grad = torch.sparse_coo_tensor(
                    every, grad[every[0]], grad.shape, check_invariants=True
                )
            p.grad = grad
        step.step()
    return [p.detach() for p in params]


def by_microtome(rule: UpdateRule, backend: str, steps: int) -> list[Tensor]:
    params = tuple(start(torch.float32))
    moments = moments_for(params, rule)  # type: ignore[arg-type]
    with use_backend(backend):
        for step, (indices, values, slopes, grad_out, x) in enumerate(batches(steps), 1):
            code = Code(indices, values, slopes, grad_out)
            sae_update(code, x, params, moments, rule, step, center=False)  # type: ignore[arg-type]
    return list(params)


def grouped(make: Callable[..., torch.optim.Optimizer], decay: float, **options: object):
    """Decay acts on the two weight matrices only."""
    return lambda p: make(
        [
            {"params": [p[0], p[2]], "weight_decay": decay},
            {"params": [p[1], p[3]], "weight_decay": 0.0},
        ],
        **options,
    )


PAIRS = {
    "adam": (
        UpdateRule("adam", lr=0.01, weight_decay=0.05),
        grouped(torch.optim.Adam, 0.05, lr=0.01),
        False,
    ),
    "adamw": (
        UpdateRule("adamw", lr=0.01, weight_decay=0.1),
        grouped(torch.optim.AdamW, 0.1, lr=0.01),
        False,
    ),
    "sgd": (UpdateRule("sgd", lr=0.01, beta1=0.0), lambda p: torch.optim.SGD(p, lr=0.01), False),
    "sgd with momentum": (
        UpdateRule("sgd", lr=0.01, beta1=0.8, weight_decay=0.1),
        grouped(torch.optim.SGD, 0.1, lr=0.01, momentum=0.8),
        False,
    ),
    # SparseAdam adds eps before the bias correction of v, Adam after it: here eps is of no weight.
    "sparse adam": (
        UpdateRule("adam", lr=0.01, eps=1e-15, rowsparse=True),
        lambda p: torch.optim.SparseAdam(p, lr=0.01, eps=1e-15),
        True,
    ),
}


@pytest.mark.parametrize("backend", backends_of(_update))
@pytest.mark.parametrize("name", PAIRS)
def test_many_steps_are_those_of_torch_optim_to_rounding(backend: str, name: str) -> None:
    rule = PAIRS[name][0]
    steps = 10 if interpreted(backend) else 100  # an interpreted step costs 50 ms
    got = by_microtome(replace(rule, project=False, renorm=False), backend, steps)
    plain = by_torch(name, torch.float32, steps)
    exact = by_torch(name, torch.float64, steps)
    for which, ours, theirs, right in zip(
        ("W_enc", "b_enc", "W_dec", "b_dec"), got, plain, exact, strict=True
    ):
        assert_accurate(ours, theirs, right, f"{name}: {which}", factor_of(backend, right))
        assert (
            right - start(torch.float64)[0 if right.dim() == 2 else 1][: len(right)]
        ).abs().max() > 0.01


def bad(**changes: object) -> None:
    """A good call with some of its arguments changed; nothing may have moved after its error."""
    params = tuple(start(torch.float32))
    rule = UpdateRule()
    indices, values, slopes, grad_out, x = batches(1)[0]
    good = {
        "code": Code(indices, values, slopes, grad_out), "x": x, "params": params,
        "moments": moments_for(params, rule), "rule": rule, "step": 1, "aux": None, "screen": None,
    }  # fmt: skip
    for name, change in changes.items():
        good[name] = replace(good[name], **change) if isinstance(change, dict) else change  # type: ignore[type-var]
    before = [p.clone() for p in params]
    try:
        sae_update(
            good["code"], good["x"], good["params"], good["moments"], good["rule"], good["step"],
            aux=good["aux"], screen=good["screen"],
        )  # type: ignore[arg-type]  # fmt: skip
    finally:
        assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
        state = good["moments"]
        assert isinstance(state, list)
        assert all(m is None or m.abs().sum() == 0 for m in state)


NAN = torch.full((N, D), 1.0).index_fill(0, torch.tensor([3]), torch.nan)
THREE = (torch.zeros(F, D), torch.zeros(F), torch.zeros(D, F).t(), torch.zeros(D))
SCREEN = Screen("q15", torch.zeros(F, 64, dtype=torch.int16), torch.zeros(F, 4))
MESSAGES: list[tuple[dict[str, object], type[MicrotomeError], str]] = [
    (
        {"x": torch.zeros(N, D + 1)},
        ShapeError,
        r"W_enc must be \[f, d\] with d=11 as in x, got shape \[24, 10\]\.",
    ),
    (
        {"code": {"grad_out": torch.zeros(N)}},
        ShapeError,
        r"grad_out must be \[n, d\], got shape \[8\]\.",
    ),
    (
        {"x": torch.zeros(N, D).half()},
        DtypeError,
        "x must be float32, bfloat16, float64, got float16. Cast it",
    ),
    (
        {"code": {"grad_values": torch.zeros(N, K).double()}},
        DtypeError,
        "all weights and inputs must share one dtype, got .*grad_values float64",
    ),
    (
        {"code": {"indices": torch.zeros(N, K)}},
        DtypeError,
        "indices must be int32, int64, got float32.",
    ),
    (
        {"code": {"indices": torch.full((N, K), F)}},
        ArgumentError,
        r"indices must lie in \[0, f=24\), got 24\.",
    ),
    ({"code": {"scale": torch.inf}}, ArgumentError, "scale must be finite, got scale=inf."),
    (
        {"rule": {"optimizer": "lion"}},
        ArgumentError,
        "optimizer must be one of 'adam', 'adamw', 'sgd', 'signsgd', got 'lion'.",
    ),
    ({"step": 0}, ArgumentError, r"step must be between 1 and \d+, got step=0\."),
    (
        {"rule": {"lr": -1.0}},
        ArgumentError,
        "lr must be a finite number of at least 0, got lr=-1.0.",
    ),
    (
        {"rule": {"beta2": 1.0}},
        ArgumentError,
        "beta2 must be at least 0 and below 1, got beta2=1.0.",
    ),
    (
        {"params": THREE},
        ArgumentError,
        r"W_dec is updated in place and must be contiguous; pass W_dec\.contiguous\(\)\.",
    ),
    (
        {"moments": [None] * 8},
        ArgumentError,
        r"moments do not fit optimizer 'adam'; make them with "
        r"moments_for\(params, rule, state\)\.",
    ),
    (
        {"moments": [torch.zeros(F, D)] * 8},
        ArgumentError,
        r"m_b_enc must be \[24\] float32 on cpu, contiguous, got \[24, 10\] float32 on cpu; make "
        r"them with moments_for\(params, rule, state\)\.",
    ),
    (
        {"moments": [*moments_for(THREE, UpdateRule(), "int8")[:7], torch.zeros(D).int()]},
        ArgumentError,
        r"v_b_dec must be \[10\] float32 on cpu, contiguous, got \[10\] int32 on cpu; make them",
    ),
    (
        {"moments": [torch.zeros(F, D).to(torch.int8), *moments_for(THREE, UpdateRule())[1:]]},
        DtypeError,
        "moments of W_enc and W_dec must all be float32, all bfloat16 or all int8, got m_W_enc "
        "int8, v_W_enc float32, m_W_dec float32, v_W_dec float32; make them",
    ),
    (
        {"moments": [torch.zeros(F, D).to(t) for t in [torch.int8] * 2] * 4},
        ArgumentError,
        r"m_W_enc must be \[24, 16\] int8 on cpu, contiguous, got \[24, 10\] int8 on cpu; make",
    ),
    (
        {"screen": SCREEN},
        ArgumentError,
        r"screen does not belong to W_enc \[24, 10\]: shadow \[24, 64\], stats \[24, 4\]\. "
        r"Make it with screen_weights\(W_enc\)\.",
    ),
    ({"x": NAN}, NonFiniteError, r"x holds NaN or infinity in row 3\. Drop or repair these rows"),
    ({"code": {"grad_out": NAN}}, NonFiniteError, "grad_out holds NaN or infinity in row 3."),
    (
        {"aux": Code(*batches(1)[0][:3], NAN)},
        NonFiniteError,
        "aux_grad_out holds NaN or infinity in row 3.",
    ),
]


@pytest.mark.parametrize(("changes", "error", "message"), MESSAGES, ids=lambda v: str(v)[:40])
def test_bad_input_is_named_and_changes_nothing(
    changes: dict[str, object], error: type[MicrotomeError], message: str
) -> None:
    with pytest.raises(error, match="^sae_update: " + message):
        bad(**changes)


@pytest.mark.parametrize("backend", backends_of(_update))
def test_a_step_beyond_float32_names_the_row(backend: str) -> None:
    params = tuple(start(torch.float32))
    params[0][5] = 3e38
    rule = UpdateRule("sgd", lr=10.0, beta1=0.0, weight_decay=1.0)
    indices, values, slopes, grad_out, x = batches(1)[0]
    kind = "bf16" if backend in ("cuda", "triton") else "q15"
    screen = Screen(kind, torch.zeros(F, 32, dtype=torch.int16), torch.zeros(F, 4))
    code = Code(indices, values, slopes, grad_out)
    with (
        use_backend(backend),
        pytest.raises(NonFiniteError, match=r"W_enc holds NaN or infinity in row 5\."),
    ):
        sae_update(code, x, params, moments_for(params, rule), rule, 1, screen=screen)  # type: ignore[arg-type]


def test_float64_runs_on_the_reference() -> None:
    params = tuple(start(torch.float64))
    rule = UpdateRule()
    indices, *rest = batches(1)[0]
    values, slopes, grad_out, x = (t.double() for t in rest)
    fired = sae_update(
        Code(indices, values, slopes, grad_out),
        x,
        params,
        moments_for(params, rule),
        rule,
        1,  # type: ignore[arg-type]
    )
    assert int(fired.sum()) == N * K
