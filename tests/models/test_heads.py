"""What lies inside attention and MLP, in every family: queries, keys, values, pattern, neurons."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from microtome.models import ToyConfig, ToyModel, capture, splice
from microtome.models.sites import resolve
from microtome.testing import families

pytest.importorskip("transformers", reason="transformers is not installed")
pytestmark = pytest.mark.usefixtures("one_thread")
HEADS = families.HEADS


@pytest.fixture(params=["toy", *families.MODELS], scope="module")
def named(request: pytest.FixtureRequest) -> tuple[str, nn.Module]:
    if request.param == "toy":
        return "toy", ToyModel(ToyConfig(50, 24, 3, HEADS, 16))
    return request.param, families.build(request.param)


def per_head(keys_or_values: Tensor) -> Tensor:
    """[b, t, h, d_head] of [b, t, key-value heads, d_head]: neighbouring heads share one."""
    return keys_or_values.repeat_interleave(HEADS // keys_or_values.shape[2], dim=2)


UNGROUPED = {"toy", "gpt2", "gpt_neox", "gpt_neox_sequential", "bert"}


def test_queries_keys_and_values_have_their_heads(named):
    name, model = named
    acts = capture(model, ["q.1", "k.1", "v.1", "z.1"], families.tokens())
    key_value_heads = HEADS if name in UNGROUPED else 2
    d_head = acts["z.1"].shape[-1]
    assert acts["q.1"].shape == (3, 7, HEADS, d_head)
    assert acts["k.1"].shape == acts["v.1"].shape == (3, 7, key_value_heads, d_head)


def test_equal_keys_make_every_head_average_the_values(named):
    name, model = named
    tokens = families.tokens()
    with splice(model, "q.1", torch.zeros_like):
        acts = capture(model, ["v.1", "z.1"], tokens)
    v = per_head(acts["v.1"])
    counts = torch.arange(1, 8).view(7, 1, 1)
    mean = v.mean(1, keepdim=True).expand_as(v) if name == "bert" else v.cumsum(1) / counts
    torch.testing.assert_close(acts["z.1"], mean)
    with splice(model, "k.1", torch.zeros_like):
        torch.testing.assert_close(capture(model, "z.1", tokens)["z.1"], mean)


def test_replacing_one_of_queries_keys_and_values_leaves_the_other_two(named):
    _, model = named
    tokens = families.tokens()
    clean = capture(model, ["q.1", "k.1", "v.1"], tokens)
    for site in clean.by_site:
        with splice(model, site, lambda x: x + 1):
            acts = capture(model, ["q.1", "k.1", "v.1"], tokens)
        for other in clean.by_site:
            wanted = clean[other] + 1 if other == site else clean[other]
            assert torch.equal(acts[other], wanted), (site, other)


def attention(model: nn.Module, layer: int) -> nn.Module:
    """The module of a layer that forms the pattern."""
    (site,) = resolve("test", model, f"pattern.{layer}")
    return model.get_submodule(site.path)


def test_the_pattern_is_the_softmax_of_what_queries_and_keys_have_in_common(named):
    name, model = named
    tokens, seen = families.tokens(), {}
    # Every token at position 0, where rotary embedding turns nothing. (A mask, or the model takes
    # equal positions for packed sequences.)
    places = {} if name == "toy" else {"position_ids": torch.zeros_like(tokens)}
    mask = {} if name == "toy" else {"attention_mask": torch.ones_like(tokens)}
    with ExitStack() as stack:
        for site in ("q.1", "k.1", "pattern.1"):
            keep = partial(seen.__setitem__, site)
            stack.enter_context(splice(model, site, lambda x, keep=keep: keep(x) or x))
        with torch.no_grad():
            model(input_ids=tokens, **places, **mask)
    scores = torch.einsum("bqhd,bkhd->bhqk", seen["q.1"], per_head(seen["k.1"]))
    scores = scores * getattr(attention(model, 1), "scaling", seen["q.1"].shape[-1] ** -0.5)
    if name == "gemma2":
        scores = 50.0 * torch.tanh(scores / 50.0)
    if name != "bert":
        scores = scores.masked_fill(torch.ones(7, 7).triu(1).bool(), -torch.inf)
    torch.testing.assert_close(seen["pattern.1"], scores.softmax(-1))


def test_the_pattern_times_the_values_is_z(named):
    _, model = named
    acts = capture(model, ["pattern.1", "v.1", "z.1"], families.tokens())
    assert acts["pattern.1"].shape == (3, HEADS, 7, 7)
    z = torch.einsum("bhqk,bkhd->bqhd", acts["pattern.1"], per_head(acts["v.1"]))
    torch.testing.assert_close(acts["z.1"], z)


def test_a_replaced_pattern_is_what_the_values_are_mixed_by(named):
    _, model = named
    with splice(model, "pattern.1", lambda x: torch.eye(7).expand_as(x)):
        acts = capture(model, ["v.1", "z.1"], families.tokens())
    assert torch.equal(acts["z.1"], per_head(acts["v.1"]))
    with splice(model, "pattern.1", torch.zeros_like):
        assert not capture(model, "z.1", families.tokens())["z.1"].any()


@pytest.mark.parametrize("name", families.MODELS)
def test_the_pattern_is_that_of_eager_attention_to_the_bit(name):
    model, tokens = families.build(name), families.tokens()
    config = model.config.get_text_config()
    if getattr(config, "sliding_window", None):
        config.sliding_window = 3  # shorter than the tokens
    mask = torch.ones_like(tokens)
    mask[1, 5:] = 0
    mask[2, :2] = 0
    for attention_mask in (None, mask):
        mine = capture(model, "pattern.1", tokens, attention_mask=attention_mask)["pattern.1"]
        model.set_attn_implementation("eager")
        with torch.no_grad():
            out = model(input_ids=tokens, attention_mask=attention_mask, output_attentions=True)
            assert torch.equal(mine, out.attentions[1])
            with splice(model, "pattern.1", lambda x: x.clone()):
                again = model(input_ids=tokens, attention_mask=attention_mask)
            assert torch.equal(again.logits, out.logits)


DOWN = {
    "toy": "h.1.mlp.2",
    "gpt2": "transformer.h.1.mlp.c_proj",
    "gpt_neox": "gpt_neox.layers.1.mlp.dense_4h_to_h",
    "gpt_neox_sequential": "gpt_neox.layers.1.mlp.dense_4h_to_h",
    "bert": "bert.encoder.layer.1.output.dense",
    "gemma3_with_images": "model.language_model.layers.1.mlp.down_proj",
}


def test_neurons_are_what_the_down_projection_multiplies(named):
    name, model = named
    down = DOWN.get(name, "model.layers.1.mlp.down_proj")
    acts = capture(model, ["neurons.1", down, "mlp_out.1"], families.tokens())
    width = {"toy": 96, "gpt2": 96}.get(name, 40)
    assert acts["neurons.1"].shape == (3, 7, width)
    assert torch.equal(acts[down], model.get_submodule(down)(acts["neurons.1"]))
    if name not in ("gemma2", "gemma3", "gemma3_with_images"):  # a norm comes in between
        assert torch.equal(acts[down], acts["mlp_out.1"])
