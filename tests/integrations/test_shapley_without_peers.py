"""The drop-ins for shap and captum where neither is installed, and their examples."""

from __future__ import annotations

import doctest
import importlib
import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    "module",
    [
        *(
            f"captum.{name}"
            for name in ("feature_ablation", "kernel_shap", "lime", "shapley_value")
        ),
        *(f"shap.{name}" for name in ("exact", "kernel", "partition", "permutation", "sampling")),
    ],
)
def test_the_examples_in_the_docstrings_run(module: str) -> None:
    found = importlib.import_module(f"microtome.integrations.{module}")
    results = doctest.testmod(found)
    assert results.attempted > 0
    assert results.failed == 0


def test_neither_peer_is_needed_or_imported() -> None:
    code = """
import sys
for name in ("shap", "captum", "sklearn", "pandas", "numba", "matplotlib"):
    sys.modules[name] = None
import numpy as np, torch
from microtome.integrations import captum, shap
from microtome.errors import PackageError

for name in ("ShapleyValueSampling", "ShapleyValues", "KernelShap", "Lime", "FeatureAblation"):
    getattr(captum, name)(lambda x: x.prod(1)).attribute(torch.rand(2, 3))
for name in ("PermutationExplainer", "KernelExplainer", "SamplingExplainer", "ExactExplainer"):
    found = getattr(shap, name)(lambda x: x.prod(1), np.zeros((2, 3)))(np.ones((1, 3)))
    assert abs(found.values.sum() - 1) < 1e-9
for call, package in (
    (captum.accept_in_llm_attribution, "captum"),
    (
        lambda: shap.KernelExplainer(lambda x: x.prod(1), np.zeros((1, 3)))(
            np.ones((1, 3)), l1_reg="aic"
        ),
        "scikit-learn",
    ),
    (lambda: shap.maskers, "shap"),
    (lambda: shap.PartitionExplainer(lambda x: x.prod(1), np.zeros((2, 3))), "shap"),
):
    try:
        call()
    except PackageError as error:
        assert f"pip install {package}" in str(error)
    else:
        raise SystemExit(f"{package} was not missed")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
