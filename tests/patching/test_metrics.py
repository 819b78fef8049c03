"""Metrics: values by hand, what each reads, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from microtome.errors import ArgumentError, NonFiniteError, ShapeError
from microtome.models import ToyModel
from microtome.patching import (
    Metric,
    kl_divergence,
    log_probability,
    logit_difference,
    loss,
    probability,
    sweep,
)
from microtome.patching.metrics import as_metric

B, T, V = 2, 3, 4
# Softmax of (log 1, log 2, log 3, log 4) is (0.1, 0.2, 0.3, 0.4).
ROW = torch.tensor([1.0, 2.0, 3.0, 4.0]).log()
LOGITS = torch.stack([ROW.roll(i) for i in range(B * T)]).view(1, B, T, V)
FIRST, STOP = torch.zeros(B).long(), torch.full((B,), T)


def measured(metric: Metric, logits: Tensor = LOGITS, reference: Tensor = LOGITS[0]) -> list[float]:
    """As a sweep does it: only what the metric reads is handed over."""
    slots, columns = metric.slots(FIRST, STOP, T), metric.columns(B, V)

    def read(x: Tensor) -> Tensor:
        at = x[..., torch.arange(B)[:, None], slots, :]
        return (
            at
            if columns is None
            else torch.stack([at[..., i, :, :][..., columns[i]] for i in range(B)], -3)
        )

    out = metric(read(logits), read(reference))
    assert out.shape == (1, B)
    return out[0].tolist()


def test_each_metric_by_hand():
    # Prompt 0 ends in ROW.roll(2) = log(3, 4, 1, 2), prompt 1 in ROW.roll(5) = log(4, 1, 2, 3).
    close = lambda wanted: pytest.approx(wanted, abs=1e-6)  # noqa: E731
    assert measured(logit_difference(1, 2)) == close([math.log(4), math.log(1 / 2)])
    assert measured(logit_difference([1, 0], 2)) == close([math.log(4), math.log(2)])
    assert measured(logit_difference([1, 0], [0, 3])) == close([math.log(4 / 3), math.log(4 / 3)])
    assert measured(probability(0)) == close([0.3, 0.4])
    assert measured(log_probability([1, 3])) == close([math.log(0.4), math.log(0.3)])
    # Position 0: ROW and ROW.roll(3) = log(2, 3, 4, 1).
    assert measured(probability(0, position=0)) == close([0.1, 0.2])
    assert measured(probability(0, position=torch.tensor([0, -1]))) == close([0.1, 0.4])
    reference = torch.zeros(B, T, V)  # uniform
    wanted = sum(0.25 * math.log(0.25 / p) for p in (0.1, 0.2, 0.3, 0.4))
    assert measured(kl_divergence(), reference=reference) == close([wanted, wanted])
    # Position 0 is judged by the token at 1: prompt 0 gives 1 of (1, 2, 3, 4) and 0 of
    # (4, 1, 2, 3), prompt 1 gives 2 of (2, 3, 4, 1) and 3 of (1, 2, 3, 4).
    targets = torch.tensor([[3, 1, 0], [0, 2, 3]])
    assert measured(loss(targets)) == close([-(math.log(0.2) + math.log(0.4)) / 2, -math.log(0.4)])
    targets = torch.tensor([[3, 1, -100], [0, -100, 3]])
    assert measured(loss(targets)) == close([-math.log(0.2), -math.log(0.4)])


def test_a_metric_says_what_it_reads():
    assert logit_difference([1, 2], 3).columns(2, 9).tolist() == [[1, 3], [2, 3]]
    assert logit_difference(1, 3).columns(2, 9).tolist() == [[1, 3], [1, 3]]
    assert probability(1).columns(2, 9) is None
    padded = torch.tensor([1, 0]), torch.tensor([3, 2])
    assert probability(1).slots(*padded, 4).tolist() == [[2], [1]]
    assert probability(1, position=1).slots(*padded, 4).tolist() == [[1], [1]]
    assert loss(torch.zeros(2, 4)).slots(*padded, 4).tolist() == [[0, 1, 2, 3]] * 2


def test_a_callable_is_given_one_cell_at_a_time():
    seen: list[tuple[int, ...]] = []

    def metric(logits: Tensor) -> Tensor:
        seen.append(tuple(logits.shape))
        return logits[:, -1, 0]

    found = as_metric("sweep", metric)
    assert (found.name, found.whole) == ("metric", True)
    out = found(torch.zeros(3, B, T, V), LOGITS[0])
    assert out.shape == (3, B)
    assert seen == [(B, T, V)] * 3
    assert as_metric("sweep", found) is found


def test_the_loss_of_padded_prompts_leaves_padding_out():
    toy = ToyModel()
    tokens = torch.tensor([[1, 2, 3, 4, 0, 0], [5, 6, 7, 8, 9, 1]])
    mask = (tokens != 0).long()
    targets = tokens.masked_fill(mask == 0, -100)
    found = sweep(
        toy, tokens, tokens.flip(1) * mask + 1, loss(targets), attention_mask=mask, progress=False
    )
    alone = sweep(toy, tokens[0, :4], tokens[0, :4] + 1, loss(tokens[:1, :4]), progress=False)
    torch.testing.assert_close(found.clean[0], alone.clean[0])


def fails(error: type[Exception], metric: object, **how: object) -> str:
    clean = torch.tensor([[1, 2, 3], [4, 5, 6]])
    with pytest.raises(error) as caught:
        sweep(ToyModel(), clean, clean.flip(1), metric, progress=False, **how)
    return str(caught.value)


def test_what_a_metric_reads_has_to_be_there():
    assert fails(ArgumentError, logit_difference(1, 256)) == (
        "logit difference: token 256 is not in the vocabulary of 256."
    )
    assert fails(ArgumentError, probability([-1, 3])) == (
        "probability: token -1 is not in the vocabulary of 256."
    )
    assert fails(ArgumentError, log_probability([1, 2, 3])) == (
        "log probability: tokens for 3 prompts, but there are 2. Give one token, or one for each "
        "prompt."
    )
    assert fails(ArgumentError, logit_difference([1, 2, 3], 4)) == (
        "logit difference: tokens for 3 prompts, but there are 2. Give one token, or one for each "
        "prompt."
    )
    assert fails(ArgumentError, probability(1, position=torch.tensor([0, 1, 2]))) == (
        "probability: positions for 3 prompts, but there are 2. Give one position, or one for each "
        "prompt."
    )
    assert fails(ArgumentError, probability(1, position=torch.tensor([0, -4]))) == (
        "probability: position -4 lies outside prompt 1, whose tokens stand at 0 ... 2. Negative "
        "positions count from its end."
    )
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    assert fails(ArgumentError, probability(1, position=2), attention_mask=mask) == (
        "probability: position 2 lies outside prompt 0, whose tokens stand at 0 ... 1. Negative "
        "positions count from its end."
    )
    assert fails(ShapeError, loss(torch.zeros(2, 4).long())) == (
        "loss: targets must be the prompts' tokens, [2, 3], got shape [2, 4]."
    )


def test_metrics_are_refused_when_they_are_made():
    with pytest.raises(ArgumentError) as caught:
        logit_difference([1, 2], [3, 4, 5])
    assert str(caught.value) == ("logit_difference: 2 correct and 3 incorrect tokens. Pair them.")
    with pytest.raises(ArgumentError) as caught:
        probability(0.5)
    assert str(caught.value) == "probability: tokens must be an id or a list of ids, got 0.5."
    with pytest.raises(ArgumentError) as caught:
        kl_divergence("base")
    assert str(caught.value) == (
        "kl_divergence: reference must be 'clean' or 'corrupted', got 'base'."
    )
    assert fails(ArgumentError, "loss") == (
        "sweep: metric must be a microtome.patching metric or a callable that maps logits "
        "[b, t, vocabulary] to [b], got str."
    )


def test_a_metric_gives_a_number_for_each_prompt():
    def mean(logits: Tensor) -> Tensor:
        return logits.mean()

    assert fails(ShapeError, mean) == (
        "mean: the metric must return one number for each of 2 prompts, [2], got shape []. Do not "
        "average over prompts; the sweep does."
    )
    assert "got float." in fails(ShapeError, lambda logits: float(logits.mean()))
    own = Metric("own", lambda logits, reference: logits.mean((0, 2, 3)))
    assert fails(ShapeError, own) == (
        "own: the metric must return one number for each of 2 prompts, [1, 2], got shape [2]. Do "
        "not average over prompts; the sweep does."
    )
    one = torch.tensor([1, 2, 3])
    for number in (float, torch.Tensor):  # of one prompt, a number will do
        metric = lambda logits, number=number: number(logits.sum())  # noqa: E731
        assert sweep(ToyModel(), one, one + 1, metric, progress=False).by_prompt.shape == (4, 3, 1)


def test_nan_says_where_it_came_from():
    def broken(logits: Tensor) -> Tensor:
        return logits[:, -1, 0] + torch.tensor([0, math.nan])

    causes = (
        "Usual causes: log(0), 0/0, or reading positions that attention_mask leaves out: logits "
        "are NaN there."
    )
    assert fails(NonFiniteError, broken) == (
        f"broken: the metric is NaN for prompt 1 of the unpatched clean run. {causes}"
    )
    calls = 0

    def later(logits: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return logits[:, -1, 0] * (math.nan if calls == 3 + 6 else 1)  # the sixth cell

    assert fails(NonFiniteError, later) == (
        f"later: the metric is NaN for prompt 0 with the patch at layer 1, position 2. {causes}"
    )
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    metric = lambda logits: logits[:, -1, 0]  # noqa: E731
    for engine in ("native", "auto"):
        assert "NaN for prompt 0 of the unpatched clean run" in fails(
            NonFiniteError, metric, attention_mask=mask, engine=engine
        )
