"""What only a device can show: streams, graphs, steps that never wait.

Every op that Triton has is called here on small inputs; on the CPU twice, so that the calls
themselves are known to run where there is no device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from microtome import SAE, TopK, TrainConfig, ops, synchronize
from microtome._seed import generator
from microtome.errors import ArgumentError, NonFiniteError
from microtome.ops import ADD, REPLACE
from microtome.ops._registry import OPS
from microtome.ops.sae_update import Code, UpdateRule, moments_for
from microtome.sae.step import FusedStep
from microtome.testing import ATTENTION_CASES, MLP_CASES, SWAP_CASES, Case
from microtome.testing.calls import calls
from microtome.testing.triton import INTERPRETED

needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        INTERPRETED or not torch.cuda.is_available(),
        reason="TRITON_INTERPRET is 1" if INTERPRETED else "no CUDA device",
    ),
]
SIZES = Case("repeat", 300, 128, 4096, 16, "dense")
REPEATS = {"cpu": 2, "cuda": 20}
Call = Callable[[], Any]


def put(tree: Any, device: str) -> Any:
    return tree_map_only(Tensor, lambda t: t.to(device), tree)


def sae(device: str) -> dict[str, Tensor]:
    return {name: t.contiguous().to(device) for name, t in SIZES.inputs().items()}


def update(t: dict[str, Tensor], rows: torch.dtype = torch.float32) -> Any:
    """One step of Adam on clones of the parameters, from moments that are 0."""
    params = tuple(t[name].clone() for name in ("W_enc", "b_enc", "W_dec", "b_dec"))
    rule = UpdateRule("adam", lr=1e-2)
    moments = moments_for(params, rule)
    values, x = t["values"].to(rows), t["x"].to(rows)
    code = Code(t["indices"].int(), values, values * 0.5, x, 0.7)
    copies = None if rows == torch.float32 else (params[0].to(rows), params[2].to(rows))
    fired = ops.sae_update(code, x, params, moments, rule, 1, copies=copies)
    return fired, params, moments, copies or ()


def named(cases: tuple[Any, ...], name: str) -> Any:
    return next(case for case in cases if case.name == name)


def sae_calls(device: str) -> dict[str, Call]:
    t, at = sae(device), torch.ops.microtome
    x, W, values, indices = t["x"], t["W_dec"], t["values"], t["indices"]
    return {
        "topk_encode": lambda: ops.topk_encode(x, t["W_enc"], t["b_enc"], t["b_dec"], k=16),
        "topk_encode_fp8": lambda: ops.topk_encode_fp8(x, t["W_enc"], t["b_enc"], k=16),
        "screen_weights": lambda: ops.screen_weights(t["W_enc"], "fp8")[1:],
        "sparse_decode": lambda: ops.sparse_decode(values, indices, W, t["b_dec"]),
        "sparse_decode_grad_values": lambda: at.sparse_decode_grad_values(x, indices, W),
        "sparse_decode_grad_W_dec": lambda: at.sparse_decode_grad_W_dec(values, indices, x, len(W)),
        "sae_loss": lambda: ops.sae_loss(x, values, indices, W, t["b_dec"]),
        "sae_update": lambda: update(t),
        "sae_update on bfloat16 rows": lambda: update(t, torch.bfloat16),
    }


def patching_calls(device: str) -> dict[str, Call]:
    g = generator(0)
    draw = lambda *shape: torch.randn(*shape, generator=g).to(device)  # noqa: E731
    table = [[0, 2, 3, 90, 2, REPLACE], [1, 1, 0, 128, 1, ADD]]
    patch = {
        "base": draw(3, 4, 128),
        "sources": draw(3, 128),
        "rows": torch.tensor([[2, 1, 4], [1, 0, 4]], dtype=torch.int32, device=device),
        "table": torch.tensor(table, dtype=torch.int32, device=device),
        "factors": draw(2),
        "total": 7,
    }
    linear = {
        "x": draw(70, 128),
        "x_base": draw(3, 128),
        "y_base": draw(3, 96),
        "index": torch.arange(70, device=device) % 3,
        "packed": ops.pack_weights(torch.randn(96, 128, generator=g), "bf16").to(device),
        "o": 96,
    }
    mixed, swap = named(ATTENTION_CASES, "grouped"), named(SWAP_CASES, "grouped")
    inputs = put(mixed.inputs(), device)
    swapped, causal = swap.inputs(), put(swap.causal(swap.inputs()), device)
    swapped = put(swapped, device)

    def swap_key_attention() -> Tensor:
        z, lse = ops.cascade_attention(**causal, **swap.options)
        shape = swapped["q"].shape[:3]
        base = {"z": z.view(*shape, -1), "lse": lse.view(shape)}
        return ops.swap_key_attention(**base, **swapped, **swap.options)

    return {
        "patch_rows": lambda: ops.patch_rows(**patch),
        "delta_linear": lambda: ops.delta_linear(**linear),
        "cascade_attention": lambda: ops.cascade_attention(**inputs, **mixed.options),
        "swap_key_attention": swap_key_attention,
    }


def shapley_calls(device: str) -> dict[str, Call]:
    g = generator(0)
    draw = lambda *shape: torch.randn(*shape, generator=g).to(device)  # noqa: E731
    ranks = torch.rand(2, 3, 2, 7, generator=g).argsort(-1).argsort(-1).int().to(device)
    rows = torch.tensor([[1, 0, 3, 2, 5], [0, 1, 0, 0, 7]], dtype=torch.int32, device=device)
    coalitions = torch.randint(-(2**63), 2**63 - 1, (200, 1), generator=g).to(device)
    x, background, walks = draw(3, 7), draw(2, 7), draw(3, 2, 3, 2, 15, 2)
    weights, answers = draw(1, 200).double(), draw(3, 200, 2).double()
    mlp = put(named(MLP_CASES, "nested").inputs(), device)
    return {
        "coalition_inputs": lambda: ops.coalition_inputs(x, background, ranks.view(-1, 7), rows),
        "shapley_reduce": lambda: ops.shapley_reduce(walks, ranks, True),
        "coalition_gram": lambda: ops.coalition_gram(coalitions, weights, answers, 30),
        "mlp_shapley": lambda: ops.mlp_shapley(**mlp),
        "mlp_shapley in bf16": lambda: ops.mlp_shapley(**mlp, precision="bf16"),
    }


def other_calls(device: str) -> dict[str, Call]:
    """Codes with rows of any length, few features, whole rows: by the calls that all ops share."""
    shared, at = calls(n=50), torch.ops.microtome
    names = (
        "batch_topk_encode", "threshold_encode", "sparse_decode_csr", "feature_clamp", "solu",
        "attribution_scores",
    )  # fmt: skip
    inputs = {name: put(shared[name].inputs, device) for name in names}
    code, x = inputs["sparse_decode_csr"], inputs["solu"]["x"]
    values, indices, offsets, W = (code[key] for key in ("values", "indices", "offsets", "W_dec"))
    return {
        **{name: partial(shared[name], inputs[name]) for name in names},
        "solu_grad_x": lambda: at.solu_grad_x(x, x),
        "sparse_decode_csr_grad_values": lambda: at.sparse_decode_csr_grad_values(
            x, indices, offsets, W
        ),
        "sparse_decode_csr_grad_W_dec": lambda: at.sparse_decode_csr_grad_W_dec(
            values, indices, offsets, x, len(W)
        ),
    }


FAMILIES = {
    name: family
    for family in (sae_calls, patching_calls, shapley_calls, other_calls)
    for name in family("cpu")
}


def equal(a: Any, b: Any) -> bool:
    return all(map(torch.equal, tree_leaves(a), tree_leaves(b)))


def test_every_op_of_triton_is_called() -> None:
    have = {op.name for op in OPS.values() if any(b.name == "triton" for b in op.backends)}
    assert have <= set(FAMILIES)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
@pytest.mark.parametrize("name", FAMILIES)
def test_repeats_give_the_same_bits_on_streams_of_their_own(name: str, device: str) -> None:
    call = FAMILIES[name](device)[name]
    first = call()
    for _ in range(REPEATS[device]):
        if device == "cpu":
            again = call()
        else:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                again = call()
            torch.cuda.current_stream().wait_stream(stream)
        assert equal(again, first)


# Each with sizes that are known without the data.
ENCODERS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "topk_encode": lambda t: ops.topk_encode(t["x"], t["W_enc"], t["b_enc"], k=16),
    "batch_topk_encode": lambda t: ops.batch_topk_encode(t["x"], t["W_enc"], t["b_enc"], k=16),
    "threshold_encode": lambda t: ops.threshold_encode(
        t["x"], t["W_enc"], t["b_enc"], bandwidth=0.1, capacity=t["x"].shape[0] * SIZES.f
    ),
}


@contextmanager
def waits(mode: str) -> Iterator[None]:
    """Inside the block a wait for the device is an error, or a warning."""
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def captured(call: Call) -> tuple[torch.cuda.CUDAGraph, Any]:
    """The call as a graph, and what a replay writes to. Kernels are compiled before."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    return graph, out


