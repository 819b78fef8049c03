"""Case tables and comparison rules, shared by tests and benchmarks."""

from microtome.testing.attention import (
    ATTENTION_CASES,
    SWAP_CASES,
    AttentionCase,
    SwapCase,
)
from microtome.testing.cases import BENCH_CASES, CASES, Case
from microtome.testing.compare import (
    assert_accurate,
    backends_of,
    factor_of,
    has_level,
    interpreted,
    level_parameters,
    max_error,
    skip_if_interpreted,
)
from microtome.testing.device import ops_on
from microtome.testing.mlp import MLP_CASES, MlpCase, model_of, values_by_loops

__all__ = [
    "ATTENTION_CASES",
    "BENCH_CASES",
    "CASES",
    "MLP_CASES",
    "SWAP_CASES",
    "AttentionCase",
    "Case",
    "MlpCase",
    "SwapCase",
    "assert_accurate",
    "backends_of",
    "factor_of",
    "has_level",
    "interpreted",
    "level_parameters",
    "max_error",
    "model_of",
    "ops_on",
    "skip_if_interpreted",
    "values_by_loops",
]
