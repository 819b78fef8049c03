"""Rows that lie 2^31 numbers and more behind the first: the same bits as where they lie close.

The memory is 32 GiB of which only the pages that are touched exist.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from microtome._seed import generator
from microtome.ops import (
    ADD,
    REPLACE,
    _registry,
    cascade_attention,
    coalition_inputs,
    delta_linear,
    pack_weights,
    patch_rows,
    sae_loss,
    sparse_decode,
    swap_key_attention,
    use_backend,
)
from microtome.testing import AttentionCase, SwapCase
from microtome.testing.triton import INTERPRETED, SILENT

if INTERPRETED:
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    from microtome.kernels import coalition_inputs as inputs_kernel
    from microtome.kernels import sae_loss as loss_kernel
    from microtome.kernels import sparse_decode as decode_kernel
    from microtome.kernels import topk_select
    from microtome.kernels.segments import CHUNK

FAR = 2**31
NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # named from Python 3.12 on
ABSENT = _registry.unavailable("cpu")
# On a device the memory would be the device's, and all of it would exist.
MARKS = [
    pytest.mark.triton,
    SILENT,
    pytest.mark.skipif(not INTERPRETED, reason="TRITON_INTERPRET is not 1"),
]
BACKENDS = [
    pytest.param("cpu", marks=pytest.mark.skipif(ABSENT is not None, reason=f"cpu: {ABSENT}")),
    pytest.param("triton", marks=MARKS),
]


@pytest.fixture(scope="module")
def memory() -> Tensor:
    """[2^33] float32 zeros; an index that wrapped at 2^31 still falls into it from its middle."""
    try:
        pages = mmap.mmap(-1, 2**35, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE)
    except (AttributeError, OSError) as error:
        pytest.skip(f"no 32 GiB of memory that exists where it is touched: {error}")
    return torch.frombuffer(pages, dtype=torch.float32)


def apart(memory: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with their rows so far apart that the last begins beyond 2^31; no stride is."""
    out, begin = {}, 3 * 2**30
    for name, x in tensors.items():
        assert x.dtype == torch.float32
        stride = FAR // (x.shape[0] - 1) // 16 * 16 + 1024
        assert stride < FAR
        view = memory[begin:].as_strided(x.shape, (stride, *x[0].contiguous().stride()))
        out[name] = view.copy_(x)
        begin += -(-x[0].numel() // 16) * 16
        assert begin < 3 * 2**30 + 1024
    return out


def sae() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    g = generator(0)
    values, indices = torch.rand(4, 3, generator=g), torch.tensor([[8, 0, 7]] * 4).int()
    near = {"values": values, "indices": indices, "b_dec": torch.randn(20, generator=g)}
    return near, {"W_dec": torch.randn(9, 20, generator=g)}


def decode() -> tuple[Callable[..., object], dict[str, object], dict[str, Tensor]]:
    return sparse_decode, *sae()


def grad_values() -> tuple[Callable[..., object], dict[str, object], dict[str, Tensor]]:
    near, far = sae()
    near = {"grad_out": torch.randn(4, 20, generator=generator(1)), "indices": near["indices"]}
    return torch.ops.microtome.sparse_decode_grad_values, near, far


def loss() -> tuple[Callable[..., object], dict[str, object], dict[str, Tensor]]:
    near, far = sae()
    return sae_loss, {"x": torch.randn(4, 20, generator=generator(1)), **near}, far


def patch() -> tuple[Callable[..., object], dict[str, object], dict[str, Tensor]]:
    g = generator(0)
    table = [[0, 2, 3, 9, 2, REPLACE], [1, 1, 0, 20, 1, ADD]]
    near = {
        "rows": torch.tensor([[2, 1, 4], [1, 0, 4]], dtype=torch.int32),
        "table": torch.tensor(table, dtype=torch.int32),
        "factors": torch.randn(2, generator=g),
    }
    draw = {"base": torch.randn(3, 4, 20, generator=g), "sources": torch.randn(3, 20, generator=g)}
    return patch_rows, near, draw


def linear() -> tuple[Callable[..., object], dict[str, object], dict[str, Tensor]]:
    g = generator(0)
    draw = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    near = {
        "index": torch.tensor([2, 0, 1, 2]),
        "packed": pack_weights(draw(5, 18), "bf16"),
        "o": 5,
    }
    far = {"x": draw(4, 18), "x_base": draw(3, 18), "y_base": draw(3, 5), "add": draw(4, 5)}
    return delta_linear, near, far


def attention() -> tuple[Callable[..., object], dict[str, object], dict[str, Tensor]]:
    case = AttentionCase("far", 2, 1, 16, 16, 3, 5, ((2, 3, 2, 2), (1, 2, 3, 1)))
    inputs = case.inputs()
    far = {name: inputs.pop(name) for name in ("q", "k", "v", "k_base", "v_base")}
    return cascade_attention, {**inputs, **case.options}, far


def swap() -> tuple[Callable[..., object], dict[str, object], dict[str, Tensor]]:
    case = SwapCase("far", 2, 1, 16, 16, 3, 5, ((2, 3, 5), (1, 2, 4), (2, 1, 5)))
    inputs = case.inputs()
    with use_backend("reference"):
        z, lse = cascade_attention(**case.causal(inputs), **case.options)
    shape = inputs["q"].shape[:3]
    near = {"z": z.view(*shape, -1), "lse": lse.view(shape), **inputs, **case.options}
    names = ("q", "k_base", "v_base", "q_new", "k_new", "v_new")
    return swap_key_attention, near, {name: near.pop(name) for name in names}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", [decode, grad_values, loss, patch, linear, attention, swap])
def test_rows_far_apart_give_the_bits_of_rows_side_by_side(
    case: Callable[[], tuple[Callable[..., object], dict[str, object], dict[str, Tensor]]],
    backend: str,
    memory: Tensor,
) -> None:
    op, near, close = case()
    far = apart(memory, close)
    with use_backend(backend):
        expected, got = op(**near, **close), op(**near, **far)
    for e, g in zip(*((x,) if isinstance(x, Tensor) else x for x in (expected, got)), strict=True):
        assert torch.equal(e, g)


@pytest.mark.parametrize("backend", BACKENDS)
def test_coalition_inputs_reads_explicands_beyond_two_to_the_31(
    backend: str, memory: Tensor
) -> None:
    m, last = 1024, FAR // 1024 + 2
    x = memory[2**32 :][: (last + 1) * m].view(last + 1, m)
    x[last] = torch.arange(m)
    ranks = torch.arange(m, dtype=torch.int32)[None]
    rows = torch.tensor([[last, 0, 0, 10, 500], [0, 0, 0, 0, 5]], dtype=torch.int32)
    with use_backend(backend):
        got = coalition_inputs(x, torch.full((1, m), -1.0), ranks, rows)
    assert torch.equal(got[0, 10:500], x[last, 10:500])
    assert got[0].sum() == x[last, 10:500].sum() - (m - 490)


class TestLastProgramOf:
    """Kernels whose rows are their programs': only the program of the last rows is run."""

    pytestmark = MARKS
    d, rows = 1024, FAR // 1024 + 4  # numbers of a row; rows

    @pytest.fixture
    def run(self, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
        """Run a kernel for a row of its programs from `first` on."""
        number = interpreter.InterpreterBuilder.create_get_program_id

        def launch(kernel: Any, first: int, *arguments: object, **constants: object) -> None:
            def shifted(builder: Any, axis: int) -> Any:
                handle = number(builder, axis)
                handle.data = handle.data + (first if axis == 0 else 0)
                return handle

            with monkeypatch.context() as patched:
                patched.setattr(interpreter.InterpreterBuilder, "create_get_program_id", shifted)
                kernel[(1, 1)](*arguments, **constants)

        return launch

    @pytest.fixture
    def matrix(self, memory: Tensor) -> Callable[[int], Tensor]:
        """One of two [rows, d] whose last rows hold numbers, and NaN."""

        def make(which: int) -> Tensor:
            begin = FAR + which * 5 * 2**29
            out = memory[begin : begin + self.rows * self.d].view(self.rows, self.d)
            out[-3:] = torch.randn(3, self.d, generator=generator(which))
            out[-4] = torch.nan
            return out

        return make

    def test_sparse_decode_writes_rows(self, run: Any, matrix: Any) -> None:
        n, d, out, W = self.rows, self.d, matrix(0), torch.randn(2, self.d, generator=generator(7))
        values, indices = torch.ones(n, 1), torch.ones(n, 1, dtype=torch.int32)
        run(
            decode_kernel._sparse_decode_kernel, n // 4 - 1, values, indices, W, W, out,
            n, 1, d, d, 1, HAS_BIAS=False, BN=4, BD=d,
        )  # fmt: skip
        assert torch.equal(out[-4:], W[1].expand(4, -1))

    def test_sae_loss_reads_and_writes_rows(self, run: Any, matrix: Any) -> None:
        n, d, x, grad, W = (
            self.rows,
            self.d,
            matrix(0),
            matrix(1),
            torch.randn(2, self.d, generator=generator(7)),
        )
        values, indices = torch.ones(n, 1), torch.ones(n, 1, dtype=torch.int32)
        sse, grad_values = torch.empty(n), torch.empty(n, 1)
        run(
            loss_kernel._sae_loss_kernel, n // 2 - 1, x, values, indices, W, W, sse, grad,
            grad_values, n, 1, d, d, 1, HAS_BIAS=False, BN=2, BD=d,
        )  # fmt: skip
        assert torch.equal(grad[-2:], 2 * (W[1] - x[-2:]))
        assert torch.allclose(sse[-2:], (W[1] - x[-2:]).square().sum(1))

    def test_sparse_decode_grad_W_dec_reads_rows_and_writes_latents(
        self, run: Any, matrix: Any
    ) -> None:
        n, d, grad_out, out = self.rows, self.d, matrix(0), matrix(1)
        offsets = torch.zeros(n + 1, dtype=torch.int64)
        offsets[-1] = 2
        source = torch.tensor([n - 1, n - 3], dtype=torch.int32)
        run(
            decode_kernel._sparse_decode_grad_W_dec_kernel, n // 4 - 1, torch.tensor([2.0, 1.0]),
            source, offsets, torch.empty(1, d), grad_out, out, n, n, d, CHUNK=CHUNK, BL=4, BD=d,
        )  # fmt: skip
        assert torch.equal(out[-1], 2 * grad_out[-1] + grad_out[-3])
        assert not out[-4:-1].any()

    def test_coalition_inputs_writes_rows(self, run: Any, matrix: Any) -> None:
        R, m, out = self.rows, self.d, matrix(0).view(torch.int32)
        x, background = torch.arange(m, dtype=torch.int32), torch.full((m,), -1, dtype=torch.int32)
        rows = torch.zeros(R, 5, dtype=torch.int32)
        rows[:, 4] = 100
        ranks = torch.arange(m, dtype=torch.int32)
        run(
            inputs_kernel._coalition_inputs_kernel, R // 4 - 1, x, background, ranks, rows, ranks,
            out, R, m, m, GROUPED=False, BR=4, BC=m,
        )  # fmt: skip
        assert torch.equal(out[-4:], torch.where(x < 100, x, -1).expand(4, -1))

    def test_topk_encode_reads_features(self, run: Any, matrix: Any) -> None:
        f, d, W = self.rows, self.d, matrix(0)
        x, value = torch.randn(1, d, generator=generator(7)), torch.empty(1, 2)
        count, index = torch.tensor([2], dtype=torch.int32), torch.tensor([[f - 1, f - 3]])
        run(
            topk_select._value_kernel, 0, x, x, W, x, count, index.int(), value, 1, d, 2,
            HAS_B_DEC=False, HAS_BIAS=False, ALL=False, BN=1, BC=2, BD=128,
        )  # fmt: skip
        assert torch.allclose(value, x @ W[[-1, -3]].T, rtol=1e-4, atol=1e-4)
