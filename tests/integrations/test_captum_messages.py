"""What captum's names say of arguments that do not agree; none of this needs captum."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from microtome.errors import ArgumentError, NonFiniteError, ShapeError
from microtome.integrations.captum import FeatureAblation, Lime, ShapleyValues, ShapleyValueSampling

X = torch.arange(8.0).reshape(2, 4)


def total(x: Tensor) -> Tensor:
    return x.sum(1)


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        ([1.0, 2.0], {}, r"inputs must be a tensor \[examples, ...\] or a tuple of such.*list"),
        ((X, X[:1]), {}, r"same number of examples, at least 1, got \[2, 4\], \[1, 4\]"),
        (X, {"baselines": (0, 1)}, r"baselines must have one entry for each of the 1 inputs"),
        (X, {"baselines": X[:, :3]}, r"baseline must have the shape of its input \[2, 4\]"),
        (X, {"baselines": "zero"}, r"baseline must be a tensor or a number, got str"),
        (X.long(), {"baselines": 0.5}, r"cannot be held in the input's dtype torch.int64"),
        (X, {"feature_mask": torch.zeros(3).long()}, r"must broadcast to its input \[2, 4\]"),
        (X, {"feature_mask": torch.zeros(4)}, r"must be integer tensors.*got dtype torch.float32"),
        (X, {"target": 1}, r"target=\(1,\) cannot name an entry of outputs of shape"),
        (X, {"target": [0, 1, 0]}, r"for each of the 2 examples, got 3"),
        (X, {"perturbations_per_eval": 0}, r"must be a positive integer or None, got 0"),
    ],
)
def test_arguments_that_do_not_agree_are_named(
    inputs: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises((ArgumentError, ShapeError), match=message) as raised:
        FeatureAblation(total).attribute(inputs, **options)
    assert str(raised.value).startswith("FeatureAblation: ")


def test_a_number_for_the_batch_allows_one_perturbation_in_a_call() -> None:
    with pytest.raises(ShapeError, match=r"perturbations_per_eval > 1 needs one entry for each"):
        ShapleyValues(lambda x: x.sum()).attribute(X, perturbations_per_eval=2)


def test_a_number_for_the_batch_allows_no_masks_by_example() -> None:
    mask = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 0]])
    with pytest.raises(ShapeError, match=r"feature_mask differs between examples, but forward_fu"):
        ShapleyValues(lambda x: x.sum()).attribute(X, feature_mask=mask)


def test_samples_are_counted_from_one() -> None:
    with pytest.raises(ArgumentError, match=r"n_samples must be a positive integer, got 0"):
        ShapleyValueSampling(total).attribute(X, n_samples=0)
    with pytest.raises(ArgumentError, match=r"Lime: n_samples must be a positive integer, got 0"):
        Lime(total).attribute(X, n_samples=0)


def test_a_forward_function_that_returns_nan_is_named() -> None:
    with pytest.raises(NonFiniteError, match=r"ShapleyValues: forward_func returned NaN or infin"):
        ShapleyValues(lambda x: x.sum(1).log()).attribute(X, baselines=-1.0)


@pytest.mark.parametrize("target", [3, -4, (3,), [0, 3], torch.tensor([0, 3])])
def test_a_target_that_is_not_there_is_named_with_what_came(target: Any) -> None:
    with pytest.raises(ShapeError, match=r"target=-?[34] names an entry that is not there.*, 3\]"):
        FeatureAblation(lambda x: x[:, :3]).attribute(X, target=target)
