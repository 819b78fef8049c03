"""threshold_encode: the spec by hand, then every backend against the dense formula."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from microtome import SparseCode
from microtome.errors import ArgumentError, NonFiniteError, ShapeError
from microtome.ops import screen_weights, threshold_encode, use_backend
from microtome.ops.threshold_encode import Thresholded, _encode
from microtome.testing import CASES, Case, assert_accurate, backends_of, factor_of

on_every_backend = pytest.mark.parametrize("backend", backends_of(_encode))
SMALL = [c for c in CASES if c.name not in ("massive", "medium", "dense")]
INTEGERS = Case("integers", 9, 16, 400, 1, "ties")  # every sum is exact in float32


def inputs_of(case: Case, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """x, W_enc, b_enc, b_dec and thresholds around the upper third of the pre-activations."""
    i = case.inputs(dtype)
    kept = {name: i[name] for name in ("x", "W_enc", "b_enc", "b_dec")}
    spread = 0.5 * case.d**0.5 * (1000.0 if case.kind == "massive" else 1.0)
    steps = torch.arange(case.f) % 7 / 6.0  # 0 for every seventh feature
    if case.kind == "ties":
        return {**kept, "threshold": (steps * 6 - 2).to(dtype)}
    return {**kept, "threshold": (spread * steps).to(dtype)}


def call(i: dict[str, Tensor], **options: object) -> Thresholded:
    return threshold_encode(
        i["x"], i["W_enc"], i["b_enc"], i["b_dec"], threshold=i.get("threshold"), **options
    )  # type: ignore[arg-type]


def pre_activations(i: dict[str, Tensor], dtype: torch.dtype = torch.float64) -> Tensor:
    x, b_dec, W_enc, b_enc = (i[n].to(dtype) for n in ("x", "b_dec", "W_enc", "b_enc"))
    return linear(x - b_dec, W_enc, b_enc)


def mask_of(entries: tuple[Tensor, Tensor, Tensor], n: int, f: int) -> Tensor:
    """Which entries of the dense [n, f] are there; fails where one is there twice."""
    ones = torch.ones_like(entries[0], dtype=torch.float32)
    dense = SparseCode(ones, entries[1], f, entries[2]).to_dense()
    assert dense.shape == (n, f)
    assert bool((dense <= 1).all())
    return dense == 1


def check(got: Thresholded, i: dict[str, Tensor], bandwidth: float, backend: str) -> None:
    """Membership wherever float32 can tell, order, values, certificate."""
    (n, _), f = i["x"].shape, i["W_enc"].shape[0]
    z, plain = pre_activations(i), pre_activations(i, torch.float32)
    slack = 4 * float((plain.double() - z).abs().max()) + 1e-12 if n else 0.0
    margin = z - i["threshold"].double()
    for entries, inside in ((got.code, margin), (got.window, bandwidth / 2 - margin.abs())):
        mask = mask_of(entries, n, f)
        assert bool(mask[inside > slack].all())
        assert not bool(mask[inside < -slack].any())
        assert entries.indices.dtype == torch.int32
        assert torch.equal(mask.nonzero()[:, 1], entries.indices.long())  # ascending in a row
        values, usual = z[mask], plain[mask].to(entries.values.dtype)
        assert_accurate(entries.values, usual, values, factor=factor_of(backend, values))
    assert got.candidates.shape == (n,)
    assert bool((got.candidates <= f).all())
    assert bool((got.candidates >= got.code.offsets.diff()).all())


@on_every_backend
def test_it_agrees_with_numbers_worked_by_hand(backend: str) -> None:
    x = torch.tensor([[1.0, 2.0], [-1.0, 0.5], [0.5, 0.5]])
    W_enc = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    b_enc, b_dec = torch.tensor([0.0, 0.5, -1.0]), torch.tensor([0.5, 0.5])
    # z = [.5, 2, 1], [-1.5, .5, -2.5], [0, .5, -1]
    with use_backend(backend):
        relu = threshold_encode(x, W_enc, b_enc, b_dec)
        jump = threshold_encode(
            x, W_enc, b_enc, b_dec, threshold=torch.tensor([0.25, 0.5, 1.25]), bandwidth=1.0
        )
    assert relu.code.values.tolist() == [0.5, 2.0, 1.0, 0.5, 0.5]
    assert relu.code.indices.tolist() == [0, 1, 2, 1, 1]
    assert relu.code.offsets.tolist() == [0, 3, 4, 5]
    assert relu.window.values.shape == relu.window.indices.shape == (0,)
    assert relu.window.offsets.tolist() == [0, 0, 0, 0]
    # At its threshold an entry is out: .5 of feature 1.
    assert jump.code.values.tolist() == [0.5, 2.0]
    assert jump.code.offsets.tolist() == [0, 2, 2, 2]
    assert jump.window.values.tolist() == [0.5, 1.0, 0.5, 0.0, 0.5]
    assert jump.window.indices.tolist() == [0, 2, 1, 0, 1]
    assert jump.window.offsets.tolist() == [0, 2, 3, 5]


@pytest.mark.parametrize("case", SMALL, ids=lambda c: c.name)
@on_every_backend
def test_every_backend_finds_what_lies_above_the_thresholds(backend: str, case: Case) -> None:
    i = inputs_of(case)
    with use_backend(backend):
        got = call(i, bandwidth=0.7)
    check(got, i, 0.7, backend)


@pytest.mark.parametrize("name", ["massive", "medium"])
def test_the_reference_takes_larger_cases(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    i = inputs_of(next(c for c in CASES if c.name == name))
    whole = call(i, bandwidth=0.7)
    check(whole, i, 0.7, "reference")
    monkeypatch.setattr("microtome.ops._csr_encode.BLOCK", 3000)  # three or ten rows at a time
    check(call(i, bandwidth=0.7), i, 0.7, "reference")


@on_every_backend
def test_membership_and_values_are_those_of_the_dense_float32_formula(backend: str) -> None:
    i = inputs_of(INTEGERS)
    z = pre_activations(i, torch.float32)
    with use_backend(backend):
        got = call(i, bandwidth=3.0)
    for entries, mask in (
        (got.code, z > i["threshold"]),
        (got.window, (z - i["threshold"]).abs() < 1.5),
    ):
        assert torch.equal(mask_of(entries, 9, 400), mask)
        assert torch.equal(entries.values, z[mask])


@on_every_backend
def test_zero_of_either_sign_is_not_above_zero_of_either_sign(backend: str) -> None:
    x = torch.tensor([[1.0, -0.0], [0.0, 0.0]])
    W_enc = torch.tensor([[-0.0, 0.0], [0.0, 1.0], [2.0**-126, 0.0], [-1.0, 0.0]])
    with use_backend(backend):
        for threshold in (None, torch.zeros(4), -torch.zeros(4)):
            code = threshold_encode(x, W_enc, threshold=threshold).code
            assert code.indices.tolist() == [2]
            assert code.offsets.tolist() == [0, 1, 1]


@on_every_backend
def test_equal_rows_dense_latents_and_silent_rows_are_told_apart(backend: str) -> None:
    # Feature 0 fires on every row; rows 4 to 6 fire nothing else; features 1 to 299 are one.
    x = torch.tensor([[1.0, 1.0]]).repeat(7, 1)
    x[4:, 1] = -1.0
    W_enc = torch.tensor([[0.0, 1.0]]).repeat(300, 1)
    W_enc[0] = torch.tensor([1.0, 0.0])
    with use_backend(backend):
        code = threshold_encode(x, W_enc).code
        nothing = threshold_encode(x, W_enc, threshold=torch.full((300,), 2.0)).code
    assert code.offsets.tolist() == [0, 300, 600, 900, 1200, 1201, 1202, 1203]
    assert code.indices.tolist() == list(range(300)) * 4 + [0] * 3
    assert nothing.offsets.tolist() == [0] * 8
    assert nothing.values.shape == (0,)


@on_every_backend
def test_bfloat16_is_compared_in_float32(backend: str) -> None:
    case = Case("half", 5, 17, 70, 1)
    i = inputs_of(case, torch.bfloat16)
    with use_backend(backend):
        got = call(i, bandwidth=0.5)
    z = pre_activations(i, torch.float32)
    assert torch.equal(mask_of(got.code, 5, 70), z > i["threshold"])
    assert got.code.values.dtype == torch.bfloat16


def test_float64_is_compared_in_float64() -> None:
    i = {n: t.double() for n, t in inputs_of(Case("wide", 5, 17, 70, 1)).items()}
    code = call(i).code
    z = pre_activations(i)
    assert torch.equal(mask_of(code, 5, 70), z > i["threshold"])
    assert torch.equal(code.values, z[z > i["threshold"]])


@on_every_backend
def test_strided_inputs_repeats_and_a_cached_screen_change_no_bit(backend: str) -> None:
    i = inputs_of(Case("strided", 6, 18, 300, 3))
    wide = {n: torch.stack([t, t], -1)[..., 0] for n, t in i.items()}
    screen = screen_weights(i["W_enc"], "bf16")
    with use_backend(backend):
        usual, again, views = (
            call(i, bandwidth=0.5),
            call(i, bandwidth=0.5),
            call(wide, bandwidth=0.5),
        )
        screened = call(i, bandwidth=0.5, screen=screen)
    for other in (again, views, screened):
        assert all(map(torch.equal, usual.code, other.code))
        assert all(map(torch.equal, usual.window, other.window))


@on_every_backend
def test_a_capacity_leaves_room_behind_the_entries(backend: str) -> None:
    i = inputs_of(Case("room", 6, 18, 90, 3))
    with use_backend(backend):
        tight = call(i, bandwidth=0.5)
        roomy = call(i, bandwidth=0.5, capacity=500)
        without = call(i, capacity=500)
    for a, b in ((tight.code, roomy.code), (tight.window, roomy.window)):
        m = a.values.numel()
        assert b.values.shape == b.indices.shape == (500,)
        assert torch.equal(a.offsets, b.offsets)
        assert torch.equal(a.values, b.values[:m])
        assert torch.equal(a.indices, b.indices[:m])
        assert not b.values[m:].any()
        assert not b.indices[m:].any()
    assert without.window.values.shape == (0,)


@on_every_backend
def test_more_entries_than_the_capacity_raise(backend: str) -> None:
    x, W_enc = torch.ones(3, 4), torch.ones(8, 4)
    text = (
        "threshold_encode: 24 entries, capacity=23. "
        "Pass capacity=24 or more, or None to size by the data."
    )
    with use_backend(backend):
        assert threshold_encode(x, W_enc, capacity=24).code.values.tolist() == [4.0] * 24
        with pytest.raises(ArgumentError, match=f"^{re.escape(text)}$"):
            threshold_encode(x, W_enc, capacity=23)
        near = torch.full((8,), 4.25)
        with pytest.raises(ArgumentError, match="24 entries in the window, capacity=5"):
            threshold_encode(x, W_enc, threshold=near, bandwidth=1.0, capacity=5)


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.name in ("small", "odd", "empty")], ids=lambda c: c.name
)
@on_every_backend
def test_gradients_are_those_of_the_dense_formula(backend: str, case: Case) -> None:
    grads = []
    for dtype, dense in ((torch.float64, True), (torch.float32, True), (torch.float32, False)):
        i = {n: t.to(dtype) for n, t in inputs_of(case).items()}
        leaves = [i[n].requires_grad_() for n in ("x", "W_enc", "b_enc", "b_dec")]
        with use_backend("auto" if dense else backend):
            values = call(i).code.values
            if dense:
                z = pre_activations(i, dtype)
                values = z[z > i["threshold"]]
            weight = torch.linspace(-1, 1, values.numel(), dtype=dtype)
            grads.append(torch.autograd.grad((values * weight).sum(), leaves))
    for name, exact, plain, got in zip(("x", "W_enc", "b_enc", "b_dec"), *grads, strict=True):
        assert_accurate(got, plain, exact, name, factor=factor_of(backend, exact))


def test_the_gradients_pass_gradcheck_twice() -> None:
    i = {n: t.double() for n, t in inputs_of(Case("check", 3, 4, 6, 1)).items()}
    leaves = [i[n].requires_grad_() for n in ("x", "W_enc", "b_enc", "b_dec")]
    function = lambda *w: threshold_encode(*w, threshold=i["threshold"]).code.values  # noqa: E731
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


@on_every_backend
def test_relu_codes_train_like_the_dense_relu(backend: str) -> None:
    i = {n: t.requires_grad_() for n, t in inputs_of(Case("relu", 7, 16, 60, 1)).items()}
    del i["threshold"]
    with use_backend(backend):
        values, indices, offsets = call(i).code
        dense = SparseCode(values, indices, 60, offsets).to_dense()
        got = torch.autograd.grad((dense**2).sum() + dense.sum(), list(i.values()))
    relu = pre_activations(i, torch.float32).relu()
    usual = torch.autograd.grad((relu**2).sum() + relu.sum(), list(i.values()))
    torch.testing.assert_close(dense, relu)
    for a, b in zip(got, usual, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


@on_every_backend
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_named(backend: str, bad: float) -> None:
    for name, row in (("x", 4), ("W_enc", 211), ("b_enc", 211), ("b_dec", 0), ("threshold", 211)):
        i = inputs_of(Case("nan", 9, 20, 300, 6))
        i[name][row if name != "b_dec" else 3] = bad
        text = f"threshold_encode: {name} holds NaN or infinity in row {row}."
        with use_backend(backend), pytest.raises(NonFiniteError, match=re.escape(text)):
            call(i)


def test_a_pre_activation_that_overflows_is_named() -> None:
    x = torch.full((3, 8), 3e38)
    x[0] = 0.0
    with pytest.raises(NonFiniteError, match=r"x W_enc\^T holds NaN or infinity in row 1, 2\."):
        threshold_encode(x, torch.full((100, 8), 3e38))


@on_every_backend
def test_the_op_passes_opcheck(backend: str) -> None:
    i = inputs_of(Case("opcheck", 4, 10, 40, 3))
    i["x"].requires_grad_()
    args = (i["x"], i["W_enc"].requires_grad_(), i["b_enc"], i["b_dec"], i["threshold"], 0.5)
    rest = ("exact", "auto", None, None)
    with use_backend(backend):
        torch.library.opcheck(torch.ops.microtome.threshold_encode, (*args, None, *rest))
        torch.library.opcheck(torch.ops.microtome.threshold_encode, (*args, 200, *rest))


def test_a_compiled_graph_holds_the_op_whole() -> None:
    i = inputs_of(Case("compile", 6, 10, 70, 3))

    def encode(x: Tensor) -> tuple[Tensor, Tensor]:
        code, window, _ = threshold_encode(
            x, i["W_enc"], i["b_enc"], threshold=i["threshold"], bandwidth=0.3
        )
        return code.values * 2, window.values

    # Sizes that follow the data stay in a graph only if dynamo is told to keep them.
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(encode, fullgraph=True, backend="aot_eager")
        assert all(map(torch.equal, compiled(i["x"]), encode(i["x"])))


def test_messages_say_what_came_and_what_is_allowed() -> None:
    x, W_enc = torch.randn(3, 4), torch.randn(8, 4)
    with pytest.raises(
        ShapeError, match=r"threshold must be \[f\] with f=8 as in W_enc, got shape \[7\]"
    ):
        threshold_encode(x, W_enc, threshold=torch.zeros(7))
    with pytest.raises(ArgumentError, match="bandwidth must be finite and at least 0, got -1"):
        threshold_encode(x, W_enc, bandwidth=-1.0)
    with pytest.raises(ArgumentError, match=r"capacity must be at least 0, or None .*, got -2"):
        threshold_encode(x, W_enc, capacity=-2)
    with pytest.raises(ArgumentError, match=r"per_row must be at least 1, or None .*, got 0"):
        threshold_encode(x, W_enc, per_row=0)
    with pytest.raises(ArgumentError, match="precision must be one of 'exact', 'fast'"):
        threshold_encode(x, W_enc, precision="sloppy")
