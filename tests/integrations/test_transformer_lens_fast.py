"""Stock sweeps run natively where they can, with the numbers of one forward for each cell."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from microtome.integrations.transformer_lens import HookedModel, get_act_name, patching, rows
from microtome.models.native.block import Stack
from microtome.models.native.plan import Plan
from microtome.patching.native import NativeEngine
from microtome.testing import families

pytest.importorskip("transformers", reason="transformers is not installed")
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:HookedTransformer is deprecated"),
]
GENERIC = importlib.import_module("microtome.integrations.transformer_lens.generic")

POSITION, HEAD, BOTH = ("layer", "pos"), ("layer", "head"), ("layer", "pos", "head")
ROW, ENTRY = ("layer", "head", "dest_pos"), ("layer", "head", "dest_pos", "src_pos")
# Activation -> the stock setters that are made for its axes, and the axes.
STREAM = ((patching.layer_pos_patch_setter, POSITION),)
HEADS = (
    (patching.layer_head_vector_patch_setter, HEAD),
    (patching.layer_pos_head_vector_patch_setter, BOTH),
    (patching.layer_pos_patch_setter, POSITION),
)
PATTERN = (
    (patching.layer_head_pattern_patch_setter, HEAD),
    (patching.layer_head_pos_pattern_patch_setter, ROW),
    (patching.layer_head_dest_src_pos_pattern_patch_setter, ENTRY),
)
ACTIVATIONS = {
    **dict.fromkeys(
        ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "post"), STREAM
    ),
    **dict.fromkeys(("q", "k", "v", "z"), HEADS),
    "pattern": PATTERN,
}
B, T = 2, 3
CLEAN, CORRUPTED = families.tokens(2 * B, T).split(B)
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def metric(logits: Tensor) -> Tensor:
    """Reads several rows and positions."""
    return (logits[:, -1, 3] - logits[:, -1, 5]).mean() + logits[0, 1, 2]


@pytest.fixture(scope="module", params=["gpt2", "llama", "HookedTransformer", "bridge"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Of each kind that the sweeps take, under TransformerLens's calls."""
    if request.param == "HookedTransformer":
        return families.hooked_transformer()
    if request.param == "bridge":
        return families.bridge(str(tmp_path_factory.mktemp("gpt2")))
    return HookedModel(families.build(request.param))


@pytest.fixture(scope="module")
def gpt2() -> HookedModel:
    return HookedModel(families.build("gpt2"))


def cache_of(model: Any, activation: str = "", tokens: Tensor = CLEAN) -> Any:
    """A cache of everything, or of one activation alone."""
    name = get_act_name(activation, 0).removeprefix("blocks.0.") if activation else ""
    keep = (lambda hook: hook.endswith(f".{name}")) if activation else None
    return model.run_with_cache(tokens, names_filter=keep)[1]


def run(model: Any, activation: str, setter: Any, axes: Any, *given: Any, **how: Any) -> Any:
    clean, measure = given or (cache_of(model, activation), metric)
    tokens = how.pop("tokens", CORRUPTED)
    return patching.generic_activation_patch(
        model, tokens, clean, measure, setter, activation, axes, progress=False, **how
    )


