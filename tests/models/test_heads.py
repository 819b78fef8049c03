"""What lies inside attention and MLP, in every family: queries, keys, values, neurons."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from microtome.models import ToyConfig, ToyModel, capture, splice
from microtome.testing import families

pytest.importorskip("transformers", reason="transformers is not installed")
HEADS = families.HEADS


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Matrices this small are slower on many threads, and far slower on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
