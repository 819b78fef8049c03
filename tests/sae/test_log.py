"""The loggers: as stand-ins record their calls, and as the real packages' own files tell."""

import json
import struct
import sys
import types
from pathlib import Path

import pytest
import torch

from microtome import SAE, TopK, TrainConfig, train
from microtome.errors import ArgumentError, CheckpointError, NonFiniteError
from microtome.sae import InMemory

SETTINGS = {"steps": 12, "batch_size": 50, "lr": 5e-3, "log_every": 4, "checkpoint_every": 4}


class Poisoned(InMemory):
    """Rows whose tenth batch holds a NaN."""

    def batches(self, batch_size, *, seed, start=0):
        for i, batch in enumerate(super().batches(batch_size, seed=seed, start=start), start):
            if i == 9:
                batch[13] = float("nan")
            yield batch


def run(data, out=None, **changes):
    config = TrainConfig(**{**SETTINGS, **changes})
    return train(SAE(12, 48, TopK(3)), data, config, out=out, progress=False)


def log_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.fixture
def wandb_calls(monkeypatch):
    """What a stand-in for wandb was called with: (arguments of init, lines and exit code)."""
    calls = []

    def init(*, project, id, resume, config):
        json.dumps(config)
        lines = []
        calls.append(({"project": project, "id": id, "resume": resume}, lines))
        return types.SimpleNamespace(
            log=lambda values, step: lines.append({"step": step, **values}),
            finish=lambda exit_code: lines.append(exit_code),
        )

    module = types.ModuleType("wandb")
    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return calls


def test_weights_and_biases_gets_every_line_and_is_told_of_the_end(data, wandb_calls, tmp_path):
    result = run(data, tmp_path, wandb="saes")
    ((started, lines),) = wandb_calls
    assert lines == [*result.history, 0]
    kept = json.loads((tmp_path / "wandb.json").read_text())
    assert started == {"project": "saes", "id": kept["id"], "resume": "allow"}
    assert len(kept["id"]) == 16


def test_a_run_without_a_folder_gets_its_id_from_weights_and_biases(data, wandb_calls):
    run(data, wandb="saes")
    assert wandb_calls[0][0] == {"project": "saes", "id": None, "resume": None}


def test_a_run_that_an_error_ended_is_told_as_failed_and_continued_under_its_id(
    data, wandb_calls, tmp_path
):
    with pytest.raises(NonFiniteError):
        run(Poisoned(data), tmp_path / "run", wandb="saes")
    (tmp_path / "run").rename(tmp_path / "moved")
    result = run(data, tmp_path / "moved", wandb="saes")
    run(data, tmp_path / "run", wandb="saes")  # begun anew at the path of the first
    ids = [started["id"] for started, _ in wandb_calls]
    assert (ids[0] == ids[1], ids[0] == ids[2]) == (True, False)
    assert [lines[-1] for _, lines in wandb_calls] == [1, 0, 0]
    assert wandb_calls[0][1][:-1] == result.history[:3]
    assert wandb_calls[1][1][:-1] == result.history[3:]


def test_a_wandb_json_without_an_id_is_named(data, wandb_calls, tmp_path):
    (tmp_path / "wandb.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"wandb\.json holds no id of a run\. Remove it"):
        run(data, tmp_path, wandb="saes")


def test_what_weights_and_biases_refuses_is_said_with_the_way_out(data, monkeypatch):
    class Error(Exception):
        pass

    def init(**_):
        msg = "No API key configured."
        raise Error(msg)

    module = types.ModuleType("wandb")
    module.init, module.Error = init, Error
    monkeypatch.setitem(sys.modules, "wandb", module)
    config = TrainConfig(steps=2, batch_size=50, wandb="p")
    with pytest.raises(ArgumentError, match=r"refuses wandb='p': No API key .*WANDB_MODE=offline"):
        train(SAE(12, 24, TopK(2)), data, config, progress=False)


def test_tensorboard_gets_every_number(data, monkeypatch):
    written, folders = [], []

    class Writer:
        def __init__(self, log_dir, *, purge_step):
            folders.append((log_dir, purge_step))

        def add_scalar(self, tag, scalar_value, global_step):
            written.append((tag, scalar_value, global_step))

        def close(self):
            written.append("closed")

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    result = run(data, tensorboard="events")
    assert folders == [("events", 1)]
    assert ("loss", result.history[-1]["loss"], 12) in written
    assert len(written) == 7 * len(result.history) + 1


# None: not installed. A bare module: what python makes of the ./wandb that an earlier run left.
@pytest.mark.parametrize("module", [None, types.ModuleType("wandb")])
def test_an_absent_logger_is_named_before_training_starts(data, monkeypatch, module):
    monkeypatch.setitem(sys.modules, "wandb", module)
    with pytest.raises(ArgumentError, match="wandb='saes' needs the package 'wandb', which cannot"):
        run(data, wandb="saes")


def test_the_event_files_of_tensorboard_hold_the_log_after_a_crash_too(data, tmp_path: Path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out, events = tmp_path / "run", tmp_path / "events"
    more = {"log_every": 1, "tensorboard": str(events)}
    with pytest.raises(NonFiniteError):  # in step 10, after step 9 was logged; 8 has a checkpoint
        run(Poisoned(data), out, **more)
    result = run(data, out, **more)
    assert len(list(events.iterdir())) == 2
    read = EventAccumulator(str(events)).Reload()
    assert set(read.Tags()["scalars"]) == set(result.history[0]) - {"step"}
    for name in read.Tags()["scalars"]:
        found = [(scalar.step, scalar.value) for scalar in read.Scalars(name)]
        log = [(line["step"], line[name]) for line in log_of(out)]
        assert found == [(step, torch.tensor(value).item()) for step, value in log]  # float32


def records(path: Path):
    """The records of a run-ID.wandb, which has LevelDB's log format with a header of its own."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, block = path.read_bytes(), 32768
    assert data[:4] == b":W&B"
    at, whole = 7, b""
    while at + 7 <= len(data):
        if block - at % block < 7:  # too little room for a header: the block is padded
            at += block - at % block
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record = Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def test_the_offline_files_of_weights_and_biases_hold_the_log_and_how_the_run_ended(
    data, tmp_path: Path, monkeypatch
):
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    for name, value in {
        "MODE": "offline",
        "DIR": tmp_path,
        "SILENT": "true",
        "CONSOLE": "off",
    }.items():
        monkeypatch.setenv(f"WANDB_{name}", str(value))
    out = tmp_path / "run"
    try:
        with pytest.raises(NonFiniteError):
            run(Poisoned(data), out, wandb="saes")
        logged = log_of(out)
        run(data, out, wandb="saes")
    finally:
        wandb.teardown()
    ends = {}
    for path in (tmp_path / "wandb").glob("offline-run-*/run-*.wandb"):
        lines = []
        for record in records(path):
            if record.WhichOneof("record_type") == "run":
                assert record.run.project == "saes"
                assert record.run.run_id == json.loads((out / "wandb.json").read_text())["id"]
            elif record.WhichOneof("record_type") == "history":
                items = {i.key or i.nested_key[0]: i.value_json for i in record.history.item}
                line = {k: json.loads(v) for k, v in items.items() if not k.startswith("_")}
                lines.append({"step": record.history.step.num, **line})
            elif record.WhichOneof("record_type") == "exit":
                ends[record.exit.exit_code] = lines
    assert ends == {1: logged, 0: log_of(out)[len(logged) :]}
