"""Activation patching: copy activations between runs, ablate them, and measure what changes."""

from microtome.patching.attribution import attribute
from microtome.patching.estimate import Attribution, Faithfulness, faithfulness
from microtome.patching.features import sweep_error, sweep_features
from microtome.patching.listed import Pairs, pairs, patch
from microtome.patching.metrics import (
    Metric,
    kl_divergence,
    log_probability,
    logit_difference,
    loss,
    probability,
)
from microtome.patching.naive import Write, naive_sweep, run_patched
from microtome.patching.paths import Node, Paths, path_patch
from microtome.patching.result import Sweep
from microtome.patching.sweep import ablate, sweep

__all__ = [
    "Attribution",
    "Faithfulness",
    "Metric",
    "Node",
    "Pairs",
    "Paths",
    "Sweep",
    "Write",
    "ablate",
    "attribute",
    "faithfulness",
    "kl_divergence",
    "log_probability",
    "logit_difference",
    "loss",
    "naive_sweep",
    "pairs",
    "patch",
    "path_patch",
    "probability",
    "run_patched",
    "sweep",
    "sweep_error",
    "sweep_features",
]
