"""Shapley values and ablation under captum's names, against captum."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from microtome.integrations import captum as ours

theirs = pytest.importorskip("captum.attr", reason="captum is not installed")
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:You are attempting to compute Shapley Values"),
]
EXACT = ("ShapleyValues", "FeatureAblation")


@pytest.fixture(scope="module")
def net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 3))


def rows(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def both(name: str, forward: Any, inputs: Any, **options: Any) -> tuple[Any, Any]:
    return tuple(
        getattr(package, name)(forward).attribute(inputs, **options) for package in (theirs, ours)
    )


def same(pair: tuple[Any, Any]) -> None:
    peer, our = pair
    assert type(peer) is type(our)
    for a, b in zip(*(p if isinstance(p, tuple) else (p,) for p in pair), strict=True):
        torch.testing.assert_close(b.float(), a.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize(
    "baselines",
    [None, 0.5, rows(1, 5, seed=2), rows(4, 5, seed=3)],
    ids=["zero", "number", "row", "rows"],
)
def test_baselines_are_a_number_a_row_or_a_row_for_each_example(
    name: str, baselines: Any, net: nn.Module
) -> None:
    same(both(name, net, rows(4, 5), baselines=baselines, target=1))


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize(
    "target",
    [2, (1,), [0, 2, 1, 0], torch.tensor([0, 2, 1, 0]), torch.tensor(1)],
    ids=["integer", "tuple", "list", "tensor", "scalar"],
)
def test_targets_are_for_all_examples_or_for_each(name: str, target: Any, net: nn.Module) -> None:
    same(both(name, net, rows(4, 5), target=target))


def test_a_baseline_may_lack_the_dimension_of_examples(net: nn.Module) -> None:
    x, base = rows(4, 5), torch.arange(5.0)
    peer = theirs.FeatureAblation(net).attribute(x, base, target=1)
    for name in ("FeatureAblation", "ShapleyValues"):
        our = getattr(ours, name)(net)
        found = our.attribute(x, base, target=1)
        torch.testing.assert_close(found, our.attribute(x, base[None], target=1))
        if name == "FeatureAblation":
            torch.testing.assert_close(found, peer)


def test_a_tuple_names_an_entry_of_a_matrix_and_a_list_of_tuples_one_for_each(
    net: nn.Module,
) -> None:
    def matrix(x: Tensor) -> Tensor:
        return torch.stack([net(x), net(x).square()], 2)

    for target in ((2, 1), [(0, 1), (2, 0)]):
        same(both("ShapleyValues", matrix, rows(2, 5), target=target))


@pytest.mark.parametrize("name", EXACT)
def test_every_output_is_explained_without_a_target(name: str, net: nn.Module) -> None:
    same(both(name, net, rows(2, 5)))


@pytest.mark.parametrize("name", EXACT)
def test_groups_run_across_inputs_and_arguments_go_along_with_their_example(
    name: str, net: nn.Module
) -> None:
    def forward(a: Tensor, b: Tensor, scale: Tensor, power: int) -> Tensor:
        return (net(a)[:, 0] + b.sum((1, 2)) * scale).tanh() ** power

    mask = (torch.tensor([0, 0, 1, 2, 2]), torch.tensor([[[3, 0], [4, 4]]]))
    found = both(
        name, forward, (rows(3, 5), rows(3, 2, 2)), baselines=(0.1, rows(1, 2, 2, seed=5)),
        additional_forward_args=(rows(3, seed=4), 3), feature_mask=mask,
    )  # fmt: skip
    same(found)
    a, b = found[1]
    assert torch.equal(a[:, 0], a[:, 1])
    assert torch.equal(a[:, 0], b[:, 0, 1])


def test_examples_may_have_groups_of_their_own(net: nn.Module) -> None:
    mask = torch.tensor([[0, 0, 1, 1, 2], [0, 1, 2, 0, 1]])
    for name in EXACT:
        same(both(name, net, rows(2, 5), feature_mask=mask, target=0))


@pytest.mark.parametrize("name", EXACT)
def test_a_number_for_the_whole_batch_gives_one_row(name: str, net: nn.Module) -> None:
    def total(x: Tensor) -> Tensor:
        return net(x)[:, 0].tanh().sum()

    found = both(name, total, rows(3, 5))
    same(found)
    assert found[1].shape == (1, 5)


def test_a_function_of_the_whole_batch_may_return_a_plain_number(net: nn.Module) -> None:
    def total(x: Tensor) -> float:
        return float(net(x)[:, 0].tanh().sum())

    same(both("FeatureAblation", total, rows(3, 5)))


def test_feature_numbers_may_have_gaps(net: nn.Module) -> None:
    mask = torch.tensor([[4, 4, 9, 6, 6]])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # captum's, of missing numbers
        same(both("FeatureAblation", net, rows(2, 5), feature_mask=mask, target=0))
        same(
            both("ShapleyValueSampling", lambda x: net(x)[:, 0] * 0, rows(2, 5), feature_mask=mask)
        )


def test_sampling_agrees_with_captum_within_its_error() -> None:
    weights = rows(12, 6, seed=7)

    def forward(x: Tensor) -> Tensor:
        return (x @ weights).tanh().sum(1)

    x = rows(3, 12)
    method = ours.ShapleyValueSampling(forward)
    our = method.attribute(x, n_samples=100)
    stderr = method.explain(x, n_samples=100).stderr
    exact = ours.ShapleyValues(forward).attribute(x)
    error = (our - exact).square().mean().sqrt()
    assert 0.5 * float(stderr.square().mean().sqrt()) < error < 2 * stderr.square().mean().sqrt()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        peer = theirs.ShapleyValueSampling(forward).attribute(
            x, n_samples=100, perturbations_per_eval=12
        )
    assert error < (peer - exact).square().mean().sqrt()


def test_sampling_evaluates_no_more_than_captum_and_moves_no_random_state() -> None:
    seen = 0

    def forward(x: Tensor) -> Tensor:
        nonlocal seen
        seen += len(x)
        return x.prod(1)

    state = torch.get_rng_state()
    x = rows(2, 9)
    found = [ours.ShapleyValueSampling(forward).attribute(x, n_samples=25) for _ in range(2)]
    assert seen / 2 <= 2 * (25 * 9 + 1) + 2  # and the inputs themselves
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(*found)
    other = ours.ShapleyValueSampling(forward, seed=1).attribute(x, n_samples=25)
    assert not torch.equal(found[0], other)


def test_one_sample_is_one_permutation_and_sums_to_the_difference() -> None:
    x = rows(2, 9)
    found = ours.ShapleyValueSampling(lambda x: x.prod(1)).attribute(x, n_samples=1)
    torch.testing.assert_close(found.sum(1), x.prod(1), rtol=1e-5, atol=1e-6)


def test_calls_hold_no_more_perturbations_than_allowed(net: nn.Module) -> None:
    sizes: list[int] = []

    def forward(x: Tensor) -> Tensor:
        sizes.append(len(x))
        return net(x)[:, 0]

    for most in (1, 3):
        sizes.clear()
        ours.ShapleyValues(forward).attribute(rows(4, 5), perturbations_per_eval=most)
        assert max(sizes) == 4 * most
    sizes.clear()
    ours.ShapleyValues(forward).attribute(rows(4, 5))
    assert len(sizes) < 6


class Numbers:
    """A tokenizer of numbers."""

    def encode(self, text: str, add_special_tokens: bool = True, return_tensors: Any = None) -> Any:
        ids = [int(word) for word in text.split()]
        return torch.tensor([ids]) if return_tensors else ids

    def decode(self, ids: Any, **_: Any) -> str:
        return " ".join(map(str, torch.as_tensor(ids).reshape(-1).tolist()))

    def convert_ids_to_tokens(self, ids: Any) -> list[str]:
        return [str(int(i)) for i in ids]

    def __call__(self, text: str, **_: Any) -> dict[str, Any]:
        ends = [len(" ".join(text.split()[: i + 1])) for i in range(len(text.split()))]
        starts = [end - len(word) for end, word in zip(ends, text.split(), strict=True)]
        return {
            "input_ids": self.encode(text),
            "offset_mapping": list(zip(starts, ends, strict=True)),
        }


@pytest.mark.parametrize("name", EXACT)
def test_language_models_are_explained_through_captums_llm_attribution(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    for lists in ("SUPPORTED_METHODS", "SUPPORTED_PER_TOKEN_ATTR_METHODS"):
        monkeypatch.setattr(theirs.LLMAttribution, lists, getattr(theirs.LLMAttribution, lists))
    ours.accept_in_llm_attribution()
    config = transformers.GPT2Config(
        vocab_size=50, n_positions=16, n_embd=16, n_layer=1, n_head=2,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.GPT2LMHeadModel(config).eval()
    found = []
    for package in (theirs, ours):
        method = getattr(package, name)(model)
        text = theirs.TextTokenInput("3 14 15 9", Numbers())
        found.append(theirs.LLMAttribution(method, Numbers()).attribute(text, target="26 5"))
    torch.testing.assert_close(found[1].seq_attr, found[0].seq_attr, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[1].token_attr, found[0].token_attr, rtol=1e-5, atol=1e-5)
