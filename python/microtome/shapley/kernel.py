"""Shapley values by weighted least squares on sampled coalitions (KernelSHAP)."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from microtome import _check
from microtome.errors import ArgumentError
from microtome.shapley import running
from microtome.shapley._start import as_game
from microtome.shapley.coalitions import MEAN, spans
from microtome.shapley.game import MEMORY, Game
from microtome.shapley.link import Link, link_of
from microtome.shapley.regression import Regression
from microtome.shapley.result import ShapleyValues, finish
from microtome.shapley.running import Stop
from microtome.shapley.subsets import SAMPLING, Drawn, Plan, growing, plan_of

_SHARED = 2048  # coalitions beside 2 p, by default, where all background rows share them
_OWN = 8  # times p coalitions for each background row, by default, where each has its own
_GROWTH = 1.5  # of the coalitions from one look at the error to the next
_MOST = 1 << 15  # coalitions of a row where nothing else but the error ends the sampling
_NUMBERS = 1 << 21  # of a regression's matrix; rows beyond are fitted in a further one


def kernel(
    f: Any,
    x: Any = None,
    background: Any = None,
    *,
    n_coalitions: int | None = None,
    paired: bool = True,
    sampling: str = "leverage",
    shared: bool = False,
    groups: Mapping[str, Sequence[int | str]] | Sequence[int] | Tensor | None = None,
    max_evaluations: int | None = None,
    target_error: float | None = None,
    seconds: float | None = None,
    seed: int = 0,
    link: str | Link = "identity",
    memory: int = MEMORY,
    check: bool = True,
    progress: bool = True,
) -> ShapleyValues:
    """Estimate Shapley values by a weighted linear fit of coalitions' values (KernelSHAP).

        phi = argmin sum over S of w(|S|) (v(S) - v(none) - sum of phi over S)^2
              subject to sum of phi = v(all) - v(none),  w(s) = (p - 1) / (C(p, s) s (p - s))

    over sampled coalitions: of sizes from the outside in all there are while the budget lasts, of
    the others some without replacement. Every background row has its own coalitions and its own
    fit, unless `shared`: at the same number of model rows the error is then about a third
    (docs/shapley.md). All rows explained and all outputs share coalitions and factorisations.

    Args:
        f: a function of rows, a torch module, a scikit-learn estimator; or a game, and then x,
            background and groups are None.
        x: [e, m] rows to explain ([m] for one); [e, ...] for inputs of more dimensions.
        background: [n, m] rows that absent players are drawn from.
        n_coalitions: coalitions of each background row, the empty and the full one not counted; at
            least 2 p (p + 1 if not paired), all 2^p - 2 give exact values. By default 8 p; with
            `shared` or one background row 2 p + 2048.
        paired: draw every coalition with its complement.
        sampling: how the budget goes to sizes: "leverage" or "kernel" (subsets.py).
        shared: let all background rows have the same coalitions, and average them first.
        groups: players that are groups of columns, as in `permutation`.
        max_evaluations: most model rows for each explicand; instead of n_coalitions.
        target_error: stop a row when the RMS standard error over players falls below this fraction
            of the RMS value, n_coalitions or max_evaluations permitting.
        seconds: stop all when so much time has passed, but not before every row has a first fit;
            the result then depends on the machine.
        seed: of the coalitions. The same seed gives the same bits for any `memory` and number of
            threads, and a row's values do not depend on which other rows are explained with it.
        link: "identity", "logit", or a function: explains link(mean over background of f); other
            links than the identity need shared=True.
        memory: bytes of rows in one call of f, and of values held.
        check: call f twice on x to find out whether it is deterministic.
        progress: show a progress bar, if it takes longer than a second.

    Returns:
        ShapleyValues, [e, p] or [e, p, o]; sums match f(x) - mean f(b). Standard errors are the
        sandwich estimate for a stratified sample without replacement (regression.py); they do not
        cover the bias of the fit, which falls faster than they do. With few coalitions beyond 2 p
        they come from few degrees of freedom: read them with Student's t. NaN where none is left.

    Raises:
        ArgumentError: too small a budget, an unknown option, a function that is not deterministic.
        ShapeError, NonFiniteError: f returns something else than numbers for each row.

    Ctrl-C ends the sampling and returns what is there, with its errors (`interrupted`); rows that
    were not begun are NaN, and before a first fit there is nothing to return.
    Source: Lundberg and Lee 2017 (arXiv:1705.07874); Covert and Lee 2021 (arXiv:2012.01536); Musco
    and Witter 2025 (arXiv:2410.01917).

    Example:
        >>> import torch
        >>> x, background = torch.tensor([[1.0, 2.0, 3.0]]), torch.zeros(1, 3)
        >>> kernel(lambda a: a[:, 0] * a[:, 1] + a[:, 2], x, background).values.round(decimals=6)
        tensor([[1., 1., 3.]], dtype=torch.float64)
    """
    op = "kernel"
    game = as_game(op, f, x, background, groups=groups, memory=memory, check=check)
    _check.one_of(op, "sampling", sampling, SAMPLING)
    linked = link_of(op, link)
    if linked is not None and not shared and game.backgrounds > 1:
        msg = (
            f"{op}: link={link!r} applies to the mean over background rows, which needs them all "
            "on one coalition. Pass shared=True."
        )
        raise ArgumentError(msg)
    stop = Stop(op, target_error, seconds)
    shared = shared or game.backgrounds == 1
    units = _units(op, game, paired, shared, n_coalitions, max_evaluations, stop)
    plans = _schedule(game, paired, sampling, units, shared, stop)
    fit = _Fit(game, plans, shared, seed, linked, stop)
    return _sample(op, fit, sampling, memory, progress)


def _units(
    op: str,
    game: Game,
    paired: bool,
    shared: bool,
    n_coalitions: int | None,
    max_evaluations: int | None,
    stop: Stop,
) -> int:
    """Units (pairs, or single coalitions) of a row."""
    p, n = len(game.players), game.backgrounds
    every = (1 << p) - 2
    least = min(2 * p if paired else p + 1, every)
    if max_evaluations is not None:
        if n_coalitions is not None:
            msg = f"{op}: give n_coalitions or max_evaluations, not both."
            raise ArgumentError(msg)
        n_coalitions = (max_evaluations - n - 1) // n
        if n_coalitions < least:
            msg = (
                f"{op}: max_evaluations={max_evaluations} is too few for p={p} players and n={n} "
                f"background rows: a fit takes {least * n + n + 1}. Raise it, pass fewer background"
                " rows, or group players."
            )
            raise ArgumentError(msg)
    if n_coalitions is None:
        n_coalitions = 2 * p + _SHARED if shared else _OWN * p
        if stop.asked:
            n_coalitions = _MOST
    elif n_coalitions < least:
        msg = (
            f"{op}: n_coalitions must be at least {least} for p={p} players"
            f"{' in pairs (p + 1 with paired=False)' if paired else ''}, got "
            f"n_coalitions={n_coalitions}: fewer leave the values undetermined."
        )
        raise ArgumentError(msg)
    n_coalitions = min(max(n_coalitions, least), every)
    return n_coalitions // 2 if paired else n_coalitions


def _schedule(
    game: Game, paired: bool, sampling: str, units: int, shared: bool, stop: Stop
) -> list[Plan]:
    """Plans from small to large: between them the clock, the error and the user are looked at.

    It depends on the game's size and the budget alone, so that memory and threads change no draw.
    """
    p, each = len(game.players), game.backgrounds * (2 if paired else 1)
    factor = _GROWTH if stop.asked else 2
    # Without a target, many evaluations between looks: only Ctrl-C asks for them. The clock asks
    # for a first fit with as little as that takes.
    rows = 0 if stop.seconds is not None else game.rows_per_round * (1 if stop.asked else 4)
    now = max(2 * p if paired else 4 * p, rows // each)
    return growing(plan_of(p, paired, sampling, units), now, factor, sampling)


class _Rows:
    """Background rows first .. first + C - 1: their coalitions and values so far."""

    def __init__(self, first: int, background: Tensor, largest: Plan, seed: int) -> None:
        self.background = background  # [C]
        self.drawn = Drawn(first, len(background), largest, seed)
        self.targets: Tensor | None = None  # [C, U, e', o]
        self.kept = 0  # explicands with all of their targets, where the user came between

    def grow(self, fit: _Fit, plan: Plan, who: Tensor, empty: Tensor, apart: Tensor) -> None:
        """Evaluate what `plan` has beyond what is there.

        Args:
            fit: whose game it is.
            plan: the larger plan.
            who: [e'] explicands.
            empty: [1 or e', C, o] values without players.
            apart: [e', C, o] full - empty.
        """
        ranks, sizes = self.drawn.extend(plan)
        C, new, p = ranks.shape
        if new == 0:
            return
        order = torch.arange(C * new).reshape(C, new, 1)
        size = sizes[:, None]
        if plan.paired:
            lo = torch.cat([torch.zeros_like(size), size], 1)
            hi = torch.cat([size, torch.full_like(size, p)], 1)
        else:
            lo, hi = torch.zeros_like(size), size
        table = spans(self.background.reshape(C, 1, 1), order, lo, hi)
        share = (sizes.double() / p)[:, None]
        found: list[Tensor] = []
        some = max(1, running.KEPT // 4 // (len(table) * (fit.game.backgrounds if C == 1 else 1)))
        try:
            for rows in torch.arange(len(who)).split(some):
                v = fit.game.values(ranks.reshape(C * new, p), table, who[rows])
                if fit.link is not None:
                    v = fit.link(v)
                v = v.reshape(len(rows), C, new, lo.shape[1], -1)
                d = apart[rows][:, :, None]
                if plan.paired:
                    found.append((v[:, :, :, 0] - v[:, :, :, 1]) / 2 + d * (0.5 - share))
                else:
                    nobody = (empty if len(empty) == 1 else empty[rows])[:, :, None]
                    found.append(v[:, :, :, 0] - nobody - d * share)
        except KeyboardInterrupt:
            self.kept = sum(map(len, found))
            if self.targets is None and found:
                self.targets = torch.cat(found).permute(1, 2, 0, 3)
            raise
        targets = (torch.cat(found) if len(found) > 1 else found[0]).permute(1, 2, 0, 3)
        self.targets = targets if self.targets is None else torch.cat([self.targets, targets], 1)


class _Fit:
    """The fits of a block of explicands, growing from plan to plan."""

    def __init__(
        self, game: Game, plans: list[Plan], shared: bool, seed: int, link: Link | None, stop: Stop
    ) -> None:
        self.game, self.plans, self.seed, self.link, self.stop = game, plans, seed, link, stop
        n = game.backgrounds
        one = torch.tensor([MEAN if n > 1 else 0])
        self.background = one if shared else torch.arange(n)
        empty, full = game.ends()
        if shared:
            empty = empty.mean(1, keepdim=True)
        self.empty = empty if link is None else link(empty)  # [1 or e, S, o]
        self.full = full if link is None else link(full)  # [e, o]

    def run(self, who: Tensor, values: Tensor, stderr: Tensor, until: float) -> tuple[str, int]:
        """Fill in the rows `who` of values and stderr.

        Returns:
            "done", "late" if the time `until` came first, "interrupted" if the user did; and how
            many of the rows were begun.

        Raises:
            KeyboardInterrupt: before there is anything to keep.
        """
        p = self.plans[-1].p
        C = max(1, _NUMBERS // max(1, p * self.plans[-1].units))
        parts = [
            _Rows(at, part, self.plans[-1], self.seed)
            for at, part in zip(range(0, 1 << 30, C), self.background.split(C), strict=False)
        ]
        empty = self.empty if len(self.empty) == 1 else self.empty[who]
        apart = self.full[who][:, None] - empty  # [e', S, o]
        all_of_them = len(who)
        for turn, plan in enumerate(self.plans):
            last = plan is self.plans[-1]
            began = time.monotonic()
            try:
                at = 0
                for part in parts:
                    rows = slice(at, at + len(part.background))
                    part.grow(self, plan, who, empty[:, rows], apart[:, rows])
                    at = rows.stop
            except KeyboardInterrupt:
                if turn > 0:
                    self._write(self.plans[turn - 1], parts, who, apart, values, stderr)
                    return "interrupted", all_of_them
                kept = parts[0].kept if len(parts) == 1 else 0
                if kept == 0:
                    raise
                self._write(plan, parts, who[:kept], apart[:kept], values, stderr)
                return "interrupted", kept
            late = not last and self.stop.ends_late(
                began, plan.units - (self.plans[turn - 1].units if turn else 0),
                self.plans[turn + 1].units - plan.units, until,
            )  # fmt: skip
            if last or late or self.stop.target_error is not None:
                self._write(plan, parts, who, apart, values, stderr)
            if late:
                return "late", all_of_them
            if last:
                break
            keep = ~self.stop.reached(values[who], stderr[who])
            if not bool(keep.any()):
                break
            if not bool(keep.all()):
                who, apart = who[keep], apart[keep]
                empty = empty if len(empty) == 1 else empty[keep]
                for part in parts:
                    part.targets = part.targets[:, :, keep]
        return "done", all_of_them

    def _write(
        self, plan: Plan, parts: list[_Rows], who: Tensor, apart: Tensor, values: Tensor,
        stderr: Tensor,
    ) -> None:  # fmt: skip
        """Fit the first plan.units units of every row, and average over rows."""
        S, o = apart.shape[1], apart.shape[2]
        beta: Tensor | float = 0.0
        variance: Tensor | float = 0.0
        for part in parts:
            if part.targets is None:
                continue
            drawn = part.drawn.first_units(plan.units)
            targets = part.targets[:, : plan.units].flatten(2)
            b, v = Regression(drawn, plan).fit(targets)
            beta, variance = beta + b, variance + v
        shift = apart.mean(1)[:, None] / plan.p  # [e', 1, o]
        if not isinstance(beta, Tensor) or not isinstance(variance, Tensor):  # one player
            values[who], stderr[who] = shift.expand(-1, plan.p, -1), 0.0
            return
        values[who] = (beta / S).reshape(plan.p, len(who), o).transpose(0, 1) + shift
        stderr[who] = (variance.sqrt() / S).reshape(plan.p, len(who), o).transpose(0, 1)


def _sample(op: str, fit: _Fit, sampling: str, memory: int, progress: bool) -> ShapleyValues:
    game, largest = fit.game, fit.plans[-1]
    e, p = game.explicands, largest.p
    o = fit.full.shape[1]
    S = len(fit.background)
    values = torch.full((e, p, o), math.nan, dtype=torch.float64)
    stderr = torch.full_like(values, math.nan)
    block = max(1, memory // max(1, 16 * o * S * largest.coalitions))
    interrupted, done = False, 0
    with running.bar(e, op, "row", progress) as bar:
        for at in range(0, e, block):
            who = torch.arange(at, min(at + block, e))
            try:
                ended, begun = fit.run(who, values, stderr, fit.stop.share(len(who) / (e - at)))
            except KeyboardInterrupt:
                if done == 0:
                    raise
                interrupted = True
                break
            done = at + begun
            bar.update(begun)
            interrupted |= ended != "done"
            if ended == "interrupted":
                break
    own = "" if S == 1 else ", every background row its own"
    notes = [f"{sampling} sampling{own}"]
    if interrupted:
        notes.append(
            "ended early" if done == e else f"ended early; rows from {done} on were not begun"
        )
    exact = largest.complete and not interrupted and fit.stop.target_error is None
    return finish(
        game, values, stderr, op, exact=exact, interrupted=interrupted, note="; ".join(notes),
        link=fit.link,
    )  # fmt: skip
