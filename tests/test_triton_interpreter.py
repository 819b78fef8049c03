"""Triton kernels against float64 and hand-made hard cases; interpreted where there is no GPU."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from microtome._seed import generator
from microtome.errors import BackendError, NonFiniteError
from microtome.ops import screen_weights, topk_encode, use_backend
from microtome.ops.sae_loss import sae_loss_reference
from microtome.ops.sae_update import OPTIMIZERS, UpdateRule, moments_for, sae_update_reference
from microtome.ops.sparse_decode import (
    sparse_decode_grad_values_reference,
    sparse_decode_grad_W_dec_reference,
    sparse_decode_reference,
)
from microtome.ops.topk_encode import topk_encode_reference
from microtome.testing import CASES, Case, assert_accurate
from microtome.testing.triton import DEVICE, MARKS, RUNS

pytestmark = MARKS
if RUNS:
    bf16 = pytest.importorskip("microtome.kernels.bf16")
    from microtome.kernels import (
        sae_loss,
        sae_update,
        segments,
        sparse_decode,
        sparse_decode_csr,
    )
    from microtome.kernels import (
        topk_encode as encode,
    )

BY_NAME = {case.name: case for case in CASES}
SMALL = [
    pytest.param(case, id=case.name) for case in CASES if case.name not in ("massive", "medium")
]
FLOATS = [torch.float32, torch.bfloat16]


def put(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to(DEVICE) for name, tensor in inputs.items()}


def check(got: object, plain: object, exact: object, what: str) -> None:
    if isinstance(got, Tensor):
        got, plain, exact = (got,), (plain,), (exact,)
    for i, (g, p, e) in enumerate(zip(got, plain, exact, strict=True)):
        # Over a handful of entries it is luck how far plain PyTorch is off.
        assert_accurate(g, p, e, f"{what}[{i}]", factor=2.0 if e.numel() > 32 else 4.0)


def wide(*tensors: object) -> tuple[object, ...]:
    return tuple(
        t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in tensors
    )


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", SMALL)
def test_gathers_are_as_accurate_as_pytorch(case: Case, dtype: torch.dtype) -> None:
    t = put(case.inputs(dtype))
    values, indices, W, b, x = t["values"], t["indices"], t["W_dec"], t["b_dec"], t["x"]
    for launch, reference, args in (
        (sparse_decode.launch, sparse_decode_reference, (values, indices, W, b)),
        (sparse_decode.launch_grad_values, sparse_decode_grad_values_reference, (x, indices, W)),
        (
            sparse_decode.launch_grad_W_dec,
            sparse_decode_grad_W_dec_reference,
            (values, indices, x, case.f),
        ),
        (sae_loss.launch, sae_loss_reference, (x, values, indices, W, b)),
    ):
        check(launch(*args), reference(*args), reference(*wide(*args)), reference.__name__)


def test_repeated_indices_add_up_and_int64_indices_are_taken() -> None:
    values = torch.tensor([[1.0, 2.0, 4.0]], device=DEVICE)
    indices = torch.tensor([[1, 1, 0]], device=DEVICE)
    W = torch.tensor([[1.0, 0.0], [0.0, 1.0]], device=DEVICE)
    assert sparse_decode.launch(values, indices, W, None).tolist() == [[4.0, 3.0]]
    gradient = sparse_decode.launch_grad_W_dec(
        values, indices, torch.tensor([[1.0, 10.0]], device=DEVICE), 2
    )
    assert gradient.tolist() == [[4.0, 40.0], [3.0, 30.0]]


def test_every_length_of_a_long_segment_is_summed_once() -> None:
    # Segments of every remainder around the chunk length, at starts that are no multiple of it.
    chunk = segments.CHUNK
    lengths = [chunk - 1, chunk, chunk + 1, 0, 2 * chunk, 3 * chunk + 5, 1, 2 * chunk - 1]
    latents = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(DEVICE)
    shuffled = latents[torch.randperm(latents.numel(), generator=generator(0)).to(DEVICE)]
    ones = torch.ones(latents.numel(), 1, device=DEVICE)
    got = sparse_decode.launch_grad_W_dec(
        ones, shuffled[:, None].int(), ones.expand(-1, 3).contiguous(), len(lengths)
    )
    assert got.tolist() == [[float(n)] * 3 for n in lengths]


def test_an_index_that_no_check_has_seen_yet_is_added_to_no_latent() -> None:
    # So many that a kernel over chunks begins with entries below 0, and ends with such from f on.
    n = 2 * segments.CHUNK + 3
    latents = torch.tensor([-(2**31), -1, 0, 1, 2, 2**31 - 1], dtype=torch.int32).repeat(n)
    ones = torch.ones(latents.numel(), 1, device=DEVICE)
    got = sparse_decode.launch_grad_W_dec(ones, latents[:, None].to(DEVICE), ones, 2)
    assert got.tolist() == [[float(n)]] * 2
    offsets = torch.tensor([0, ones.numel()], device=DEVICE)
    row = torch.ones(1, 1, device=DEVICE)
    got = sparse_decode_csr.launch_grad_W_dec(ones.flatten(), latents.to(DEVICE), offsets, row, 2)
    assert got.tolist() == [[float(n)]] * 2


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    "case", [*SMALL, pytest.param(Case("screened", 30, 40, 700, 16), id="screened")]
)
def test_topk_encode_is_the_float32_answer(case: Case, dtype: torch.dtype) -> None:
    t = put(case.inputs(dtype))
    args = (t["x"], t["W_enc"], t["b_enc"], t["b_dec"], case.k, "exact", "auto", None, None)
    values, indices, candidates = encode.launch(*args)
    plain, expected, _ = topk_encode_reference(*args)
    exact = topk_encode_reference(*wide(*args))[0]
    assert_accurate(values, plain, exact, "values")
    assert torch.equal(indices, expected)
    assert bool((candidates >= case.k).all())
    assert bool((candidates <= case.f).all())


def test_the_filter_screens_most_features_and_needs_no_repair_on_gaussian_rows() -> None:
    case = BY_NAME["medium"]
    t = put(case.inputs())
    _, _, candidates = encode.run(
        encode.plan(case.n, case.f, case.k), t["x"][:16], t["W_enc"], t["b_enc"], None, case.k
    )
    assert int(candidates.max()) < case.f // 3


@pytest.mark.parametrize(
    ("change", "repaired"),
    [
        ({"capacity": 16}, 5),
        ({"capacity": 16, "slots": 2}, 5),
        ({"rank": 1, "group": 1}, None),
        ({"rank": 10**6}, 5),
        ({"rows": 16, "BM": 16, "BN": 32, "BD": 16, "group": 1, "groups": 64, "rank": 8}, 0),
    ],
    ids=[
        "overflow",
        "more failures than slots",
        "threshold too high",
        "threshold too low",
        "other tiles",
    ],
)
def test_repaired_rows_hold_the_same_bits(change: dict[str, int], repaired: int | None) -> None:
    case = Case("repair", 5, 24, 700, 16)
    t = put(case.inputs())
    args = (t["x"], t["W_enc"], t["b_enc"], t["b_dec"], case.k)
    plan = encode.plan(case.n, case.f, case.k)
    assert plan.capacity < case.f
    values, indices, candidates = encode.run(plan, *args)
    assert int((candidates == case.f).sum()) == 0
    again, order, counts = encode.run(dataclasses.replace(plan, **change), *args)
    assert torch.equal(values, again)
    assert torch.equal(indices, order)
    whole = int((counts == case.f).sum())
    assert whole > 0 if repaired is None else whole == repaired


def test_ties_go_to_the_lower_index_on_every_path() -> None:
    # Every feature is one of three, so the k-th value is shared by hundreds and every list
    # overflows.
    f, k = 2100, 5
    W = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]).repeat(f // 3 + 1, 1)[:f].to(DEVICE)
    x = torch.tensor([[2.0, 1.0], [0.0, 3.0], [-1.0, -2.0], [0.0, -1.0]], device=DEVICE)
    values, indices, candidates = encode.launch(x, W, None, None, k, "exact", "auto", None, None)
    assert candidates.tolist() == [f] * 4
    assert indices[:3].tolist() == [[0, 3, 6, 9, 12], [1, 4, 7, 10, 13], [2, 5, 8, 11, 14]]
    # 0 and -0.0 are one value.
    assert indices[3].tolist() == [0, 2, 3, 5, 6]
    assert values.tolist() == [[2.0] * 5, [3.0] * 5, [1.0] * 5, [0.0] * 5]


def test_a_feature_that_rounds_apart_in_bf16_is_still_found() -> None:
    # In bf16 the true best (1 + 2^-9) ties with hundreds of decoys (1 + 2^-8 rounds up, 1.0 stays).
    f, d = 700, 4
    W = torch.ones(f, d)
    W[:, 0] += 2.0**-10
    W[413, 0] = 1 + 2.0**-9
    x = torch.ones(1, d)
    values, indices, _ = encode.launch(
        x.to(DEVICE), W.to(DEVICE), None, None, 1, "exact", "auto", None, None
    )
    assert indices.tolist() == [[413]]
    assert values.item() == d + 2.0**-9


def test_the_bound_of_the_screen_holds_for_every_feature() -> None:
    g = generator(0, "bound")
    scale = 10.0 ** torch.randint(-12, 12, (40, 1), generator=g)
    source = (torch.randn(40, 50, generator=g) * scale).to(DEVICE)
    shadow, stats = bf16.shadow_rows(source, None)
    exact, rounded = source.double(), shadow[:, :50].double()
    assert torch.equal(shadow[:, :50], source.bfloat16())
    assert bool((stats[:, 1].double() >= exact.norm(dim=1)).all())
    assert bool((stats[:, 2].double() >= (exact - rounded).norm(dim=1)).all())


def test_a_given_bf16_screen_gives_the_same_bits() -> None:
    case = Case("screened", 6, 40, 700, 6)
    t = put(case.inputs())
    kind, shadow, stats = screen_weights(t["W_enc"].cpu(), "bf16")
    args = (t["x"], t["W_enc"], t["b_enc"], t["b_dec"], case.k, "exact")
    plain = encode.launch(*args, "auto", None, None)
    with_screen = encode.launch(*args, kind, shadow.to(DEVICE), stats.to(DEVICE))
    assert torch.equal(plain[0], with_screen[0])
    assert torch.equal(plain[1], with_screen[1])


@pytest.mark.parametrize("f", [32, 700])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_rows_that_are_not_finite_are_named(f: int, bad: float) -> None:
    t = put(Case("bad", 9, 16, f, 3).inputs())
    x = t["x"].clone()
    x[2, 5] = x[7, 0] = bad
    with (
        use_backend("triton"),
        pytest.raises(NonFiniteError, match="x holds NaN or infinity in row 2, 7"),
    ):
        topk_encode(x, t["W_enc"], k=3)
    W = t["W_enc"].clone()
    W[f - 1, 3] = bad
    with (
        use_backend("triton"),
        pytest.raises(NonFiniteError, match=f"W_enc holds NaN or infinity in row {f - 1}"),
    ):
        topk_encode(t["x"], W, k=3)


def update_inputs(
    case: Case, rule: UpdateRule, *, aux: bool, screen: bool, center: bool = True
) -> list[object]:
    """Arguments of `sae_update`'s kernels, with moments as after some steps."""
    g = generator(1, case.name)
    t = case.inputs()
    n, k, d = case.n, case.k, case.d
    grad_values = torch.randn(n, k, generator=g) * (t["values"] != 0)
    grad_out = torch.randn(n, d, generator=g)
    params = tuple(t[name].contiguous().clone() for name in ("W_enc", "b_enc", "W_dec", "b_dec"))
    moments = [
        None if m is None else torch.rand(m.shape, generator=g) for m in moments_for(params, rule)
    ]
    second = (
        t["indices"].flip(1).roll(1, 0).contiguous(),
        t["values"] * 0.5,
        grad_values * 2,
        grad_out.flip(1),
        0.3,
    )
    shadow = screen_weights(params[0], "bf16") if screen else ("", None, None)
    arguments = [
        t["indices"].int(), t["values"], grad_values, grad_out, 0.7,
        *(second if aux else (None, None, None, None, 0.0)), t["x"].contiguous(), *params,
        *moments, *shadow, *(None,) * 6,  # neither copies nor rows of gradients
        rule.optimizer, rule.lr, rule.beta1, rule.beta2, rule.eps, rule.weight_decay, 3,
        rule.rowsparse, rule.project, rule.renorm, center,
    ]  # fmt: skip
    return [a.to(DEVICE) if isinstance(a, Tensor) else a for a in arguments]


