"""The training loop, its run folder and its refusals."""

import json
import math
import signal
from itertools import islice
from pathlib import Path

import pytest
import torch

from microtome import SAE, TopK, TrainConfig, train
from microtome.errors import ArgumentError, CheckpointError, NonFiniteError
from microtome.sae import InMemory, files
from microtome.sae.train import _take

SETTINGS = {"steps": 12, "batch_size": 50, "lr": 5e-3, "log_every": 4, "checkpoint_every": 4}


def fresh() -> SAE:
    return SAE(12, 48, TopK(3))


def run(data, out=None, **changes):
    config = TrainConfig(**{**SETTINGS, **changes})
    return train(fresh(), data, config, out=out, progress=False)


def test_training_lowers_the_loss_and_fills_the_folder(data, tmp_path: Path):
    config = TrainConfig(**{**SETTINGS, "steps": 60, "eval_every": 30})
    result = train(fresh(), data[:500], config, held_out=data[500:], out=tmp_path, progress=False)
    assert result.history[-1]["fvu"] < 0.6 * result.history[0]["fvu"]
    assert {p.name for p in tmp_path.iterdir()} == {
        "config.json", "log.jsonl", "checkpoints", "sae", "metrics.json",
    }  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines == result.history
    assert [line["step"] for line in lines] == sorted({1, 30, *range(4, 61, 4)})
    assert set(lines[0]) == {
        "step", "loss", "fvu", "l0", "dead_fraction", "auxk_loss", "lr", "tokens_per_second",
    }  # fmt: skip
    assert {name for line in lines if line["step"] == 30 for name in line} >= {
        "held_out_fvu", "held_out_l0", "held_out_dead_fraction",
    }  # fmt: skip
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics == result.metrics
    assert (metrics["steps"], metrics["tokens"], metrics["n_rows"]) == (60, 3000, 100)
    assert torch.equal(SAE.from_pretrained(tmp_path / "sae").W_dec, result.sae.W_dec)
    kept = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert kept == ["step_56", "step_60"]
    last = SAE.from_pretrained(tmp_path / "checkpoints" / "step_60")
    assert torch.equal(last.W_enc, result.sae.W_enc)


def test_the_same_arguments_give_the_same_bits_and_another_seed_does_not(data):
    one, two, other = run(data), run(data), run(data, seed=1)
    assert torch.equal(one.sae.W_enc, two.sae.W_enc)
    assert not torch.equal(one.sae.W_enc, other.sae.W_enc)


def test_a_source_with_its_own_batches_trains_like_its_tensor(data):
    assert torch.equal(run(InMemory(data)).sae.W_dec, run(data).sae.W_dec)


def test_training_writes_nothing_to_the_terminal_when_asked(data, capsys):
    run(data)
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""
    train(fresh(), data, TrainConfig(**SETTINGS), progress=True)
    shown = capsys.readouterr().err
    assert all(word in shown for word in ("train", "loss=", "fvu=", "dead="))


def test_a_finished_run_is_returned_as_it_is(data, tmp_path: Path):
    first = run(data, tmp_path)
    log = (tmp_path / "log.jsonl").read_bytes()
    again = run(data, tmp_path)
    assert torch.equal(again.sae.W_enc, first.sae.W_enc)
    assert again.history == first.history
    assert (tmp_path / "log.jsonl").read_bytes() == log


def test_a_finished_run_whose_log_is_gone_is_returned_too(data, tmp_path: Path):
    config = TrainConfig(**SETTINGS)
    train(SAE(12, 48, TopK(3)), data, config, held_out=data, out=tmp_path, progress=False)
    (tmp_path / "log.jsonl").unlink()
    again = train(SAE(12, 48, TopK(3)), data, config, held_out=data, out=tmp_path, progress=False)
    assert again.history == []
    assert again.metrics.keys() == {"steps", "tokens", "fvu", "l0", "dead_fraction", "n_rows"}


