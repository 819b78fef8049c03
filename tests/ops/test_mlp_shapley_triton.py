"""mlp_shapley in Triton: as accurate as PyTorch, in every geometry, the same bits in any batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from microtome import errors
from microtome._seed import generator
from microtome.ops import GELU, IDENTITY, RELU, SILU, SOFTPLUS, TANH, mlp_shapley, use_backend
from microtome.ops._mlp_shapley_inputs import ACTIVATIONS
from microtome.ops.mlp_shapley import mlp_shapley_reference
from microtome.testing import assert_accurate
from microtome.testing.triton import DEVICE, INTERPRETED, MARKS, RUNS, SILENT

pytestmark = [*MARKS, SILENT]
if RUNS:
    kernel = pytest.importorskip("microtome.kernels.mlp_shapley")
    from microtome.kernels import activations, mlp_layers

    triton = pytest.importorskip("triton")
    tl = triton.language


@dataclass(frozen=True)
class Case:
    """e explicands, n background rows, ranks [S, U, A, p]; layers as widths and activations."""

    e: int
    n: int
    ranks: tuple[int, int, int, int]
    widths: tuple[int, ...]
    codes: tuple[int, ...]
    grouped: bool = False
    paired: bool = True
    precision: str = "fp32"

    def arguments(self) -> list[Any]:
        g, (S, U, A, p) = generator(0, str(self)), self.ranks
        m = p + 4 if self.grouped else p
        ins = (m, *self.widths)
        weights = [
            torch.randn(o, i, generator=g) / i**0.5
            for i, o in zip(ins[:-1], self.widths, strict=True)
        ]
        biases = [torch.randn(o, generator=g) for o in self.widths]
        biases[0] = biases[0] if len(biases) > 1 else torch.empty(0)
        player = torch.randint(-1, p, (m,), generator=g) if self.grouped else None
        x, background = torch.randn(self.e, m, generator=g), torch.randn(self.n, m, generator=g)
        ranks = torch.rand(S, U, A, p, generator=g).argsort(-1).int()
        return [
            put(x), put(background), put(ranks), put(weights), put(biases), list(self.codes),
            put(player), self.paired, self.precision,
        ]  # fmt: skip


def put(value: Any) -> Any:
    if isinstance(value, list):
        return [put(v) for v in value]
    return value.to(DEVICE) if isinstance(value, Tensor) else value


def wide(value: Any) -> Any:
    if isinstance(value, list):
        return [wide(v) for v in value]
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


CASES = {
    "one layer": Case(2, 3, (3, 2, 1, 5), (7,), (TANH,)),
    "two layers": Case(2, 3, (3, 2, 2, 5), (33, 2), (RELU, IDENTITY)),
    "three layers": Case(2, 5, (5, 4, 1, 6), (20, 9, 2), (RELU, GELU, IDENTITY)),
    "three in bf16": Case(
        2, 5, (5, 3, 1, 6), (20, 40, 2), (RELU, RELU, IDENTITY), precision="bf16"
    ),
    "shared orders": Case(2, 3, (1, 2, 2, 5), (20, 9, 2), (SILU, RELU, IDENTITY)),
    "one background row": Case(3, 1, (1, 2, 2, 5), (20, 9, 1), (RELU, RELU, TANH)),
    "forward": Case(1, 3, (3, 3, 1, 6), (20, 9, 2), (RELU, SILU, IDENTITY), paired=False),
    "groups": Case(2, 3, (3, 3, 2, 5), (20, 9, 2), (RELU, RELU, IDENTITY), grouped=True),
    "groups, shared": Case(
        2, 3, (1, 3, 1, 4), (16, 2), (SOFTPLUS, IDENTITY), grouped=True, paired=False
    ),
    "one player": Case(2, 2, (2, 1, 2, 1), (5, 3, 1), (RELU, RELU, IDENTITY)),
    "no explicand": Case(0, 2, (2, 1, 2, 3), (5, 1), (RELU, IDENTITY)),
}
every_case = pytest.mark.parametrize("name", CASES)


@every_case
def test_it_is_as_accurate_as_pytorch(name: str) -> None:
    case = CASES[name]
    arguments = case.arguments()
    got, plain = kernel.launch(*arguments), mlp_shapley_reference(*arguments)
    exact = mlp_shapley_reference(*wide(arguments))
    for i, what in enumerate(("mean", "m2")):
        if case.precision == "bf16":  # now and then a number rounds to the other side
            high = mlp_shapley_reference(*arguments[:-1], "fp32")[i]
            assert (got[i] - exact[i]).abs().mean() < 0.1 * (high - exact[i]).abs().mean()
        else:  # along a walk the first layer takes up a rounding a step
            assert_accurate(got[i], plain[i], exact[i], what, factor=8.0)


@pytest.mark.parametrize("shared", [160 * 1024, 1], ids=["resident", "through memory"])
@pytest.mark.parametrize("name", ["three layers", "three in bf16", "groups"])
def test_the_tiles_of_a_gpu_give_the_same_values(
    name: str, shared: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # More rows than a tile, and products cut along the activations.
    chosen = mlp_layers.geometry
    arguments = CASES[name].arguments()
    whole = kernel.launch(*arguments)
    monkeypatch.setattr(
        mlp_layers, "geometry", lambda widths, bf16, rows, _: chosen(widths, bf16, rows, shared)
    )
    monkeypatch.setattr(mlp_layers, "PROGRAMS", 1)
    for got, expected in zip(kernel.launch(*arguments), whole, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-6)


def test_bf16_rounds_the_second_of_three_layers_and_no_other() -> None:
    for name, rounds in (("three in bf16", True), ("two layers", False)):
        arguments = CASES[name].arguments()
        low, high = (kernel.launch(*arguments[:-1], precision)[0] for precision in ("bf16", "fp32"))
        assert torch.equal(low, high) is not rounds
        torch.testing.assert_close(low, high, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("name", ["three layers", "two layers", "groups, shared"])
def test_an_explicand_and_a_stratum_have_the_same_bits_in_any_batch(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = CASES[name].arguments()
    together = kernel.launch(*arguments)
    monkeypatch.setattr(kernel, "WORKSPACE", 1)  # an explicand and a stratum at a time
    for got, expected in zip(kernel.launch(*arguments), together, strict=True):
        # In the interpreter a product's bits depend on where in the tile a row lies.
        loose = 1e-6 if INTERPRETED and name == "three layers" else 0
        torch.testing.assert_close(got, expected, rtol=10 * loose, atol=loose)


def test_the_marginals_add_up_to_full_minus_empty() -> None:
    x, background, ranks, weights, biases, codes, *rest = CASES["three layers"].arguments()
    mean, _ = kernel.launch(x, background, ranks, weights, biases, codes, *rest)
    full, empty = (
        model(rows.double(), wide(weights), wide(biases), codes) for rows in (x, background)
    )
    torch.testing.assert_close(mean.sum(2), full[:, None] - empty[None], rtol=0, atol=2e-6)


def model(a: Tensor, weights: list[Tensor], biases: list[Tensor], codes: list[int]) -> Tensor:
    for W, bias, code in zip(weights, biases, codes, strict=True):
        a = ACTIVATIONS[code](a @ W.T + bias)
    return a


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_nan_is_never_made_finite_and_stays_with_its_rows(precision: str) -> None:
    arguments = CASES["three layers"].arguments()
    arguments[-1] = precision
    x, background = arguments[:2]
    x[1, 2], background[3, 0] = torch.nan, torch.inf
    mean, _ = kernel.launch(*arguments)
    plain, _ = mlp_shapley_reference(*arguments)
    assert not (mean.isfinite() & ~plain.isfinite()).any()
    assert mean[1].isnan().any(1).all()
    sound = torch.tensor([0, 1, 2, 4], device=DEVICE)  # background rows
    assert mean[0, sound].isfinite().all()


@pytest.mark.parametrize("code", range(len(ACTIVATIONS)))
def test_every_activation_keeps_its_digits(code: int) -> None:
    @triton.jit
    def _activate_kernel(h, out, CODE: tl.constexpr, B: tl.constexpr):
        at = tl.arange(0, B)
        tl.store(out + at, activations.activate(tl.load(h + at), CODE))

    sizes = 10.0 ** torch.linspace(-6, 1.9, 120)
    special = torch.tensor([0.0, 0.29999, 0.3, 0.30001, 20.0, 88.0, 200.0, torch.inf])
    h = torch.cat([sizes, -sizes, special, -special]).to(DEVICE)  # [256]
    out = torch.empty_like(h)
    _activate_kernel[(1,)](h, out, CODE=code, B=256, enable_fp_fusion=True)
    exact = ACTIVATIONS[code](h.double())
    plain = ACTIVATIONS[code](h)
    known = exact.isfinite()
    assert not (out.isnan() & ~plain.isnan()).any()
    slack = 4e-7 * exact.abs() + 1e-30
    if code in (2, 3):  # torch's formula too cancels far below zero
        slack = slack + 2e-7 * h.abs()
    assert bool(((out - exact).abs() <= slack)[known].all())
    h.fill_(torch.nan)
    _activate_kernel[(1,)](h, out, CODE=code, B=256, enable_fp_fusion=True)
    assert out.isnan().all()


def test_an_order_that_is_no_permutation_is_refused_before_the_kernel_runs() -> None:
    arguments = CASES["two layers"].arguments()
    arguments[2][1, 0, 0, 0] = arguments[2][1, 0, 0, 1]
    with use_backend("triton"), pytest.raises(errors.ArgumentError, match="permutation"):
        mlp_shapley(*arguments)


@pytest.mark.parametrize(
    ("widths", "why"),
    [
        ((4, 4, 4, 1), r"triton: 4 layers \(has 1 to 3\)"),
        ((257, 1), r"triton: a layer of width 257 \(has up to 256\)"),
        ((4, 65), r"triton: o=65 outputs \(has up to 64\)"),
    ],
)
def test_a_perceptron_that_does_not_fit_is_left_to_the_reference(
    widths: tuple[int, ...], why: str
) -> None:
    arguments = Case(1, 1, (1, 1, 1, 2), widths, (RELU,) * len(widths)).arguments()
    with use_backend("triton"), pytest.raises(errors.BackendError, match=why):
        mlp_shapley(*arguments)
    mean, _ = mlp_shapley(*arguments)
    assert mean.shape == (1, 1, 2, widths[-1])