def check_update(arguments: list[object], case: Case) -> None:
    """Compare every parameter and moment with the reference in float32 and float64."""
    copy = lambda args: [a.clone() if isinstance(a, Tensor) else a for a in args]  # noqa: E731
    got, plain, exact = copy(arguments), copy(arguments), list(wide(*copy(arguments)))
    fired = sae_update.launch(*got)
    assert torch.equal(fired, sae_update_reference(*plain))
    exact[23:26] = ["", None, None]
    sae_update_reference(*exact)
    for i in range(11, 23):
        if isinstance(got[i], Tensor):
            assert_accurate(got[i], plain[i], exact[i], f"{case.name} argument {i}")
    if isinstance(got[24], Tensor):
        W = got[11].double()
        rounded = got[24][:, : case.d].contiguous().view(torch.bfloat16).double()
        assert torch.equal(rounded, got[11].bfloat16().double())
        assert bool((got[25][:, 1].double() >= W.norm(dim=1)).all())
        assert bool((got[25][:, 2].double() >= (W - rounded).norm(dim=1)).all())


RULES = [
    UpdateRule("adam", lr=1e-2, weight_decay=0.1),
    UpdateRule("adamw", lr=1e-2, weight_decay=0.1, project=False),
    UpdateRule("sgd", lr=1e-2, renorm=False),
    UpdateRule("sgd", lr=1e-2, beta1=0.0, weight_decay=0.1, rowsparse=True),
    UpdateRule("signsgd", lr=1e-2, weight_decay=0.1),
    UpdateRule("signsgd", lr=1e-2, beta1=0.0, project=False, renorm=False),
    UpdateRule("adam", lr=1e-2, rowsparse=True),
]


