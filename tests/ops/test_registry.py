"""The dispatcher: who is chosen, what a demand does, and what it says when it cannot be met."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import microtome as mt
from microtome import _native, errors
from microtome.ops import _registry
from microtome.ops._registry import Backend, Op, demanded_backend, use_backend

needs_extension = pytest.mark.skipif(
    _native.why_absent() is not None, reason="the extension is absent"
)
CALLS: list[str] = []


def registry_probe_reference(x: Tensor, scale: float) -> Tensor:
    CALLS.append("reference")
    return x * scale


def registry_probe_cpu(x: Tensor, scale: float) -> Tensor:
    CALLS.append("cpu")
    return x * scale


def registry_autocast_reference(x: Tensor) -> Tensor:
    return x @ x


# Two backends in Python, so that the dispatcher is tested without the extension.
probe = Op(
    registry_probe_reference,
    fake=lambda x, scale: torch.empty_like(x),
    backends=[
        Backend("cpu", "absent:absent", lambda x, scale: "scale is 0" if scale == 0 else None)
    ],
)
probe.backends[0].__dict__["run"] = registry_probe_cpu
autocast_probe = Op(registry_autocast_reference, fake=lambda x: torch.empty_like(x))
for op in (probe, autocast_probe):
    _registry.OPS.pop(op.name)  # microtome's own table lists microtome's own ops
X = torch.ones(2)


@pytest.fixture(autouse=True)
def no_demand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test starts without a demand, whatever the environment says."""
    monkeypatch.delenv("MICROTOME_BACKEND", raising=False)
    monkeypatch.delenv("MICROTOME_REQUIRE", raising=False)
    CALLS.clear()


def test_the_first_backend_that_can_run_is_chosen() -> None:
    probe(X, 2.0)
    assert CALLS == ["cpu"]


def test_a_backend_that_cannot_run_gives_way_to_the_next() -> None:
    probe(X, 0.0)
    assert CALLS == ["reference"]


def test_use_backend_nests_and_is_undone_also_by_an_exception() -> None:
    def fail() -> None:
        with use_backend("triton"):
            assert demanded_backend() == "triton"
            raise KeyError(X)

    with use_backend("reference"):
        with use_backend("cpu"):
            probe(X, 2.0)
        with use_backend("auto"):
            assert demanded_backend() is None
        with pytest.raises(KeyError, match="tensor"):
            fail()
        probe(X, 2.0)
    assert demanded_backend() is None
    assert CALLS == ["cpu", "reference"]


def test_an_unknown_backend_is_named_and_demands_nothing() -> None:
    text = (
        r"^use_backend: no backend 'gpu'; choose one of 'cuda', 'triton', 'cpu', 'reference' "
        r"or 'auto'\.$"
    )
    with pytest.raises(errors.ArgumentError, match=text), use_backend("gpu"):
        pass
    assert demanded_backend() is None


def test_the_environment_demands_a_backend_and_a_block_overrules_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MICROTOME_BACKEND", "reference")
    probe(X, 2.0)
    with use_backend("cpu"):
        probe(X, 2.0)
    with use_backend("auto"):
        probe(X, 2.0)
    monkeypatch.setenv("MICROTOME_BACKEND", "auto")
    probe(X, 2.0)
    assert CALLS == ["reference", "cpu", "cpu", "cpu"]


def test_a_demand_that_cannot_be_met_lists_every_input_and_every_reason() -> None:
    with use_backend("cpu"), pytest.raises(errors.BackendError) as raised:
        probe(X, 0.0)
    assert str(raised.value) == (
        "registry_probe: backend 'cpu' was demanded but cannot run here.\n"
        "  x: [2] float32 cpu\n"
        "  scale: 0.0\n"
        "because\n"
        "  cuda: not written for this op\n"
        "  triton: not written for this op\n"
        "  cpu: scale is 0\n"
        "  reference: can run it\n"
        'Demand another with use_backend("reference"), or none to let microtome choose.'
    )
    assert CALLS == []


def test_explain_says_what_each_backend_answers() -> None:
    assert probe.explain(X.bfloat16(), 2.0).splitlines() == [
        "  x: [2] bfloat16 cpu",
        "  scale: 2.0",
        "backends, in order of choice",
        "  cuda: not written for this op",
        "  triton: not written for this op",
        "  cpu: can run it",
        "  reference: can run it",
    ]


def test_a_graph_compiled_before_the_demand_follows_it() -> None:
    compiled = torch.compile(lambda x: probe(x, 3.0) + 1, fullgraph=True, backend="aot_eager")
    compiled(X)
    assert CALLS[-1] == "cpu"
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    with use_backend("reference"):
        assert torch.equal(compiled(X), X * 3 + 1)
    assert CALLS[-1] == "reference"
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before


