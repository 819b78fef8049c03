"""What a sweep can be given and asked for, and what it says of bad input."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from microtome.errors import (
    ArgumentError,
    DtypeError,
    NonFiniteError,
    PackageError,
    ShapeError,
    SiteError,
)
from microtome.integrations.transformer_lens import HookedModel, patching, rows
from microtome.models import ToyConfig, ToyModel, capture
from microtome.testing import families

pytestmark = pytest.mark.usefixtures("one_thread")


def metric(logits: Tensor) -> Tensor:
    return (logits[:, -1, 3] - logits[:, -1, 5]).mean() + logits[0, 1, 2]


def pair(b: int = 2, t: int = 4) -> tuple[Tensor, Tensor]:
    both = families.tokens(2 * b, t)
    return both[:b], both[b:]


@pytest.fixture
def model() -> ToyModel:
    return ToyModel(ToyConfig(num_hidden_layers=2, hidden_size=16, vocab_size=50))


@pytest.fixture
def cache(model: ToyModel) -> Any:
    return HookedModel(model).run_with_cache(pair()[0])[1]


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "_said", True)


def test_cells_can_be_listed_and_come_back_with_the_scores(
    model: ToyModel, cache: Any, monkeypatch: pytest.MonkeyPatch
):
    pandas = pytest.importorskip("pandas")
    _, corrupted = pair()
    given = (model, corrupted, cache, metric)
    grid, frame = patching.get_act_patch_resid_pre(*given, return_index_df=True, progress=False)
    assert list(frame.columns) == ["layer", "pos"]
    assert frame.equals(patching.make_df_from_ranges((2, 4), ("layer", "pos")))
    rows_of = pandas.DataFrame({"layer": [1, 0, 1], "pos": [2, 3, -1]})
    for listed in (rows_of, [(1, 2), (0, 3), (1, -1)]):
        found = patching.get_act_patch_resid_pre(
            *given, index_axis_names=None, index_df=listed, progress=False
        )
        torch.testing.assert_close(found, torch.stack([grid[1, 2], grid[0, 3], grid[1, 3]]))
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(
        PackageError, match=r"index_df needs pandas. Install it: pip install pandas"
    ):
        patching.get_act_patch_resid_pre(*given, return_index_df=True, progress=False)
    none = patching.get_act_patch_resid_pre(
        *given, index_axis_names=None, index_df=[], progress=False
    )
    assert none.shape == (0,)


def test_a_cache_may_be_a_dict_activations_or_one_row(model: ToyModel, cache: Any):
    clean, corrupted = pair()
    acts = capture(model, ["resid_pre.0", "resid_pre.1"], clean)
    kept = dict(cache.items())
    scores = [
        patching.get_act_patch_resid_pre(model, corrupted, given, metric, progress=False)
        for given in (cache, kept, acts)
    ]
    assert torch.equal(scores[0], scores[1])
    torch.testing.assert_close(scores[0], scores[2])
    one = HookedModel(model).run_with_cache(clean[:1])[1]
    twice = HookedModel(model).run_with_cache(clean[:1].expand(2, -1))[1]
    a, b = (
        patching.get_act_patch_resid_pre(model, corrupted, given, metric, progress=False)
        for given in (one, twice)
    )
    torch.testing.assert_close(a, b)


def test_values_per_prompt_several_metrics_and_a_baseline(model: ToyModel, cache: Any):
    clean, corrupted = pair()

    def each(logits: Tensor) -> Tensor:
        return logits[:, -1, 3] - logits[:, -1, 5]

    def sweep(metric: Any, **options: Any) -> Any:
        return patching.get_act_patch_mlp_out(
            model, corrupted, cache, metric, progress=False, **options
        )

    scalar = sweep(lambda logits: each(logits).mean())
    torch.testing.assert_close(sweep(each, reduce="mean"), scalar)
    result = sweep(each, reduce="none", baseline=True)
    assert result.values.shape == (2, 4, 2)
    torch.testing.assert_close(result.mean(), scalar)
    base = each(model(corrupted).logits).detach()
    torch.testing.assert_close(result.baseline, base)
    torch.testing.assert_close(result.effect(), result.values - base)
    goal = each(model(clean).logits).detach()
    torch.testing.assert_close(result.normalized(goal), (result.values - base) / (goal - base))
    spread = (result.values[..., 0] - result.values[..., 1]).abs() / 2
    torch.testing.assert_close(result.stderr(), spread)
    several = sweep({"a": each, "b": lambda logits: -each(logits)}, reduce="mean", baseline=True)
    assert several.values.shape == (2, 2, 4)
    torch.testing.assert_close(several["a"].values, -several["b"].values)
    torch.testing.assert_close(several["b"].effect(), -several.effect()[0])
    assert several.reduced
    with pytest.raises(SiteError, match=r"no metric 'c'; there is 'a', 'b'"):
        several["c"]
    with pytest.raises(ArgumentError, match=r"stderr: needs one value per prompt"):
        several.stderr()
    with pytest.raises(ArgumentError, match=r"effect: needs a baseline. Sweep with baseline=True"):
        sweep(each, reduce="none").effect()
    with pytest.raises(ShapeError, match=r"clean_baseline must have the shape of baseline, \[2\]"):
        result.normalized(goal[:1])


def test_a_mask_is_passed_on_for_every_cell():
    plain = families.build("gpt2")
    clean, corrupted = pair()
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    _, cache = HookedModel(plain).run_with_cache(clean, attention_mask=mask)
    found = patching.get_act_patch_mlp_out(
        plain, corrupted, cache, metric, attention_mask=mask, progress=False
    )

    def patch(act: Tensor, hook) -> None:
        act[:, 2] = cache[hook.name][:, 2]

    alone = HookedModel(plain).run_with_hooks(
        corrupted, fwd_hooks=[("mlp_out.1", patch)], attention_mask=mask
    )
    torch.testing.assert_close(found[1, 2], metric(alone).detach())


@pytest.mark.usefixtures("quiet")
def test_bad_input_is_answered_in_words(model: ToyModel, cache: Any):
    clean, corrupted = pair()

    def sweep(
        *, tokens=corrupted, cache=cache, metric=metric, setter=None, name="resid_pre", **options
    ):
        setter = setter or patching.layer_pos_patch_setter
        options.setdefault("index_axis_names", ("layer", "pos"))
        return patching.generic_activation_patch(
            model, tokens, cache, metric, setter, name, progress=False, **options
        )

    with pytest.raises(
        SiteError, match=r"no hook matches 'blocks.0.hook_resid_pr'; .* Closest: 'bl"
    ):
        sweep(name="resid_pr")
    lacking = HookedModel(model).run_with_cache(clean, names_filter="resid_pre.0")[1]
    with pytest.raises(
        SiteError,
        match=r"clean_cache lacks 'blocks.1.hook_resid_pre'; it holds 'blocks.0.hook_resid_pre'. "
        r"Make it with run_with_cache\(clean_tokens\)",
    ):
        sweep(cache=lacking)
    with pytest.raises(
        ShapeError, match=r"must have the same length, got 4 positions .* and 3 corr"
    ):
        sweep(tokens=corrupted[:, :3])
    with pytest.raises(ShapeError, match=r"the same number of rows, got 2 in .* and 3 rows"):
        sweep(tokens=corrupted[[0, 1, 1]])
    flat = {name: value[0] for name, value in cache.items()}
    with pytest.raises(ShapeError, match=r"must have 3 axes, got shape \[4, 16\]. Keep the batch"):
        sweep(cache=flat)
    with pytest.raises(
        ShapeError, match=r"metric 'metric' must return one number, got shape \[2\]"
    ):
        sweep(metric=lambda logits: logits[:, -1, 0])
    with pytest.raises(ShapeError, match=r"must return one value per row, \[2\], got shape \[\]"):
        sweep(reduce="none")
    with pytest.raises(NonFiniteError, match=r"'metric' returned NaN at index \[0, 0\]. Check the"):
        sweep(metric=lambda logits: logits.sum() * torch.nan)
    with pytest.raises(DtypeError, match=r"metric 'metric' must return a number, got NoneType"):
        sweep(metric=lambda logits: None)
    with pytest.raises(
        ArgumentError, match=r"must be a function of logits .* got int for 'metric'"
    ):
        sweep(metric=3)
    with pytest.raises(ArgumentError, match=r"index_axis_names must be of 'layer', .* got 'row'"):
        sweep(index_axis_names=("layer", "row"))
    with pytest.raises(ArgumentError, match=r"the first axis must be 'layer', got \['pos'\]"):
        sweep(index_axis_names=("pos",))
    with pytest.raises(
        ArgumentError, match=r"pass index_axis_names, .*, or index_df, and not both"
    ):
        sweep(index_df=[(0, 1)])
    with pytest.raises(ArgumentError, match=r"an index must be \[layer, pos\], got 3 entries"):
        sweep(index_axis_names=("layer", "pos", "head"))
    with pytest.raises(
        ArgumentError, match=r"pos must be below 4, got pos=4 in the index \[0, 4\]"
    ):
        sweep(index_axis_names=None, index_df=[(0, 4)])
    with pytest.raises(SiteError, match=r"no hook matches 'blocks.2.hook_resid_pre'"):
        sweep(index_axis_names=None, index_df=[(2, 0)])
    with pytest.raises(ArgumentError, match=r"index_df must be a pandas DataFrame .* got int"):
        sweep(index_axis_names=None, index_df=3)
    with pytest.raises(ArgumentError, match=r"reduce must be one of 'scalar', 'mean', 'none'"):
        sweep(reduce="sum")
    with pytest.raises(ArgumentError, match=r"cells_per_forward must be between 1 and"):
        sweep(cells_per_forward=0)
    with pytest.raises(ArgumentError, match=r"return_index_df goes with a tensor"):
        sweep(return_index_df=True, baseline=True)
    with pytest.raises(
        ShapeError, match=r"patch_setter must return shape \[2, 4, 16\] at 'blocks.0"
    ):
        sweep(setter=lambda act, index, clean: act[:, :2])
    with pytest.raises(DtypeError, match=r"patch_setter must return the activation, got int"):
        sweep(setter=lambda act, index, clean: 1)
    with pytest.raises(ShapeError, match=r"corrupted_tokens must be \[b, t\], got shape \[4\]"):
        sweep(tokens=corrupted[0])
    with pytest.raises(
        ArgumentError, match=r"model must be a Hugging Face or TransformerLens model"
    ):
        patching.get_act_patch_resid_pre("gpt2", corrupted, cache, metric)


def test_a_native_sweep_shows_a_bar_over_cells_unless_told_not_to(capsys):
    model = HookedModel(families.build("llama"))
    both = families.tokens(2, 4)
    _, cache = model.run_with_cache(both[:1], names_filter=lambda name: name.endswith("hook_z"))

    def shown(**how: bool) -> str:
        capsys.readouterr()
        patching.get_act_patch_attn_head_out_all_pos(
            model, both[1:], cache, lambda logits: logits[0, -1, 3], **how
        )
        return capsys.readouterr().err

    assert "12/12" in shown()
    assert shown(progress=False) == ""
