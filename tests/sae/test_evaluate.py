"""Evaluation against sums written out, and cross-entropy through a stub of splice."""

import math
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from microtome import SAE, TopK, evaluate
from microtome.errors import ArgumentError, NonFiniteError, ShapeError
from microtome.models import ToyModel


def test_the_numbers_are_the_sums_over_all_rows(data):
    sae = SAE(12, 48, TopK(3))
    with torch.no_grad():
        sae.b_enc -= 0.4 * torch.arange(48) / 48
    code = sae.encode(data)
    dense = code.to_dense()
    e = (data - sae(data).detach()).double()
    centred = (data - data.mean(0)).double()
    expected = float(e.square().sum() / centred.square().sum())
    for batch_size in (1024, 7):
        result = evaluate(sae, data, batch_size=batch_size)
        assert result.fvu == pytest.approx(expected, rel=1e-5)
        assert result.l0 == code.l0
        assert torch.equal(result.firing_counts, (dense > 0).sum(0))
        assert result.dead_fraction == float(((dense > 0).sum(0) == 0).float().mean())
        assert result.n_rows == 600
    assert result.to_dict().keys() == {"fvu", "l0", "dead_fraction", "n_rows"}


def test_a_large_common_offset_costs_no_digits(data):
    sae = SAE(12, 48, TopK(3))
    with torch.no_grad():
        sae.b_dec += 2.0
    near = evaluate(sae, data).fvu
    far_data = ((data * 1024).round() / 1024).double() + 4096.0
    with torch.no_grad():
        sae.b_dec += 4096.0
    assert evaluate(sae, far_data.float()).fvu == pytest.approx(near, rel=1e-2)


def test_rows_without_variance_are_answered():
    sae = SAE(4, 8, TopK(2))
    with torch.no_grad():
        sae.b_dec += 1.0
    assert evaluate(sae, torch.ones(5, 4)).fvu == 0.0
    assert evaluate(sae, torch.full((5, 4), 2.0)).fvu == math.inf


class Tiny(nn.Module):
    """Embedding, a site of width 6, unembedding; it predicts that each token comes again."""

    def __init__(self):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.embed = nn.Parameter(torch.randn(11, 6, generator=g))
        self.unembed = nn.Parameter(self.embed.detach().T.clone())
        self.site = nn.Identity()

    def forward(self, tokens):
        return self.site(self.embed[tokens]) @ self.unembed


@contextmanager
def splice(model, site, function):
    handle = getattr(model, site).register_forward_hook(lambda _m, _i, out: function(out))
    try:
        yield
    finally:
        handle.remove()


TOKENS = torch.arange(5)[:, None].repeat(1, 9)


def perfect() -> SAE:
    """Features +e_i and -e_i, all active: the reconstruction is the input."""
    sae = SAE(6, 12, TopK(12))
    with torch.no_grad():
        sae.W_dec.copy_(torch.cat([torch.eye(6), -torch.eye(6)]))
        sae.W_enc.copy_(sae.W_dec)
    return sae


@pytest.mark.parametrize("model_batch_size", [2, 8])
def test_cross_entropy_is_per_predicted_token_and_a_perfect_sae_recovers_all(model_batch_size):
    model = Tiny().train()
    result = evaluate(
        perfect(), torch.ones(2, 6), model=model, site="site", tokens=TOKENS, splice=splice,
        model_batch_size=model_batch_size,
    )  # fmt: skip
    logits = model(TOKENS)[:, :-1].flatten(0, 1)
    clean = nn.functional.cross_entropy(logits, TOKENS[:, 1:].flatten())
    assert result.ce_clean == pytest.approx(float(clean.detach()), rel=1e-6)
    assert result.ce_spliced == pytest.approx(result.ce_clean, rel=1e-5)
    assert result.ce_zero == pytest.approx(math.log(11), rel=1e-6)
    assert result.ce_recovered == pytest.approx(1.0, abs=1e-4)
    assert model.training
    assert not model.site._forward_hooks