def test_a_folder_with_other_settings_is_refused_and_left_alone(data, tmp_path: Path):
    run(data, tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(CheckpointError, match=r"other settings: lr was 0\.005, is 0\.01\. Choose"):
        run(data, tmp_path, lr=0.01)
    with pytest.raises(CheckpointError, match=r"sample_sha256 was .*, is "):
        run(data + 1, tmp_path)
    with pytest.raises(CheckpointError, match="k was 3, is 2"):
        train(SAE(12, 48, TopK(2)), data, TrainConfig(**SETTINGS), out=tmp_path, progress=False)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_reporting_settings_may_change_between_resumes(data, tmp_path: Path):
    run(data, tmp_path)
    assert run(data, tmp_path, log_every=3, keep_checkpoints=5).metrics["steps"] == 12


def test_a_callable_optimizer_with_other_defaults_is_refused(data, tmp_path: Path):
    run(data, tmp_path, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    with pytest.raises(CheckpointError, match="optimizer_defaults was"):
        run(data, tmp_path, optimizer=lambda p: torch.optim.SGD(p, lr=0.2))


def test_nan_in_a_batch_names_step_and_row_and_loses_nothing(data, tmp_path: Path):
    class Poisoned(InMemory):
        def batches(self, batch_size, *, seed, start=0):
            for i, batch in enumerate(super().batches(batch_size, seed=seed, start=start), start):
                if i == 9:
                    batch[13] = float("nan")
                yield batch

    sae = fresh()
    config = TrainConfig(**SETTINGS)
    with pytest.raises(NonFiniteError) as caught:
        train(sae, Poisoned(data), config, out=tmp_path, progress=False)
    assert "train: step 10 (batch 9 of seed 0):" in str(caught.value)
    assert "row 13" in str(caught.value)
    assert "The SAE keeps its weights of step 9" in str(caught.value)
    whole = run(data, steps=12)
    assert all(bool(torch.isfinite(p).all()) for p in sae.parameters())
    kept = SAE.from_pretrained(tmp_path / "checkpoints" / "step_8")
    assert not torch.equal(kept.W_enc, sae.W_enc)
    resumed = train(fresh(), data, config, out=tmp_path, progress=False)
    assert torch.equal(resumed.sae.W_enc, whole.sae.W_enc)


@pytest.mark.parametrize("how", ["raised by the source", "SIGINT"])
def test_an_interrupt_writes_a_checkpoint_and_is_raised_again(data, tmp_path: Path, how):
    class Interrupting(InMemory):
        def batches(self, batch_size, *, seed, start=0):
            for i, batch in enumerate(super().batches(batch_size, seed=seed, start=start), start):
                if i == 6 and how == "SIGINT":
                    signal.raise_signal(signal.SIGINT)
                elif i == 6:
                    raise KeyboardInterrupt
                yield batch

    config = TrainConfig(**SETTINGS)
    with pytest.raises(KeyboardInterrupt):
        train(fresh(), Interrupting(data), config, out=tmp_path, progress=False)
    step = 7 if how == "SIGINT" else 6  # a signal lets the step end
    assert (tmp_path / "checkpoints" / f"step_{step}").is_dir()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    resumed = train(fresh(), data, config, out=tmp_path, progress=False)
    assert torch.equal(resumed.sae.W_enc, run(data).sae.W_enc)


class Ending(InMemory):
    """Batches that stop coming after `count`, by an error or with none."""

    def __init__(self, data, count: int, error: Exception | None) -> None:
        super().__init__(data)
        self.count, self.error = count, error

    def batches(self, batch_size, *, seed, start=0):
        yield from islice(super().batches(batch_size, seed=seed, start=start), self.count)
        if self.error is not None:
            raise self.error


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (None, ArgumentError, r"^train: activations\.batches\(\) ended before the training did"),
        (OSError("unreadable"), OSError, "^unreadable$"),
    ],
)
def test_rows_that_stop_coming_end_the_run_with_a_checkpoint(data, tmp_path, error, kind, text):
    with pytest.raises(kind, match=text):
        run(Ending(data, 6, error), tmp_path)
    assert (tmp_path / "checkpoints" / "step_6").is_dir()
    assert torch.equal(run(data, tmp_path).sae.W_enc, run(data).sae.W_enc)


