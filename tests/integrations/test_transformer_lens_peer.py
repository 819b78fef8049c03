"""Against TransformerLens: its models through our calls, our models through its calls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from microtome.errors import ArgumentError, SiteError
from microtome.integrations.transformer_lens import HookedModel, get_act_name, patching, rows
from microtome.testing import families

tl = pytest.importorskip("transformer_lens", reason="transformer-lens is not installed")
theirs = pytest.importorskip("transformer_lens.patching")
if not hasattr(tl, "HookedTransformer"):
    pytest.skip("this transformer-lens has no HookedTransformer", allow_module_level=True)

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:HookedTransformer is deprecated"),
]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
# Those with "every" run the other sweeps of their kind.
SWEEPS = (
    "get_act_patch_attn_head_all_pos_every",
    "get_act_patch_attn_head_by_pos_every",
    "get_act_patch_attn_head_k_by_pos",
    "get_act_patch_attn_head_pattern_by_pos",
    "get_act_patch_attn_head_pattern_dest_src_pos",
    "get_act_patch_attn_head_v_all_pos",
    "get_act_patch_block_every",
    "get_act_patch_resid_mid",
)


def metric(logits: Tensor) -> Tensor:
    return (logits[:, -1, 3] - logits[:, -1, 5]).mean() + logits[0, 1, 2]


def pair() -> tuple[Tensor, Tensor]:
    both = families.tokens(4, 3)
    return both[:2], both[2:]


def hooked_transformer(**sizes: Any) -> Any:
    config = tl.HookedTransformerConfig(
        **{
            "n_layers": 2, "d_model": 16, "n_ctx": 8, "d_head": 4, "n_heads": 4, "d_mlp": 32,
            "d_vocab": families.VOCABULARY, "act_fn": "gelu_new", "normalization_type": "LN",
            "seed": 0, "device": "cpu",
        } | sizes
    )  # fmt: skip
    return tl.HookedTransformer(config)


@pytest.fixture(scope="module")
def shared() -> tuple[Any, Any]:
    """A HookedTransformer whose heads share keys and values, and its clean cache."""
    model = hooked_transformer(n_key_value_heads=2)
    return model, model.run_with_cache(pair()[0])[1]


@pytest.fixture(scope="module")
def bridge(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The tiny GPT-2 of the tests under TransformerLens's own hooks."""
    from transformer_lens.model_bridge import TransformerBridge

    folder = tmp_path_factory.mktemp("gpt2")
    families.build("gpt2").save_pretrained(folder)
    return TransformerBridge.boot_transformers(
        str(folder), hf_model=families.build("gpt2"), device="cpu"
    )


def test_there_is_every_sweep_and_setter_of_transformer_lens():
    for name in dir(theirs):
        if name.startswith("get_act_patch") or name.endswith("_patch_setter"):
            assert name in patching.__all__, name


@pytest.mark.parametrize("layer", [None, 3])
def test_short_names_mean_the_same(layer: int | None):
    for name in ("z", "k6", "pre5", "resid_mid", "scale4ln1", "attn_logits", "key"):
        assert get_act_name(name, layer) == theirs.utils.get_act_name(name, layer)


@pytest.mark.parametrize("component", ["q", "k"])
def test_queries_and_keys_that_have_a_norm_are_patched_before_it(component: str, monkeypatch):
    sizes = {"normalization_type": "RMS", "positional_embedding_type": "rotary", "rotary_dim": 4}
    model = hooked_transformer(use_qk_norm=True, n_key_value_heads=2, **sizes)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.q_norm.w.uniform_(0.5, 2.0)
            block.attn.k_norm.w.uniform_(0.5, 2.0)
    clean, corrupted = pair()
    _, cache = model.run_with_cache(clean)
    name = f"get_act_patch_attn_head_{component}_by_pos"
    wanted = getattr(theirs, name)(model, corrupted, cache, metric)
    monkeypatch.setattr(rows, "_said", False)
    found = getattr(patching, name)(model, corrupted, cache, metric, progress=False)
    torch.testing.assert_close(found, wanted, **CLOSE)
    assert not rows._said  # that is, it took the fast path


@pytest.mark.parametrize("sweep", SWEEPS)
def test_every_sweep_of_a_hooked_transformer_gives_its_numbers(shared: tuple[Any, Any], sweep: str):
    model, cache = shared
    corrupted = pair()[1]
    expected = getattr(theirs, sweep)(model, corrupted, cache, metric)
    found = getattr(patching, sweep)(model, corrupted, cache, metric, progress=False)
    torch.testing.assert_close(found, expected, **CLOSE)
    assert found.std() > 0


