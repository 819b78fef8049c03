"""torch.compile(fullgraph=True) through models that call the ops: same bits, no graph break."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_map_only

from microtome import SAE, TopK, _native
from microtome.models import ToyModel, splice
from microtome.models.toy import ToyConfig
from microtome.ops import sparse_decode, topk_encode, use_backend
from microtome.ops._registry import Backend, Op
from microtome.testing.calls import Call, calls

SMALL, LARGE = calls(), calls(seed=1, n=7)
on_every_op = pytest.mark.parametrize("op", SMALL)
D, F = 16, 48


@pytest.fixture(autouse=True)
def _no_graphs_from_other_tests() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def graph(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """The function compiled as one graph, its pieces run by PyTorch one by one."""
    compiled: Callable[..., Any] = torch.compile(
        function, fullgraph=True, backend="aot_eager", **options
    )
    return compiled


def graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def copied(call: Call) -> dict[str, Any]:
    return {n: t.clone() if n in call.mutates else t for n, t in call.inputs.items()}


def small_sae() -> SAE:
    sae = SAE(D, F, TopK(4), seed=0)
    with torch.no_grad():
        sae.b_enc.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
    return sae


def x_of(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed))


def gradients(*modules: nn.Module) -> list[Tensor]:
    """The gradients of all parameters, which are cleared."""
    parameters = [p for module in modules for p in module.parameters()]
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    for p in parameters:
        p.grad = None
    return grads


def assert_same(got: Any, expected: Any) -> None:
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@on_every_op
def test_every_op_compiles_whole_for_two_batch_sizes(op: str) -> None:
    small, large = SMALL[op], LARGE[op]
    compiled = graph(lambda inputs, options: small.function(**inputs, **options), dynamic=True)
    for call in (small, large):
        inputs, mine = copied(call), copied(call)
        got = compiled(mine, call.options)
        got = (got,) if isinstance(got, Tensor) else tuple(got)
        assert_same(got, call(inputs))
        for name in call.mutates:
            assert torch.equal(mine[name], inputs[name]), name
    assert graphs() <= 2  # the second size may be a second graph where n == 1 or K == n


@on_every_op
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_the_fake_of_every_op_has_the_strides_of_the_answer(
    op: str, layout: str, backend: str
) -> None:
    call = SMALL[op]
    inputs = copied(call)
    if layout == "transposed":
        inputs = {
            n: t.mT.contiguous().mT
            if isinstance(t, Tensor) and t.dim() > 1 and n not in call.mutates
            else t
            for n, t in inputs.items()
        }
    with FakeTensorMode() as mode:
        fakes = tree_map_only(Tensor, mode.from_tensor, inputs)
        # As in a compiled graph, checks that read numbers must not run.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.compiler, "is_compiling", lambda: True)
            told = call(fakes)
    with use_backend(backend):
        real = call(inputs)
    assert [(t.shape, t.stride(), t.dtype) for t in told] == [
        (t.shape, t.stride(), t.dtype) for t in real
    ]


def test_an_sae_trains_in_one_graph_for_two_batch_sizes() -> None:
    sae = small_sae()

    def loss(x: Tensor) -> Tensor:
        code = sae.encode(x)
        return (sae.decode(code) - x).square().sum() + 0.1 * code.values.sum()

    compiled = graph(loss, dynamic=True)
    for n in (6, 11):
        x, mine = x_of(n).requires_grad_(), x_of(n).requires_grad_()
        expected, got = loss(x), compiled(mine)
        expected.backward()
        plain = [x.grad, *gradients(sae)]
        got.backward()
        assert_same([got.detach(), mine.grad, *gradients(sae)], [expected.detach(), *plain])
    assert graphs() == 1


def test_a_transformer_with_an_sae_spliced_in_trains_in_one_graph() -> None:
    model = ToyModel(ToyConfig(hidden_size=D, num_hidden_layers=1, num_attention_heads=2))
    sae = small_sae()

    def loss(tokens: Tensor) -> Tensor:
        return model(tokens).logits.logsumexp(-1).mean()

    compiled = graph(loss, dynamic=True)
    with splice(model, "resid_pre.0", sae):
        for shape in ((2, 5), (3, 8)):
            tokens = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(1))
            expected, got = loss(tokens), compiled(tokens)
            expected.backward()
            plain = gradients(model, sae)
            got.backward()
            assert_same([got.detach(), *gradients(model, sae)], [expected.detach(), *plain])
    assert graphs() == 1


def test_a_compiled_sae_follows_use_backend_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    sae, x, ran = small_sae(), x_of(3), []
    choose = Op.choose

    def chosen(op: Op, *args: Any) -> Backend:
        backend = choose(op, *args)
        ran.append(backend.name)
        return backend

    monkeypatch.setattr(Op, "choose", chosen)
    compiled = graph(sae)
    with torch.no_grad():
        compiled(x)
        before = graphs()
        ran.clear()
        with use_backend("reference"):
            compiled(x)
        assert ran == ["reference", "reference"]
        ran.clear()
        compiled(x)
    native = "cpu" if _native.why_absent() is None else "reference"
    assert ran == [native, native]
    assert graphs() == before


def test_a_step_between_two_encodes_is_seen_by_the_second() -> None:
    call = SMALL["sae_update"]

    def twice(inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        encode = SMALL["topk_encode"]
        first = encode({"x": inputs["x"], "W_enc": inputs["W_enc"], "b_enc": inputs["b_enc"]})
        (fired,) = call(inputs)
        second = encode({"x": inputs["x"], "W_enc": inputs["W_enc"], "b_enc": inputs["b_enc"]})
        return first[0], fired, second[0], inputs["W_dec"] * 2

    inputs, mine = copied(call), copied(call)
    expected, got = twice(inputs), graph(twice)(mine)
    assert_same(got, expected)
    assert not torch.equal(got[0], got[2])
    for name in call.mutates:
        assert torch.equal(mine[name], inputs[name]), name


def test_under_autocast_a_graph_casts_as_eager_does() -> None:
    sae, layer = small_sae(), nn.Linear(D, D)

    def loss(x: Tensor) -> Tensor:
        values, indices, _ = topk_encode(layer(x), sae.W_enc, sae.b_enc, k=4)  # bf16 and float32
        return (sparse_decode(values, indices, sae.W_dec, sae.b_dec) - x).square().sum()

    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x_of(1)).dtype == torch.bfloat16
        expected, got = loss(x_of(5)), graph(loss)(x_of(5))
    expected.backward()
    plain = gradients(sae, layer)
    got.backward()
    assert_same([got.detach(), *gradients(sae, layer)], [expected.detach(), *plain])


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method. is deprecated")
def test_inductor_gives_what_eager_gives() -> None:
    sae = small_sae()

    def loss(x: Tensor) -> Tensor:
        return (sae(x.tanh()) - x).square().mean()

    x = x_of(8)
    expected, got = loss(x), torch.compile(loss, fullgraph=True)(x)
    expected.backward()
    plain = gradients(sae)
    got.backward()
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(gradients(sae), plain)
