"""One tiny run through the real commands, shared by the tests of this folder."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from microtome.cli import main

pytest.importorskip("matplotlib", reason="the report draws with matplotlib")

# The byte tokenizer gives "<script>" as eight tokens; each must come out escaped.
TEXT = (
    "In the beginning <script>alert(1)</script> & the end.\nThe second line, the same again.\n" * 60
)


@dataclass(frozen=True)
class Made:
    """Where the commands put what they made."""

    text: Path
    store: Path
    run: Path
    page: Path


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """capture, train, eval and report of 2,048 bytes through the toy model."""
    home = tmp_path_factory.mktemp("app")
    made = Made(home / "text.txt", home / "store", home / "run", home / "page" / "report.html")
    made.text.write_text(TEXT, encoding="utf-8")
    capture = ["--model", "toy", "--text", str(made.text), "--tokens", "2048"]
    small = ["--features", "96", "--k", "8", "--steps", "30", "--batch-size", "128"]
    for command in (
        ["capture", *capture, "--context-length", "64", "--out", str(made.store)],
        ["train", "--store", str(made.store), *small, "--out", str(made.run)],
        ["eval", "--sae", str(made.run), "--store", str(made.store), "--model", "toy"],
        ["report", "--run", str(made.run), "--store", str(made.store), "--out", str(made.page)],
    ):
        assert main(command) == 0, command
    return made
