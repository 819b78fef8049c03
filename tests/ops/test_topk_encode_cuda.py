"""The Hopper encode, run by the emulator: what it screens, and that the answer stays exact."""

import importlib

import pytest

from microtome.testing import cuda

pytestmark = pytest.mark.skipif(not cuda.EMULATED, reason="the emulated CUDA kernels are not there")


def test_the_emulated_instructions_do_what_the_manual_says():
    assert importlib.import_module("microtome._emulated_ext").failing_hopper_tests() == []
