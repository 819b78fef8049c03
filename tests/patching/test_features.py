"""Features of sparse autoencoders, and what those leave out, against vectors added by hand."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import microtome as mt
from microtome.errors import ArgumentError, ShapeError, SiteError, StoreError
from microtome.models import capture
from microtome.patching import Sweep, Write, patch, run_patched, sweep, sweep_error, sweep_features
from microtome.testing import families
from microtome.testing.patching import changed, everything, last_difference

pytest.importorskip("transformers", reason="transformers is not installed")

B, T, D, F = 2, 5, 24, 40
CORRUPTED = families.tokens(B, T)
CLEAN = changed(CORRUPTED, (0, 1), (1, 3))
MASK = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 0]])
SAE = mt.SAE(D, F, mt.TopK(6), seed=1)
Change = Callable[[str], Tensor]  # site -> [b, t, f]


class Dense:
    """An autoencoder of another kind: dense codes, no module, in float64."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(2)
        self.W_dec = torch.randn(F, D, generator=generator, dtype=torch.float64)

    def encode(self, x: Tensor) -> Tensor:
        return (x @ self.W_dec.T - 1.0).relu()

    def decode(self, code: Tensor) -> Tensor:
        return code @ self.W_dec + 0.5


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    return families.in_float64("llama")


