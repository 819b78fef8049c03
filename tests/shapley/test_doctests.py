"""The examples in the docstrings run."""

import doctest
import importlib
import pkgutil

import pytest

import microtome.shapley

NAMES = [module.name for module in pkgutil.iter_modules(microtome.shapley.__path__)]


@pytest.mark.parametrize("name", NAMES)
def test_the_examples_of_a_module_hold(name):
    module = importlib.import_module(f"microtome.shapley.{name}")
    assert doctest.testmod(module).failed == 0
