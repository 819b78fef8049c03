"""An interrupted sweep goes on where it stopped, and no file is taken for another's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from microtome.errors import StoreError
from microtome.models import ToyModel
from microtome.patching import (
    Sweep,
    ablate,
    execute,
    kl_divergence,
    logit_difference,
    probability,
    sweep,
)

CORRUPTED = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
CLEAN = CORRUPTED + 7
MASK = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])


@pytest.fixture(autouse=True)
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three cells of 2 prompts of 5 tokens at a time; the grid has 20."""
    monkeypatch.setattr(execute, "TOKENS", 30)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "sweep.part"


@pytest.fixture
def toy() -> ToyModel:
    return ToyModel()


def counting(stop_at: int | None = None) -> tuple[Callable[[Tensor], Tensor], list[int]]:
    """A metric that is interrupted at one of its calls, and how often it was called."""
    calls = [0]

    def metric(logits: Tensor) -> Tensor:
        calls[0] += 1
        if calls[0] == stop_at:
            raise KeyboardInterrupt
        return logits[:, -1, 3] - logits[:, -1, 4]

    return metric, calls


def run(toy: ToyModel, metric: object, path: Path | None, **how: object) -> Sweep:
    return sweep(toy, CLEAN, CORRUPTED, metric, progress=False, resume=path, **how)


@pytest.mark.parametrize("engine", ["native", "blocks", "forwards"])
def test_an_interrupted_sweep_goes_on_with_the_rest_alone(toy, path, engine):
    metric, _ = counting()
    whole = run(toy, metric, None, engine=engine)
    metric, _ = counting(
        stop_at=3 + 11
    )  # what it reads, two unpatched runs, then in the fourth group
    with pytest.raises(KeyboardInterrupt):
        run(toy, metric, path, engine=engine)
    metric, calls = counting()
    again = run(toy, metric, path, engine=engine)
    assert calls == [3 + 11]
    assert torch.equal(again.by_prompt, whole.by_prompt)
    assert torch.equal(again.written, whole.written)
    metric, calls = counting()
    once_more = run(toy, metric, path, engine=engine)  # finished: it answers at once
    assert calls == [3]
    assert torch.equal(once_more.by_prompt, whole.by_prompt)


def test_an_ablation_goes_on_too(toy, path):
    whole = ablate(toy, CLEAN, counting()[0], progress=False)
    with pytest.raises(KeyboardInterrupt):
        ablate(toy, CLEAN, counting(stop_at=2 + 8)[0], progress=False, resume=path)
    metric, calls = counting()
    again = ablate(toy, CLEAN, metric, progress=False, resume=path)
    assert calls == [2 + 16 - 6]
    assert torch.equal(again.by_prompt, whole.by_prompt)


def test_the_progress_bar_counts_cells_that_were_there_already(toy, path, capsys):
    with pytest.raises(KeyboardInterrupt):
        run(toy, counting(stop_at=2 + 11)[0], path)
    sweep(toy, CLEAN, CORRUPTED, counting()[0], resume=path)
    shown = capsys.readouterr().err
    assert "sweep: 100%" in shown
    assert "20/20" in shown
    run(toy, counting()[0], path)
    assert capsys.readouterr().err == ""


LAST = logit_difference(3, 4)


def nudged(toy: ToyModel) -> None:
    toy.h[2].mlp[0].weight.data[1, 2] += 1e-3


def swapped(toy: ToyModel) -> None:
    weight = toy.h[2].mlp[0].weight
    weight.data = weight.data.flip(0)  # sums stay


@pytest.mark.parametrize("change", [
    {"clean": CLEAN + 1}, {"site": "resid_post"}, {"layers": [0, 1]}, {"direction": "noise"},
    {"metric": logit_difference(3, 5)}, {"metric": logit_difference(3, 4, position=-2)},
    {"metric": lambda logits: logits[:, -1, 3]}, {"attention_mask": MASK}, {"engine": "blocks"},
    {"edit": nudged}, {"edit": swapped},
])  # fmt: skip
def test_a_file_of_another_sweep_is_refused_and_kept(toy, path, change):
    how = {"clean": CLEAN, "metric": LAST, "site": "resid_pre"}

    def go(edit: Callable[[ToyModel], None] = lambda toy: None, **how: object) -> Sweep:
        edit(toy)
        how |= {"progress": False, "resume": path}
        return sweep(toy, how.pop("clean"), CORRUPTED, how.pop("metric"), how.pop("site"), **how)

    go(**how)
    kept = path.read_bytes()
    with pytest.raises(StoreError) as caught:
        go(**how | change)
    assert str(caught.value) == (
        f"sweep: {path} belongs to another sweep (other prompts, model, metric or cells). Name "
        "another file, or delete it."
    )
    assert path.read_bytes() == kept


@pytest.mark.parametrize(("one", "other"), [
    ({"value": "zero"}, {"value": "mean"}),
    ({"value": "resample"}, {"value": "resample", "seed": 1}),
    ({"value": torch.zeros(64)}, {"value": torch.ones(64)}),
    ({"op": "scale", "factor": 2.0}, {"op": "scale", "factor": 3.0}),
    ({"metric": probability(3)}, {"metric": probability(4)}),
    ({"metric": lambda x: x[:, -1, 3]}, {"metric": lambda x: x[:, -1, 4]}),
])  # fmt: skip
def test_ablations_that_differ_in_one_thing_do_not_share_a_file(toy, path, one, other):
    def go(metric: object = LAST, **how: object) -> Sweep:
        return ablate(toy, CLEAN, metric, progress=False, resume=path, **how)

    first = go(**one)
    assert torch.equal(go(**one).by_prompt, first.by_prompt)
    with pytest.raises(StoreError, match="belongs to another sweep"):
        go(**other)


def test_metrics_that_compare_with_another_run_do_not_share_a_file(toy, path):
    run(toy, kl_divergence("clean"), path)
    with pytest.raises(StoreError, match="belongs to another sweep"):
        run(toy, kl_divergence("corrupted"), path)


def test_a_damaged_file_is_named_and_kept(toy, path):
    run(toy, LAST, path)
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:5], b""):
        path.write_bytes(damaged)
        with pytest.raises(StoreError) as caught:
            run(toy, LAST, path)
        assert str(caught.value).startswith(f"sweep: {path} holds no interrupted sweep (")
        assert str(caught.value).endswith("). Delete it to start anew, or name another file.")
        assert path.read_bytes() == damaged
    path.unlink()
    for other in ({}, {"microtome": "[]"}, {"microtome": '{"done": 3}'}):
        save_file({"x": torch.zeros(2)}, path, metadata=other)
        with pytest.raises(StoreError, match="holds no interrupted sweep"):
            run(toy, LAST, path)


def test_a_file_that_cannot_be_written_is_named_before_the_work(toy, tmp_path):
    metric, calls = counting()
    with pytest.raises(StoreError) as caught:
        run(toy, metric, tmp_path / "nowhere" / "sweep.part")
    assert calls == [3]
    assert str(caught.value).startswith(f"sweep: cannot write {tmp_path}/nowhere/sweep.part (")
    with pytest.raises(StoreError, match="holds no interrupted sweep"):
        run(toy, LAST, tmp_path)
