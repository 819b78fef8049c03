"""The page: every part is there, nothing comes from outside, every text is escaped."""

import dataclasses
import json
import re
import shutil
from html.parser import HTMLParser

import pytest

from microtome.errors import StoreError
from microtome.models import ActivationStore
from microtome.report import About, write_report
from microtome.report.features import Context, Feature
from microtome.report.page import Page, render
from microtome.report.write import Run, metrics


class Tags(HTMLParser):
    """All start tags with their attributes, and a check that they close in order."""

    VOID = ("meta", "br", "link", "img", "input", "hr")

    def __init__(self):
        super().__init__()
        self.tags, self.open, self.text = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open, tag
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text.append(data)


def parsed(html):
    tags = Tags()
    tags.feed(html)
    assert tags.open == []
    return tags


@pytest.fixture(scope="module")
def html(made):
    return made.page.read_text(encoding="utf-8")


def test_the_page_has_every_part(html, made):
    tags = parsed(html)
    text = " ".join("".join(tags.text).split())
    assert {a.get("id") for t, a in tags.tags if t == "section"} == {
        "metrics",
        "figures",
        "features",
        "config",
    }
    for word in ("FVU", "L0", "Dead latents", "Loss, zeroed", "the built-in toy model", "text.txt"):
        assert word in text
    for name in ("resid_pre.2", "1,984 in contexts of 64", "batch_size"):
        assert name.replace("1,984", f"{len(ActivationStore(made.store)):,}") in text
    assert sum(t == "svg" for t, _ in tags.tags) == 4
    assert sum(t == "article" for t, _ in tags.tags) >= 5
    assert sum(a.get("class") == "peak" for t, a in tags.tags if t == "mark") >= 5


def test_the_numbers_of_the_page_are_those_of_the_evaluation(html, made):
    numbers = json.loads((made.run / "evaluation.json").read_text())
    for metric in metrics(numbers):
        assert f'<td class="value">{metric.value}</td>' in html
    assert len(metrics(numbers)) == 6
    assert "Zeros do not raise its loss, so there is no share of it to recover." in html
    shown = {metric.name: metric.value for metric in metrics({**numbers, "ce_recovered": 0.98})}
    assert len(shown) == 7
    assert shown["CE recovered"] == "98.0%"


def test_nothing_is_loaded_from_outside(html):
    assert not re.findall(r"https?://", html)
    assert "@import" not in html
    for tag, attributes in parsed(html).tags:
        assert tag not in ("script", "link", "iframe", "img", "object")
        for name in ("src", "href", "xlink:href", "data", "srcset"):
            assert attributes.get(name, "#").startswith("#"), (tag, attributes)
    assert all(url.startswith("#") for url in re.findall(r"url\(([^)]*)\)", html))


def test_ids_that_a_reference_needs_are_there(html):
    tags = parsed(html).tags
    ids = {a["id"] for _, a in tags if a.get("id")}
    wanted = {a["xlink:href"][1:] for _, a in tags if a.get("xlink:href")}
    wanted |= {url[1:] for url in re.findall(r"url\(([^)]*)\)", html)}
    assert wanted <= ids


def test_no_text_becomes_markup():
    evil = "<script>alert('x')</script>&\"\n"
    context = Context(0, (1, 2, 3), (0.0, 2.0, 1.0), 1)
    feature = Feature(0, "word", 5, 0.01, 2.0, 1.0, 1.5, ((1, 1.0),), (context,))
    page = Page(
        title=evil,
        lead=evil,
        warnings=[evil],
        facts=[(evil, evil)],
        metrics=[],
        metrics_note=evil,
        figures=[],
        rule=evil,
        features=[feature],
        text=lambda _: evil,
        config=[(evil, evil)],
        footer=evil,
    )
    assert "script" not in {tag for tag, _ in parsed(render(page)).tags}
    assert render(page).count("alert(&#x27;x&#x27;)") >= 12


def test_space_and_line_ends_are_visible_and_strength_follows_activation():
    texts = {1: "\n", 2: " ", 3: " king", 4: "s"}
    context = Context(0, (1, 2, 3, 4), (0.0, 1.0, 4.0, 0.0), 2)
    feature = Feature(7, "word", 5, 0.01, 4.0, 1.0, 1.5, ((3, 1.0),), (context,))
    blank = dict.fromkeys((f.name for f in dataclasses.fields(Page)), "")
    lists = {name: [] for name in ("warnings", "facts", "metrics", "figures", "config")}
    page = Page(**{**blank, **lists, "features": [feature], "text": lambda token: texts[token]})
    html = render(page)
    assert '<i class="space">↵</i>' in html
    assert '<mark style="--a:0.21" title="1"><i class="space">␣</i></mark>' in html
    assert ' <mark class="peak" style="--a:0.85" title="4">king</mark>s' in html


def test_the_pictures_lie_beside_the_page(made):
    for name in ("fvu", "density", "dead", "alignment"):
        assert (made.page.parent / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_a_report_without_a_finished_run_says_what_to_do(made, tmp_path):
    store = ActivationStore(made.store)
    with pytest.raises(StoreError, match=r"holds no finished run .* microtome train --store DIR"):
        write_report(tmp_path, store, tmp_path / "r.html", about=About())
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_file_is_named_and_a_torn_line_of_the_log_is_left_out(made, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(made.run, run, ignore=shutil.ignore_patterns("checkpoints"))
    whole = len(Run.open(run).history)
    with (run / "log.jsonl").open("a") as log:
        log.write('{"step": 3')
    assert len(Run.open(run).history) == whole > 0
    (run / "evaluation.json").write_text("{")
    with pytest.raises(StoreError, match=r"evaluation\.json: it is not JSON"):
        Run.open(run)
    (tmp_path / "text.json").write_text('{"vocabulary": {"a": "b"}}')
    with pytest.raises(StoreError, match=r"text\.json is damaged .* or remove the file"):
        About.read(tmp_path)
    with pytest.raises(StoreError, match=r"is a folder\. Name the file"):
        write_report(made.run, ActivationStore(made.store), tmp_path, about=About())