# Ops that look at index tables; here their tables are sound.
TABLED = (
    "patch_rows", "delta_linear", "cascade_attention", "swap_key_attention", "coalition_inputs",
    "shapley_reduce", "mlp_shapley", "feature_clamp",
)  # fmt: skip


def tabled(name: str, device: str) -> tuple[Call, dict[str, Any]]:
    """A call of such an op that reads its sizes from nothing, and its inputs."""
    call = calls(n=50)[name]
    inputs = put(call.inputs, device)
    return partial(call, inputs), inputs


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
@pytest.mark.parametrize("name", TABLED)
def test_an_op_that_looks_at_tables_never_waits_for_the_device(name: str, device: str) -> None:
    call, _ = tabled(name, device)
    want = call()  # compiles
    if device == "cuda":
        torch.cuda.synchronize()
    with waits("error") if device == "cuda" else nullcontext():
        got = call()
    assert equal(got, want)
    synchronize()


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=needs_gpu)])
@pytest.mark.parametrize("name", TABLED)
def test_an_op_that_looks_at_tables_is_captured(name: str, device: str) -> None:
    call, inputs = tabled(name, device)
    graph, out = captured(call)
    for turn in range(2):
        if turn:
            for tensor in tree_leaves(inputs):
                if isinstance(tensor, Tensor) and tensor.is_floating_point():
                    tensor.mul_(1.5)
        graph.replay()
        assert equal(out, call())


