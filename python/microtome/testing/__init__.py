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

__all__ = [
    "ATTENTION_CASES",
    "BENCH_CASES",
    "CASES",
    "SWAP_CASES",
    "AttentionCase",
    "Case",
    "SwapCase",
    "assert_accurate",
    "backends_of",
    "factor_of",
    "has_level",
    "interpreted",
    "level_parameters",
    "max_error",
    "ops_on",
    "skip_if_interpreted",
]
