"""The forwards and backwards of attribution patching, and the metric they differentiate."""

from __future__ import annotations

from contextlib import closing

import torch
from torch import Tensor

from microtome.patching.cells import Grid, Shape
from microtome.patching.gradients import Places
from microtome.patching.hooked import chosen
from microtome.patching.metrics import Metric
from microtome.patching.units import Parts, by_unit, counted

TOKENS = 2048  # of a batch of steps: fewer leave a matrix product waiting for its weights


class Judge:
    """The metric of the base run, differentiable in its logits.

    Args:
        metric: what is measured.
        shape: of the run.
        base: "clean" or "corrupted", the name of the base run.
        logits: [b, t, vocabulary] of the source run.
    """

    def __init__(self, metric: Metric, shape: Shape, base: str, logits: Tensor) -> None:
        self.metric, self.b = metric, shape.b
        self.slots = metric.slots(shape.first, shape.stop, shape.t)
        self.padding = (self.slots < shape.first[:, None]) | (self.slots >= shape.stop[:, None])
        self.columns = metric.columns(shape.b, logits.shape[-1])
        self.by_base = metric.reference == base
        self.other = self._read(logits)  # [1, b, m, c]
        self.reference = self.other[0]

    def base_run(self, logits: Tensor) -> Tensor:
        """[1, b], the metric of the base run, which becomes the reference where it is named."""
        if self.by_base:
            self.reference = self._read(logits)[0].detach()
        return self(logits)

    def source_run(self) -> Tensor:
        """[b], the metric of the source run."""
        return self.metric(self.other, self.reference)[0]

    def __call__(self, logits: Tensor) -> Tensor:
        """[n, b] of logits [n * b, t, vocabulary]."""
        return self.metric(self._read(logits), self.reference)

    def _read(self, logits: Tensor) -> Tensor:
        """[n, b, m, c]: what the metric reads, NaN where there is padding, as in a sweep."""
        runs = logits.unflatten(0, (-1, self.b))
        read = torch.stack([chosen(run, self.slots, self.columns) for run in runs])
        return read.masked_fill(self.padding.to(read.device)[..., None], torch.nan)


def one_pass(
    places: Places, tokens: Tensor, mask: Tensor | None, there: Parts, grid: Grid, shape: Shape,
    judge: Judge,
) -> tuple[Parts, Parts, Tensor]:  # fmt: skip
    """The gradient at the base run, for all layers at once.

    Args:
        places: the sites.
        tokens: [b, t] int64, the base prompts.
        mask: [b, t] or None.
        there: the source run's activations by layer.
        grid: which units are apart.
        shape: of the run.
        judge: the metric.

    Returns:
        Attributions by unit, changes by unit, and the base run's metric [b].
    """
    here, grads, own = places.differentiate(tokens, mask, list(there), judge.base_run)
    scores: Parts = {}
    changed: Parts = {}
    for layer, end in there.items():
        scores[layer], changed[layer] = by_unit(grid, shape, end, here[layer], grads[layer])
    return scores, changed, own[0]


def along_lines(
    places: Places, tokens: Tensor, mask: Tensor | None, there: Parts, grid: Grid, shape: Shape,
    judge: Judge, *, steps: int, progress: bool,
) -> tuple[Parts, Parts, Tensor]:  # fmt: skip
    """The same with the gradient averaged over each layer's line, at the middle of each step."""
    from tqdm import tqdm

    here, logits = places.read(tokens, mask, list(there))
    own = judge.base_run(logits)[0]
    at_once = max(1, TOKENS // tokens.numel())
    scores: Parts = {}
    changed: Parts = {}
    total = len(there) * steps
    with closing(tqdm(total=total, desc="attribute", unit="step", disable=not progress)) as bar:
        for layer, end in there.items():
            start = here[layer]
            # A sweep leaves padding alone, and so does the line.
            counts = counted(shape).to(start.device)  # [b, t]
            rest = (None,) * (start.dim() - 2)
            at = (slice(None), None, slice(None), None) if grid.site == "pattern" else (..., *rest)
            end = torch.where(counts[at], end, start)
            for some in torch.arange(steps).split(at_once):
                points = torch.stack(
                    [torch.lerp(start, end, (i + 0.5) / steps) for i in some.tolist()]
                )
                grads = places.differentiate_at(tokens, mask, layer, points, judge)
                for grad in grads:
                    part, changed[layer] = by_unit(grid, shape, end, start, grad)
                    scores[layer] = part / steps + scores.get(layer, 0.0)
                bar.update(len(some))
    return scores, changed, own