def test_an_sae_that_returns_zeros_recovers_nothing():
    result = evaluate(
        SAE(6, 12, TopK(2), seed=None), torch.ones(2, 6), model=Tiny(), site="site",
        tokens=TOKENS, splice=splice,
    )  # fmt: skip
    assert result.ce_spliced == result.ce_zero
    assert result.ce_recovered == 0.0


def test_a_model_that_zeros_make_no_worse_has_nothing_to_recover():
    wrong = torch.randint(0, 11, (5, 9), generator=torch.Generator().manual_seed(1))
    result = evaluate(
        perfect(), torch.ones(2, 6), model=Tiny(), site="site", tokens=wrong, splice=splice
    )
    assert result.ce_zero < result.ce_clean == pytest.approx(result.ce_spliced)
    assert result.ce_recovered is None
    assert "ce_recovered" not in result.to_dict()


def test_a_site_with_heads_is_one_row_a_token():
    model = Tiny()
    model.site = nn.Unflatten(2, (2, 3))
    model.after = nn.Flatten(2)
    model.forward = lambda t: model.after(model.site(model.embed[t])) @ model.unembed
    result = evaluate(
        perfect(), torch.ones(2, 6), model=model, site="site", tokens=TOKENS, splice=splice
    )
    assert result.ce_recovered == pytest.approx(1.0, abs=1e-4)


def test_the_packaged_splice_is_used_by_default():
    models = pytest.importorskip("microtome.models", reason="the models floor is not in this build")
    model = Tiny()
    given = evaluate(
        perfect(), torch.ones(2, 6), model=model, site="site", tokens=TOKENS, splice=models.splice
    )
    usual = evaluate(perfect(), torch.ones(2, 6), model=model, site="site", tokens=TOKENS)
    assert usual.to_dict() == given.to_dict()
    assert usual.ce_recovered == pytest.approx(1.0, abs=1e-4)


def test_what_does_not_fit_is_named(data):
    sae = SAE(12, 24, TopK(2))
    with pytest.raises(ShapeError, match="evaluate: activations must be"):
        evaluate(sae, data[:, :5])
    with pytest.raises(ArgumentError, match="a model needs site="):
        evaluate(sae, data, model=Tiny())
    with pytest.raises(ArgumentError, match=r"t \(tokens a sequence\) must be between 2"):
        evaluate(sae, data, model=Tiny(), site="site", tokens=TOKENS[:, :1], splice=splice)
    with pytest.raises(ArgumentError, match=r"must return logits \[b, t, vocabulary\].*Tensor"):
        evaluate(sae, data, model=nn.Flatten(), site="site", tokens=TOKENS, splice=splice)
    with pytest.raises(ShapeError, match=r"evaluate: activations must have at least one row"):
        evaluate(sae, data[:0])
    data[130] = float("nan")
    with pytest.raises(NonFiniteError, match=r"evaluate: activations holds NaN .* in row 130\."):
        evaluate(sae, data, batch_size=100)


def test_a_site_of_another_width_is_refused_and_not_cut_into_rows():
    toy = ToyModel()
    sae, tokens = SAE(64, 128, TopK(4)), torch.zeros(2, 16, dtype=torch.long)
    for site, shape in (("neurons.0", r"\[2, 16, 256\]"), ("pattern.0", r"\[2, 4, 16, 16\]")):
        with pytest.raises(ShapeError, match=rf"evaluate: site '{site}' has shape {shape}"):
            evaluate(sae, torch.randn(9, 64), model=toy, site=site, tokens=tokens)


def test_tokens_that_the_model_does_not_know_are_named():
    given = {"model": ToyModel(), "site": "z.0", "tokens": torch.full((1, 4), 256)}
    sae = SAE(64, 128, TopK(4))
    with pytest.raises(ArgumentError, match=r"evaluate: tokens must lie in \[0, vocabulary=256\)"):
        evaluate(sae, torch.randn(9, 64), **given)
    with pytest.raises(ArgumentError, match=r"model_batch_size must be between 1 and .*=0"):
        evaluate(sae, torch.randn(9, 64), **given, model_batch_size=0)
