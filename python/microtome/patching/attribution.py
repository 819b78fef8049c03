"""Attribution patching: every cell of a sweep estimated from one forward and one backward pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from microtome import _check
from microtome._seed import generator
from microtome.errors import ArgumentError, NonFiniteError
from microtome.models.capture import takes_mask
from microtome.patching.cells import AXES, Grid, Shape, make_grid
from microtome.patching.chosen_cells import run_chosen
from microtome.patching.engine import MEMORY, engine_for, no_mask
from microtome.patching.estimate import Attribution, Faithfulness, compare
from microtome.patching.gradients import frozen, places_of
from microtome.patching.metrics import Metric, as_metric
from microtome.patching.passes import Judge, along_lines, one_pass
from microtome.patching.prompts import pair, spans
from microtome.patching.units import by_cell


def attribute(
    model: nn.Module,
    clean: Tensor,
    corrupted: Tensor,
    metric: Metric | Callable[[Tensor], Tensor],
    site: str = "resid_pre",
    *,
    axes: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    positions: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    neurons: Sequence[int] | None = None,
    direction: str = "denoise",
    attention_mask: Tensor | None = None,
    steps: int = 1,
    check: int = 0,
    seed: int = 0,
    progress: bool = True,
) -> Attribution:
    """Estimate what patching each cell of a sweep would do, from gradients.

        scores[cell] = metric(base run) + sum over the cell's entries of (source - base) * gradient

    With steps=1 the gradient of the metric is taken at the base run, for all layers in one backward
    pass. With more steps it is averaged over the straight line from the base run's activation of a
    layer's site to the source run's, at the middle of each of `steps` equal parts. Each layer's
    site moves along a line of its own, all its positions and heads at once, in a run that is
    otherwise the base run. So for each layer the attributions of all cells add up, as steps grow,
    to the exact effect of patching the whole site there; at a residual stream of unpadded prompts
    that is metric(source) - metric(base).

    Args:
        model: as in `sweep`.
        clean: [b, t] int64 prompts (or [t]).
        corrupted: [b, t].
        metric: as in `sweep`; differentiable in the logits.
        site: as in `sweep`, and so are the axes and what restricts them.
        axes: what to sweep over besides layers.
        layers: restricts the axis; all by default.
        positions: likewise.
        heads: likewise.
        neurons: likewise.
        direction: "denoise" estimates writing clean activations into the corrupted run, "noise"
            corrupted ones into the clean run.
        attention_mask: [b, t], one for both runs, padding on one or both ends.
        steps: points on each line.
        check: if positive, run the exact sweep on so many cells of largest estimate and on as many
            others, drawn at random from those that a patch changes, and report how close the
            estimate comes in `.check`.
        seed: of that draw.
        progress: show a bar over layers and steps, and one over the cells that are checked.

    Returns:
        Attribution, a Sweep whose scores are estimates; `.effect()` is the attribution, and
        `.against(exact)` compares it with a sweep. Products are summed in float32 (float64 in a
        float64 model); all numbers are float64, on the CPU.

    Raises:
        ShapeError, SiteError: as `sweep`.
        ArgumentError: as `sweep`; or the metric has no gradient, or compares the base run with
            itself, where its gradient is zero.
        NonFiniteError: the metric or a gradient is NaN.

    Costs one forward of the source run, and one forward and one backward of the base run, in one
    batch; with more steps, one forward and one backward down to the site for each layer and step,
    several steps in a batch.
    Gradients of parameters are neither computed nor touched. Deterministic where the model's own
    backward is (on a CPU).

    What it does not mean: the attribution is the linear part of a patch's effect. It misses what is
    left when an activation moves far: a saturated softmax has next to no gradient, so that a head
    whose attention a patch would switch gets little; effects that need two entries of a cell
    together are not seen; large steps through a norm are overrated. Rank by it, then patch.
    Source: Nanda 2023, attribution patching; Syed et al. 2023, arXiv:2310.10348; Kramar et al.
    2024, arXiv:2403.00745; Sundararajan et al. 2017, arXiv:1703.01365 (steps).

    Example:
        >>> import torch, microtome as mt
        >>> from microtome.models import ToyModel
        >>> clean = torch.arange(8)[None]
        >>> corrupted = clean.clone(); corrupted[0, 3] = 99
        >>> metric = mt.patching.logit_difference(11, 12)
        >>> mt.patching.attribute(ToyModel(), clean, corrupted, metric, "z")
        Attribution(z: 4 layers x 4 heads, logit difference)
    """
    op, model = "attribute", getattr(model, "_orig_mod", model)  # the plain one of a compiled model
    _check.one_of(op, "direction", direction, ("denoise", "noise"))
    _check.one_of(op, "site", site, tuple(AXES))
    _check.between(op, "steps", steps, 1, 1 << 20)
    _check.between(op, "check", check, 0, 1 << 30)
    clean, corrupted = pair(op, model, clean, corrupted, attention_mask)
    base_name = "corrupted" if direction == "denoise" else "clean"
    base, source = (corrupted, clean) if direction == "denoise" else (clean, corrupted)
    metric = as_metric(op, metric)
    if steps == 1 and metric.reference == base_name:
        msg = (
            f"{op}: {metric.name} compares the {base_name} run with itself where the gradient is "
            "taken, so every attribution would be 0. Use steps > 1, another direction or metric."
        )
        raise ArgumentError(msg)
    span = spans(op, base, attention_mask)
    if attention_mask is not None and bool(attention_mask.all()):
        attention_mask = None
    if attention_mask is not None and not takes_mask(model):
        raise ArgumentError(no_mask(op, model))
    places = places_of(op, model, site)
    wanted = range(len(places.sites)) if layers is None else dict.fromkeys(int(i) for i in layers)
    found = [i for i in wanted if 0 <= i < len(places.sites)] or [0]  # make_grid names the others
    with frozen(model):
        there, logits = places.read(source, attention_mask, found)
        shape = _shape(site, there[found[0]], len(places.sites), base.shape, span)
        grid = make_grid(
            op, site, shape, axes=axes, layers=layers, positions=positions, heads=heads,
            neurons=neurons,
        )  # fmt: skip
        judge = Judge(metric, shape, base_name, logits)
        run = places, base, attention_mask, there, grid, shape, judge
        scores, changed, own = (
            one_pass(*run) if steps == 1 else along_lines(*run, steps=steps, progress=progress)
        )
    effect = by_cell(grid, shape, scores)  # [*axes, b]
    if bool(effect.isnan().any()):
        at = grid.coordinates(effect.isnan().any(-1).flatten().nonzero()[0])
        place = ", ".join(f"{axis} {int(i)}" for axis, i in at.items())
        msg = f"{op}: the attribution is NaN at {place}. Is an activation or a gradient not finite?"
        raise NonFiniteError(msg)
    # In float64, lest a small attribution be rounded away beside the metric it is added to.
    own, other = own.double().cpu(), judge.source_run().double().cpu()
    by_prompt = own + effect
    result = Attribution(
        scores=by_prompt.mean(-1),
        by_prompt=by_prompt,
        axes=grid.axes,
        values=grid.values,
        site=site,
        metric=metric.name,
        clean=other if direction == "denoise" else own,
        corrupted=own if direction == "denoise" else other,
        base=base_name,
        written=by_cell(grid, shape, changed).sum(-1),
        engine="gradient",
        note="a linear estimate" if steps == 1 else f"an average over {steps} gradients",
        steps=steps,
    )
    if not check:
        return result
    faith = _checked(
        model, base, source, attention_mask, grid, metric, result, (check, seed, progress)
    )
    return dataclasses.replace(result, check=faith)


def _shape(
    site: str, sample: Tensor, layers: int, tokens: torch.Size, span: tuple[Tensor, Tensor]
) -> Shape:
    """Sizes as far as cells of one site need them, off one activation of it."""
    heads = sample.shape[1 if site == "pattern" else 2] if sample.dim() == 4 else 1
    width = sample.shape[-1]
    first, stop = span
    return Shape(layers, *tokens, first, stop, heads, heads, width, width, width)


def _checked(
    model: nn.Module, base: Tensor, source: Tensor, mask: Tensor | None, grid: Grid, metric: Metric,
    estimate: Attribution, how: tuple[int, int, bool],
) -> Faithfulness:  # fmt: skip
    """Run the largest cells and some others exactly."""
    n, seed, progress = how
    changes = estimate.written.flatten().nonzero().flatten()
    if len(changes) == 0:
        msg = "attribute: no patch changes anything, so nothing can be checked. Do the runs differ?"
        raise ArgumentError(msg)
    size = estimate.effect().flatten()[changes].abs()
    order = changes[size.argsort(descending=True, stable=True)]
    rest = order[n:]
    drawn = rest[torch.randperm(len(rest), generator=generator(seed, "attribute"))[:n]]
    numbers = torch.cat((order[:n], drawn)).sort().values
    engine = engine_for(
        "attribute", model, base, source, mask, paired=True, precision="fp32", memory=MEMORY,
        engine="auto", site=grid.site,
    )  # fmt: skip
    scores, unpatched = run_chosen(
        "attribute", engine, grid, numbers, metric, estimate.base, memory=MEMORY, progress=progress
    )
    exact = torch.full((grid.cells,), float("nan"), dtype=torch.float64)
    exact[numbers] = (scores - unpatched).mean(-1).double().cpu()
    return compare(estimate, exact.view(grid.shape), ~exact.isnan().view(grid.shape), k=min(n, 10))
