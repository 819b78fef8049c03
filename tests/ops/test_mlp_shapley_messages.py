"""What mlp_shapley says to arguments that do not fit."""

from __future__ import annotations

import re

import pytest
import torch

from microtome import _native, errors
from microtome.ops import mlp_shapley, use_backend
from microtome.ops.mlp_shapley import _shapley
from microtome.testing import MlpCase, backends_of

on_every_backend = pytest.mark.parametrize("backend", backends_of(_shapley))
GOOD = MlpCase("messages", 2, 3, 4, (5, 6, 2), 3, 1, 2, 4).inputs()
W1, W2, W3 = GOOD["weights"]
b1, b2, b3 = GOOD["biases"]


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (
            {"background": torch.ones(3, 5)},
            errors.ShapeError,
            "mlp_shapley: background must be [n, m] with m=4 as in x, got shape [3, 5].",
        ),
        (
            {"background": torch.ones(0, 4)},
            errors.ShapeError,
            "mlp_shapley: background must have at least one row, got shape [0, 4].",
        ),
        (
            {"ranks": torch.zeros(3, 2, 4)},
            errors.ShapeError,
            "mlp_shapley: ranks must be [S, U, A, p], got shape [3, 2, 4].",
        ),
        (
            {"ranks": GOOD["ranks"][:2]},
            errors.ShapeError,
            "mlp_shapley: ranks must be [S, U, A, p] with S=1 (all background rows walk the same "
            "orders) or S=n=3 (each its own), got S=2.",
        ),
        (
            {"ranks": GOOD["ranks"][:, :0]},
            errors.ShapeError,
            "mlp_shapley: ranks must have U, A and p of at least 1, got shape [3, 0, 2, 4].",
        ),
        (
            {"ranks": torch.zeros(3, 1, 1, 3, dtype=torch.int32)},
            errors.ShapeError,
            "mlp_shapley: without player, ranks must have p=4 players, one for each column of x, "
            "got p=3. Pass player [m] to group columns.",
        ),
        (
            {"ranks": GOOD["ranks"].float()},
            errors.DtypeError,
            "mlp_shapley: ranks must be int32, int64, got float32. Cast it with .to().",
        ),
        (
            {"player": torch.tensor([0, 1, 4, -1])},
            errors.ArgumentError,
            "mlp_shapley: player must lie in [-1, p=4), -1 for a column of no player, got 4.",
        ),
        (
            {"player": torch.tensor([0, -2, 3, -1])},
            errors.ArgumentError,
            "mlp_shapley: player must lie in [-1, p=4), -1 for a column of no player, got -2.",
        ),
        (
            {"weights": [W1, W2]},
            errors.ShapeError,
            "mlp_shapley: weights, biases and activations must have one entry for each layer, got "
            "2, 3 and 3.",
        ),
        (
            {"weights": [], "biases": [], "activations": []},
            errors.ShapeError,
            "mlp_shapley: weights, biases and activations must have one entry for each layer, got "
            "0, 0 and 0.",
        ),
        (
            {"weights": [W2, W2, W3]},
            errors.ShapeError,
            "mlp_shapley: weights[0] must be [o, 4], 4 being the columns of x, got shape [6, 5].",
        ),
        (
            {"weights": [W1, W3, W3]},
            errors.ShapeError,
            "mlp_shapley: weights[1] must be [o, 5], 5 being the outputs of weights[0], got shape "
            "[2, 6].",
        ),
        (
            {"biases": [b1, b1, b3]},
            errors.ShapeError,
            "mlp_shapley: biases[1] must be [6], as weights[1] has outputs, or None, got shape "
            "[5].",
        ),
        (
            {"activations": [1, 10, 0]},
            errors.ArgumentError,
            "mlp_shapley: activations[1] must be a code from IDENTITY=0 to SOFTPLUS=9, got 10.",
        ),
        (
            {"x": torch.ones(2, 4, dtype=torch.float16)},
            errors.DtypeError,
            "mlp_shapley: x must be float32, float64, got float16. Cast it with .to().",
        ),
        (
            {"background": torch.ones(3, 4).double()},
            errors.DtypeError,
            "mlp_shapley: all weights and inputs must share one dtype, got x float32, background "
            "float64, weights[0] float32, weights[1] float32, weights[2] float32, biases[0] "
            "float32, biases[1] float32, biases[2] float32. Cast them with .to().",
        ),
        (
            {"x": torch.ones(2, 4, device="meta")},
            errors.DeviceError,
            "mlp_shapley: all tensors must lie on one device, got x [2, 4] on meta, background "
            "[3, 4] on cpu, ranks [3, 1, 2, 4] on cpu, weights[0] [5, 4] on cpu, weights[1] [6, 5] "
            "on cpu, weights[2] [2, 6] on cpu, biases[0] [5] on cpu, biases[1] [6] on cpu, "
            "biases[2] [2] on cpu. Load x on cpu (meta tensors hold no data).",
        ),
        (
            {"precision": "fp16"},
            errors.ArgumentError,
            "mlp_shapley: precision must be one of 'fp32', 'bf16', got 'fp16'.",
        ),
    ],
)
def test_what_is_wrong_is_said(
    change: dict[str, object], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=f"^{re.escape(text)}$"):
        mlp_shapley(**{**GOOD, **change})


@on_every_backend
@pytest.mark.parametrize("bad", [-1, 4, 2, 2**40])
def test_an_order_that_is_no_permutation_is_named(backend: str, bad: int) -> None:
    ranks = GOOD["ranks"].long()
    ranks[1, 0, 1] = torch.tensor([0, 2, bad, 1])
    text = (
        "mlp_shapley: every order must be a permutation of 0 .. p-1=3, got ranks[1, 0, 1] = "
        f"[0, 2, {bad}, 1]."
    )
    with use_backend(backend), pytest.raises(errors.ArgumentError, match=f"^{re.escape(text)}$"):
        mlp_shapley(**{**GOOD, "ranks": ranks})


@on_every_backend
def test_of_a_long_order_the_first_places_are_shown(backend: str) -> None:
    inputs = MlpCase("long", 1, 1, 9, (3, 1), 1, 1, 1, 9).inputs()
    zeros = torch.zeros_like(inputs["ranks"])
    text = (
        "mlp_shapley: every order must be a permutation of 0 .. p-1=8, got ranks[0, 0, 0] = "
        "[0, 0, 0, 0, 0, 0, 0, 0, ...]."
    )
    with use_backend(backend), pytest.raises(errors.ArgumentError, match=f"^{re.escape(text)}$"):
        mlp_shapley(**{**inputs, "ranks": zeros})


@pytest.mark.skipif(_native.why_absent() is not None, reason="the extension is absent")
def test_a_backend_that_cannot_take_float64_says_so() -> None:
    wide = {
        name: [t.double() for t in GOOD[name]] if name in ("weights", "biases") else GOOD[name]
        for name in GOOD
    }
    wide |= {name: GOOD[name].double() for name in ("x", "background")}
    with (
        use_backend("cpu"),
        pytest.raises(errors.BackendError, match=r"cpu: dtype float64 \(has float32\)"),
    ):
        mlp_shapley(**wide)
