"""What importing microtome.models costs, and that the examples in its docstrings run."""

from __future__ import annotations

import doctest
import importlib
import subprocess
import sys

import pytest

from microtome import models

HEAVY = ("transformers", "tokenizers", "gguf", "safetensors", "fsspec", "tqdm.auto", "sqlite3")


def test_importing_models_imports_no_model_library():
    code = f"import microtome.models, sys; print([m for m in {HEAVY} if m in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_every_public_name_is_there_and_documented():
    for name in models.__all__:
        assert getattr(models, name).__doc__, name


@pytest.mark.parametrize("module", ["capture", "splice", "texts"])
def test_the_examples_in_the_docstrings_run(module: str):
    found = importlib.import_module(f"microtome.models.{module}")
    results = doctest.testmod(found)
    assert results.attempted > 0
    assert results.failed == 0