def code(sae: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        out = sae.encode(x.flatten(0, 1))
    return (out if isinstance(out, Tensor) else out.to_dense()).double().unflatten(0, x.shape[:2])


def added(
    model: nn.Module,
    at: str,
    base: Tensor,
    metric: Callable[[Tensor], Tensor],
    vector: Tensor,
    mask: Tensor | None = None,
) -> Tensor:
    """[b]: the metric with vector [b, t, d] added at a site."""
    with torch.no_grad():
        patches = [(at, lambda x: x + vector)]
        return metric(run_patched(model, base, patches, attention_mask=mask))


def by_hand(
    model: nn.Module,
    found: Sweep,
    sae: Any,
    at: str,
    base: Tensor,
    change: Tensor,
    metric: Callable[[Tensor], Tensor],
    mask: Tensor | None = None,
) -> Tensor:
    """What `found.by_prompt` has to be where the code [b, t, f] changes by `change`."""
    out = []
    for cell in itertools.product(*found.values):
        where = dict(zip(found.axes, cell, strict=True))
        some = torch.zeros_like(change)
        here = (slice(None), where.get("position", slice(None)), where["feature"])
        some[here] = change[here]
        some = some if mask is None else some * mask[..., None]
        out.append(added(model, at, base, metric, some @ sae.W_dec.detach().double(), mask))
    return torch.stack(out).unflatten(0, found.scores.shape)


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("engine", ["native", "blocks"])
@pytest.mark.parametrize("sae", [SAE, Dense()], ids=["TopK", "dense"])
def test_a_feature_is_replaced_and_the_rest_of_the_code_and_the_error_stay(llama, sae, engine):
    for at, axes, direction in (
        ("resid_post.2", ("position", "feature"), "denoise"),
        ("resid_mid.0", ("feature",), "noise"),
    ):
        found = sweep_features(
            llama, sae, at, CLEAN, CORRUPTED, everything, axes=axes, direction=direction,
            engine=engine, progress=False,
        )  # fmt: skip
        base, source = (CORRUPTED, CLEAN) if direction == "denoise" else (CLEAN, CORRUPTED)
        own, other = (code(sae, capture(llama, at, tokens)[at]) for tokens in (base, source))
        change = other - own
        ids = change.flatten(0, 1).ne(0).any(0).nonzero().flatten()
        assert found.axes == axes
        assert found.values[-1] == tuple(ids.tolist())
        assert found.base == ("corrupted" if direction == "denoise" else "clean")
        assert (found.engine, found.site) == (engine, f"features of {at}")
        close(found.by_prompt, by_hand(llama, found, sae, at, base, change, everything))
        written = change[..., ids].ne(0).sum(0)
        written = written if "position" in axes else written.sum(0)
        assert torch.equal(found.written, written)


@pytest.mark.parametrize("engine", ["native", "blocks"])
def test_features_are_taken_out_scaled_and_added_to(llama, engine):
    at = "mlp_out.1"
    own = code(SAE, capture(llama, at, CLEAN)[at])
    for op, factor, change in (
        ("zero", 0.0, -own), ("scale", 1.5, 0.5 * own), ("scale", 0.0, -own),
        ("add", -2.0, torch.full_like(own, -2.0)),
    ):  # fmt: skip
        for axes in (("feature",), ("position", "feature")):
            found = sweep_features(
                llama, SAE, at, CLEAN, None, everything, op=op, factor=factor,
                features=[3, 7, 20], axes=axes, engine=engine, progress=False,
            )  # fmt: skip
            wanted = by_hand(llama, found, SAE, at, CLEAN, change, everything)
            # Codes are float32 and so is what is added to them.
            torch.testing.assert_close(found.by_prompt, wanted, rtol=1e-6, atol=1e-6)
            assert found.base == "clean"
            assert found.corrupted.numel() == 0
            assert found.values[-1] == (3, 7, 20)
    # Beside corrupted prompts the base run is theirs.
    found = sweep_features(llama, SAE, at, CLEAN, CORRUPTED, everything, op="zero", progress=False)
    own = code(SAE, capture(llama, at, CORRUPTED)[at])
    close(found.by_prompt, by_hand(llama, found, SAE, at, CORRUPTED, -own, everything))
    assert found.base == "corrupted"


def test_chosen_positions_are_an_axis_or_what_is_patched_at_once(llama):
    given = (llama, SAE, "resid_pre.1", CLEAN, CORRUPTED, everything)
    every = sweep_features(*given, axes=("position", "feature"), progress=False)
    some = sweep_features(*given, axes=("position", "feature"), positions=[3, 1], progress=False)
    assert some.values[0] == (3, 1)
    place = [every.values[1].index(feature) for feature in some.values[1]]
    assert torch.equal(some.by_prompt, every.by_prompt[[3, 1]][:, place])
    assert len(sweep_features(*given, positions=[0], features=[1], progress=False).scores) == 1
    at_once = sweep_features(*given, positions=[1, 2], progress=False)
    at = "resid_pre.1"
    change = code(SAE, capture(llama, at, CLEAN)[at]) - code(SAE, capture(llama, at, CORRUPTED)[at])
    change[:, [0, 3, 4]] = 0.0
    close(at_once.by_prompt, by_hand(llama, at_once, SAE, at, CORRUPTED, change, everything))
    # A feature that changes elsewhere alone is none of the cells.
    assert set(at_once.values[0]) == set(change.flatten(0, 1).any(0).nonzero().flatten().tolist())
    assert bool(at_once.written.min() > 0)


@pytest.mark.parametrize("engine", ["native", "blocks"])
def test_padding_has_no_features_and_no_error(llama, engine):
    clean = changed(CLEAN, (0, 0), (1, 4))  # at padding
    at = "resid_pre.1"

    def visible(logits: Tensor) -> Tensor:
        weights = torch.linspace(-1, 1, logits[0].numel()).view(logits[0].shape).to(logits)
        return torch.where(MASK[..., None] == 1, logits * weights, 0.0).sum((1, 2))

    how = {"attention_mask": MASK, "engine": engine, "progress": False}
    found = sweep_features(llama, SAE, at, clean, CORRUPTED, visible, **how)
    own, other = (
        capture(llama, at, tokens, attention_mask=MASK)[at] for tokens in (CORRUPTED, clean)
    )
    change = code(SAE, other) - code(SAE, own)
    wanted = by_hand(llama, found, SAE, at, CORRUPTED, change, visible, MASK)
    close(found.by_prompt, wanted)
    seen = (change * MASK[..., None]).flatten(0, 1).any(0).nonzero().flatten()
    assert found.values == (tuple(seen.tolist()),)
    error = sweep_error(llama, SAE, at, clean, CORRUPTED, visible, **how)
    assert error.written[0] <= 1
    assert error.written[4] <= 1
    assert float(error.by_prompt[4, 1]) == float(error.corrupted[1])


@pytest.mark.parametrize("sae", [SAE, Dense()], ids=["TopK", "dense"])
@pytest.mark.parametrize(
    "at", ["resid_pre.1", "resid_mid.0", "resid_post.2", "attn_out.1", "mlp_out.2"]
)
def test_the_error_is_patched_and_with_all_features_it_is_the_whole_site(llama, sae, at):
    def left_out(x: Tensor) -> Tensor:
        with torch.no_grad():
            return x - sae.decode(sae.encode(x.flatten(0, 1))).to(x).view_as(x)

    own, other = (capture(llama, at, tokens)[at] for tokens in (CORRUPTED, CLEAN))
    error = left_out(other) - left_out(own)
    found = sweep_error(llama, sae, at, CLEAN, CORRUPTED, last_difference, progress=False)
    for position in range(T):
        here = torch.zeros_like(error)
        here[:, position] = error[:, position]
        wanted = added(llama, at, CORRUPTED, last_difference, here)
        # mt.SAE decodes in float32, in other batches to other bits.
        torch.testing.assert_close(found.by_prompt[position], wanted, rtol=1e-5, atol=1e-5)
    assert (found.axes, found.values, found.site) == (
        ("position",), (tuple(range(T)),), f"error of {at}"
    )  # fmt: skip
    # All features and the error together are the site.
    features = (code(sae, other) - code(sae, own)) @ sae.W_dec.detach().double()
    writes = [Write(at, op="add", value=v) for v in (features, error)]
    both, site = patch(llama, CORRUPTED, CLEAN, last_difference, [writes, [Write(at)]])
    torch.testing.assert_close(both, site, rtol=1e-6, atol=1e-6)
    whole = sweep(
        llama, CLEAN, CORRUPTED, last_difference, at[:-2], axes=("layer",), layers=[int(at[-1])],
        progress=False,
    )  # fmt: skip
    torch.testing.assert_close(site, whole.by_prompt[0], rtol=1e-9, atol=1e-9)


def test_noising_and_models_in_float32(llama):
    how = {"at": "resid_pre.1", "metric": last_difference, "progress": False}
    for run in (sweep_error, sweep_features):
        noised = run(llama, SAE, clean=CLEAN, corrupted=CORRUPTED, direction="noise", **how)
        denoised = run(llama, SAE, clean=CORRUPTED, corrupted=CLEAN, **how)
        assert (noised.base, denoised.base) == ("clean", "corrupted")
        assert torch.equal(noised.by_prompt, denoised.by_prompt)
        single = run(families.build("llama"), SAE, clean=CORRUPTED, corrupted=CLEAN, **how)
        assert single.scores.dtype == torch.float32
        assert single.values == denoised.values
        torch.testing.assert_close(single.scores.double(), denoised.scores, rtol=1e-4, atol=1e-4)


# Resuming


@pytest.mark.parametrize("sae", [SAE, Dense()], ids=["module", "no module"])
def test_an_interrupted_sweep_goes_on_and_one_with_another_decoder_does_not(llama, sae, tmp_path):
    path = tmp_path / "features"
    how = {"op": "scale", "factor": 0.5, "resume": path, "progress": False}
    given = ("resid_pre.1", CLEAN, None, last_difference)
    first = sweep_features(llama, sae, *given, **how)
    assert torch.equal(sweep_features(llama, sae, *given, **how).by_prompt, first.by_prompt)
    other = copy.deepcopy(sae)
    with torch.no_grad():
        other.W_dec += 0.01
    for again, change in ((other, {}), (sae, {"factor": 0.25}), (sae, {"positions": [1, 2]})):
        with pytest.raises(StoreError, match="belongs to another sweep"):
            sweep_features(llama, again, *given, **how | change)


# Refusals


def test_what_cannot_be_patched_is_refused(llama):
    def refuses(kind: type[Exception], message: str, *, run=sweep_features, **how: Any) -> None:
        given = {"sae": SAE, "at": "resid_pre.1", "clean": CLEAN, "corrupted": CORRUPTED}
        given |= {"metric": last_difference, "progress": False}
        with pytest.raises(kind) as raised:
            run(llama, **given | how)
        assert str(raised.value) == f"{run.__name__}: {message}"

    refuses(
        ArgumentError, "op must be one of 'replace', 'zero', 'scale', 'add', got 'mean'.",
        op="mean",
    )  # fmt: skip
    refuses(
        ArgumentError,
        "axes must be ('feature',) or ('position', 'feature'), got ('feature', 'position').",
        axes=("feature", "position"),
    )
    refuses(
        ArgumentError, "op 'zero' takes no factor, got 2.0. Use 'scale' or 'add'.",
        op="zero", factor=2.0,
    )  # fmt: skip
    for run in (sweep_features, sweep_error):
        refuses(
            ArgumentError,
            "site must be one of 'resid_pre', 'resid_mid', 'resid_post', 'attn_out', 'mlp_out', "
            "got 'z'.",
            run=run, at="z.1",
        )  # fmt: skip
        for at in ("resid_pre.3", "resid_pre", "resid_pre.x"):
            refuses(
                SiteError, f"no site {at!r}; the model has resid_pre.0 ... resid_pre.2.",
                run=run, at=at,
            )  # fmt: skip
        refuses(
            ShapeError, "the autoencoder has d=16, but resid_pre.1 has d=24.", run=run,
            sae=mt.SAE(16, 32, mt.TopK(2)),
        )  # fmt: skip
        refuses(
            ArgumentError,
            "values come from the other run, got corrupted=None. Pass both runs.",
            run=run, corrupted=None,
        )  # fmt: skip
        refuses(
            ArgumentError, "direction must be one of 'denoise', 'noise', got 'both'.", run=run,
            direction="both",
        )  # fmt: skip
    refuses(ArgumentError, "indices must lie in [0, n_features=40), got 40.", features=[1, 40])
    refuses(ArgumentError, "indices must lie in [0, t=5), got -1.", positions=[-1])
    empty = "is an empty list. Name at least one, or leave it out."
    refuses(ArgumentError, f"features {empty}", features=[])
    refuses(ArgumentError, f"positions {empty}", positions=[])
    refuses(
        ArgumentError, "no feature changes anywhere. Do both runs differ at this site?",
        corrupted=CLEAN,
    )  # fmt: skip
    refuses(
        ArgumentError,
        "no feature changes anywhere. Op 'add' with factor=0.0 leaves the code as it is.",
        op="add",
    )