def test_a_full_disk_says_so_and_leaves_the_checkpoints_before(data, tmp_path: Path, monkeypatch):
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full on this system")
    usual, opened = files._open, []

    def filling(path: Path):
        opened.append(path)
        # config.json, the four files and hashes of step_4, two of step_8; then the disk is full.
        return usual(path) if len(opened) <= 8 else open("/dev/full", "wb")  # noqa: PTH123

    monkeypatch.setattr(files, "_open", filling)
    with pytest.raises(CheckpointError, match=r"cannot write .*: the disk is full \(No space left"):
        run(data, tmp_path)
    monkeypatch.undo()
    assert len(opened) == 9
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_4"]
    resumed = run(data, tmp_path)
    assert [line["step"] for line in resumed.history] == [1, 4, 8, 12]
    assert torch.equal(resumed.sae.W_enc, run(data).sae.W_enc)


def test_an_optimizer_that_is_none_is_named(data):
    with pytest.raises(ArgumentError, match=r"must return a torch.optim.Optimizer, returned list"):
        run(data, optimizer=list)


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (torch.optim.LBFGS, "optimizer LBFGS cannot run here: it evaluates the loss several"),
        (torch.optim.SparseAdam, "optimizer SparseAdam cannot run here: gradients are dense"),
    ],
)
def test_an_optimizer_that_wants_other_gradients_is_refused_with_the_way_out(
    data, optimizer, message
):
    config = TrainConfig(**{**SETTINGS, "optimizer": optimizer})
    with pytest.raises(ArgumentError, match=message):
        train(SAE(12, 48, TopK(3)), data, config, progress=False)


def test_without_gradients_the_fused_step_runs_and_the_other_says_why_not(data):
    plain = TrainConfig(**{**SETTINGS, "optimizer": torch.optim.Adam})
    with torch.inference_mode():
        run = train(SAE(12, 48, TopK(3)), data, TrainConfig(**SETTINGS), progress=False)
        with pytest.raises(ArgumentError, match=r"inside torch\.inference_mode\(\) there are no"):
            train(SAE(12, 48, TopK(3)), data, plain, progress=False)
    assert math.isfinite(run.metrics["train_fvu"])
    with pytest.raises(ArgumentError, match="config must be a TrainConfig, got dict"):
        train(SAE(12, 48, TopK(3)), data, SETTINGS)


def test_the_numbers_of_a_line_are_finite(data):
    assert all(math.isfinite(v) for line in run(data).history for v in line.values())


class OneHuge(InMemory):
    """Batches of which one overflows."""

    def __init__(self, data, at: int) -> None:
        super().__init__(data)
        self.at = at

    def batches(self, batch_size, *, seed, start=0):
        numbered = enumerate(super().batches(batch_size, seed=seed, start=start), start + 1)
        for number, batch in numbered:
            yield batch * 1e25 if number == self.at else batch


@pytest.mark.parametrize("at", [4, 6])  # a step that is logged, and one that is only saved
def test_no_checkpoint_is_written_of_a_step_that_a_gpu_finds_wrong(gpu, data, tmp_path, at):
    del gpu
    with pytest.raises(NonFiniteError, match=f"^train: found in step {at}: .* checkpoint stays"):
        run(OneHuge(data, at), tmp_path, checkpoint_every=2)
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert f"step_{at - 2}" in names
    assert f"step_{at}" not in names


def test_an_error_on_which_all_ranks_agree_stays_one_when_the_step_is_named():
    class Refusing:
        def take(self, x, factor, step):
            error = NonFiniteError("x holds NaN.")
            error.agreed = True
            raise error

    with pytest.raises(NonFiniteError, match="keeps its weights of step 2") as raised:
        _take(Refusing(), torch.zeros(1, 1), TrainConfig(steps=3), 3)
    assert raised.value.agreed
