"""The examples in the docstrings run."""

import doctest
import importlib
import pkgutil

import pytest

import microtome.sae

NAMES = [module.name for module in pkgutil.iter_modules(microtome.sae.__path__)]


@pytest.mark.parametrize("name", NAMES)
def test_the_examples_of_a_module_hold(name):
    assert doctest.testmod(importlib.import_module(f"microtome.sae.{name}")).failed == 0