def test_the_rules_below_name_every_optimizer() -> None:
    assert {rule.optimizer for rule in RULES} == set(OPTIMIZERS)


@pytest.mark.parametrize(
    "rule", RULES, ids=lambda r: f"{r.optimizer}-{r.beta1:g}-{'row' if r.rowsparse else 'dense'}"
)
def test_sae_update_is_the_reference_for_every_rule(rule: UpdateRule) -> None:
    case = BY_NAME["odd"]
    check_update(update_inputs(case, rule, aux=True, screen=True), case)


@pytest.mark.parametrize("name", ["tiny", "one_row", "k_is_f", "empty", "ties", "dense"])
def test_sae_update_is_the_reference_for_every_shape(name: str) -> None:
    case = BY_NAME[name]
    center = name not in ("one_row", "ties")
    check_update(update_inputs(case, RULES[0], aux=False, screen=False, center=center), case)


def test_repeats_give_the_same_bits() -> None:
    case = Case("repeat", 12, 17, 400, 6, "dense")
    t = put(case.inputs())
    args = (t["x"], t["W_enc"], t["b_enc"], t["b_dec"], case.k, "exact", "auto", None, None)
    first = [
        *encode.launch(*args),
        sparse_decode.launch_grad_W_dec(t["values"], t["indices"], t["x"], case.f),
    ]
    second = [
        *encode.launch(*args),
        sparse_decode.launch_grad_W_dec(t["values"], t["indices"], t["x"], case.f),
    ]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_screen_that_triton_cannot_refresh_is_refused_by_name() -> None:
    case = BY_NAME["small"]
    arguments = update_inputs(case, RULES[0], aux=False, screen=True)
    arguments[23] = "q15"
    with use_backend("triton"), pytest.raises(BackendError, match="screen kind 'q15'"):
        torch.ops.microtome.sae_update(*arguments)


