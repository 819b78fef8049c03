"""TransformerLens models in parts: SoLU, folded norms, neighbours rotated, bridges, padding."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from microtome.models.native.runner import Runner, runner_of
from microtome.patching import Write, logit_difference, naive_sweep, patch, sweep
from microtome.testing import families
from microtome.testing.patching import apart, changed, everything, last_difference, naive_twin

transformer_lens = pytest.importorskip(
    "transformer_lens", reason="transformer-lens is not installed"
)
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:HookedTransformer is deprecated"),
]

T = 6
CORRUPTED = families.tokens(2, T)
CLEAN = changed(CORRUPTED, (0, 1), (1, 3))
NONE = torch.zeros(2, dtype=torch.int32)
ROTARY = {"positional_embedding_type": "rotary", "rotary_dim": 4}
SETTINGS: dict[str, dict[str, Any]] = {
    "SoLU with a norm": {"act_fn": "solu_ln"},
    "SoLU, folded": {"act_fn": "solu", "normalization_type": "LNPre"},
    "attention alone": {"attn_only": True, "d_mlp": None, "act_fn": None},
    "no norm": {"normalization_type": None, "act_fn": "relu"},
    "GPT-J": {**ROTARY, "rotary_adjacent_pairs": True, "parallel_attn_mlp": True},
    "Llama, folded": {
        **ROTARY, "normalization_type": "RMSPre", "act_fn": "silu", "gated_mlp": True,
        "n_key_value_heads": 2,
    },
    "local": {"use_local_attn": True, "window_size": 3, "attn_types": ["global", "local"]},
}  # fmt: skip
KINDS = ("resid_pre", "resid_mid", "attn_out", "mlp_out", "neurons", "q", "k", "v", "z", "pattern")


def build(**settings: Any) -> Any:
    if not hasattr(transformer_lens, "HookedTransformer"):
        pytest.skip("this transformer-lens has no HookedTransformer")
    sizes = {
        "n_layers": 2, "d_model": 24, "n_ctx": 16, "d_head": 8, "n_heads": 4, "d_mlp": 40,
        "d_vocab": families.VOCABULARY, "act_fn": "gelu_new", "normalization_type": "LN",
        "seed": 0, "device": "cpu", "dtype": torch.float64,
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = transformer_lens.HookedTransformerConfig(**sizes | settings)
        model = transformer_lens.HookedTransformer(config)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter)).mul_(3.0)
    return model.eval()


def theirs(write: Write) -> Write:
    """The same write at a hook point, where a pattern is [b, head, destination, source]."""
    kind, layer = write.site.split(".")
    if kind == "pattern":
        write = replace(write, positions=write.heads, heads=write.positions)
    inside = {"neurons": "mlp.hook_post"}.get(kind, f"attn.hook_{kind}")
    name = f"hook_{kind}" if "_" in kind else inside
    return replace(write, site=f"blocks.{layer}.{name}")


def lacks(model: Any, kind: str) -> bool:
    alone = model.cfg.attn_only and kind in ("mlp_out", "neurons")
    return alone or theirs(Write(f"{kind}.0")).site not in model.hook_dict


@pytest.mark.parametrize("name", SETTINGS)
def test_writes_to_a_hooked_transformer_are_those_at_its_hook_points(name):
    model = build(**SETTINGS[name])
    runner = runner_of(model, CORRUPTED, NONE)
    assert isinstance(runner, Runner), runner
    assert runner.error < 1e-12
    cells = []
    for i, kind in enumerate(kind for kind in KINDS if not lacks(model, kind)):
        head = i % 2 if kind in ("q", "k", "v", "z", "pattern") else None
        cells += [
            [Write(f"{kind}.{layer}", position, head)] for layer in (0, 1) for position in (None, 2)
        ]
        cells[-1].append(Write(f"attn_out.{1 - i % 2}", 1 + i % 4, op="scale", factor=1.5))
    found = patch(model, CORRUPTED, CLEAN, everything, cells, engine="native")
    wanted = naive_sweep(
        model, CORRUPTED, CLEAN, everything, [[theirs(w) for w in cell] for cell in cells]
    )
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    assert float((found[:, None] - found[None]).abs().amax()) > 1e-3


def test_what_parts_do_not_know_runs_block_by_block():
    model = build(positional_embedding_type="shortformer")
    why = runner_of(model, CORRUPTED, NONE)
    assert isinstance(why, str)
    assert why.startswith("its parts give other logits than the model does (off by ")
    with pytest.warns(UserWarning, match="run block by block, since its parts give other logits"):
        found = sweep(model, CLEAN, CORRUPTED, everything, progress=False)
    wanted = naive_twin(model, found, CORRUPTED, CLEAN, everything, sites=at_hook)
    assert apart(found, wanted) < 1e-9
    model = build()
    model.add_hook("blocks.1.hook_mlp_out", lambda x, hook: 2 * x)
    why = runner_of(model, CORRUPTED, NONE)
    assert why == "blocks.1.hook_mlp_out carries a hook, which parts would not call"


def at_hook(name: str) -> str:
    return theirs(Write(name)).site


class Tokenizer:
    """Pads on the left, with the token that opens a text."""

    padding_side, pad_token_id, bos_token_id = "left", 0, 0


@pytest.mark.parametrize("where", ["base", "source"])
def test_padding_that_a_model_hides_by_itself_is_noticed(where):
    model = build()
    padded = CLEAN.clone()
    padded[1, :3] = 0  # two of padding, and the first of the text
    base, source = (padded, CLEAN) if where == "base" else (CLEAN, padded)

    def run() -> Any:
        return sweep(model, source, base, everything, progress=False)

    assert run().engine == "native"  # without a tokenizer 0 is a token
    model.tokenizer = Tokenizer()
    with pytest.warns(UserWarning, match=r"hides the padding that prompt \d begins with"):
        found = run()
    assert apart(found, naive_twin(model, found, base, source, everything, sites=at_hook)) < 1e-9
    padded[1, 1:3] = 5  # what opens a text is no padding
    assert run().engine == "native"


@pytest.mark.parametrize("processed", [False, True])
def test_a_bridge_gives_the_numbers_of_the_model_in_it(processed, tmp_path):
    bridges = pytest.importorskip("transformer_lens.model_bridge")
    model: nn.Module = families.build("gpt2")
    model.save_pretrained(tmp_path)
    bridge = bridges.TransformerBridge.boot_transformers(
        str(tmp_path), hf_model=families.build("gpt2"), device="cpu"
    )
    if processed:
        bridge.enable_compatibility_mode()
    for site in ("resid_pre", "z", "pattern", "mlp_out"):
        found, wanted = (
            sweep(one, CLEAN, CORRUPTED, logit_difference(11, 12), site, progress=False)
            for one in (bridge, model)
        )
        assert found.engine == wanted.engine == "native"
        torch.testing.assert_close(found.scores, wanted.scores, rtol=1e-4, atol=1e-4)

    def entering(name: str) -> str:
        return f"blocks.{name[-1]}.hook_in"

    # Its own forward gives them too, one by one, and block by block where it carries a hook.
    layers: dict[str, Any] = {"layers": [1, 2], "progress": False}
    found = sweep(bridge, CLEAN, CORRUPTED, last_difference, **layers)
    wanted = naive_twin(bridge, found, CORRUPTED, CLEAN, last_difference, sites=entering)
    assert apart(found, wanted) < 1e-4
    bridge.add_hook("blocks.1.hook_mlp_out", lambda x, hook: 1.5 * x)
    before = bridge(CORRUPTED)
    with pytest.warns(UserWarning, match=r"since blocks\.1\..*hook_\w* carries a hook"):
        hooked = sweep(bridge, CLEAN, CORRUPTED, last_difference, **layers)
    wanted = naive_twin(bridge, hooked, CORRUPTED, CLEAN, last_difference, sites=entering)
    assert apart(hooked, wanted) < 1e-4
    assert apart(found, wanted) > 1e-3
    assert torch.equal(bridge(CORRUPTED), before)  # nothing was left in the model


@pytest.mark.parametrize("name", ["qwen3", "gemma2"])
def test_a_bridge_without_biases_or_with_norms_after_is_read_into_parts(name, tmp_path):
    bridges = pytest.importorskip("transformer_lens.model_bridge")
    model: nn.Module = families.build(name)
    model.save_pretrained(tmp_path)
    bridge = bridges.TransformerBridge.boot_transformers(
        str(tmp_path), hf_model=families.build(name), device="cpu"
    )
    for site in ("resid_mid", "k", "z"):
        found, wanted = (
            sweep(one, CLEAN, CORRUPTED, logit_difference(11, 12), site, progress=False)
            for one in (bridge, model)
        )
        assert found.engine == "native", found.note
        torch.testing.assert_close(found.scores, wanted.scores, rtol=1e-4, atol=1e-4)