@pytest.fixture
def natively(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """A sweep that fails rather than run as forwards."""

    def refuse(*_: Any, **__: Any) -> Tensor:
        msg = "ran as forwards"
        raise AssertionError(msg)

    def call(*given: Any, **how: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(GENERIC, "run_rows", refuse)
            return run(*given, **how)

    return call


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """A sweep that does not try to run natively."""

    def call(*given: Any, **how: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(GENERIC, "try_fast", lambda request, **how: None)
            return run(*given, **how)

    return call


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_stock_sweep_runs_natively_with_the_numbers_of_forwards(
    model, activation, natively, forwards
):
    if activation == "resid_mid" and type(model).__name__ == "TransformerBridge":
        pytest.skip("a bridge's hook_resid_mid leaves the skip connection as it is")
    cache = cache_of(model, activation)
    for setter, axes in ACTIVATIONS[activation]:
        found = natively(model, activation, setter, axes, cache, metric)
        wanted = forwards(model, activation, setter, axes, cache, metric)
        torch.testing.assert_close(found, wanted, **CLOSE)
        assert found.std() > 0
        assert found.dtype == torch.float32


def test_a_bridge_patches_the_stream_before_the_mlp_by_forwards(tmp_path, monkeypatch, forwards):
    model = families.bridge(str(tmp_path))
    monkeypatch.setattr(rows, "_said", False)
    given = (model, "resid_mid", *STREAM[0])
    with pytest.warns(UserWarning, match="hook_resid_mid leaves the skip connection as it is: thi"):
        found = run(*given)
    assert torch.equal(found, forwards(*given))


# What is saved


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[int]]:
    """Rows of the plans that the engine runs."""
    seen: set[int] = set()
    original = NativeEngine.patched

    def count(self: NativeEngine, plan: Plan, *given: Any) -> Any:
        seen.update(plan.writes.row.tolist())
        return original(self, plan, *given)

    monkeypatch.setattr(NativeEngine, "patched", count)
    return seen


@pytest.mark.parametrize("kind", ["gpt2", "HookedTransformer"])
def test_cells_that_change_nothing_are_the_unpatched_run(kind, natively, written, gpt2):
    model = gpt2 if kind == "gpt2" else families.hooked_transformer()
    clean = CORRUPTED.clone()
    clean[0, 1] += 1  # prompt 1 is the same in both runs
    for activation in ("resid_pre", "v"):
        cache = cache_of(model, activation, clean)
        setter, axes = (STREAM if activation == "resid_pre" else HEADS[1:])[0]
        written.clear()
        found = natively(model, activation, setter, axes, cache, metric, baseline=True)
        own = cache_of(model, activation, CORRUPTED)
        cells = found.cells
        expected = set()
        for i, (layer, position, *head) in enumerate(cells):
            here = (slice(None), position, *head)
            name = next(n for n in own if f".{layer}." in n)
            moved = (cache[name][here] != own[name][here]).flatten(1).any(1)
            expected |= {i * B + int(prompt) for prompt in moved.nonzero().flatten()}
        assert written == expected
        assert {row % B for row in written} == {0}
        assert {cells[row // B][1] for row in written} == {1, 2} if activation == "v" else True
        torch.testing.assert_close(
            found.values[:, 0], found.baseline.expand_as(found.values[:, 0]), **CLOSE
        )


def test_a_metric_of_the_last_position_unembeds_that_position_alone(gpt2, natively, monkeypatch):
    shapes = []
    original = Stack.logits

    def count(self: Stack, *given: Any) -> Tensor:
        out = original(self, *given)
        shapes.append(tuple(out.shape))
        return out

    def last(logits: Tensor) -> Tensor:
        return (logits[:, -1, 3] - logits[:, -1, 5]).mean()

    cache = cache_of(gpt2, "z")
    natively(gpt2, "z", *HEADS[0], cache, last)  # verified: reads the model's logits
    monkeypatch.setattr(Stack, "logits", count)
    natively(gpt2, "z", *HEADS[0], cache, last)
    assert max(columns for _, columns in shapes) == 2
    assert sum(many for many, _ in shapes) <= 3 * 4 * B + 4 * B


# What is returned


def test_metrics_by_name_values_by_prompt_and_a_baseline(model, natively, forwards):
    def by_prompt(logits: Tensor) -> Tensor:
        return logits[:, -1, 3] - logits[:, -1].logsumexp(-1)

    several = {"last": by_prompt, "first": lambda logits: logits[:, 0, 2] + logits[:, 1].amax(-1)}
    cells = [(1, -1), (0, 2), (1, 0)]
    for measure, how in (
        (metric, {"baseline": True}),
        (by_prompt, {"reduce": "none"}),
        (by_prompt, {"reduce": "mean", "baseline": True}),
        (several, {"reduce": "none", "baseline": True}),
        (several, {"reduce": "mean"}),
        ({"one": metric, "half": lambda logits: float(metric(logits)) / 2}, {}),
        (metric, {"index_df": cells}),
        (metric, {"index_df": []}),
    ):
        axes = None if "index_df" in how else HEAD
        setter = patching.layer_head_vector_patch_setter
        if "index_df" in how:
            setter = patching.layer_pos_patch_setter
        given = (model, "z", setter, axes, cache_of(model, "z"), measure)
        fast = natively if how.get("index_df") != [] else run  # nothing to run
        found, wanted = fast(*given, **how), forwards(*given, **how)
        if isinstance(wanted, Tensor):
            torch.testing.assert_close(found, wanted, **CLOSE)
            continue
        torch.testing.assert_close(found.values, wanted.values, **CLOSE)
        assert found.metric_names == wanted.metric_names
        assert found.cells == wanted.cells
        assert (found.baseline is None) == (wanted.baseline is None)
        if wanted.baseline is not None:
            assert torch.equal(found.baseline, wanted.baseline)


def test_one_clean_row_serves_every_prompt(gpt2, natively, forwards):
    cache = cache_of(gpt2, "k", CLEAN[:1])
    given = (gpt2, "k", *HEADS[1], cache, metric)
    torch.testing.assert_close(natively(*given), forwards(*given), **CLOSE)


def test_a_metric_may_look_where_the_numbers_lead_it_and_write_into_its_logits(
    gpt2, natively, forwards
):
    def moody(logits: Tensor) -> Tensor:
        return logits[0, int(logits[0, -1].argmax()) % T, 3] + logits[1, 0, 2]

    def rude(logits: Tensor) -> Tensor:
        last = logits[:, -1]
        last.clamp_(max=0.1)
        return logits[:, -1].sum()

    cache = cache_of(gpt2, "resid_pre")
    for measure in (moody, rude):
        found = natively(gpt2, "resid_pre", *STREAM[0], cache, measure)
        wanted = forwards(gpt2, "resid_pre", *STREAM[0], cache, measure)
        torch.testing.assert_close(found, wanted, **CLOSE)
        assert found.std() > 0


MASK = torch.tensor([[0, 1, 1], [1, 1, 1]])


def test_padding_is_left_out_of_plain_models(natively, forwards):
    model = HookedModel(families.build("llama"))
    cache = model.run_with_cache(CLEAN, attention_mask=MASK)[1]

    def last(logits: Tensor) -> Tensor:
        return (logits[:, -1, 3] - logits[:, -1, 5]).mean() + logits[1, 0, 2]

    for activation in ("resid_pre", "z", "v", "pattern"):
        setter, axes = ACTIVATIONS[activation][0]
        given = (model, activation, setter, axes, cache, last)
        found, wanted = (way(*given, attention_mask=MASK) for way in (natively, forwards))
        torch.testing.assert_close(found, wanted, **CLOSE)


# When forwards run instead


def falls_back(
    forwards: Callable[..., Any], why: str, model: Any, activation: str, *given: Any, **how: Any
) -> None:
    """It says why, once, and gives the numbers of forwards."""
    rows._said = False
    with pytest.warns(UserWarning, match="^generic_activation_patch: ") as told:
        found = run(model, activation, *given, **how)
    assert str(told[0].message) == (
        f"generic_activation_patch: {why}: this sweep runs as full forwards with many cells as "
        "rows of a batch, which gives the same numbers more slowly. Said once."
    )
    assert told[0].filename == __file__
    assert torch.equal(found, forwards(model, activation, *given, **how))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(model, activation, *given, **how)


@pytest.fixture(autouse=True)
def said() -> Iterator[None]:
    """What was said is forgotten after each test."""
    before = rows._said
    yield
    rows._said = before


def double(activation: Tensor, hook: Any) -> Tensor:
    return activation * 2


def test_hooks_of_the_users_are_run(gpt2, forwards):
    why = "the model carries hooks of its own"
    plain = HookedModel(gpt2.model)
    plain.add_hook("blocks.1.hook_mlp_out", double)
    falls_back(forwards, why, plain, "resid_pre", *STREAM[0])
    theirs = families.hooked_transformer()
    theirs.add_hook("blocks.1.hook_mlp_out", double)
    falls_back(forwards, why, theirs, "resid_pre", *STREAM[0])
    torch_hook = families.build("gpt2")
    torch_hook.transformer.h[1].mlp.register_forward_hook(lambda module, args, out: 2 * out)
    falls_back(
        forwards,
        "transformer.h.1.mlp carries a forward hook, which parts would not call",
        HookedModel(torch_hook), "resid_pre", *STREAM[0],
    )  # fmt: skip


def test_models_that_are_not_read_into_parts_run_as_they_are(forwards):
    falls_back(
        forwards,
        "BertForMaskedLM is not one of the architectures that are read into parts",
        HookedModel(families.build("bert")), "z", *HEADS[0],
    )  # fmt: skip
    falls_back(
        forwards,
        "its weights are bfloat16, and parts are run in float32 or float64 (model.float() converts "
        "it)",
        HookedModel(families.build("gpt2").bfloat16()), "z", *HEADS[0],
    )  # fmt: skip


def test_padding_of_a_transformer_lens_model_is_its_own(forwards):
    model = families.hooked_transformer()
    falls_back(
        forwards, "a TransformerLens model shifts positions by its attention_mask", model,
        "resid_pre", *STREAM[0], attention_mask=MASK,
    )  # fmt: skip

    class Tokenizer:
        padding_side, pad_token_id, bos_token_id = "left", 0, 0

    padded = CORRUPTED.clone()
    padded[1, :2] = 0  # the second is the first of the text
    run(model, "resid_pre", *STREAM[0], tokens=padded)  # the same model, known by its parts
    model.tokenizer = Tokenizer()
    why = "HookedTransformer hides the padding that prompt 1 begins with, which parts would not"
    falls_back(forwards, why, model, "resid_pre", *STREAM[0], tokens=padded)
    assert not torch.allclose(
        run(model, "resid_pre", *STREAM[0], tokens=padded),
        run(families.hooked_transformer(), "resid_pre", *STREAM[0], tokens=padded),
    )


def test_what_the_fast_path_does_not_patch(gpt2, natively, forwards):
    theirs = families.hooked_transformer()
    falls_back(
        forwards, "activation 'attn_scores' is none that the fast path patches", theirs,
        "attn_scores", *PATTERN[0],
    )  # fmt: skip
    # These do what they say to other axes than they are made for.
    for activation, setter in (
        ("pattern", patching.layer_head_vector_patch_setter),
        ("pattern", patching.layer_pos_patch_setter),
        ("z", patching.layer_head_pattern_patch_setter),
        ("resid_pre", patching.layer_pos_head_vector_patch_setter),
    ):
        axes = BOTH if "pos_head" in setter.__name__ else ("layer", "pos")
        falls_back(
            forwards, f"{setter.__name__} is made for other axes than those of {activation!r}",
            gpt2, activation, setter, axes,
        )  # fmt: skip
    cache = {name: value.double() for name, value in cache_of(gpt2, "z").items()}
    name = "blocks.0.attn.hook_z"
    falls_back(
        forwards, f"clean_cache[{name!r}] is float64 and the model float32", gpt2, "z", *HEADS[0],
        cache, metric,
    )  # fmt: skip


def test_logits_at_padding_are_the_models_own(forwards):
    model = HookedModel(families.build("llama"))
    cache = model.run_with_cache(CLEAN, attention_mask=MASK)[1]
    falls_back(
        forwards, "a metric is NaN without the logits at padding", model, "resid_pre", *STREAM[0],
        cache, lambda logits: logits.mean(), attention_mask=MASK,
    )  # fmt: skip
