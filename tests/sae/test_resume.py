"""Kill -9 at random points, resume, and compare bits; damaged checkpoints; other optimizers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from microtome import SAE, TopK, TrainConfig, train
from microtome.errors import CheckpointError
from microtome.sae import checkpoint

SETTINGS = {"steps": 12, "batch_size": 50, "lr": 5e-3, "log_every": 1, "checkpoint_every": 1}

# One process imports torch; each life of the run is a fork of it that dies by SIGKILL.
KILLER = """
import json, os, random, signal, sys, time
import torch
torch.set_num_threads(1)
from microtome import SAE, TopK, TrainConfig, train

lives, settings = random.Random(7), json.loads(sys.argv[2])
data = torch.randn(600, 12, generator=torch.Generator().manual_seed(0))

def live(out, optimizer, every):
    config = TrainConfig(optimizer=optimizer, checkpoint_every=every, **settings)
    train(SAE(12, 48, TopK(3)), data, config, out=out, progress=False)

def run_to_the_end(out, optimizer):
    kills = []
    while True:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                live(out, optimizer, 1)
                code = 0
            finally:
                os._exit(code)
        end = time.monotonic() + lives.uniform(0.01, 0.2)
        status = None
        while status is None:
            done, ended = os.waitpid(child, os.WNOHANG)
            if done:
                status = ended
            elif time.monotonic() > end and len(kills) < 4:
                os.kill(child, signal.SIGKILL)
                status = os.waitpid(child, 0)[1]
            else:
                time.sleep(0.002)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            return kills
        log = os.path.join(out, "log.jsonl")
        kills.append(open(log).read().count("\\n") if os.path.exists(log) else 0)

kills = {}
for name, optimizer in (("adam", "adam"), ("torch", torch.optim.Adam)):
    out = os.path.join(sys.argv[1], name)
    kills[name] = run_to_the_end(out, optimizer)
    live(out + "-whole", optimizer, 0)
print(json.dumps(kills))
"""


def lines_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def test_a_run_killed_at_random_points_ends_with_the_bits_of_one_that_was_not(tmp_path: Path):
    settings = {**SETTINGS, "steps": 100, "dead_after_tokens": 400}
    settings.pop("checkpoint_every")
    done = subprocess.run(
        [sys.executable, "-c", KILLER, str(tmp_path), json.dumps(settings)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for name, kills in json.loads(done.stdout).items():
        assert len(kills) >= 2, f"{name}: the run was over before it could be killed: {kills}"
        killed, whole = tmp_path / name, tmp_path / f"{name}-whole"
        saes = [SAE.from_pretrained(run / "sae") for run in (killed, whole)]
        for mine, theirs in zip(*(sae.parameters() for sae in saes), strict=True):
            assert torch.equal(mine, theirs)
        logs = [lines_of(run) for run in (killed, whole)]
        for lines in logs:
            assert [line["step"] for line in lines] == list(range(1, 101))
            for line in lines:
                line.pop("tokens_per_second")
        assert logs[0] == logs[1]
        left = sorted(path.name for path in (killed / "checkpoints").iterdir())
        assert left == ["step_100", "step_99"]


def fresh() -> SAE:
    return SAE(12, 48, TopK(3))


def stopped(data, out: Path, **changes) -> TrainConfig:
    """A run that ended after step 7 of 12."""

    class Stops(Exception):
        pass

    class Source:
        d = 12

        def __len__(self):
            return len(data)

        def rows(self, index):
            return data[index]

        def batches(self, batch_size, *, seed, start=0):
            from microtome.sae import InMemory

            for i, batch in enumerate(InMemory(data).batches(batch_size, seed=seed)):
                if i == 7:
                    raise Stops
                yield batch

    config = TrainConfig(**{**SETTINGS, **changes})
    with pytest.raises(Stops):
        train(fresh(), Source(), config, out=out, progress=False)
    return config


OPTIMIZERS = {
    "adamw": "adamw",
    "sgd": "sgd",
    "signsgd": "signsgd",
    "torch SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "torch AdamW": lambda p: torch.optim.AdamW(p, amsgrad=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_resumes_bit_for_bit(data, tmp_path: Path, name):
    config = stopped(data, tmp_path, optimizer=OPTIMIZERS[name], lr=1e-3)
    resumed = train(fresh(), data, config, out=tmp_path, progress=False)
    whole = train(fresh(), data, config, progress=False)
    for mine, theirs in zip(resumed.sae.parameters(), whole.sae.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_lines_after_the_checkpoint_and_a_torn_line_are_dropped(data, tmp_path: Path):
    config = stopped(data, tmp_path, checkpoint_every=5)
    with (tmp_path / "log.jsonl").open("a") as log:
        log.write('{"step": 8, "loss"')
    resumed = train(fresh(), data, config, out=tmp_path, progress=False)
    lines = lines_of(tmp_path)
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert lines == resumed.history


@pytest.mark.parametrize(
    "name", ["training.safetensors", "training.json", "sae_weights.safetensors", "sha256.json"]
)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(data, tmp_path: Path, name):
    config = stopped(data, tmp_path)
    newest = tmp_path / "checkpoints" / "step_7" / name
    newest.write_bytes(newest.read_bytes()[:-20])
    with pytest.warns(UserWarning, match=r"step_7.*Trying the one before it"):
        resumed = train(fresh(), data, config, out=tmp_path, progress=False)
    whole = train(fresh(), data, config, progress=False)
    assert torch.equal(resumed.sae.W_enc, whole.sae.W_enc)


def test_when_all_checkpoints_are_damaged_nothing_is_overwritten(data, tmp_path: Path):
    config = stopped(data, tmp_path)
    for path in (tmp_path / "checkpoints").iterdir():
        (path / "training.json").unlink()
    log = (tmp_path / "log.jsonl").read_bytes()
    sae = fresh()
    with (
        pytest.warns(UserWarning, match="Trying the one before"),
        pytest.raises(CheckpointError, match=r"no whole checkpoint in .*Move the folder away"),
    ):
        train(sae, data, config, out=tmp_path, progress=False)
    assert (tmp_path / "log.jsonl").read_bytes() == log
    assert torch.equal(sae.W_enc, fresh().W_enc)


def test_a_half_written_checkpoint_is_removed_and_not_read(data, tmp_path: Path):
    config = stopped(data, tmp_path)
    part = tmp_path / "checkpoints" / ".step_9.123.part"
    part.mkdir()
    (part / "cfg.json").write_text("{")
    resumed = train(fresh(), data, config, out=tmp_path, progress=False)
    assert resumed.metrics["steps"] == 12
    assert not part.exists()


def test_an_optimizer_whose_state_needs_pickle_is_refused(data, tmp_path: Path):
    class Odd(torch.optim.SGD):
        def state_dict(self):
            return {**super().state_dict(), "odd": object()}

    config = TrainConfig(**SETTINGS, optimizer=lambda p: Odd(p, lr=0.1))
    with pytest.raises(CheckpointError, match=r"holds object at optimizer.odd; only tensors"):
        train(fresh(), data, config, out=tmp_path, progress=False)


def test_no_file_of_a_run_is_a_pickle(data, tmp_path: Path):
    train(fresh(), data, TrainConfig(**SETTINGS), out=tmp_path, progress=False)
    kinds = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert kinds == {".json", ".jsonl", ".safetensors"}
    assert checkpoint.newest(tmp_path / "checkpoints").step == 12