@pytest.mark.parametrize(
    ("n", "f", "k"),
    [(1, 1, 1), (8192, 24576, 32), (8192, 65536, 64), (16384, 131072, 64), (4096, 1 << 20, 32),
    (1 << 20, 1 << 24, 4096),
     (2048, 16384, 2048), (0, 4096, 8)],
)  # fmt: skip
def test_the_plan_keeps_its_workspace_and_its_counts_in_range(n: int, f: int, k: int) -> None:
    p = encode.plan(n, f, k)
    assert k <= p.capacity <= f
    assert 4 * f * p.slots <= max(encode.WORKSPACE, 4 * f)
    assert 8 * p.capacity * p.rows <= max(encode.WORKSPACE, 8 * p.capacity * p.BM)
    assert -(-p.rows // p.BM) * -(-f // p.BN) < 2**31  # programs of a launch
    if p.capacity < f:
        assert p.rank <= p.groups
        assert p.groups <= 8 * encode.MAXIMA
        assert p.groups * p.group >= -(-f // p.stride)
        assert p.rank * p.stride < p.capacity


def test_every_full_chunk_has_a_slot_of_its_own_beyond_two_to_the_31() -> None:
    chunk = segments.CHUNK
    base = 2**31 + 77
    for begin, end in ((base, base + 5 * chunk + 3), (0, 2**33)):
        full = (end - begin) // chunk
        for i in (0, 1, full // 2, full - 1):
            first = begin + i * chunk
            slot = (first + chunk - 1) // chunk  # as add_partials computes it
            entry = slot * chunk  # as _chunk_kernel finds the chunk again
            assert begin + (entry - begin) // chunk * chunk == first
            assert slot < segments.slots(end)
