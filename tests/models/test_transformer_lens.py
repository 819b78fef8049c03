"""HookedTransformers in parts: attention alone, shared keys, parallel blocks, left padding."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from microtome.errors import SiteError
from microtome.patching import logit_difference, sweep
from microtome.testing import families
from microtome.testing.patching import apart, changed, everything, naive_twin

pytestmark = [pytest.mark.model, pytest.mark.usefixtures("one_thread")]

SETTINGS: dict[str, dict[str, Any]] = {
    "attention alone": {"attn_only": True, "n_key_value_heads": 2},
    "rotary, parallel": {
        "positional_embedding_type": "rotary", "rotary_dim": 4, "parallel_attn_mlp": True,
        "act_fn": "gelu",
    },
    "gated, windowed": {
        "gated_mlp": True, "act_fn": "silu", "normalization_type": "RMS", "window_size": 3,
        "use_local_attn": True, "attn_types": ["local", "global"], "attn_scores_soft_cap": 2.0,
        "positional_embedding_type": "rotary", "rotary_dim": 8, "n_key_value_heads": 1,
    },
}  # fmt: skip
PLACES = {
    **{
        kind: f"hook_{kind}"
        for kind in ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
    },
    **{kind: f"attn.hook_{kind}" for kind in "qkvz"},
    "neurons": "mlp.hook_post",
}
CORRUPTED = families.tokens(2, 6)
CLEAN = changed(CORRUPTED, (0, 1), (1, 3))


def build(name: str) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        package = pytest.importorskip(
            "transformer_lens", reason="transformer_lens is not installed"
        )
        if not hasattr(package, "HookedTransformer"):
            pytest.skip("this transformer_lens has no HookedTransformer")
        sizes = {"n_layers": 2, "d_model": 24, "n_ctx": 8, "d_head": 8, "n_heads": 4, "d_vocab": 50}
        more = {"act_fn": "gelu_new", "normalization_type": "LN", "seed": 0} | SETTINGS[name]
        model = package.HookedTransformer(package.HookedTransformerConfig(**sizes, **more))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
            parameter.mul_(3.0)
    return model.double().eval()


def site(name: str) -> str:
    kind, layer = name.split(".")
    return f"blocks.{layer}.{PLACES[kind]}"


@pytest.mark.parametrize("name", SETTINGS)
def test_a_hooked_transformer_gives_the_naive_numbers(name):
    model = build(name)
    kinds = [*PLACES]
    for kind in kinds:
        lacks = (kind in ("mlp_out", "neurons") and name == "attention alone") or (
            kind == "resid_mid" and name == "rotary, parallel"
        )
        axes = ("position",) if kind in ("neurons", "v") else None
        if lacks:
            with pytest.raises(SiteError, match=f"HookedTransformer has no {kind}: its "):
                sweep(model, CLEAN, CORRUPTED, everything, kind, axes=axes, progress=False)
            continue
        found = sweep(model, CLEAN, CORRUPTED, everything, kind, axes=axes, progress=False)
        assert found.engine == "native"
        if kind == "resid_mid" and name == "attention alone":
            continue  # it has no such hook point; the stream is the next layer's
        wanted = naive_twin(model, found, CORRUPTED, CLEAN, everything, sites=site)
        assert apart(found, wanted) < 1e-9, kind


def test_without_an_mlp_the_stream_after_attention_is_the_next_layers():
    model = build("attention alone")
    mid, post = (
        sweep(model, CLEAN, CORRUPTED, everything, kind, progress=False)
        for kind in ("resid_mid", "resid_post")
    )
    torch.testing.assert_close(mid.by_prompt, post.by_prompt)


def test_left_padding_shifts_positions_and_is_left_to_the_models_own_forward():
    model = build("attention alone")
    mask = torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    metric = logit_difference(3, 4)
    sweep(model, CLEAN, CORRUPTED, metric, progress=False)  # verified without padding
    with pytest.warns(UserWarning, match="its parts give other logits than the model"):
        found = sweep(model, CLEAN, CORRUPTED, metric, attention_mask=mask, progress=False)
    assert found.engine == "blocks"

    def twin(logits: Tensor) -> Tensor:
        return logits[:, -1, 3] - logits[:, -1, 4]

    wanted = naive_twin(
        model, found, CORRUPTED, CLEAN, twin, attention_mask=mask, sites=site
    )  # fmt: skip
    assert apart(found, wanted) < 1e-9
