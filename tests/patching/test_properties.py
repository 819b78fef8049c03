"""What holds for every sweep, whatever the prompts."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from microtome.models import ToyModel
from microtome.patching import sweep
from microtome.testing.patching import everything


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_the_order_of_prompts_does_not_matter(data):
    toy, b, t = ToyModel(), 3, 5
    draw = lambda: torch.tensor(  # noqa: E731
        data.draw(st.lists(st.integers(0, 255), min_size=b * t, max_size=b * t))
    ).view(b, t)
    clean, corrupted = draw(), draw()
    order = torch.tensor(data.draw(st.permutations(range(b))))
    site = data.draw(st.sampled_from(["resid_pre", "resid_mid", "k", "z", "pattern", "neurons"]))
    how = {"axes": ("position",) if site == "neurons" else None, "progress": False}
    how["layers"] = [data.draw(st.integers(0, 3))]
    found = sweep(toy, clean, corrupted, everything, site, **how)
    other = sweep(toy, clean[order], corrupted[order], everything, site, **how)
    torch.testing.assert_close(other.by_prompt, found.by_prompt[..., order], rtol=1e-4, atol=1e-4)
    assert torch.equal(other.written, found.written)
    torch.testing.assert_close(other.scores, found.scores, rtol=1e-4, atol=1e-4)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1 << 16), engine=st.sampled_from(["native", "blocks", "forwards"]))
def test_patching_every_position_of_the_first_stream_gives_the_other_run(seed, engine):
    toy = ToyModel(seed=seed).double()
    clean, corrupted = torch.randint(
        0, 256, (2, 2, 4), generator=torch.Generator().manual_seed(seed)
    )
    found = sweep(toy, clean, corrupted, everything, axes=("layer",), engine=engine, progress=False)
    torch.testing.assert_close(found.by_prompt[0], found.clean)
    torch.testing.assert_close(found.restored()[0], torch.ones((), dtype=torch.float64))
    # So does the whole stream of any other layer.
    torch.testing.assert_close(found.by_prompt, found.clean.expand(4, 2))