def test_a_setter_of_theirs_is_stock_and_one_of_the_users_is_not(
    shared: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
):
    model, cache = shared
    corrupted = pair()[1]

    def double(act: Tensor, index: Any, clean: Tensor) -> Tensor:
        act[:, :, index[1]] = 2 * clean[:, :, index[1]]
        return act

    monkeypatch.setattr(rows, "_said", False)
    given = (model, corrupted, cache, metric)
    stock = theirs.layer_head_vector_patch_setter
    patching.generic_activation_patch(*given, stock, "z", ("layer", "head"), progress=False)
    expected = theirs.generic_activation_patch(*given, double, "z", ("layer", "head"))
    with pytest.warns(UserWarning, match="'double' is no stock one"):
        found = patching.generic_activation_patch(
            *given, double, "z", ("layer", "head"), progress=False
        )
    torch.testing.assert_close(found, expected, **CLOSE)


def test_a_plain_model_shows_what_the_bridge_shows_under_the_same_names(bridge: Any):
    clean, _ = pair()
    plain = HookedModel(families.build("gpt2"))
    logits, cache = plain.run_with_cache(clean)
    expected_logits, expected = bridge.run_with_cache(clean)
    torch.testing.assert_close(logits, expected_logits, **CLOSE)
    for name, value in cache.items():
        torch.testing.assert_close(value, expected[name], **CLOSE, msg=name)
    loss = bridge(clean, return_type="loss")
    torch.testing.assert_close(plain(clean, return_type="loss"), loss, **CLOSE)


@pytest.mark.parametrize("sweep", ["resid_pre", "mlp_out", "attn_head_out_by_pos"])
def test_plain_model_bridge_and_their_own_sweeps_agree(bridge: Any, sweep: str):
    clean, corrupted = pair()
    name = f"get_act_patch_{sweep}"
    plain = HookedModel(families.build("gpt2"))
    cache, its = plain.run_with_cache(clean)[1], bridge.run_with_cache(clean)[1]
    expected = getattr(theirs, name)(plain, corrupted, cache, metric)  # their loop, our model
    for model, kept in ((plain, cache), (plain.model, its), (bridge, its)):
        found = getattr(patching, name)(model, corrupted, kept, metric, progress=False)
        torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("component", ["q", "k", "v"])
def test_a_direct_path_is_their_forked_input_plus_the_write_of_the_source(component: str):
    model = hooked_transformer(n_layers=3)
    clean, corrupted = pair()
    cleans, corrupts = (model.run_with_cache(tokens)[1] for tokens in (clean, corrupted))
    found = patching.get_act_patch_direct_path_all_sources(
        model, corrupted, cleans, corrupts, metric, component, verbose=False
    )
    assert found.shape == (3, 4, 3, 4)
    model.set_use_split_qkv_input(True)
    for source, head in ((0, 2), (1, 3)):
        delta = (cleans["z", source] - corrupts["z", source])[:, :, head] @ model.W_O[source, head]
        expected = torch.zeros(3, 4)
        for layer in range(source + 1, 3):
            for h in range(4):

                def add(fork: Tensor, hook: Any, h: int = h, delta: Tensor = delta) -> Tensor:
                    fork = fork.clone()
                    fork[:, :, h] += delta
                    return fork

                at = f"blocks.{layer}.hook_{component}_input"
                patched = model.run_with_hooks(corrupted, fwd_hooks=[(at, add)])
                expected[layer, h] = metric(patched).item()
        torch.testing.assert_close(found[source, head], expected, **CLOSE)
    assert not found[1:, :, 0].any()


def test_a_direct_path_into_shared_keys_and_unknown_hooks_are_refused(shared: tuple[Any, Any]):
    model, cache = shared
    corrupted = pair()[1]
    given = (model, corrupted, cache, cache, metric)
    with pytest.raises(ArgumentError, match=r"they share n_key_value_heads=2. component='q' is av"):
        patching.get_act_patch_direct_path(*given, 0, 0, "k")
    with pytest.raises(ArgumentError, match=r"src_head must be between 0 and n_heads - 1=3, got"):
        patching.get_act_patch_direct_path(*given, 0, 4)
    with pytest.raises(
        SiteError, match=r"no hook matches 'blocks.0.hook_resid_prae'; .* Closest: "
    ):
        patching.generic_activation_patch(
            *given[:3], metric, patching.layer_pos_patch_setter, "resid_prae", ("layer", "pos")
        )
