"""Superpixels and stretches of time as players, in every layout."""

import sys

import numpy as np
import pytest
import torch

from microtome.errors import ArgumentError, NonFiniteError, PackageError, ShapeError
from microtome.shapley import SetGame, image_game, permutation, series_game
from microtome.shapley.coalitions import of_members
from microtome.shapley.image import blurred, grid

FIRST = torch.zeros(1, dtype=torch.int64)


def values(game, inside):
    return game.values(*of_members(inside), FIRST)[0]


def some(p, seed=0):
    return torch.rand(9, p, generator=torch.Generator().manual_seed(seed)) < 0.5


IMAGE = np.random.default_rng(0).random((6, 8, 3))
SEGMENTS = grid(6, 8, 6)


def curved(images):
    """Something of an image [R, 6, 8, 3] to which pixels do not add."""
    return (images * np.arange(3)).sum((1, 2, 3)) ** 2 + images[:, 0, 0, 0]


@pytest.mark.parametrize("layout", ["array", "tensor", "channels first", "channels last"])
def test_an_image_game_is_the_game_of_its_pixels_in_every_layout(layout):
    first = layout in ("tensor", "channels first")
    x = np.moveaxis(IMAGE, -1, 0) if first else IMAGE
    if "tensor" in layout or "channels" in layout:
        x = torch.from_numpy(np.ascontiguousarray(x))

    def f(images):
        assert images.shape[1:] == x.shape
        assert isinstance(images, torch.Tensor) == isinstance(x, torch.Tensor)
        a = np.asarray(images)
        return curved(np.moveaxis(a, 1, -1) if first else a)

    colour = np.array([0.1, 0.5, 0.9])
    game = image_game(f, x, segments=SEGMENTS, background=colour)
    assert len(game.players) == 6

    def value(inside):
        there = np.asarray(inside)[:, SEGMENTS][..., None]
        return curved(np.where(there, IMAGE, colour))

    inside = some(6)
    torch.testing.assert_close(values(game, inside), values(SetGame(value, 6), inside))
    result = permutation(game, n_permutations=4)
    result.check_additivity()
    assert result.players.kind == "image"
    assert result.players.view["image"].shape == (6, 8, 3)


def test_grey_whole_numbered_images_keep_their_dtype_and_rounded_background():
    image = np.arange(20, dtype=np.uint8).reshape(4, 5)
    game = image_game(lambda a: a.mean((1, 2)) + (a.dtype != np.uint8), image, segments="grid",
                      background="mean")  # fmt: skip
    assert game.ends()[0].item() == 10  # 9.5, rounded to even
    assert game.ends()[1].item() == 9.5


def test_backgrounds_by_name_by_image_and_by_several():
    def empty(background, segments=SEGMENTS):
        game = image_game(lambda a: a.reshape(len(a), -1), IMAGE, segments=segments,
                          background=background)  # fmt: skip
        return game.ends()[0][0].reshape(-1, 6, 8, 3).numpy()

    np.testing.assert_allclose(empty("mean")[0], np.broadcast_to(IMAGE.mean((0, 1)), (6, 8, 3)))
    wanted = IMAGE[SEGMENTS == 2].mean(0)
    np.testing.assert_allclose(empty("segments")[0][SEGMENTS == 2], np.broadcast_to(wanted, (6, 3)))
    np.testing.assert_array_equal(empty(0.25), np.full((1, 6, 8, 3), 0.25))
    np.testing.assert_array_equal(empty(IMAGE[::-1])[0], IMAGE[::-1])
    several = np.stack([IMAGE * 0, IMAGE * 0.5])
    np.testing.assert_array_equal(empty(several), several)
    blur = empty("blur")[0]
    assert blur.std() < 0.75 * IMAGE.std()
    np.testing.assert_allclose(blurred(np.full((5, 7, 1), 2.0), 1.5), 2.0)


def test_pixels_of_negative_segments_are_always_there():
    segments = SEGMENTS.copy()
    segments[SEGMENTS == 0] = -1
    game = image_game(lambda a: a[:, 0, 0, 0] + a[:, -1, -1, 0], IMAGE, segments=segments,
                      background=0)  # fmt: skip
    assert len(game.players) == 5
    assert game.ends()[0].item() == IMAGE[0, 0, 0]


def test_a_grid_has_about_as_many_cells_as_asked():
    assert len(np.unique(grid(224, 224, 64))) == 64
    assert len(np.unique(grid(3, 100, 50))) == 50
    assert len(np.unique(grid(2, 2, 64))) == 4


def test_slic_is_used_where_it_is_installed_and_asked_for_by_name(monkeypatch):
    pytest.importorskip("skimage.segmentation")
    image = np.zeros((24, 24, 3))
    image[:, 12:] = 1
    game = image_game(lambda a: a.mean((1, 2, 3)), image, segments=4)
    segments = game.players.view["segments"]
    assert (segments[:, :12].max() < segments[:, 12:].min()) or not set(
        np.unique(segments[:, :12])
    ) & set(np.unique(segments[:, 12:]))
    monkeypatch.setitem(sys.modules, "skimage.segmentation", None)
    fallen = image_game(lambda a: a.mean((1, 2, 3)), image, segments=4)
    np.testing.assert_array_equal(fallen.players.view["segments"], grid(24, 24, 4))
    with pytest.raises(PackageError, match="segments='slic' needs scikit-image"):
        image_game(lambda a: a.mean((1, 2, 3)), image, segments="slic")