# Op, table, and an entry beyond what there is, of a call of n = 50 rows.
BEYOND: dict[str, tuple[str, tuple[int, ...], int]] = {
    "patch_rows": ("table", (1, 1), 10**6),
    "cascade_attention": ("q_positions", (3,), 10**6),
    "swap_key_attention": ("rows", (0, 2), 10**6),
    "coalition_inputs": ("rows", (7, 2), 10**6),
    "shapley_reduce": ("ranks", (0, 1, 0, 2), 10**6),
    "mlp_shapley": ("ranks", (0, 1, 1, 0), 10**6),
}


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=needs_gpu)])
@pytest.mark.parametrize("name", BEYOND)
def test_a_table_that_reaches_outside_is_told_later_and_harms_nothing(
    name: str, device: str
) -> None:
    key, at, value = BEYOND[name]
    call, inputs = tabled(name, device)
    want, sound = call(), inputs[key].clone()
    inputs[key][at] = value
    call()
    with pytest.raises(ArgumentError, match=rf"^{name}: .*, the first such row, in an earlier"):
        synchronize()
    inputs[key].copy_(sound)
    assert equal(call(), want)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=needs_gpu)])
@pytest.mark.parametrize(
    "name", [*ENCODERS, "sae_loss", "sae_update", "sae_update on bfloat16 rows"]
)
def test_a_captured_op_answers_what_lies_in_its_inputs_at_replay(name: str, device: str) -> None:
    t = sae(device)
    call = {
        **{name: partial(encoder, t) for name, encoder in ENCODERS.items()},
        "sae_loss": lambda: ops.sae_loss(t["x"], t["values"], t["indices"], t["W_dec"]),
        "sae_update": lambda: update(t),
        "sae_update on bfloat16 rows": lambda: update(t, torch.bfloat16),
    }[name]
    graph, out = captured(call)
    for flipped in (False, True):
        if flipped:
            t["x"].copy_(t["x"].flip(0) * 1.5)
        graph.replay()
        assert equal(out, call())


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=needs_gpu)])
def test_the_ops_of_a_step_never_wait_for_the_device(device: str) -> None:
    t = sae(device)
    params = tuple(t[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec"))
    rule = UpdateRule("adam", lr=1e-3)
    moments = moments_for(params, rule)

    def step() -> None:
        values, indices, _ = ops.topk_encode(t["x"], *params[:2], k=16)
        values = values.relu()
        _, grad_out, grad_values = ops.sae_loss(t["x"], values, indices, *params[2:])
        code = Code(indices, values, grad_values, grad_out, 1e-3)
        ops.sae_update(code, t["x"], params, moments, rule, 1)

    step()  # compiles
    torch.cuda.synchronize()
    with waits("error"):
        step()


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=needs_gpu)])
@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_never_waits_for_the_device(name: str, device: str) -> None:
    t = sae(device)
    ENCODERS[name](t)  # compiles
    torch.cuda.synchronize()
    with waits("error"):
        ENCODERS[name](t)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=needs_gpu)])
def test_a_step_on_wrong_inputs_changes_not_a_bit(device: str) -> None:
    t = sae(device)
    before = {name: t[name].clone() for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    t["x"][3, 5] = float("nan")
    fired, params, *_ = update(t)
    assert all(map(torch.equal, params, before.values()))
    assert not fired.any()
    with pytest.raises(NonFiniteError, match="sae_update: x holds NaN or infinity in row 3"):
        synchronize()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=needs_gpu)])
@pytest.mark.parametrize("n_dead", [0, 40])
def test_a_training_step_makes_the_host_wait_for_no_kernel_of_its_own(
    device: str, precision: str, n_dead: int
) -> None:
    # Only for an event of the step before, which is no call that torch counts as a wait.
    x = sae(device)["x"]
    model = SAE(d_model=SIZES.d, n_features=SIZES.f, activation=TopK(SIZES.k)).to(device)
    step = FusedStep(model, TrainConfig(steps=2, precision=precision))
    step.since_fired[:n_dead] = step.config.dead_after_tokens
    step.take(x, 1.0, 1)  # compiles
    step.since_fired[:n_dead] = step.config.dead_after_tokens
    torch.cuda.synchronize()
    with waits("error"):
        losses = step.take(x, 1.0, 2)
    assert (losses.auxk > 0) == (n_dead > 0)
