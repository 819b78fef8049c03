"""TransformerLens's names and calls over plain models: caches, hooks, clean-up, messages."""

from __future__ import annotations

import doctest
import importlib
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from microtome.errors import ArgumentError, DtypeError, ShapeError, SiteError
from microtome.integrations.transformer_lens import ActivationCache, HookedModel, get_act_name
from microtome.integrations.transformer_lens.names import hook_name, site_name
from microtome.models import ByteTokenizer, ToyConfig, ToyModel, capture, sites
from microtome.testing import families

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENS = torch.arange(12).view(2, 6)
FAMILIES = ("gpt2", "llama", "gemma2", "gpt_neox", "bert", "gemma3_with_images")


@pytest.fixture
def model() -> HookedModel:
    return HookedModel(ToyModel(ToyConfig(num_hidden_layers=3, hidden_size=16)))


def hooks_on(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_short_names_are_spelled_out_as_transformer_lens_does():
    assert get_act_name("k", 6, "a") == get_act_name("k6") == "blocks.6.attn.hook_k"
    assert get_act_name("mlp_post", 2) == get_act_name("post2") == "blocks.2.mlp.hook_post"
    assert get_act_name("resid_mid", 0) == get_act_name("resid_mid0") == "blocks.0.hook_resid_mid"
    assert get_act_name("normalized", 27, "ln2") == "blocks.27.ln2.hook_normalized"
    assert get_act_name("scale4ln1") == "blocks.4.ln1.hook_scale"
    assert get_act_name("attn", 1) == "blocks.1.attn.hook_pattern"
    assert get_act_name("scale") == "ln_final.hook_scale"
    assert get_act_name("blocks.3.hook_in") == "blocks.3.hook_in"


def test_hook_names_and_sites_translate_both_ways():
    for site in ("resid_pre.0", "q.11", "pattern.2", "neurons.7", "mlp_out.3"):
        full = hook_name(site)
        assert full is not None
        assert site_name(full) == site
    assert hook_name("transformer.h.3") is None
    assert site_name("ln_final.hook_scale") is None


@pytest.mark.parametrize("name", FAMILIES)
def test_a_cache_holds_every_site_of_a_family_under_its_hook_name(name: str):
    plain = families.build(name)
    tokens = families.tokens()
    hooked = HookedModel(plain)
    with torch.no_grad():
        logits, cache = hooked.run_with_cache(tokens)
        expected = plain(input_ids=tokens, use_cache=False) if name != "bert" else plain(tokens)
    # Reading a pattern makes the model compute attention in plain steps, which rounds otherwise.
    torch.testing.assert_close(logits, expected.logits, rtol=1e-4, atol=1e-4)
    acts = capture(plain, sites(plain), tokens)
    assert [hook_name(site) in cache for site in sites(plain)] == [True] * len(sites(plain))
    assert set(cache) - {hook_name(site) for site in sites(plain)} == {"hook_embed"}
    for site in sites(plain):
        assert torch.equal(cache[str(hook_name(site))], acts[site]), site
    assert cache["embed"].shape == (3, 7, families.WIDTH)
    assert hooks_on(plain) == 0
    assert hooked.cfg.n_layers == families.LAYERS
    assert hooked.cfg.n_heads == families.HEADS


def test_a_cache_is_read_by_full_name_short_name_and_layer(model: HookedModel):
    _, cache = model.run_with_cache(TOKENS)
    assert isinstance(cache, ActivationCache)
    full = cache["blocks.2.attn.hook_z"]
    for key in (("z", 2), ("z", -1), "z2"):
        assert cache[key] is full
    assert cache.stack_activation("resid_pre").shape == (3, 2, 6, 16)
    assert cache.stack_activation("z", 2).shape == (2, 2, 6, 4, 4)
    assert ("resid_mid", 1) in cache
    assert "blocks.9.hook_resid_pre" not in cache
    assert next(iter(cache)) == "hook_embed"
    assert len(cache) == len(cache.keys()) == len(cache.values()) == len(dict(cache.items()))
    with pytest.raises(SiteError, match=r"holds no 'blocks.3.hook_resid_pre'.*Closest: 'blocks.\d"):
        cache["resid_pre", 3]


def test_a_filter_a_slice_and_a_dropped_batch_axis_shape_the_cache(model: HookedModel):
    names = ["blocks.0.attn.hook_z", "resid_post.1"]
    _, cache = model.run_with_cache(TOKENS[:1], names_filter=names, remove_batch_dim=True)
    assert {k: list(v.shape) for k, v in cache.items()} == {
        "blocks.0.attn.hook_z": [6, 4, 4],
        "blocks.1.hook_resid_post": [6, 16],
    }
    whole = model.run_with_cache(TOKENS, names_filter=names)[1]
    for positions, kept in (
        (-1, [5]),
        ((1, 4), [1, 2, 3]),
        ([0, 2], [0, 2]),
        (slice(4, None), [4, 5]),
    ):
        _, part = model.run_with_cache(TOKENS, names_filter=names, pos_slice=positions)
        for name in part:
            assert torch.equal(part[name], whole[name][:, kept])
    ends = model.run_with_cache(
        TOKENS, names_filter=lambda n: n.endswith("resid_post"), return_cache_object=False
    )[1]
    assert isinstance(ends, dict)
    assert list(ends) == [f"blocks.{layer}.hook_resid_post" for layer in range(3)]
    one = model.run_with_cache(TOKENS[:1])[1].remove_batch_dim()
    assert one["z", 0].shape == (6, 4, 4)


def test_a_run_that_stops_at_a_layer_gives_the_stream_and_what_lies_before(model: HookedModel):
    _, whole = model.run_with_cache(TOKENS)
    for stop, expected in ((0, ("resid_pre", 0)), (-1, ("resid_pre", 2)), (3, ("resid_post", 2))):
        stream, cache = model.run_with_cache(TOKENS, stop_at_layer=stop)
        assert torch.equal(stream, whole[expected])
        layers = {int(name.split(".")[1]) for name in cache if name.startswith("blocks")}
        assert layers == set(range(stop % 3 if stop != 3 else 3))
    assert hooks_on(model.model) == 0


def test_hooks_see_the_activation_and_where_they_are(model: HookedModel):
    seen: list[tuple[str, int, tuple[int, ...]]] = []

    def look(act: Tensor, hook) -> None:
        hook.ctx["calls"] = hook.ctx.get("calls", 0) + 1
        seen.append((hook.name, hook.layer(), tuple(act.shape)))

    plain = model(TOKENS)
    out = model.run_with_hooks(TOKENS, fwd_hooks=[("z.1", look), (lambda n: "mlp_out" in n, look)])
    assert torch.equal(out, plain)
    assert seen == [
        ("blocks.0.hook_mlp_out", 0, (2, 6, 16)),
        ("blocks.1.attn.hook_z", 1, (2, 6, 4, 4)),
        ("blocks.1.hook_mlp_out", 1, (2, 6, 16)),
        ("blocks.2.hook_mlp_out", 2, (2, 6, 16)),
    ]
    assert model.hook_dict["blocks.1.attn.hook_z"].ctx == {"calls": 1}
    model.clear_contexts()
    assert model.hook_dict["blocks.1.attn.hook_z"].ctx == {}


def test_a_returned_tensor_and_a_change_in_place_both_replace(model: HookedModel):
    def returned(act: Tensor, hook) -> Tensor:
        act = act.clone()
        act[:, 2] = 1.0
        return act

    def in_place(act: Tensor, hook) -> None:
        act[:, 2] = 1.0

    for name in (
        "hook_resid_pre",
        "hook_resid_mid",
        "hook_resid_post",
        "attn.hook_z",
        "hook_mlp_out",
    ):
        full = f"blocks.1.{name}"
        with torch.no_grad():
            a = model.run_with_hooks(TOKENS, fwd_hooks=[(full, returned)])
            b = model.run_with_hooks(TOKENS, fwd_hooks=[(full, in_place)])
            base = model(TOKENS)
        assert torch.equal(a, b), name
        assert not torch.equal(a, base), name
        assert torch.equal(a[:, :2], base[:, :2]), name  # causal


def test_hooks_at_several_places_of_a_block_all_take_effect_in_any_order(model: HookedModel):
    order = ["blocks.0.hook_resid_post", "blocks.0.hook_resid_mid", "blocks.0.hook_mlp_out"]

    def add(n: float):
        return lambda act, hook: act + n

    hooks = list(zip(order, (add(4.0), add(2.0), add(1.0)), strict=True))
    _, base = model.run_with_cache(TOKENS)
    mid = model.model.h[0].mlp(model.model.h[0].ln_2(base["resid_mid", 0] + 2.0))
    expected = base["resid_mid", 0] + 2.0 + mid + 1.0 + 4.0
    for some in (hooks, hooks[::-1]):
        with model.hooks(fwd_hooks=some):
            _, cache = model.run_with_cache(TOKENS)
        torch.testing.assert_close(cache["resid_pre", 1], expected)
        torch.testing.assert_close(cache["resid_mid", 0], base["resid_mid", 0] + 2.0)
        torch.testing.assert_close(cache["mlp_out", 0], mid + 1.0)


def test_functions_at_one_place_run_in_order_and_prepend_puts_one_first(model: HookedModel):
    calls: list[str] = []

    def note(word: str):
        return lambda act, hook: calls.append(word)

    model.add_hook("z.0", note("second"))
    model.add_hook("z.0", note("first"), prepend=True)
    model.run_with_hooks(TOKENS, fwd_hooks=[("z.0", note("third"))])
    assert calls == ["first", "second", "third"]


def test_added_hooks_stay_until_they_are_reset_and_permanent_ones_longer(model: HookedModel):
    base = model(TOKENS)

    def zero(act: Tensor, hook) -> Tensor:
        return 0 * act

    model.add_hook("attn_out.0", zero)
    model.add_perma_hook("attn_out.1", zero)
    assert hooks_on(model.model) == 0
    both = model(TOKENS)
    model.reset_hooks()
    one = model(TOKENS)
    model.reset_hooks(including_permanent=True)
    assert not torch.equal(both, one)
    assert not torch.equal(one, base)
    assert torch.equal(model(TOKENS), base)
    model.run_with_hooks(TOKENS, fwd_hooks=[("attn_out.0", zero)], reset_hooks_end=False)
    assert not torch.equal(model(TOKENS), base)
    model.reset_hooks()
    outer = model.hooks(fwd_hooks=[("attn_out.0", zero)])
    with outer, model.hooks(fwd_hooks=[("attn_out.1", zero)]) as inner:
        assert torch.equal(inner(TOKENS), both)
    assert torch.equal(model(TOKENS), base)


def test_loss_is_next_token_cross_entropy(model: HookedModel):
    logits, loss = model(TOKENS, return_type="both")
    logp = logits.detach().log_softmax(-1)
    by_hand = torch.tensor([[-logp[b, t, TOKENS[b, t + 1]] for t in range(5)] for b in range(2)])
    each = model(TOKENS, return_type="loss", loss_per_token=True)
    torch.testing.assert_close(each.detach(), by_hand)
    torch.testing.assert_close(loss.detach(), by_hand.mean())
    assert model(TOKENS, return_type=None) is None
    hooked = HookedModel(families.build("gpt2"))
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    ids = families.tokens(2, 4)
    each = hooked(ids, return_type="loss", loss_per_token=True, attention_mask=mask)
    assert each[0, 2] == 0
    mean = hooked(ids, return_type="loss", attention_mask=mask)
    torch.testing.assert_close(mean, each.sum() / 5)


def test_gradients_reach_hooks_and_the_cache(model: HookedModel):
    _, cache = model.run_with_cache(TOKENS, incl_bwd=True, return_type="loss")
    names = [name for name in cache if not name.endswith("_grad")]
    assert all(cache[f"{name}_grad"].shape == cache[name].shape for name in names)
    seen: dict[str, Tensor] = {}
    loss = model.run_with_hooks(
        TOKENS,
        return_type="loss",
        bwd_hooks=[
            (n, lambda g, hook: seen.update({hook.name: g})) for n in ("z.1", "resid_mid.0")
        ],
    )
    loss.backward()
    for name, gradient in seen.items():
        torch.testing.assert_close(gradient, cache[f"{name}_grad"])
    assert len(seen) == 2
    # By finite difference, along one direction of one head's output.
    direction = torch.zeros(2, 6, 4, 4).index_fill_(2, torch.tensor([3]), 1.0)
    up, down = (
        model.run_with_hooks(
            TOKENS, return_type="loss", fwd_hooks=[("z.1", lambda a, hook, e=e: a + e * direction)]
        )
        for e in (1e-2, -1e-2)
    )
    expected = (cache["blocks.1.attn.hook_z_grad"] * direction).sum()
    torch.testing.assert_close((up - down) / 2e-2, expected, rtol=2e-2, atol=1e-4)


def test_text_needs_a_tokenizer_and_one_length(model: HookedModel):
    with pytest.raises(ArgumentError, match=r"to_tokens: text needs a tokenizer. Pass HookedModel"):
        model("ab")
    spoken = HookedModel(model.model, ByteTokenizer())
    assert torch.equal(spoken("ab"), model(torch.tensor([97, 98])))
    with pytest.raises(ShapeError, match=r"must have the same number of tokens, got \[1, 2\]"):
        spoken(["a", "ab"])


def test_a_module_path_is_a_hook_name_too(model: HookedModel):
    seen = []
    model.run_with_hooks(
        TOKENS, fwd_hooks=[("h.1.mlp.0:in", lambda act, hook: seen.append(hook.name))]
    )
    assert seen == ["h.1.mlp.0:in"]


def test_generation_runs_under_the_hooks_that_are_set():
    hooked = HookedModel(families.build("gpt2"))
    lengths: list[int] = []
    with hooked.hooks(fwd_hooks=[("z.1", lambda act, hook: lengths.append(act.shape[1]))]):
        out = hooked.generate(
            families.tokens(1, 4),
            max_new_tokens=3,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=49,
        )
    assert lengths == [4, 1, 1]
    assert out.shape == (1, 7)
    assert hooks_on(hooked.model) == 0


def test_no_hook_is_left_after_an_exception(model: HookedModel):
    def fail(act: Tensor, hook) -> None:
        msg = "stop here"
        raise RuntimeError(msg)

    with pytest.raises(RuntimeError, match="stop here"):
        model.run_with_hooks(TOKENS, fwd_hooks=[("z.0", fail), ("resid_mid.1", fail)])
    with pytest.raises(RuntimeError, match="stop here"), model.hooks(fwd_hooks=[("z.0", fail)]):
        model.run_with_cache(TOKENS)
    with pytest.raises(SiteError):
        model.run_with_hooks(TOKENS, fwd_hooks=[("z.0", fail), ("nowhere", fail)])
    assert hooks_on(model.model) == 0
    assert torch.equal(model(TOKENS), model.model(TOKENS).logits)


def test_bad_names_and_bad_hooks_are_answered_in_words(model: HookedModel):
    with pytest.raises(
        SiteError,
        match=r"run_with_hooks: no hook matches 'blocks.1.hook_z'; the model has hook_embed, "
        r"blocks.\{l\}.hook_resid_pre, .* with l from 0 to 2. Closest: 'blocks.1.attn.hook_z'.",
    ):
        model.run_with_hooks(TOKENS, fwd_hooks=[("blocks.1.hook_z", print)])
    with pytest.raises(SiteError, match=r"run_with_cache: no hook matches 'blocks.7.attn.hook_z'"):
        model.run_with_cache(TOKENS, names_filter="blocks.7.attn.hook_z")
    with pytest.raises(SiteError, match=r"add_hook: no hook matches '<lambda>'"):
        model.add_hook(lambda name: False, print)
    with pytest.raises(
        ShapeError, match=r"'blocks.0.attn.hook_z' must return shape \[2, 6, 4, 4\]"
    ):
        model.run_with_hooks(TOKENS, fwd_hooks=[("z.0", lambda act, hook: act[:, 1:])])
    with pytest.raises(DtypeError, match=r"must return a tensor or None, got int"):
        model.run_with_hooks(TOKENS, fwd_hooks=[("z.0", lambda act, hook: 3)])
    with pytest.raises(
        ShapeError, match=r"removing the batch axis takes a batch of one row, got 2"
    ):
        model.run_with_cache(TOKENS, remove_batch_dim=True)
    with pytest.raises(
        ArgumentError, match=r"pos_slice names position 6, the input has 6 positions"
    ):
        model.run_with_cache(TOKENS, pos_slice=[0, 6])
    with pytest.raises(ArgumentError, match=r"stop_at_layer must be between -3 and n_layers=3"):
        model(TOKENS, stop_at_layer=4)
    with pytest.raises(ArgumentError, match=r"return_type must be one of 'logits', 'loss', 'both'"):
        model(TOKENS, return_type="logit")
    with pytest.raises(ArgumentError, match=r"incl_bwd needs one number to go back from. Pass ret"):
        model.run_with_cache(TOKENS, incl_bwd=True)
    with pytest.raises(ArgumentError, match=r"ToyModel takes no argument 'start_at_layer'"):
        model(TOKENS, start_at_layer=1)
    with pytest.raises(SiteError, match=r"HookedModel: Linear is no architecture with canonical"):
        HookedModel(nn.Linear(2, 2))


@pytest.mark.parametrize("module", ["names", "hooked", "generic"])
def test_the_examples_in_the_docstrings_run(module: str):
    found = importlib.import_module(f"microtome.integrations.transformer_lens.{module}")
    results = doctest.testmod(found)
    assert results.attempted > 0
    assert results.failed == 0


def test_it_runs_without_transformer_lens_and_imports_nothing_heavy():
    code = (
        "import sys; sys.modules['transformer_lens'] = None; sys.modules['pandas'] = None; "
        "import torch, microtome.integrations.transformer_lens as tl; "
        "from microtome.models import ToyModel; "
        "tl.HookedModel(ToyModel()).run_with_cache(torch.arange(4)); "
        "print([m for m in ('transformers', 'einops', 'jaxtyping') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
