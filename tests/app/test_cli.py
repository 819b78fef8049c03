"""The microtome command: help, exit codes, messages."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from microtome import cli
from microtome.cli import main
from microtome.report import write

COMMANDS = ("info", "capture", "train", "eval", "report", "demo")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_with_an_example(command, capsys):
    with pytest.raises(SystemExit) as left:
        main([command, "--help"])
    assert left.value.code == 0
    shown = capsys.readouterr().out
    assert "example:" in shown
    assert f"microtome {command}" in shown.split("example:")[1]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_example_of_every_command_is_accepted_by_its_own_parser(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    example = capsys.readouterr().out.split("example:")[1].strip().splitlines()[0]
    words = example.split("microtome ", 1)[1].split()
    parsed = cli._parser().parse_args(words)
    assert parsed.run.__name__ == f"_{command}"


def test_defaults_stand_in_the_help(capsys):
    with pytest.raises(SystemExit):
        main(["demo", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "(default: 10.0)" in shown
    assert "(default: demo-output)" in shown


def test_info_lists_every_backend_and_the_versions(monkeypatch, capsys):
    monkeypatch.delenv("MICROTOME_REQUIRE", raising=False)
    assert main(["info"]) == 0
    shown = capsys.readouterr().out
    for word in ("microtome", "torch", "cuda", "triton", "cpu", "reference  available", "threads"):
        assert word in shown


def test_info_fails_where_a_required_backend_is_missing(monkeypatch, capsys):
    monkeypatch.setenv("MICROTOME_REQUIRE", "reference,quantum")
    assert main(["info"]) == 1
    came = capsys.readouterr().err
    assert came.startswith("microtome: MICROTOME_REQUIRE names backends that are missing.")
    assert "quantum: no such backend" in came


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["capture", "--model", "no/such", "--out", "x"], "'no/such' is neither auto, smollm2"),
        (["capture", "--model", "toy", "--text", "no.txt", "--out", "x"], "no text 'no.txt'"),
        (["train", "--store", "no-store", "--out", "x"], "no-store"),
        (["eval", "--sae", "no-sae", "--store", "no-store"], "no-sae"),
        (["report", "--run", "no-run", "--store", "no-store"], "no-store"),
        (["demo", "--minutes", "0"], "minutes must be above 0, got minutes=0.0"),
        (["demo", "--features", "8", "--k", "9"], "k must be between 1 and features=8, got k=9"),
        (["demo", "--tokens", "0"], "demo: tokens must be between 256 and"),
        (["demo", "--out", "/dev/null"], "/dev/null: File exists. What earlier commands made"),
    ],
)
def test_an_error_is_one_message_without_a_traceback(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 1
    came = capsys.readouterr()
    assert came.err.startswith("microtome: ")
    assert message in came.err
    assert "Traceback" not in came.err + came.out


def test_an_unknown_site_names_those_there_are(tmp_path, capsys):
    words = ["capture", "--model", "toy", "--text", "pydoc", "--tokens", "128"]
    assert main([*words, "--site", "resid_pre.99", "--out", str(tmp_path / "s")]) == 1
    assert "resid_pre.3" in capsys.readouterr().err


def test_steps_and_tokens_together_are_refused(made, tmp_path, capsys):
    words = ["train", "--store", str(made.store), "--out", str(tmp_path), "--steps", "1"]
    assert main([*words, "--tokens", "2000"]) == 1
    assert "give --steps or --tokens, got both (1 and 2000)" in capsys.readouterr().err


def test_the_precision_of_the_products_reaches_the_run(made, tmp_path):
    words = ["train", "--store", str(made.store), "--features", "96", "--k", "8", "--steps", "2"]
    assert main([*words, "--precision", "bfloat16", "--out", str(tmp_path / "run")]) == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())["config"]
    assert config["precision"] == "bfloat16"


def test_a_size_of_zero_is_refused_and_not_taken_for_none(made, tmp_path, capsys):
    words = ["--store", str(made.store)]
    new = ["--out", str(tmp_path / "new")]
    for command, message in (
        (["train", *words, *new, "--features", "0"], "n_features must be between 1 and"),
        (["report", *words, *new, "--run", str(made.run), "--count", "0"], "count must be between"),
        (["eval", *words, "--sae", str(made.run / "sae"), "--model", "toy", "--contexts", "0"],
         "contexts must be between 1 and"),
    ):  # fmt: skip
        assert main(command) == 1
        assert message in capsys.readouterr().err


def test_a_store_that_is_there_is_refused_before_the_model_is_loaded(made, monkeypatch, capsys):
    monkeypatch.setattr("microtome.workflow.load", None)
    assert main(["capture", "--out", str(made.store)]) == 1
    assert "is a finished store already" in capsys.readouterr().err


def test_rows_that_training_saw_are_counted_and_another_model_is_named(made, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(made.run, run, ignore=shutil.ignore_patterns("checkpoints", "evaluation.json"))
    store = tmp_path / "store"
    shutil.copytree(made.store, store)
    manifest = json.loads((store / "manifest.json").read_text())
    (store / "manifest.json").write_text(json.dumps({**manifest, "model": "GPT-2"}))
    words = ["eval", "--sae", str(run), "--store", str(store), "--held-out", "0.5"]
    assert main([*words, "--model", "toy", "--contexts", "1"]) == 0
    came = capsys.readouterr().err
    # A tenth of 32 contexts of 64 tokens was held out, three of them.
    assert "it was trained on 832 of the rows that are measured here" in came
    assert "the store says that it came from GPT-2, the model is the built-in toy" in came
    note = write._metrics_note(json.loads((run / "evaluation.json").read_text()), "GPT-2")
    assert note.startswith("On 1,024 tokens, 832 of which training saw;")


def test_a_folder_that_transformers_cannot_load_is_named(made, tmp_path, capsys):
    (tmp_path / "config.json").write_text("{")
    words = ["eval", "--sae", str(made.run), "--store", str(made.store)]
    assert main([*words, "--model", str(tmp_path)]) == 1
    assert "cannot be loaded as a causal language model with its tok" in capsys.readouterr().err


def test_a_reader_that_leaves_is_no_error_of_ours():
    code = (
        "import sys\n"
        "from microtome import cli\n"
        "cli._info = lambda _: print('x' * 10**6)\n"
        "sys.exit(cli.main(['info']))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 1


def test_ctrl_c_leaves_with_130_and_says_what_is_kept(monkeypatch, capsys):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_train", interrupted)
    assert main(["train", "--store", "s", "--out", "there"]) == 130
    assert "Checkpoints in there are kept" in capsys.readouterr().err


def test_training_again_in_a_finished_run_changes_no_weight(made, capsys):
    before = (made.run / "sae" / "sae_weights.safetensors").read_bytes()
    small = ["--features", "96", "--k", "8", "--steps", "30", "--batch-size", "128"]
    assert main(["train", "--store", str(made.store), *small, "--out", str(made.run)]) == 0
    assert (made.run / "sae" / "sae_weights.safetensors").read_bytes() == before


def test_eval_leaves_its_numbers_in_the_run(made):
    numbers = json.loads((made.run / "evaluation.json").read_text())
    assert 0 < numbers["fvu"] < 1
    assert 0 < numbers["l0"] <= 8
    assert numbers["ce_tokens"] == 3 * 63  # a tenth of 32 contexts, whole ones, of 64 tokens
    # Random weights are worse than zeros, which give all bytes the same chance.
    assert numbers["ce_clean"] > numbers["ce_zero"] == pytest.approx(math.log(256))
    assert numbers["ce_spliced"] == pytest.approx(numbers["ce_clean"], abs=0.5)
    assert "ce_recovered" not in numbers


def test_help_answers_without_importing_torch():
    code = (
        "import sys\n"
        "from microtome.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(cli.__file__).parent,
    )
    assert done.returncode == 0, done.stderr
    assert "usage: microtome" in done.stdout
