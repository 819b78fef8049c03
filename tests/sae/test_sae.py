"""The SAE module: shapes, semantics, the cached screen."""

import copy
import io

import numpy as np
import pytest
import torch

from microtome import SAE, SparseCode, TopK
from microtome.errors import ArgumentError, DtypeError, NonFiniteError, ShapeError
from microtome.ops import topk_encode


def written_out(sae: SAE, x: torch.Tensor) -> torch.Tensor:
    """The dense code by plain PyTorch."""
    z = (x - sae.b_dec if sae.center else x) @ sae.W_enc.T + sae.b_enc
    values, indices = z.topk(sae.activation.k)
    return torch.zeros_like(z).scatter(-1, indices, values.relu())


def filled(center: bool = True) -> SAE:
    sae = SAE(8, 32, TopK(4), center=center, seed=3)
    with torch.no_grad():
        sae.b_dec += torch.arange(8.0) / 8
        sae.b_enc -= torch.arange(32.0) / 20
    return sae


@pytest.mark.parametrize("center", [True, False])
def test_encode_and_decode_are_the_formula(center):
    sae = filled(center).double()
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    code = sae.encode(x)
    assert code.shape == (2, 3, 32)
    torch.testing.assert_close(code.to_dense(), written_out(sae, x))
    expected = written_out(sae, x) @ sae.W_dec + sae.b_dec
    torch.testing.assert_close(sae.decode(code), expected)
    torch.testing.assert_close(sae(x), expected)


@pytest.mark.parametrize("center", [True, False])
def test_gradients_are_those_of_the_formula(center):
    sae = filled(center).double()
    x = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    sae(x).square().sum().backward()
    got = [x.grad, *(p.grad for p in sae.parameters())]
    x.grad = None
    sae.zero_grad()
    (written_out(sae, x) @ sae.W_dec + sae.b_dec).square().sum().backward()
    for mine, theirs in zip(got, [x.grad, *(p.grad for p in sae.parameters())], strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_fresh_sae_has_unit_decoder_rows_copied_to_the_encoder():
    sae = SAE(16, 64, TopK(4), seed=1)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(64))
    assert torch.equal(sae.W_enc, sae.W_dec)
    assert torch.equal(sae.W_dec, SAE(16, 64, TopK(4), seed=1).W_dec)
    assert not torch.equal(sae.W_dec, SAE(16, 64, TopK(4), seed=2).W_dec)


def test_construction_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    SAE(4, 8, TopK(2))
    assert torch.equal(before, torch.get_rng_state())


def test_a_single_vector_and_an_empty_batch_encode():
    sae = filled()
    assert sae.encode(torch.ones(8)).shape == (32,)
    assert sae(torch.ones(8)).shape == (8,)
    assert sae(torch.empty(0, 8)).shape == (0, 8)


def test_bfloat16_input_is_computed_in_the_weights_dtype():
    x = torch.randn(3, 8).bfloat16()
    assert torch.equal(filled()(x), filled()(x.float()))


def test_the_decoder_gradient_is_projected_off_its_row():
    sae = filled()
    sae(torch.randn(20, 8)).square().sum().backward()
    sae.project_decoder_gradient_()
    along = (sae.W_dec.grad * sae.W_dec).sum(1)
    assert sae.W_dec.grad.abs().max() > 0.1
    assert along.abs().max() < 1e-5


def test_normalizing_restores_unit_rows():
    sae = filled()
    with torch.no_grad():
        sae.W_dec *= 3
    sae.normalize_decoder_()
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(32))


def test_the_screen_is_kept_until_the_weights_change():
    sae = filled()
    first = sae.screen()
    assert first is not None
    assert sae.screen() is first
    with torch.no_grad():
        sae.W_enc[0] *= 2
    second = sae.screen()
    assert second is not first
    sae.load_state_dict(filled().state_dict())
    assert sae.screen() is not second
    third = sae.screen()
    sae.W_enc = torch.nn.Parameter(sae.W_enc.detach().clone())
    assert sae.screen() is not third


def test_there_is_no_screen_for_other_dtypes_and_no_stale_one_after_a_round_trip():
    sae = filled()
    first = sae.screen()
    assert sae.double().screen() is None
    assert sae.float().screen() is not first


def test_the_screen_is_neither_saved_nor_copied():
    sae = filled()
    sae.screen()
    assert sorted(sae.state_dict()) == ["W_dec", "W_enc", "b_dec", "b_enc"]
    twin = copy.deepcopy(sae)
    assert twin._screen is None
    assert torch.equal(twin(torch.ones(8)), sae(torch.ones(8)))
    file = io.BytesIO()
    torch.save(sae.state_dict(), file)


def test_an_optimizer_step_is_seen_by_the_next_encode():
    sae = filled()
    x = torch.randn(6, 8)
    optimizer = torch.optim.SGD(sae.parameters(), lr=0.1)
    sae(x).square().sum().backward()
    optimizer.step()
    torch.testing.assert_close(sae.encode(x).to_dense(), written_out(sae, x))


def test_what_does_not_fit_is_named():
    with pytest.raises(ArgumentError, match="k must be between 1 and n_features=8, got k=9"):
        SAE(4, 8, TopK(9))
    with pytest.raises(ArgumentError, match="k must be at least 1, got k=0"):
        TopK(0)
    with pytest.raises(ArgumentError, match=r"activation must be TopK\(k\), got 4"):
        SAE(4, 8, 4)
    sae = filled()
    with pytest.raises(ShapeError, match=r"x must be \[..., d=8\], got shape \[2, 7\]"):
        sae.encode(torch.ones(2, 7))
    code = SparseCode(torch.ones(1, 1), torch.zeros(1, 1).int(), 31)
    with pytest.raises(ShapeError, match="must have f=32 features, got 31"):
        sae.decode(code)
    with pytest.raises(ArgumentError, match="W_dec has no gradient"):
        sae.project_decoder_gradient_()
    bad = torch.ones(3, 8)
    bad[1, 2] = float("nan")
    with pytest.raises(NonFiniteError, match="row 1"):
        sae.encode(bad)


def test_what_is_no_whole_number_or_no_tensor_is_named(tmp_path):
    with pytest.raises(ArgumentError, match=r"TopK: k must be a whole number, got k=2\.5\."):
        TopK(2.5)
    with pytest.raises(ArgumentError, match="SAE: d_model must be a whole number, got"):
        SAE("8", 32, TopK(4))
    sae = SAE(np.int64(8), torch.tensor(32), TopK(np.int64(4)))
    sae.save_pretrained(tmp_path)  # whose sizes JSON holds
    assert repr(SAE.from_pretrained(tmp_path)) == repr(sae) == repr(SAE(8, 32, TopK(4)))
    with pytest.raises(DtypeError, match=r"x must be a tensor \[\.\.\., d=8\], got ndarray\."):
        sae.encode(np.ones((2, 8)))
    with pytest.raises(DtypeError, match=r"SAE\.encode: x must be float32, .*, got complex64"):
        sae.encode(torch.ones(2, 8, dtype=torch.complex64))
    with pytest.raises(ArgumentError, match=r"code must be a SparseCode, got Tensor\."):
        sae.decode(torch.ones(2, 8))
    with pytest.raises(DtypeError, match=r"topk_encode: x must be a tensor \[n, d\], got list"):
        topk_encode([[1.0]], torch.ones(1, 1), k=1)


def test_print_shows_the_sizes():
    assert "d_model=8, n_features=32, TopK(k=4), center=False" in repr(filled(False))
