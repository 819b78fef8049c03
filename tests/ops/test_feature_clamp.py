"""feature_clamp: by hand, then every backend against float64, its gradients and its messages."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from microtome import errors
from microtome._seed import generator
from microtome.ops import feature_clamp, use_backend
from microtome.ops.feature_clamp import MODES, _clamp, feature_clamp_reference
from microtome.testing import assert_accurate, backends_of

on_every_backend = pytest.mark.parametrize("backend", backends_of(_clamp))
SIZES = {"one": (1, 1, 3, 1), "odd": (7, 33, 20, 3), "rows": (40, 16, 9, 2), "none": (0, 8, 5, 2),
         "no_features": (3, 8, 5, 0)}  # fmt: skip


def inputs(name: str, dtype: torch.dtype = torch.float32, **options: Any) -> dict[str, Any]:
    """Arguments by name; `options` may ask for a threshold, current activations or row targets."""
    n, d, f, m = SIZES[name]
    g = generator(0, "feature_clamp", name)
    draw = lambda *shape: torch.randn(shape, generator=g).to(dtype)  # noqa: E731
    made = {
        "x": draw(n, d), "features": torch.randperm(f, generator=g)[:m],
        "targets": draw(n, m) if options.get("by_row") else draw(m),
        "W_enc": draw(f, d), "b_enc": draw(f), "b_dec": draw(d), "W_dec": draw(f, d),
        "threshold": draw(f).abs() if options.get("threshold") else None,
        "current": draw(n, m).relu() if options.get("current") else None,
    }  # fmt: skip
    if options.get("current"):
        made.update(W_enc=None, b_enc=None, b_dec=None, threshold=None)
    return made


def wide(given: dict[str, Any]) -> dict[str, Any]:
    return {
        k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v
        for k, v in given.items()
    }


def test_a_row_by_hand() -> None:
    W_enc, W_dec = torch.tensor([[1.0, 1.0], [0.0, 3.0]]), torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    x, both = torch.tensor([[1.0, 2.0], [-5.0, 1.0]]), torch.tensor([0])
    # a = relu(1 + 2) = 3 and relu(-4) = 0; wanted 4
    got = feature_clamp(x, both, torch.tensor([4.0]), W_enc, None, None, W_dec)
    assert got.tolist() == [[1 + 1 * 2, 2], [-5 + 4 * 2, 1]]
    got = feature_clamp(x, both, torch.tensor([2.0]), W_enc, None, None, W_dec, mode="scale")
    assert got.tolist() == [[1 + 3 * 2, 2], [-5, 1]]
    limit = torch.tensor([3.0, 0.0])  # 3 is not above 3: inactive
    got = feature_clamp(x, both, torch.tensor([4.0]), W_enc, None, None, W_dec, threshold=limit)
    assert got.tolist() == [[1 + 4 * 2, 2], [-5 + 4 * 2, 1]]


def test_it_is_decoding_a_changed_code_with_the_error_kept() -> None:
    a = wide(inputs("odd"))
    code = ((a["x"] - a["b_dec"]) @ a["W_enc"].T + a["b_enc"]).relu()
    error = a["x"] - (code @ a["W_dec"] + a["b_dec"])
    code[:, a["features"]] = a["targets"]
    torch.testing.assert_close(feature_clamp(**a), code @ a["W_dec"] + a["b_dec"] + error)


@on_every_backend
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", SIZES)
def test_every_mode_is_accurate(backend: str, mode: str, name: str) -> None:
    for by_row, threshold, current in ((0, 0, 0), (1, 1, 0), (1, 0, 1)):
        a = inputs(name, by_row=by_row, threshold=threshold, current=current)
        with use_backend(backend):
            got = feature_clamp(**a, mode=mode)
        plain = feature_clamp_reference(*a.values(), mode)
        assert_accurate(got, plain, feature_clamp_reference(*wide(a).values(), mode), factor=4.0)


@on_every_backend
def test_bfloat16_is_computed_in_float32(backend: str) -> None:
    a = inputs("odd", torch.bfloat16)
    with use_backend(backend):
        got = feature_clamp(**a)
    assert_accurate(got, feature_clamp_reference(*a.values(), "set"),
                    feature_clamp_reference(*wide(a).values(), "set"))  # fmt: skip


@on_every_backend
def test_a_row_whose_features_are_as_wanted_comes_back_bit_for_bit(backend: str) -> None:
    a = inputs("rows", by_row=True, current=True)
    a["x"][3, :4] = -0.0
    a["targets"] = a["current"].clone()
    a["targets"][5:] += 1.0
    with use_backend(backend):
        got = feature_clamp(**a)
    assert torch.equal(got[:5].view(torch.int32), a["x"][:5].view(torch.int32))
    assert (got[5:] != a["x"][5:]).any(1).all()


def formula(x, features, targets, W_enc, b_enc, b_dec, W_dec, threshold, current, mode):  # type: ignore[no-untyped-def]
    """Every row moved, also those that stay where they are."""
    a = current
    if a is None:
        a = ((x - b_dec) @ W_enc[features].T + b_enc[features]).relu()
    changed = {"set": targets.expand(a.shape), "add": a + targets, "scale": a * targets}[mode]
    return x + (changed - a) @ W_dec[features]


@pytest.mark.parametrize("mode", MODES)
def test_gradients_are_those_of_the_formula(mode: str) -> None:
    for by_row, current in itertools.product((False, True), repeat=2):
        a = wide(inputs("odd", by_row=by_row, current=current))
        leaves = {k: v.requires_grad_() for k, v in a.items()
                  if isinstance(v, Tensor) and v.is_floating_point()}  # fmt: skip
        got = torch.autograd.grad(feature_clamp(**a, mode=mode).square().sum(), leaves.values())
        wanted_all = torch.autograd.grad(
            formula(**a, mode=mode).square().sum(), leaves.values(), materialize_grads=True
        )
        for name, mine, wanted in zip(leaves, got, wanted_all, strict=True):
            torch.testing.assert_close(mine, wanted, msg=lambda m, name=name: f"{name}: {m}")


@on_every_backend
def test_the_op_passes_opcheck(backend: str) -> None:
    a = inputs("odd")
    a["x"].requires_grad_()
    with use_backend(backend):
        torch.library.opcheck(torch.ops.microtome.feature_clamp.default, (*a.values(), "set"))


def test_messages_say_what_is_wrong() -> None:
    a = inputs("odd")
    with pytest.raises(errors.ArgumentError, match=r"features must lie in \[0, f=20\), got 20"):
        feature_clamp(**{**a, "features": torch.tensor([1, 2, 20])})
    with pytest.raises(errors.ArgumentError, match=r"features must hold no number twice, got \[1,"):
        feature_clamp(**{**a, "features": torch.tensor([1, 2, 1])})
    with pytest.raises(errors.ArgumentError, match=r"W_enc is None and so is current"):
        feature_clamp(**{**a, "W_enc": None})
    with pytest.raises(errors.ArgumentError, match=r"mode must be one of 'set', 'add', 'scale'"):
        feature_clamp(**a, mode="zero")
    with pytest.raises(errors.ShapeError, match=r"feature_clamp: targets must be \[m\] with m=3"):
        feature_clamp(**{**a, "targets": torch.zeros(4)})
    with pytest.raises(errors.DtypeError, match=r"must share one dtype, got x float32"):
        feature_clamp(**{**a, "W_dec": a["W_dec"].double()})
