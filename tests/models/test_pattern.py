"""Watching the attention pattern: hand-made numbers, and a model that is afterwards as it was."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from microtome.errors import SiteError
from microtome.models import ToyConfig, ToyModel, capture, sites, splice
from microtome.models.pattern import NAME, attention
from microtome.models.toy import _Attention
from microtome.testing import families

pytestmark = pytest.mark.usefixtures("one_thread")
TOKENS = torch.arange(15).view(3, 5)


def column(*values: float) -> Tensor:
    """[1, 1, t, 1]: one head of width one."""
    return torch.tensor(values).view(1, 1, -1, 1)


class Module(nn.Module):
    """What `attention` reads of an attention module."""

    def __init__(self, is_causal: bool) -> None:
        super().__init__()
        self.is_causal = is_causal


def test_attention_of_two_tokens_by_hand():
    # The second query meets scores 0 and ln 3, i.e. weights 1/4 and 3/4 of the values 8 and 16.
    q, k, v = column(1.0, 1.0), column(0.0, math.log(3.0)), column(8.0, 16.0)
    z, pattern = attention(Module(is_causal=True), q, k, v, None)
    torch.testing.assert_close(pattern[0, 0], torch.tensor([[1.0, 0.0], [0.25, 0.75]]))
    torch.testing.assert_close(z.flatten(), torch.tensor([8.0, 14.0]))
    z, pattern = attention(Module(is_causal=False), q, k, v, None)
    torch.testing.assert_close(pattern[0, 0], torch.tensor([[0.25, 0.75], [0.25, 0.75]]))
    # Twice the scale squares the ratio of the weights.
    _, pattern = attention(Module(is_causal=False), q, k, v, None, scaling=2.0)
    torch.testing.assert_close(pattern[0, 0, 0], torch.tensor([0.1, 0.9]))
    # A cap of 1 turns the score ln 3 into tanh(ln 3) = 4/5.
    _, pattern = attention(Module(is_causal=False), q, k, v, None, softcap=1.0)
    torch.testing.assert_close((pattern[0, 0, 0, 1] / pattern[0, 0, 0, 0]).log(), torch.tensor(0.8))


def test_masks_are_added_or_say_where_to_look():
    q, k, v = column(1.0, 1.0), column(0.0, math.log(3.0)), column(8.0, 16.0)
    look = torch.tensor([[False, True], [True, False]])
    _, pattern = attention(Module(is_causal=True), q, k, v, look)
    assert pattern[0, 0].tolist() == [[0.0, 1.0], [1.0, 0.0]]
    added = torch.tensor([[math.log(3.0), 0.0], [0.0, -math.inf]])
    _, pattern = attention(Module(is_causal=True), q, k, v, added)
    torch.testing.assert_close(pattern[0, 0], torch.tensor([[0.5, 0.5], [1.0, 0.0]]))


def test_grouped_queries_share_keys_and_values_with_their_neighbours():
    q = torch.zeros(1, 4, 1, 1)
    k = torch.zeros(1, 2, 1, 1)
    v = torch.tensor([5.0, 7.0]).view(1, 2, 1, 1)
    z, _ = attention(Module(is_causal=True), q, k, v, None)
    assert z.flatten().tolist() == [5.0, 5.0, 7.0, 7.0]


def test_the_softmax_is_at_least_float32_and_dropout_comes_last():
    q = torch.randn(1, 2, 3, 4, dtype=torch.float64)
    _, exact = attention(Module(is_causal=True), q, q, q, None)
    assert (exact.sum(-1) - 1).abs().max() < 1e-15
    half = q.bfloat16()
    _, rounded = attention(Module(is_causal=True), half, half, half, None)
    assert rounded.dtype == torch.bfloat16
    z, dropped = attention(Module(is_causal=True).train(), q, q, q, None, dropout=1.0)
    assert not z.any()
    assert not dropped.any()


def test_watching_the_toy_model_changes_rounding_only_and_one_layer_only():
    model = ToyModel()
    plain = capture(model, ["resid_post.0", "z.1"], TOKENS)
    open_ = capture(model, ["resid_post.0", "pattern.1", "z.1"], TOKENS)
    assert torch.equal(plain["resid_post.0"], open_["resid_post.0"])
    torch.testing.assert_close(plain["z.1"], open_["z.1"])
    assert not open_["pattern.1"].triu(1).any()
    torch.testing.assert_close(open_["pattern.1"].sum(-1), torch.ones(3, 4, 5))


def test_gradients_flow_through_a_replaced_pattern():
    model, scale = ToyModel(), torch.ones((), requires_grad=True)
    with splice(model, "pattern.3", lambda x: x * scale):
        model(TOKENS).logits.square().mean().backward()
    assert scale.grad is not None
    assert scale.grad.abs() > 0


def test_visits_of_one_pattern_apply_in_the_order_they_are_opened_in():
    model = ToyModel()
    with splice(model, "pattern.0", lambda x: x * 0 + 3), splice(model, "pattern.0", torch.square):
        seen = capture(model, "pattern.0", TOKENS)["pattern.0"]
    assert torch.equal(seen, torch.full((3, 4, 5, 5), 9.0))
    assert not capture(model, "pattern.0", TOKENS)["pattern.0"].triu(1).any()


def test_a_model_whose_attention_cannot_be_exchanged_says_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_Attention, "asks_is_watched", False)
    model = ToyModel(ToyConfig(num_hidden_layers=1))
    assert not any(site.startswith("pattern") for site in sites(model))
    with pytest.raises(SiteError) as caught:
        capture(model, "pattern.0", TOKENS)
    assert str(caught.value) == (
        "capture: no site matches 'pattern.0' (its attention does not go through the attention "
        "functions of transformers, so the pattern is out of reach; a newer transformers may "
        "help); the model has resid_pre.0, resid_mid.0, resid_post.0, attn_out.0, mlp_out.0, q.0, "
        "k.0, v.0, z.0, neurons.0 and module paths. Closest: 'attn_out.0'."
    )


class TestConfig:
    """A Hugging Face config asks for our attention while a pattern is watched."""

    @pytest.fixture
    def model(self) -> nn.Module:
        pytest.importorskip("transformers", reason="transformers is not installed")
        return families.build("gpt2")

    def test_it_asks_for_what_it_asked_before_once_the_last_watch_is_closed(self, model):
        model.set_attn_implementation("eager")
        first = splice(model, "pattern.0", torch.relu)
        second = splice(model, "pattern.1", torch.relu)
        first.__enter__()
        second.__enter__()
        assert model.config._attn_implementation == NAME
        first.__exit__(None, None, None)
        assert model.config._attn_implementation == NAME
        second.__exit__(None, None, None)
        assert model.config._attn_implementation == "eager"

    def test_an_exception_or_an_early_stop_gives_it_back(self, model):
        def fail(_: Tensor) -> Tensor:
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError), splice(model, "pattern.0", fail):
            model(input_ids=families.tokens())
        assert model.config._attn_implementation == "sdpa"
        capture(model, ["pattern.0", "pattern.2"], families.tokens(), batch_size=2)
        assert model.config._attn_implementation == "sdpa"
        with pytest.raises(SiteError):
            capture(model, ["pattern.0", "pattern.3"], families.tokens())
        assert model.config._attn_implementation == "sdpa"

    def test_what_somebody_asks_for_meanwhile_stays(self, model):
        with splice(model, "pattern.0", torch.relu):
            model.set_attn_implementation("eager")
        assert model.config._attn_implementation == "eager"

    def test_a_capture_inside_a_splice_sees_the_replaced_pattern(self, model):
        with splice(model, "pattern.1", torch.zeros_like):
            acts = capture(model, ["pattern.1", "pattern.2"], families.tokens())
        assert not acts["pattern.1"].any()
        torch.testing.assert_close(acts["pattern.2"].sum(-1), torch.ones(3, families.HEADS, 7))

    def test_the_vision_tower_of_gemma_3_keeps_its_own(self):
        pytest.importorskip("transformers", reason="transformers is not installed")
        model = families.build("gemma3_with_images")
        with splice(model, "pattern.0", torch.relu):
            assert model.config.text_config._attn_implementation == NAME
            assert model.config.vision_config._attn_implementation == "sdpa"
        assert model.config.text_config._attn_implementation == "sdpa"
