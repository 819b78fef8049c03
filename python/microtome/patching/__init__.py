"""Activation patching: copy activations between runs, ablate them, and measure what changes."""

from microtome.patching.attribution import attribute
from microtome.patching.estimate import Attribution, Faithfulness, faithfulness
from microtome.patching.metrics import (
    Metric,
    kl_divergence,
    log_probability,
    logit_difference,
    loss,
    probability,
)
from microtome.patching.result import Sweep
from microtome.patching.sweep import ablate, sweep

__all__ = [
    "Attribution",
    "Faithfulness",
    "Metric",
    "Sweep",
    "ablate",
    "attribute",
    "faithfulness",
    "kl_divergence",
    "log_probability",
    "logit_difference",
    "loss",
    "probability",
    "sweep",
]
