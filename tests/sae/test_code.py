"""SparseCode: shapes, conversions, indexing, gradients."""

import pytest
import torch

from microtome import SparseCode
from microtome.errors import ArgumentError, DtypeError, ShapeError
from microtome.ops import batch_topk_encode, threshold_encode

# Rows: {3: 2, 0: 0.5}, {1: 1, 2: cut}, {2: 4, 3: 1}, {0: cut, 1: cut}.
VALUES = torch.tensor([[2.0, 0.5], [1.0, 0.0], [4.0, 1.0], [0.0, 0.0]])
INDICES = torch.tensor([[3, 0], [1, 2], [2, 3], [0, 1]])
DENSE = torch.tensor([[0.5, 0, 0, 2], [0, 1, 0, 0], [0, 0, 4, 1], [0, 0, 0, 0]])


def uniform() -> SparseCode:
    return SparseCode(VALUES, INDICES, 4)


def ragged() -> SparseCode:
    return SparseCode(
        torch.tensor([0.5, 2.0, 1.0, 4.0, 1.0]),
        torch.tensor([0, 3, 1, 2, 3]),
        4,
        torch.tensor([0, 2, 3, 5, 5]),
    )


def roomy() -> SparseCode:
    """The ragged code with room for more entries behind it."""
    code = ragged()
    values, indices = (torch.cat([t, t.new_zeros(3)]) for t in (code.values, code.indices))
    return SparseCode(values, indices, 4, code.offsets)


@pytest.mark.parametrize("make", [uniform, ragged, roomy])
def test_both_kinds_stand_for_the_same_dense_code(make):
    code = make()
    assert torch.equal(code.to_dense(), DENSE)
    assert torch.equal(code.to_torch_csr().to_dense(), DENSE)
    assert code.l0 == 5 / 4
    assert (len(code), code.n_rows, code.shape) == (4, 4, (4, 4))
    assert code.indices.dtype == torch.int32


@pytest.mark.parametrize("make", [uniform, ragged, roomy])
@pytest.mark.parametrize(
    "item", [1, -1, slice(1, 3), slice(0, 0), torch.tensor([2, 0, 2]), DENSE[:, 3] > 0]
)
def test_indexing_picks_rows_as_it_does_on_the_dense_code(make, item):
    picked = make()[item]
    assert torch.equal(picked.to_dense(), DENSE[item])
    assert picked.shape == tuple(DENSE[item].shape)


@pytest.mark.parametrize("make", [uniform, ragged, roomy])
def test_indexing_goes_over_a_leading_shape(make):
    flat = make()
    code = SparseCode(flat.values, flat.indices, 4, flat.offsets, (2, 2))
    assert len(code) == 2
    assert torch.equal(code.to_dense(), DENSE.reshape(2, 2, 4))
    assert torch.equal(code[1].to_dense(), DENSE[2:])
    assert torch.equal(code[0, 1].to_dense(), DENSE[1])
    with pytest.raises(TypeError, match="single vector"):
        len(code[0, 1])


def test_the_csr_matrix_has_ascending_columns_and_no_stored_zeros():
    csr = uniform().to_torch_csr()
    assert csr.crow_indices().tolist() == [0, 2, 3, 5, 5]
    assert csr.col_indices().tolist() == [0, 3, 1, 2, 3]
    assert csr.values().tolist() == [0.5, 2.0, 1.0, 4.0, 1.0]


@pytest.mark.parametrize("make", [ragged, roomy])
def test_padding_a_ragged_code_keeps_its_dense_code(make):
    values, indices = make().padded()
    assert values.shape == (4, 2)
    assert torch.equal(SparseCode(values, indices, 4).to_dense(), DENSE)


def test_gradients_flow_from_the_dense_code_to_the_values():
    values = VALUES.clone().requires_grad_()
    weight = torch.arange(16.0).reshape(4, 4)
    (SparseCode(values, INDICES, 4).to_dense() * weight).sum().backward()
    assert torch.equal(values.grad, weight.gather(1, INDICES))


def test_repeated_features_add_up():
    code = SparseCode(torch.tensor([[1.0, 2.0]]), torch.tensor([[1, 1]]), 3)
    assert code.to_dense().tolist() == [[0.0, 3.0, 0.0]]


def test_an_empty_code_is_a_code():
    code = SparseCode(torch.empty(0, 2), torch.empty(0, 2, dtype=torch.int32), 4)
    assert code.to_dense().shape == (0, 4)
    assert code.to_torch_csr().shape == (0, 4)
    assert code.l0 == 0.0


@pytest.mark.parametrize("capacity", [None, 40])
def test_it_holds_what_the_encoders_with_rows_of_any_length_return(capacity):
    g = torch.Generator().manual_seed(0)
    x, W_enc = torch.randn(6, 5, generator=g), torch.randn(9, 5, generator=g)
    x[2] = 0.0
    z = torch.nn.functional.linear(x, W_enc)
    entries = threshold_encode(x, W_enc, capacity=capacity).code
    code = SparseCode(entries.values, entries.indices, 9, entries.offsets, (2, 3))
    dense = z.relu()
    torch.testing.assert_close(code.to_dense(), dense.reshape(2, 3, 9))
    torch.testing.assert_close(code.to_torch_csr().to_dense(), dense)
    torch.testing.assert_close(code[1, 2].to_dense(), dense[5])
    assert code[0, 2].values.numel() == 0
    assert code.l0 == float((dense > 0).sum()) / 6
    values, indices, offsets, _ = batch_topk_encode(x, W_enc, k=2)
    code = SparseCode(values, indices, 9, offsets)
    torch.testing.assert_close(code.to_dense(), z * (z >= z.flatten().topk(12).values[-1]))
    assert len(code[1:4]) == 3


def test_a_code_that_does_not_fit_says_how():
    with pytest.raises(ShapeError, match=r"indices must be \[n, k\] with k=2"):
        SparseCode(VALUES, INDICES[:, :1], 4)
    with pytest.raises(ShapeError, match=r"leading shape \(3,\) must hold n=4 rows, holds 3"):
        SparseCode(VALUES, INDICES, 4, None, (3,))
    with pytest.raises(DtypeError, match="indices must be int32, int64, got float32"):
        SparseCode(VALUES, VALUES, 4)
    with pytest.raises(ArgumentError, match="takes a device"):
        uniform().to(torch.float64)
    assert torch.equal(uniform().to("cpu").to_dense(), DENSE)


def test_an_index_outside_the_features_is_named_and_never_wraps():
    for bad in (2**33, -1, 4):
        with pytest.raises(ArgumentError, match=rf"lie in \[0, n_features=4\), got {bad}"):
            SparseCode(VALUES, INDICES.masked_fill(INDICES == 3, bad), 4)
    late = SparseCode(VALUES, INDICES.int().masked_fill(INDICES == 3, -1), 4)
    for convert in (late.to_dense, late.to_torch_csr):
        with pytest.raises(ArgumentError, match=r"n_features=4\), got -1"):
            convert()
    with pytest.raises(ArgumentError, match="n_features must be between 1 and"):
        SparseCode(VALUES, INDICES, 0)


@pytest.mark.parametrize("offsets", [[], [1, 5], [0, 3, 2, 5], [0, 6]])
def test_offsets_that_are_no_row_starts_are_refused(offsets):
    code = ragged()
    starts = torch.tensor(offsets, dtype=torch.int64)
    with pytest.raises(ArgumentError, match=r"offsets must be \[n \+ 1\] row starts"):
        SparseCode(code.values, code.indices, 4, starts)
