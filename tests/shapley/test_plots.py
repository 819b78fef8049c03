"""Pictures: that they are written, show something, and refuse what they cannot show."""

import builtins
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from microtome.errors import ArgumentError, PackageError, ShapeError
from microtome.shapley import (
    Players,
    ShapleyValues,
    image_game,
    permutation,
    series_game,
    text_game,
)
from microtome.shapley.plots import draw, text_html
from microtome.shapley.plots.canvas import alike, choose, cut, number, ranked
from microtome.shapley.plots.table import _feature_colours, _lifts

plt = pytest.importorskip("matplotlib.image")


def result(e=3, p=5, o=None, *, names=None, shown=True, stderr=0.1, kind="columns", view=None):
    generator = torch.Generator().manual_seed(0)
    tail = (p,) if o is None else (p, o)
    values = torch.randn(e, *tail, generator=generator, dtype=torch.float64)
    base = torch.zeros(e, *tail[1:], dtype=torch.float64)
    players = Players(
        tuple(names or (f"feature {j}" for j in range(p))), kind,
        torch.randn(e, p, generator=generator) if shown else None, view or {},
    )  # fmt: skip
    return ShapleyValues(
        values, torch.full_like(values, stderr), base, values.sum(1), players, "test", "test", 0
    )


def spread(path):
    """How many distinct grey levels, and their standard deviation: a blank page has 1 and 0."""
    pixels = plt.imread(path)[..., :3].mean(-1)
    return len(np.unique(pixels)), float(pixels.std())


def shows(path):
    levels, deviation = spread(path)
    return levels > 20 and deviation > 0.02


@pytest.mark.parametrize("kind", ["bar", "waterfall", "beeswarm"])
def test_tables_are_drawn_for_one_row_for_several_and_for_every_output(kind, tmp_path):
    one, several = tmp_path / "one.png", tmp_path / "several.png"
    assert result(1).plot(one, kind) == one
    options = {} if kind == "beeswarm" else {"row": 1}
    result(30, 24, 2).plot(several, kind, output=1, limit=6, title="Words above", **options)
    assert shows(one)
    assert shows(several)


def test_a_bar_of_many_rows_is_another_picture_than_that_of_one(tmp_path):
    many = result(4)
    many.plot(tmp_path / "all.png", "bar")
    many.plot(tmp_path / "row.png", "bar", row=2)
    assert shows(tmp_path / "all.png")
    assert spread(tmp_path / "all.png") != spread(tmp_path / "row.png")


def test_auto_takes_what_suits_the_players(tmp_path, monkeypatch):
    import microtome.shapley.plots as plots

    drawn = []
    for kind in plots._KINDS:
        monkeypatch.setitem(plots._KINDS, kind, lambda r, path, kind=kind: drawn.append(kind))
    draw(result(1), "x.png")
    draw(result(2), "x.png")
    for kind in ("text", "image", "series"):
        draw(result(1, kind=kind), "x.png")

    @dataclass
    class Pairs:
        matrix: torch.Tensor
        names: tuple

    draw(Pairs(torch.eye(2), ("a", "b")), "x.png")
    assert drawn == ["waterfall", "beeswarm", "text", "image", "series", "heat"]


def test_a_text_is_drawn_and_written_as_html(tmp_path):
    game = text_game(
        lambda t: [[len(a), -a.count("good")] for a in t], "so <good>, so\n\u4f60\u597d bad " * 9
    )
    found = permutation(game, n_permutations=4)
    assert shows(found.plot(tmp_path / "text.png", title="A text"))
    page = text_html(found, output=1, path=tmp_path / "text.html")
    assert "&lt;<span" in page
    assert "good</span>&gt;" in page
    assert "<good>" not in page
    assert (tmp_path / "text.html").read_text(encoding="utf-8").count("<span") == len(found.names)


def test_tokens_without_places_are_drawn_one_after_another(tmp_path):
    found = result(1, 3, kind="text", view={"text": "abc", "spans": None}, shown=False)
    assert shows(found.plot(tmp_path / "tokens.png"))


def test_an_image_and_a_series_are_drawn_over_what_they_explain(tmp_path):
    image = np.random.default_rng(0).random((12, 16, 3))
    game = image_game(lambda a: a[:, :6, :8].mean((1, 2, 3)), image, segments="grid", background=0)
    found = permutation(game, n_permutations=4)
    assert shows(found.plot(tmp_path / "image.png", limit=9, title="Noise"))
    series = np.random.default_rng(0).normal(size=(20, 2))
    for per_channel in (False, True):
        game = series_game(lambda a: a[:, 3, 0] * a[:, 9, 1], series, steps=5,
                           per_channel=per_channel)  # fmt: skip
        path = permutation(game, n_permutations=8).plot(tmp_path / f"{per_channel}.png")
        assert shows(path)


@pytest.mark.parametrize("shape", [(5, 5), (2, 5, 5), (2, 5, 5, 3), (30, 30)])
def test_interactions_are_drawn_from_every_shape(shape, tmp_path):
    @dataclass
    class Pairs:
        matrix: torch.Tensor
        names: tuple

    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    p = shape[1]
    pairs = Pairs(matrix, tuple(f"player {j}" for j in range(p)))
    assert shows(draw(pairs, tmp_path / "heat.png"))
    with pytest.raises(ShapeError, match=rf"matrix must be \[p, p\] for p={p - 1} names"):
        draw(replace(pairs, names=pairs.names[1:]), tmp_path / "heat.png")


