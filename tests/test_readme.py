"""The README and the docs say only what runs: code is executed, commands are parsed."""

import re
import shlex
import socket
import sys
from pathlib import Path

import pytest

from microtome import cli

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {}
    for code in blocks("python"):  # one after another: each goes on with the names of the last
        exec(compile(code, "README.md", "exec"), names)
    assert 0 < names["run"].metrics["fvu"] < 1
    assert (tmp_path / "my-sae" / "cfg.json").exists()
    assert (tmp_path / "heads.png").exists()
    assert names["sweep"].engine == "native"
    assert (tmp_path / "waterfall.png").exists()
    assert names["heads_phi"].check_additivity().shape == (1,)
    assert capsys.readouterr().out.startswith("0.")


PAGES = [
    "training",
    "parallel",
    "activations",
    "patching",
    "shapley",
    "shapley_parts",
    "shapley_dropins",
    "lime",
]


@pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")  # of shap, for matplotlib
@pytest.mark.parametrize("page", PAGES)
def test_the_python_of_the_docs_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    if page == "parallel":  # as torchrun would, for one process
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        if sys.platform == "linux":
            monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")  # a machine's own name may lead nowhere
        alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in alone.items():
            monkeypatch.setenv(name, value)
    names = {}
    for code in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        exec(compile(code, f"{page}.md", "exec"), names)
    if page == "training":
        assert (tmp_path / "run" / "metrics.json").exists()
    elif page == "parallel":
        assert names["whole"].n_features == 512
        assert (tmp_path / "parallel-run/checkpoints/step_20/shard_0.safetensors").exists()
    elif page == "patching":
        assert (tmp_path / "resid_pre.png").exists()
        assert names["grid"].shape == names["sweep"].scores.shape == (4, 16)
        assert names["paths"].scores.shape == (4, 2)
    elif page == "shapley":
        pictures = {path.stem for path in tmp_path.glob("*.png")}
        assert pictures == {"swarm", "one", "text", "image", "series"}
        assert names["phi"].values.shape == (4, 6, 1)
        assert names["by_group"].values.shape == (4, 2)
    elif page == "shapley_parts":
        assert names["found"].check_additivity().shape == (2,)
        assert len(names["neurons"].players) == 1024
    elif page == "shapley_dropins":
        assert names["explanation"].values.tolist() == [[2.0, 2.0, 2.0]]
    elif page == "lime":
        assert (tmp_path / "bars.png").exists()
        assert names["found"].stability.seeds == 3
    else:
        assert names["acts"]["z.0"].shape == (4, 16, 4, 16)
        assert len(names["held_out"]) == 16
        assert (tmp_path / "acts" / "manifest.json").exists()


def test_the_commands_of_the_readme_parse():
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    commands = [
        shlex.split(line, comments=True)[1:] for line in lines if line.startswith("microtome ")
    ]
    assert [c[0] for c in commands] == ["info", "capture", "train", "eval", "report"]
    for command in commands:
        cli._parser().parse_args(command)


def test_the_make_targets_of_the_readme_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"\bmake ([a-z-]+)", README)
    assert {"demo", "test", "bench"} <= set(targets)
    for target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", *(f"docs/{page}.md" for page in PAGES)]
)
def test_every_link_to_a_file_leads_somewhere(page):
    path = ROOT / page
    links = re.findall(r"\]\(([^)#]+)", path.read_text(encoding="utf-8"))
    for link in links:
        assert "://" in link or (path.parent / link).exists(), link
