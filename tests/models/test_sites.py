"""Canonical sites of every family, against hidden states, hand-made hooks and the block's sums."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from microtome.errors import ArgumentError, SiteError
from microtome.models import ToyConfig, ToyModel, capture, sites, splice
from microtome.testing import families

pytest.importorskip("transformers", reason="transformers is not installed")
pytestmark = pytest.mark.usefixtures("one_thread")
LAYERS, WIDTH, HEADS = families.LAYERS, families.WIDTH, families.HEADS
PARALLEL = {"gpt_neox"}


@pytest.fixture(params=families.MODELS, scope="module")
def named(request: pytest.FixtureRequest) -> tuple[str, nn.Module]:
    return request.param, families.build(request.param)


def fused(model: nn.Module) -> list[str]:
    """The sites that can be read under fused attention, i.e. all but the pattern."""
    return [site for site in sites(model) if not site.startswith("pattern")]


def test_sites_lists_every_kind_and_layer(named):
    name, model = named
    kinds = ["resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out"]
    kinds += ["q", "k", "v", "pattern", "z", "neurons"]
    if name in PARALLEL:
        kinds.remove("resid_mid")
    assert sites(model) == [f"{kind}.{layer}" for kind in kinds for layer in range(LAYERS)]


def test_resid_pre_and_resid_post_are_the_models_own_hidden_states(named):
    _, model = named
    tokens = families.tokens()
    with torch.no_grad():
        hidden = model(input_ids=tokens, output_hidden_states=True).hidden_states
    acts = capture(model, fused(model), tokens)
    for layer in range(LAYERS):
        assert torch.equal(acts[f"resid_pre.{layer}"], hidden[layer])
    for layer in range(LAYERS - 1):  # the last hidden state is taken after the final norm
        assert torch.equal(acts[f"resid_post.{layer}"], hidden[layer + 1])


def test_attn_out_and_mlp_out_are_what_is_added_to_the_stream(named):
    name, model = named
    acts = capture(model, fused(model), families.tokens())
    for layer in range(LAYERS):
        pre, post = acts[f"resid_pre.{layer}"], acts[f"resid_post.{layer}"]
        attn, mlp = acts[f"attn_out.{layer}"], acts[f"mlp_out.{layer}"]
        if name == "bert":
            block = model.bert.encoder.layer[layer]
            mid = acts[f"resid_mid.{layer}"]
            assert torch.equal(mid, block.attention.output.LayerNorm(attn + pre))
            assert torch.equal(post, block.output.LayerNorm(mlp + mid))
        elif name in PARALLEL:
            torch.testing.assert_close(pre + attn + mlp, post)
        else:
            torch.testing.assert_close(acts[f"resid_mid.{layer}"], pre + attn)
            torch.testing.assert_close(post, acts[f"resid_mid.{layer}"] + mlp)
        assert attn.abs().max() > 0
        assert mlp.abs().max() > 0


PROJECTIONS = {
    "gpt2": "transformer.h.1.attn.c_proj",
    "gpt_neox": "gpt_neox.layers.1.attention.dense",
    "gpt_neox_sequential": "gpt_neox.layers.1.attention.dense",
    "bert": "bert.encoder.layer.1.attention.output.dense",
    "gemma3_with_images": "model.language_model.layers.1.self_attn.o_proj",
}


def test_z_is_the_input_of_the_output_projection_by_head(named):
    name, model = named
    path = PROJECTIONS.get(name, "model.layers.1.self_attn.o_proj")
    seen = []
    projection = model.get_submodule(path)
    handle = projection.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(input_ids=families.tokens())
    handle.remove()
    acts = capture(model, ["z.1", f"{path}:in", path], families.tokens())
    assert acts["z.1"].shape[:3] == (3, 7, HEADS)
    assert torch.equal(acts["z.1"].flatten(2), seen[0])
    assert torch.equal(acts[f"{path}:in"], seen[0])
    assert torch.equal(acts[path], projection(seen[0]))


def test_splicing_the_identity_changes_no_bit_and_zero_does(named):
    _, model = named
    tokens = families.tokens()
    with torch.no_grad():
        clean = model(input_ids=tokens).logits
        for site in (site for site in fused(model) if site.endswith(".1")):
            with splice(model, site, lambda x: x.clone()):
                assert torch.equal(model(input_ids=tokens).logits, clean), site
            with splice(model, site, torch.zeros_like):
                assert not torch.equal(model(input_ids=tokens).logits, clean), site
        assert torch.equal(model(input_ids=tokens).logits, clean)


def test_a_stream_spliced_from_another_run_continues_as_that_run(named):
    name, model = named
    mine, other = families.tokens(), families.tokens().flip(0)
    acts = capture(model, fused(model), other)
    kinds = (
        ["resid_pre", "resid_post"]
        if name in PARALLEL
        else ["resid_pre", "resid_mid", "resid_post"]
    )
    with torch.no_grad():
        wanted = model(input_ids=other).logits
        for site in (f"{kind}.1" for kind in kinds):
            with splice(model, site, lambda _, site=site: acts[site]):
                assert torch.equal(model(input_ids=mine).logits, wanted), site


def test_a_site_beyond_the_last_layer_names_the_range_and_the_closest():
    model = ToyModel()
    with pytest.raises(SiteError) as caught:
        capture(model, "resid_pre.12", families.tokens())
    assert str(caught.value) == (
        "capture: no site matches 'resid_pre.12'; the model has resid_pre.0 ... resid_pre.3. "
        "Closest: 'resid_pre.3'."
    )


def test_a_misspelt_site_lists_all_kinds_and_the_closest():
    with pytest.raises(SiteError) as caught:
        capture(ToyModel(ToyConfig(num_hidden_layers=1)), "residpre.0", families.tokens())
    assert str(caught.value) == (
        "capture: no site matches 'residpre.0'; the model has resid_pre.0, resid_mid.0, "
        "resid_post.0, attn_out.0, mlp_out.0, q.0, k.0, v.0, pattern.0, z.0, neurons.0 and "
        "module paths. "
        "Closest: 'resid_pre.0'."
    )


def test_a_parallel_model_says_why_it_has_no_resid_mid():
    with pytest.raises(SiteError, match="run in parallel, so no stream lies between them"):
        capture(families.build("gpt_neox"), "resid_mid.0", families.tokens())


def test_an_unknown_architecture_points_to_module_paths():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    with pytest.raises(SiteError, match="Sequential is no architecture") as caught:
        sites(model)
    assert "Name module paths instead: '0' (output) or '0:in' (input)." in str(caught.value)
    with pytest.raises(SiteError, match=r"no site matches 'resid_pre\.0'; Sequential is no"):
        capture(model, "resid_pre.0", torch.zeros(1, 4))


def test_a_model_without_blocks_is_an_error():
    model = ToyModel()
    model.h = nn.ModuleList()
    with pytest.raises(SiteError, match="ToyModel has no blocks"):
        sites(model)
    with pytest.raises(SiteError, match="it has no submodules"):
        sites(nn.ReLU())


def test_names_that_are_no_names_are_an_error():
    for wrong in ([], [3]):
        with pytest.raises(ArgumentError, match="sites must be a name or a list of names"):
            capture(ToyModel(), wrong, families.tokens())
    with (
        pytest.raises(ArgumentError, match="sites must be a name"),
        splice(ToyModel(), ["z.0", 1], torch.relu),
    ):
        pass


def test_headless_and_wrapped_models_have_the_same_sites():
    model = families.build("gpt2")
    wrapped = nn.ModuleDict({"inner": model})
    wrapped.config = model.config
    assert sites(model.transformer) == sites(model) == sites(wrapped)


def test_a_name_is_no_model_and_a_number_no_site():
    for call in (sites, lambda model: capture(model, "resid_pre.0", families.tokens())):
        with pytest.raises(ArgumentError, match=r"must be an nn\.Module, got 'gpt2'\. Load"):
            call("gpt2")
    with pytest.raises(ArgumentError, match=r"must be a name or a list of names .*, got 3\."):
        capture(ToyModel(), 3, families.tokens())
