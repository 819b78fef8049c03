"""Models of unknown architecture: by their own blocks where that is verified, else in full."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from microtome.patching import ablate, sweep
from microtome.testing.patching import apart, changed, everything, naive_twin, untouched
from microtome.testing.plain import InPlace, InTuple, Mixer, Plain, WithState

CORRUPTED = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
CLEAN = changed(CORRUPTED, (0, 1), (1, 3))


def check_plain(model: nn.Module, how: str, why: str) -> None:
    """Warned, and equal to the naive sweep by module paths."""
    model = model.double()
    for site, axes, side in (("resid_pre", None, ":in"), ("resid_post", ("layer",), "")):
        with pytest.warns(UserWarning, match=f"{site} patches run {how}") as told:
            found = sweep(model, CLEAN, CORRUPTED, everything, site, axes=axes, progress=False)
        assert str(told[0].message).startswith(
            f"sweep: {site} patches run {how}, since {type(model).__name__} is not one of the "
            "architectures that are read into parts"
        )
        assert why in found.note
        path = lambda name, side=side: f"blocks.{name.split('.')[1]}{side}"  # noqa: E731
        wanted = naive_twin(model, found, CORRUPTED, CLEAN, everything, sites=path)
        assert apart(found, wanted) < 1e-9
        untouched(model)


@pytest.mark.parametrize("block", [Mixer, InTuple, InPlace])
def test_a_plain_list_of_blocks_runs_block_by_block(block):
    check_plain(Plain(block), "block by block", "")


def test_blocks_that_hand_on_more_than_the_stream_run_by_full_forwards():
    check_plain(
        Plain(WithState), "by full forwards", "its blocks hand on more than the residual stream"
    )


@pytest.mark.parametrize("skips", [(0, 5), (0, 2), (0, 1), (3, 5)])
def test_a_connection_around_blocks_is_caught_and_runs_by_full_forwards(skips):
    check_plain(Plain(skips=skips), "by full forwards", "give other logits than the whole forward")


def test_a_plain_model_can_be_ablated():
    model = Plain().double()
    with pytest.warns(UserWarning, match="ablate: resid_post patches run block by block"):
        found = ablate(model, CLEAN, everything, "resid_post", progress=False)
    wanted = naive_twin(
        model, found, CLEAN, None, everything, op="zero",
        sites=lambda name: f"blocks.{name.split('.')[1]}",
    )  # fmt: skip
    assert apart(found, wanted) < 1e-9
