"""One call that chooses: closed form, enumeration, or sampled permutations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from microtome import _check
from microtome.errors import ArgumentError
from microtome.shapley._start import as_game
from microtome.shapley.closed import closed_form
from microtome.shapley.exact import affordable, exact
from microtome.shapley.game import MEMORY
from microtome.shapley.kernel import kernel
from microtome.shapley.link import Link, link_of
from microtome.shapley.permutation import permutation
from microtome.shapley.result import ShapleyValues

METHODS = ("auto", "closed", "exact", "permutation", "kernel")
_EXACT = 1 << 17  # evaluations of a row below which enumeration is taken, unless the user says more


def explain(
    f: Any,
    x: Any = None,
    background: Any = None,
    *,
    method: str = "auto",
    groups: Mapping[str, Sequence[int | str]] | Sequence[int] | Tensor | None = None,
    max_evaluations: int | None = None,
    target_error: float | None = None,
    seconds: float | None = None,
    seed: int = 0,
    link: str | Link = "identity",
    memory: int = MEMORY,
    check: bool = True,
    progress: bool = True,
    **options: Any,
) -> ShapleyValues:
    """Shapley values by the best way there is for this model; `note` says which and why.

    In this order: the closed form of a linear model or of trees (`closed`); enumeration of all
    coalitions where it takes at most max_evaluations (131,072 by default) model rows a row
    explained, and no time is set (`exact`); else sampled permutations (`permutation`).

    Args:
        f: a function of rows, a torch module, a scikit-learn estimator, a bound method of one; or
            a game, and then x, background and groups are None.
        x: [e, m] rows to explain ([m] for one).
        background: [n, m] rows that absent players are drawn from.
        method: "auto", or the name of the way to take: "closed", "exact", "permutation", "kernel".
        groups: players that are groups of columns, as in `permutation`.
        max_evaluations: most model rows for each explicand.
        target_error: of sampling, as in `permutation`.
        seconds: of sampling, as in `permutation`.
        seed: of sampling.
        link: "identity", "logit", or a function; another than the identity has no closed form, and
            background rows then share their permutations.
        memory: bytes of rows in one call of f.
        check: call f twice on x to find out whether it is deterministic.
        progress: show a progress bar, if it takes longer than a second.
        **options: what else the estimator takes, if it is named by `method`.

    Returns:
        ShapleyValues.

    Raises:
        ArgumentError: an unknown method, no closed form where one is demanded, or what the
            estimator raises.

    Example:
        >>> import torch
        >>> found = explain(lambda a: a.prod(1), torch.ones(1, 3), torch.zeros(1, 3))
        >>> found.method, found.note
        ('exact', 'exact: all 2^3 x 1 evaluations fit')
    """
    op = "explain"
    _check.one_of(op, "method", method, METHODS)
    if options and method == "auto":
        msg = f"{op}: {', '.join(options)} belong to one estimator. Name it: method='permutation'."
        raise ArgumentError(msg)
    game = as_game(op, f, x, background, groups=groups, memory=memory, check=check)
    linked = link_of(op, link)
    why = "another link than the identity has no closed form"
    if method in ("auto", "closed"):
        found = closed_form(game) if linked is None else why
        if not isinstance(found, str):
            return _noted(found, "the model is of a kind with known values")
        why = found
        if method == "closed":
            msg = f"{op}: there is no closed form: {why}. Use method='auto'."
            raise ArgumentError(msg)
    common: dict[str, Any] = {"memory": memory, "link": link, "progress": progress, **options}
    p, n = len(game.players), game.backgrounds
    budget = _EXACT if max_evaluations is None else max_evaluations
    if method == "exact" or (method == "auto" and seconds is None and affordable(game, budget)):
        if method == "exact" and max_evaluations is not None:
            common["max_evaluations"] = max_evaluations
        found = exact(game, **common)
        return _noted(found, f"all 2^{p} x {n} evaluations fit")
    common |= {"seed": seed, "target_error": target_error, "seconds": seconds}
    common["max_evaluations"] = max_evaluations
    if linked is not None:
        common.setdefault("shared", True)
    if method != "auto":
        return (kernel if method == "kernel" else permutation)(game, **common)
    return _noted(permutation(game, **common), f"2^{p} x {n} evaluations are many, and {why}")


def _noted(found: ShapleyValues, why: str) -> ShapleyValues:
    note = f"{found.method}: {why}"
    return replace(found, note=f"{note}; {found.note}" if found.note else note)
