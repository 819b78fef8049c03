"""From a run directory and an activation store to report.html."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import microtome
from microtome import _check
from microtome.errors import StoreError
from microtome.report import plots
from microtome.report.features import About, choose, describe
from microtome.report.page import Metric, Page, render
from microtome.report.survey import Rows, survey

EVALUATION = "evaluation.json"


@dataclass(frozen=True)
class Run:
    """What a report needs of a training run.

    Attributes:
        sae: the trained SAE.
        config: the training configuration, as in config.json.
        history: the lines of log.jsonl.
        evaluation: fvu, l0, dead_fraction, n_rows and, where there was a model, cross-entropies.
    """

    sae: Any
    config: dict[str, Any]
    history: Sequence[dict[str, Any]]
    evaluation: dict[str, Any]

    @classmethod
    def open(cls, path: Path) -> Run:
        """Read a run directory.

        Raises:
            StoreError: it is not one, training has not finished in it, or a file of it is damaged.
        """
        from microtome.sae import SAE, log

        if not (path / "sae").is_dir():
            msg = (
                f"report: {path} holds no finished run (no sae/ in it). "
                f"Train there first: microtome train --store DIR --out {path}"
            )
            raise StoreError(msg)
        return cls(
            sae=SAE.from_pretrained(path / "sae"),
            config=_json(path / "config.json").get("config", {}),
            history=log.read(path / "log.jsonl"),
            evaluation=_json(path / EVALUATION) or _json(path / "metrics.json"),
        )


def _json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    from microtome.sae.files import read_json

    read: dict[str, Any] = read_json(path)
    return read


def write_report(
    run: Path, store: Rows, out: Path, *, about: About, count: int = 30, progress: bool = True
) -> Path:
    """Write the report of a run as one HTML file, and its figures as PNG files beside it.

    Args:
        run: a run directory, as `train` leaves it; evaluation.json in it goes before metrics.json.
        store: the activations to look for features in, with `manifest`, `rows` and `tokens`.
        out: the HTML file; its directory is made.
        about: what the text is, and each token's text.
        count: how many features to show.
        progress: show a progress bar.

    Returns:
        `out`. The file is written whole or not at all.

    Raises:
        StoreError: the run is not finished or damaged, the SAE's width is not the store's, or
            `out` is a folder.
        ArgumentError: count is below 1.
        PackageError: matplotlib is not installed.
    """
    _check.between("report", "count", count, 1, 1 << 31)
    if out.is_dir():
        msg = f"report: {out} is a folder. Name the file, such as {out / 'report.html'}."
        raise StoreError(msg)
    out.parent.mkdir(parents=True, exist_ok=True)
    loaded = Run.open(run)
    width = int(store.rows(slice(0, 1)).shape[-1])
    if width != loaded.sae.d_model:
        msg = (
            f"report: the SAE of {run} has d={loaded.sae.d_model}, the store has d={width}. "
            "Give the store that it was trained on."
        )
        raise StoreError(msg)
    found = survey(loaded.sae, store, progress=progress)
    figures = [
        plots.curve(loaded.history),
        plots.density(found.density),
        plots.dead(loaded.history),
        plots.alignment(loaded.sae.W_enc, loaded.sae.W_dec),
    ]
    choice = choose(found, count)
    manifest = store.manifest
    page = Page(
        title=f"A sparse autoencoder on {manifest['model']}",
        lead=(
            f"{loaded.sae.n_features:,} features, trained to rebuild the activations at "
            f"{manifest['site']} from a few of them at a time, and the text that each responds to."
        ),
        warnings=_warnings(about, str(manifest["model"])),
        facts=_facts(loaded, store, about),
        metrics=metrics(loaded.evaluation),
        metrics_note=_metrics_note(loaded.evaluation, str(manifest["model"])),
        figures=[(plots.svg(figure), figure.caption) for figure in figures],
        rule=choice.rule,
        features=describe(loaded.sae, store, found, choice),
        text=about.token,
        config=[(name, _short(value)) for name, value in loaded.config.items()],
        footer=(
            f"Written by microtome {microtome.__version__} with torch {torch.__version__}, "
            f"Python {sys.version.split()[0]}. Features were surveyed on {found.n_rows:,} tokens, "
            f"those of training among them; the first token of every context of "
            f"{found.context_length} is left out."
        ),
    )
    for figure in figures:
        plots.png(figure, out.parent / f"{figure.name}.png")
    partial = out.with_name(out.name + ".partial")
    partial.write_text(render(page), encoding="utf-8")
    partial.replace(out)
    return out


def _warnings(about: About, model: str) -> list[str]:
    out = list(about.notes)
    if "quantised" in model:
        out.append(
            "The model's weights are 4-bit weights turned back into floats. Every number here is "
            "of that model: do not compare it with one taken at full precision."
        )
    return out


def _facts(run: Run, store: Rows, about: About) -> list[tuple[str, str]]:
    manifest = store.manifest
    sae = run.sae
    active = getattr(getattr(sae, "activation", None), "k", None)
    return [
        ("Model", str(manifest["model"])),
        ("Text", about.text),
        ("Site", f"{manifest['site']}, d = {sae.d_model}"),
        ("Tokens captured", f"{len(store):,} in contexts of {manifest['context_length']}"),
        ("Features", f"{sae.n_features:,} ({sae.n_features / sae.d_model:.1f} times d)"),
        ("Active a token", f"k = {active}" if active else "not fixed"),
        ("Stored as", str(manifest.get("dtype", "float32")).removeprefix("torch.")),
        ("Steps", f"{max((h['step'] for h in run.history), default=0):,}"),
    ]


def metrics(evaluation: dict[str, Any]) -> list[Metric]:
    """The metric table of an evaluation; lines whose number is missing are left out."""
    says = (
        (
            "fvu",
            "FVU",
            "{:.3f}",
            "Fraction of variance unexplained: the squared error of the reconstruction over the "
            "variance of the activations. 0 is perfect, 1 no better than their mean.",
            "Whether what is lost matters to the model, or whether a feature means anything.",
        ),
        (
            "l0",
            "L0",
            "{:.1f}",
            "How many features are active on a token, on average.",
            "That fewer is clearer: a low L0 can be bought with a high FVU.",
        ),
        (
            "dead_fraction",
            "Dead latents",
            "{:.1%}",
            "Share of latents that fired on none of the held-out tokens.",
            "That they are useless: on little text a rare one looks dead, a live one may be noise.",
        ),
        (
            "ce_clean",
            "Loss, clean",
            "{:.3f}",
            "The model's own cross-entropy on the next token, in nats, nothing replaced.",
            "Anything about the SAE: the next two lines are compared with it.",
        ),
        (
            "ce_spliced",
            "Loss, spliced",
            "{:.3f}",
            "The same, with the reconstruction put in the activation's place.",
            "Where the loss arises: an average hides tokens on which it is far higher.",
        ),
        (
            "ce_zero",
            "Loss, zeroed",
            "{:.3f}",
            "The same, with zeros in the activation's place.",
            "What a fair baseline is: zeros take the model far from anything it knows.",
        ),
        (
            "ce_recovered",
            "CE recovered",
            "{:.1%}",
            "(zeroed - spliced) / (zeroed - clean): 100 % means that the model does not notice.",
            "That the SAE is good: zeroing is so bad a baseline that high values come easily, and "
            "an SAE fitted to one kind of text can pass 100 % on it.",
        ),
    )
    return [
        Metric(name, form.format(evaluation[key]), text, does_not)
        for key, name, form, text, does_not in says
        if evaluation.get(key) is not None
    ]


def _metrics_note(evaluation: dict[str, Any], model: str) -> str:
    rows = evaluation.get("n_rows")
    seen = evaluation.get("rows_seen")
    on = f"On {rows:,} held-out tokens that training never saw" if rows else "On held-out tokens"
    if seen:
        on = f"On {rows:,} tokens, {seen:,} of which training saw"
    spliced = evaluation.get("ce_tokens")
    more = f"; the losses on {spliced:,} of them" if spliced else ""
    note = f"{on}{more}. The model is {model}."
    if "ce_zero" in evaluation and evaluation.get("ce_recovered") is None:
        note += " Zeros do not raise its loss, so there is no share of it to recover."
    return note


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else "none" if value is None else str(value)