def test_autocast_is_off_inside_an_op() -> None:
    x = torch.full((8, 8), 1 + 2**-12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = autocast_probe(x)
        assert (x @ x).dtype == torch.bfloat16
    assert out.dtype == torch.float32
    assert torch.equal(out, x @ x)


def test_info_names_every_backend() -> None:
    report = mt.info()
    assert list(report) == ["cuda", "triton", "cpu", "reference"]
    assert report["reference"] == "available"
    if not torch.cuda.is_available():
        assert report["cuda"] != "available"


def test_info_fails_where_a_required_backend_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "load", lambda: (None, "no compiler was found"))
    monkeypatch.setenv("MICROTOME_REQUIRE", "cpu,reference,tpu")
    text = (
        r"^MICROTOME_REQUIRE names backends that are missing\. "
        r"cpu: no compiler was found; tpu: no such backend$"
    )
    with pytest.raises(errors.BackendError, match=text):
        mt.info()
    monkeypatch.setenv("MICROTOME_REQUIRE", "reference")
    assert mt.info()["cpu"] == "no compiler was found"


@pytest.mark.parametrize(
    ("triton", "numpy", "reason"),
    [
        ("3.6.0", "2.4.6", "the interpreter of triton 3.6.0 needs numpy below 2.4, this is 2.4.6"),
        ("3.6.0", "2.3.5", None),
        ("3.9.0", "2.5.0rc1", None),
    ],
)
def test_an_interpreter_that_this_numpy_breaks_is_no_backend(
    triton: str, numpy: str, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = {"triton": triton, "numpy": numpy}
    monkeypatch.setattr("importlib.metadata.version", versions.get)
    monkeypatch.setattr(_registry, "_has_triton", lambda: True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    _registry._interpreter_fails.cache_clear()
    assert _registry.unavailable("triton") == reason
    _registry._interpreter_fails.cache_clear()


def test_without_the_extension_the_reference_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "load", lambda: (None, "no compiler was found"))
    code = (torch.tensor([[2.0]]), torch.tensor([[1]]), torch.tensor([[1.0], [3.0]]))
    assert mt.ops.sparse_decode(*code).tolist() == [[6.0]]
    text = r"\n  cpu: no compiler was found\n"
    with use_backend("cpu"), pytest.raises(errors.BackendError, match=text):
        mt.ops.sparse_decode(*code)


@needs_extension
def test_the_forced_instruction_set_is_never_above_the_processors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("MICROTOME_CPU_ISA", raising=False)
    best = _native.LEVELS.index(_native.isa())
    emulated = _native.module().amx_is_emulated()
    assert not emulated or _native.isa() == "avx512bf16"  # which is still the best level
    for number, level in enumerate(_native.LEVELS):
        monkeypatch.setenv("MICROTOME_CPU_ISA", level)
        wanted = level if level == "amx" and emulated else _native.LEVELS[min(number, best)]
        assert _native.isa() == wanted
        assert _native.emulates_amx() == (level == "amx" and emulated)


def test_an_instruction_set_that_is_none_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MICROTOME_CPU_ISA", "avx-512")
    message = "MICROTOME_CPU_ISA: no level 'avx-512'; choose one of generic, avx2, avx512"
    with pytest.raises(errors.ArgumentError, match=message):
        _native.forced_isa()


def test_every_op_explains_a_call_without_computing_it() -> None:
    x, W = torch.full((2, 3), torch.nan, dtype=torch.float64), torch.ones(4, 3, dtype=torch.float64)
    said = mt.ops.topk_encode.explain(x, W, k=1).splitlines()  # a NaN that nobody looks at
    assert said[:3] == ["topk_encode", "  x: [2, 3] float64 cpu", "  W_enc: [4, 3] float64 cpu"]
    assert said[-1] == "  reference: can run it"
    assert mt.explain(mt.ops.topk_encode, x, W, k=1).splitlines() == said
    sae = mt.SAE(8, 32, mt.TopK(4))
    assert mt.explain(sae, torch.randn(2, 8)).startswith("screen_weights\n  W_enc: [32, 8]")
    assert sae(torch.randn(2, 8)).shape == (2, 8)  # nothing is left of the question
    with pytest.raises(errors.ArgumentError, match="explain: relu called no op"):
        mt.explain(torch.relu, x)
    with pytest.raises(errors.ArgumentError, match="k must be between 1 and f=4, got k=9"):
        mt.ops.topk_encode.explain(x, W, k=9)
    public = [name for name in mt.ops.__all__ if name in _registry.OPS]
    assert len(public) > 15
    assert all(hasattr(getattr(mt.ops, name), "explain") for name in public)