def mean_of(images):
    return np.asarray(images).reshape(len(images), -1).mean(1)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: image_game(mean_of, IMAGE, segments=SEGMENTS[:5]),
            ShapeError,
            "segments must be [6, 8] integers, one for each pixel, got [5, 8] of int64",
        ),
        (
            lambda: image_game(mean_of, IMAGE, segments=lambda a: a[:, :, 0]),
            ShapeError,
            "the function returned [6, 8] of float64",
        ),
        (
            lambda: image_game(mean_of, IMAGE, segments=SEGMENTS - 99),
            ArgumentError,
            "all segments are negative, so no pixel plays",
        ),
        (
            lambda: image_game(mean_of, np.full((6, 8), np.nan)),
            NonFiniteError,
            "image_game: image holds NaN or infinity in 48 places. Fill them in",
        ),
        (lambda: image_game(mean_of, IMAGE, segments=0), ArgumentError, "at least 1 superpixel"),
        (
            lambda: image_game(mean_of, IMAGE, segments="quick"),
            ArgumentError,
            "segments must be one of 'auto', 'grid', 'slic', got 'quick'",
        ),
        (
            lambda: image_game(mean_of, IMAGE[None]),
            ShapeError,
            "got shape [1, 6, 8, 3]. Pass one image at a time",
        ),
        (
            lambda: image_game(mean_of, np.zeros((5, 6, 7))),
            ShapeError,
            "Pass channels_last=True or False",
        ),
        (
            lambda: image_game(mean_of, IMAGE, background=IMAGE[:4]),
            ShapeError,
            "or images [6, 8, 3] or [n, 6, 8, 3], got shape [4, 8, 3]",
        ),
        (
            lambda: image_game(mean_of, IMAGE, background="black"),
            ArgumentError,
            "background must be one of 'blur', 'mean', 'segments', got 'black'",
        ),
        (
            lambda: series_game(mean_of, np.zeros((2, 3, 4))),
            ShapeError,
            "Pass one series at a time",
        ),
        (
            lambda: series_game(mean_of, np.zeros(4), steps=0),
            ArgumentError,
            "steps must be at least",
        ),
        (
            lambda: series_game(mean_of, np.zeros(4), steps=[3, 2]),
            ArgumentError,
            "steps must rise between 0 and t=4, got [3, 2]",
        ),
        (
            lambda: series_game(mean_of, np.zeros((4, 2)), background=np.zeros(3)),
            ShapeError,
            "series [4, 2] or [n, 4, 2], got shape [3]",
        ),
        (
            lambda: series_game(mean_of, np.zeros((4, 2)), channels=["a"]),
            ArgumentError,
            "channels must name c=2 channels, got 1 names",
        ),
    ],
)
def test_bad_input_is_answered_in_words(call, error, message):
    with pytest.raises(error) as caught:
        call()
    assert message in str(caught.value)


SERIES = np.random.default_rng(1).normal(size=(7, 2))


def product(rows):
    """Of series [R, 7, 2]."""
    return rows[:, 0, 0] * rows[:, 6, 1] + rows[:, 3].sum(1) ** 2


@pytest.mark.parametrize("kind", ["array", "tensor"])
@pytest.mark.parametrize("time_last", [False, True])
@pytest.mark.parametrize("per_channel", [False, True])
def test_a_series_game_is_the_game_of_its_stretches(kind, time_last, per_channel):
    x = SERIES.T if time_last else SERIES
    x = torch.from_numpy(np.ascontiguousarray(x)) if kind == "tensor" else x

    def f(rows):
        rows = np.asarray(rows)
        return product(np.moveaxis(rows, 1, 2) if time_last else rows)

    game = series_game(
        f, x, steps=3, per_channel=per_channel, time_last=time_last,
    )  # fmt: skip
    which = np.repeat(np.arange(7)[:, None] // 3, 2, 1)
    if per_channel:
        which = which + np.array([0, 3])
        assert game.players.names == ("0 0-2", "0 3-5", "0 6", "1 0-2", "1 3-5", "1 6")
    else:
        assert game.players.names == ("0-2", "3-5", "6")

    def value(inside):
        rows = [np.where(np.asarray(row)[which], SERIES, SERIES.mean(0)) for row in inside]
        return product(np.stack(rows))

    p = len(game.players)
    inside = some(p)
    torch.testing.assert_close(values(game, inside), values(SetGame(value, p), inside))


def test_stretches_may_have_given_starts_and_backgrounds_many_forms():
    x = torch.arange(6.0)
    game = series_game(lambda a: a.sum(1), x, steps=[0, 2, 5], background=1)
    assert game.players.names == ("0-1", "2-4", "5")
    result = permutation(game, n_permutations=4)
    torch.testing.assert_close(result.values, torch.tensor([[-1.0, 6.0, 4.0]], dtype=torch.float64))
    many = series_game(lambda a: a.sum(1), x, background=torch.stack([x * 0, x + 1]))
    assert many.backgrounds == 2
    two = series_game(lambda a: a[:, 0, 1], torch.ones(3, 2), background=[5.0, 7.0])
    assert two.ends()[0].item() == 7


@pytest.mark.parametrize("kind", [np.array, torch.tensor])
def test_the_mean_of_a_series_of_whole_numbers_is_not_rounded(kind):
    x = kind([0, 1, 1, 1])
    for background in ("mean", 0.75):
        found = permutation(series_game(lambda a: a.sum(1), x, background=background))
        assert found.values.tolist() == [[-0.75, 0.25, 0.25, 0.25]]
    series_game(lambda a: a.sum(1) * (1 if "int" in str(a.dtype) else torch.nan), x, background=0)


def test_fractions_are_no_background_of_an_image_of_whole_numbers():
    image = np.full((8, 8, 1), 200, dtype=np.uint8)
    with pytest.raises(ArgumentError, match=r"background holds fractions, and the image is uint8"):
        image_game(lambda a: a.mean((1, 2, 3)), image, segments=4, background=0.5)
