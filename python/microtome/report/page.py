"""The report as one self-contained HTML file: no script, no outside file, all text escaped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from microtome.report.features import Context, Feature

_SPACES = {" ": "␣", "\n": "↵", "\t": "⇥", "\r": "␍"}


@dataclass(frozen=True)
class Metric:
    """One line of the metric table: what the number says and what it does not."""

    name: str
    value: str
    says: str
    does_not: str


@dataclass(frozen=True)
class Page:
    """Everything the page shows, in reading order.

    Attributes:
        title: the heading.
        lead: one sentence below it.
        warnings: sentences a reader must not miss.
        facts: (label, value) pairs: model, text, site and sizes.
        metrics: the metric table.
        metrics_note: on what the metrics were taken.
        figures: (svg element, caption) pairs.
        rule: how the features were chosen.
        features: the features, word features first.
        text: from a token to its text.
        config: (name, value) pairs of the training configuration.
        footer: versions.
    """

    title: str
    lead: str
    warnings: Sequence[str]
    facts: Sequence[tuple[str, str]]
    metrics: Sequence[Metric]
    metrics_note: str
    figures: Sequence[tuple[str, str]]
    rule: str
    features: Sequence[Feature]
    text: Callable[[int], str]
    config: Sequence[tuple[str, str]]
    footer: str


def render(page: Page) -> str:
    """The page's HTML. All strings of the Page are escaped, except the figures' SVG."""
    style = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    head = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(page.title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
    )
    parts = [
        _top(page),
        _metrics(page),
        _figures(page),
        _features(page),
        _config(page),
        f"<footer>{escape(page.footer)}</footer>\n",
    ]
    return head + "".join(parts) + "</body>\n</html>\n"


def _top(page: Page) -> str:
    warnings = "".join(f'<p class="warn">{escape(w)}</p>\n' for w in page.warnings)
    facts = "".join(
        f"<div><dt>{escape(label)}</dt><dd>{escape(value)}</dd></div>\n"
        for label, value in page.facts
    )
    heading = escape(page.title).replace("-", "\u2011")  # a name is not broken at its hyphens
    return (
        f'<p class="eyebrow">microtome report</p>\n<h1>{heading}</h1>\n'
        f'<p class="lead">{escape(page.lead)}</p>\n{warnings}<dl class="facts">\n{facts}</dl>\n'
    )


def _metrics(page: Page) -> str:
    rows = "".join(
        f'<tr><td>{escape(m.name)}</td><td class="value">{escape(m.value)}</td>'
        f'<td class="says">{escape(m.says)}</td><td class="not">{escape(m.does_not)}</td></tr>\n'
        for m in page.metrics
    )
    return (
        f'<section id="metrics">\n<h2>How good is it</h2>\n'
        f'<p class="note">{escape(page.metrics_note)}</p>\n'
        "<table>\n<thead><tr><th>Metric</th><th>Value</th><th>What it says</th>"
        "<th>What it does not say</th></tr></thead>\n"
        f"<tbody>\n{rows}</tbody>\n</table>\n</section>\n"
    )


def _figures(page: Page) -> str:
    figures = "".join(
        f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>\n"
        for svg, caption in page.figures
    )
    return (
        '<section id="figures">\n<h2>Training and features in four pictures</h2>\n'
        f'<div class="figures">\n{figures}</div>\n</section>\n'
    )


def _features(page: Page) -> str:
    kinds = (
        ("word", "Features of a word", "Bound to one or a few words."),
        ("subject", "Features of a subject", "They fire on many different words, close together."),
    )
    parts = []
    for kind, heading, words in kinds:
        cards = [_feature(f, page.text) for f in page.features if f.kind == kind]
        if cards:
            parts.append(f'<h2>{heading}</h2>\n<p class="note">{words}</p>\n' + "".join(cards))
    body = "".join(parts) or '<p class="note">No feature fires on this text.</p>\n'
    return (
        f'<section id="features">\n<h2>What the features respond to</h2>\n'
        f"<p>{escape(page.rule)}</p>\n"
        '<p class="note">Each line is a stretch of the text, lined up at the token with the '
        "highest activation, which is underlined and whose activation stands in front. "
        '<span class="key">Background: 0 <b></b> the feature\'s maximum.</span> '
        "␣ and ↵ stand for tokens that are only space or a line's end. High activations show what "
        "a feature is most sure of, not all that it responds to.</p>\n"
        f"{body}</section>\n"
    )


def _feature(feature: Feature, text: Callable[[int], str]) -> str:
    chips = "".join(
        f'<span class="chip text">{_visible(text(token).strip(" ") or text(token))}'
        f"<small>{share:.0%}</small></span>"
        for token, share in feature.top_tokens
        if share >= 0.005
    )
    lines = "".join(_context(c, feature.maximum, text) for c in feature.contexts)
    return (
        f'<article class="feature" id="feature-{feature.index}">\n<header><h3>{feature.index}</h3>'
        f'{chips}<span class="stats">fires on {_percent(feature.density)} of tokens '
        f"({feature.firings:,}), max {feature.maximum:.3g}, mean {feature.mean:.3g}, "
        f"{feature.token_types:.1f} token types</span></header>\n"
        f'<ol class="contexts">\n{lines}</ol>\n</article>\n'
    )


def _percent(share: float) -> str:
    return f"{share:.2%}" if share >= 0.0001 else f"{share:.1e}"


def _context(context: Context, maximum: float, text: Callable[[int], str]) -> str:
    spans = [
        _token(
            text(token).lstrip(" ") if i == 0 < context.peak else text(token),
            value,
            maximum,
            i == context.peak,
        )
        for i, (token, value) in enumerate(zip(context.tokens, context.activations, strict=True))
    ]
    left, right = "".join(spans[: context.peak]), "".join(spans[context.peak :])
    value = context.activations[context.peak]
    return (
        f'<li><span class="max">{value:.3g}</span>'
        f'<span class="left text"><span>{left}</span></span>'
        f'<span class="right text">{right}</span></li>\n'
    )


def _token(text: str, value: float, maximum: float, peak: bool) -> str:
    shown = _visible(text)
    if value <= 0 and not peak:
        return shown
    alpha = 0.85 * min(1.0, value / maximum) if maximum > 0 else 0.0
    kind = ' class="peak"' if peak else ""
    # A leading space belongs to the token but not under its colour.
    space = " " if shown.startswith(" ") else ""
    shown = shown.removeprefix(" ")
    return f'{space}<mark{kind} style="--a:{alpha:.2f}" title="{value:.4g}">{shown}</mark>'


def _visible(text: str) -> str:
    """Escaped, with line ends shown, and spaces too where the token is nothing else."""
    only_space = text.strip() == ""
    out = []
    for letter in text:
        if letter in _SPACES and (only_space or letter != " "):
            out.append(f'<i class="space">{_SPACES[letter]}</i>')
        else:
            out.append(escape(letter))
    return "".join(out)


def _config(page: Page) -> str:
    rows = "".join(
        f"<li><span>{escape(name)}</span><span>{escape(value)}</span></li>\n"
        for name, value in page.config
    )
    return (
        '<section id="config">\n<h2>Configuration</h2>\n'
        f'<ul class="config">\n{rows}</ul>\n</section>\n'
    )