def test_values_of_all_kinds_are_drawn(tmp_path):
    odd = result(3, 4, names=["$x_1$", "", "a name that goes on and on and on and on", "\n"])
    shown = np.array([["f", None, 1.5, float("nan")]] * 3, dtype=object)
    odd = replace(odd, players=replace(odd.players, shown=shown))
    for kind in ("bar", "waterfall", "beeswarm"):
        assert shows(odd.plot(tmp_path / f"{kind}.png", kind))
    zero = replace(odd, values=odd.values * 0, full_values=odd.base_values, stderr=odd.stderr * 0)
    for kind in ("bar", "waterfall", "beeswarm"):
        assert shows(zero.plot(tmp_path / f"{kind}.svg.png", kind))


def test_rows_that_were_not_begun_are_left_out_or_refused(tmp_path):
    broken = result(3)
    broken.values[2] = float("nan")
    broken.stderr[2] = float("nan")
    assert shows(broken.plot(tmp_path / "bar.png", "bar"))
    assert shows(broken.plot(tmp_path / "swarm.png", "beeswarm"))
    with pytest.raises(ArgumentError, match="row 2 has no values; the sampling ended before"):
        broken.plot(tmp_path / "row.png", "waterfall", row=2)


def test_the_output_with_the_largest_full_value_is_drawn_unless_one_is_named():
    found = result(2, 3, 2, view={"outputs": ("no", "yes")})
    found.full_values[:, 0], found.full_values[:, 1] = 1.0, 2.0
    assert choose("plot", found, 0, None).output == "yes"
    assert choose("plot", found, 0, "no").values.tolist() == found.values[0, :, 0].tolist()


def test_the_rest_is_summed_but_one_left_over_is_shown():
    assert ranked(np.array([1.0, 3.0, 2.0, 0.5]), 2, "plot") == ([1, 2], [0, 3])
    assert ranked(np.array([1.0, 3.0, 2.0]), 2, "plot") == ([1, 2, 0], [])


def test_numbers_and_names_are_written_short():
    assert [number(v) for v in (3, 0.12345, -2000.4, 1e-7, "red", None, float("nan"))] == [
        "3", "0.123", "\u22122000", "1e\u221207", "red", "None", "missing",
    ]  # fmt: skip
    write = alike([12.3456, -0.04])
    assert [write(v) for v in (12.3456, -0.04, -3.0)] == ["+12.3", "0.0", "\u22123.0"]
    assert cut("a" * 40) == "a" * 18 + "\u2026" + "a" * 9
    assert cut("\n") == "\\n"


def test_dots_of_a_swarm_stack_up_and_take_the_players_own_values():
    lift = _lifts(np.array([0.0, 0.0, 0.0, 1.0]), 0.1, 0.05)
    assert lift.tolist() == [0.0, 0.05, -0.05, 0.0]
    shown = np.array([[1.0, "a"], [2.0, "b"], [None, "c"]], dtype=object)
    kept = np.ones(3, dtype=bool)
    colours = _feature_colours(shown, kept, 0)
    assert colours[:2].tolist() == [0.0, 1.0]
    assert np.isnan(colours[2])
    assert _feature_colours(shown, kept, 1) is None


def test_column_games_keep_what_their_rows_hold():
    pandas = pytest.importorskip("pandas")
    x = torch.arange(6.0).reshape(2, 3)
    found = permutation(lambda a: a.sum(1), x, torch.zeros(1, 3), n_permutations=2)
    assert found.players.shown.tolist() == x.tolist()
    frame = pandas.DataFrame({"age": [3, 5], "sex": ["f", "m"]})
    found = permutation(
        lambda a: a["age"] * (a["sex"] == "f"), frame, frame[:1], n_permutations=2, check=False
    )
    assert found.players.shown.tolist() == [[3, "f"], [5, "m"]]
    grouped = permutation(
        lambda a: a.sum(1), x, torch.zeros(1, 3), n_permutations=2, groups=[0, 0, 1]
    )
    assert grouped.players.shown is None


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("pie", {}, "plot: kind must be one of 'auto', 'bar', 'beeswarm'"),
        ("waterfall", {"row": 7}, "plot: waterfall: row must be between 0 and 2, got row=7"),
        ("bar", {"output": 1}, "plot: bar: there is one output, so output must be 0 or None"),
        ("bar", {"limit": 0}, "plot: bar: limit must be at least 1 player, got limit=0"),
        ("text", {}, "plot: text: these players are columns, not pieces of a text"),
        ("image", {}, "plot: image: these players are columns, not superpixels"),
        ("series", {}, "plot: series: these players are columns, not stretches of a series"),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_words(kind, options, message, tmp_path):
    with pytest.raises(ArgumentError) as caught:
        result().plot(tmp_path / "x.png", kind, **options)
    assert message in str(caught.value)


def test_an_output_that_is_not_there_and_an_unknown_ending_are_refused(tmp_path):
    named = result(2, 3, 2, view={"outputs": ("no", "yes")})
    with pytest.raises(ArgumentError, match="output must be one of 'no', 'yes', got 'maybe'"):
        named.plot(tmp_path / "x.png", "bar", output="maybe")
    with pytest.raises(ArgumentError, match=r"the ending of the path must be one of .*png.*svg"):
        named.plot(tmp_path / "x.doc", "bar")


def test_without_matplotlib_a_message_says_what_to_install(monkeypatch, tmp_path):
    kept = builtins.__import__

    def without(name, *args):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return kept(name, *args)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(PackageError, match=r"not installed. Install microtome\[plot\]"):
        result().plot(tmp_path / "x.png", "bar")
    found = result(1, 3, kind="text", view={"text": "a b", "spans": ((0, 1), (1, 2), (2, 3))})
    with pytest.raises(PackageError, match="plot: text: matplotlib is not installed"):
        found.plot(tmp_path / "x.png")
    assert text_html(found).startswith("<div")
