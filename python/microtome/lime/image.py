"""LIME for images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from microtome._seed import generator
from microtome.errors import ShapeError
from microtome.lime.equations import Equations
from microtome.lime.kernels import Distance, Kernel, kernel_of
from microtome.lime.local import Settings
from microtome.lime.masks import answered, equations_of, first_of_equal
from microtome.lime.model import Model
from microtome.lime.result import LimeExplanation, finish
from microtome.lime.segments import Curtain, hidden, segments_of
from microtome.shapley import running
from microtome.shapley.call import as_function
from microtome.shapley.game import MEMORY
from microtome.shapley.image import to_show


def explain_image(
    f: Any,
    x: Any,
    *,
    segments: Any = 64,
    color: Any = None,
    channels: str = "auto",
    num_samples: int = 1000,
    num_features: int = 10,
    selection: str = "auto",
    kernel: Kernel | None = None,
    kernel_width: float | None = None,
    distance: Distance = "cosine",
    alpha: float = 1.0,
    outputs: Sequence[int] | None = None,
    repeats: int = 1,
    seed: int = 0,
    memory: int = MEMORY,
    check: bool = True,
    progress: bool = True,
) -> LimeExplanation:
    """Explain images by the segments whose hiding changes f.

    In every sample each segment is shown or hidden with equal odds.

    Args:
        f: a function of images [R, ...] of the kind, layout and numbers of x, or a torch module.
        x: [H, W, C] or [C, H, W], or [e, ...] of them: an array or a tensor.
        segments: how many squares, "quickshift", "slic", "felzenszwalb" (scikit-image), a function
            from an image [H, W, C] to [H, W] numbers, or [H, W] numbers for all images.
        color: what hides a segment; None for its mean colour.
        channels: "first", "last", or "auto": last for arrays, first for tensors.
        num_samples: samples of each image, itself among them.
        num_features: segments to keep at most.
        selection: "auto", "forward", "highest_weights", "lasso_path" or "none" (selection.py).
        kernel: a function from distances [K] to weights [K]; by default exponential(kernel_width).
        kernel_width: by default 0.25.
        distance: "cosine", "euclidean", a metric of scikit-learn or a function, of which segments
            are shown.
        alpha: the ridge penalty.
        outputs: which of f's outputs to explain; all by default.
        repeats: run with so many seeds and report how much the explanations differ.
        seed: of the samples. An image's explanation does not depend on the other images.
        memory: bytes of images in one call of f.
        check: call f twice on x to find out whether it is deterministic.
        progress: show a progress bar over the images.

    Returns:
        LimeExplanation, [e, p] or [e, p, o]; view["segments"] is [e, H, W].

    Raises:
        ArgumentError, ShapeError, NonFiniteError: as in explain_tabular.
        PackageError: scikit-image is asked for and not installed.

    Ctrl-C returns what can be said with the answers that had come (`interrupted`).

    Example:
        >>> import numpy as np
        >>> image = np.zeros((8, 8, 1))
        >>> image[:4, :4] = 1
        >>> found = explain_image(lambda a: a[:, 0, 0, 0], image, segments=4, color=0.0)
        >>> found.top(1)[0]["feature"]
        'segment 0'
    """
    op = "explain_image"
    settings = Settings(op, num_features, selection, alpha, num_samples, repeats)
    kernel = kernel_of(op, kernel, kernel_width, 0.25)
    function, wants = as_function(op, f)
    layout = _Layout(op, x, wants, channels)
    images = layout.images
    model = Model(op, function, outputs, memory // max(1, images[0].nbytes))
    prediction = model.explicands(lambda a, b: layout.back(images[a:b]), len(images), check)
    cuts = [segments_of(op, image, segments) for image in images]
    curtains = [
        Curtain(image, hidden(image, cut, color), cut)
        for image, cut in zip(images, cuts, strict=True)
    ]
    bar = running.bar(len(images) * repeats, op, "image", progress)

    def systems(run: int) -> Iterator[Equations]:
        for i, (curtain, cut) in enumerate(zip(curtains, cuts, strict=True)):
            random = generator(seed + run, "lime", "image")
            p = int(cut.max()) + 1
            on = torch.randint(0, 2, (num_samples - 1, p), generator=random).bool().numpy()
            values = _values(model, layout, curtain, on)
            every = torch.cat([prediction[i : i + 1], values])
            yield equations_of(op, on[: len(values)], every, kernel, distance, 1.0)
            bar.update()
            if model.interrupted:
                return

    with bar:
        runs, note = settings.run(model, systems, len(images))
    names = tuple(tuple(f"segment {j}" for j in range(int(cut.max()) + 1)) for cut in cuts)
    return finish(
        runs, prediction, model.scalar, names, kind="image", evaluations=model.evaluations,
        view={
            "segments": torch.from_numpy(np.stack(cuts)), "images": [to_show(a) for a in images],
        },
        note=note, interrupted=model.interrupted,
    )  # fmt: skip


def _values(model: Model, layout: _Layout, curtain: Curtain, on: np.ndarray) -> Tensor:
    first, which = first_of_equal(on)
    once = on[first]
    values = model(lambda a, b: layout.back(curtain(once[a:b])), len(once))
    return values[answered(which, len(values))]


class _Layout:
    """Images as arrays [e, H, W, C], and back to what f takes."""

    def __init__(self, op: str, x: Any, wants: str, channels: str) -> None:
        self._torch = isinstance(x, Tensor) if wants == "same" else wants == "torch"
        self._device = x.device if isinstance(x, Tensor) else "cpu"
        self._first = channels == "first" or (channels == "auto" and isinstance(x, Tensor))
        images = x.detach().cpu().numpy() if isinstance(x, Tensor) else np.asarray(x)
        if images.ndim == 3:
            images = images[None]
        if images.ndim != 4 or 0 in images.shape:
            msg = (
                f"{op}: x must be an image [H, W, C] (tensors: [C, H, W]) or [e, ...] of them, got "
                f"shape {list(images.shape)}. Give a grey image an axis for its one channel."
            )
            raise ShapeError(msg)
        self.images = images.transpose(0, 2, 3, 1) if self._first else images

    def back(self, images: np.ndarray) -> Any:
        if self._first:
            images = images.transpose(0, 3, 1, 2)
        images = images.copy(order="C")  # f may work in place
        return torch.from_numpy(images).to(self._device) if self._torch else images
