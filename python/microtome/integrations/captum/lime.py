"""LIME under captum's name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from microtome._seed import generator
from microtome.errors import ArgumentError
from microtome.integrations.captum.game import ForwardGame
from microtome.integrations.captum.kernel_shap import by_feature, one_output
from microtome.integrations.captum.linear import Lasso, fit_by_rows
from microtome.integrations.captum.method import Method
from microtome.integrations.captum.similarity import ExpKernel
from microtome.shapley.coalitions import of_members, pack
from microtome.shapley.game import MEMORY


class Lime(Method):
    """captum.attr.Lime: a linear model of the output near an example, by its features' presence.

    Features are present with probability one half, drawn in pairs of a sample and its opposite;
    where n_samples is enough for all 2^p samples, each is taken once, which is what captum's
    sampling tends to. No sample is evaluated twice.

    Args:
        forward_func: see `Method`, like seed and memory.
        interpretable_model: the linear model: one of captum's, or any with scikit-learn's fit(X, y,
            sample_weight) and coef_. By default a lasso with alpha=0.01, which is captum's default.
        similarity_func: the weight of a sample, called as in captum: similarity(original inputs,
            perturbed inputs, sample [1, features], **kwargs). By default
            `get_exp_kernel_similarity_function()`.
        perturb_func: draws samples, called as in captum: perturb(original inputs, **kwargs), with
            num_interp_features among the latter, returns a sample [1, features] or generates them.

    Example:
        >>> import torch
        >>> method = Lime(lambda x: 3 * x[:, 0] - x[:, 1], interpretable_model=Lasso(alpha=0.0))
        >>> method.attribute(torch.tensor([[2.0, 3.0]])).round(decimals=4)
        tensor([[ 6., -3.]])
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        interpretable_model: Any = None,
        similarity_func: Callable[..., Any] | None = None,
        perturb_func: Callable[..., Any] | None = None,
        *,
        seed: int = 0,
        memory: int = MEMORY,
    ) -> None:
        super().__init__(forward_func, seed=seed, memory=memory)
        self.interpretable_model = interpretable_model or Lasso()
        self.similarity_func = similarity_func or ExpKernel()
        self.perturb_func = perturb_func

    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        baselines: Any = None,
        target: Any = None,
        additional_forward_args: Any = None,
        feature_mask: Tensor | tuple[Tensor, ...] | None = None,
        n_samples: int = 25,
        perturbations_per_eval: int | None = None,
        return_input_shape: bool = True,
        show_progress: bool = False,
    ) -> Any:
        """The linear model's coefficients; arguments as in `KernelShap.attribute`.

        Returns:
            Like the inputs, float32; each element gets its feature's coefficient.
        """
        game = self._game(
            inputs, baselines, target, additional_forward_args, feature_mask,
            perturbations_per_eval,
        )  # fmt: skip
        one_output(type(self).__name__, game)
        coefficients = self._fit(game, n_samples)
        if return_input_shape:
            return game.spread(coefficients[..., None], torch.float32)
        return by_feature(game, coefficients)

    def _fit(self, game: ForwardGame, n_samples: int) -> Tensor:
        """[e, p] coefficients."""
        p, e = len(game.players), game.explicands
        if not isinstance(n_samples, int) or n_samples < 1:
            msg = f"{type(self).__name__}: n_samples must be a positive integer, got {n_samples!r}."
            raise ArgumentError(msg)
        if self.perturb_func is None:
            inside = half_samples(p, n_samples, self.seed)
            each = [inside] * e
        else:
            each = [self._perturbed(game, i, n_samples) for i in range(e)]
        together = all(inside is each[0] for inside in each)
        coefficients = torch.empty(e, p, dtype=torch.float64)
        groups = [torch.arange(e)] if together else list(torch.arange(e).split(1))
        for who in groups:
            inside = each[int(who[0])]
            values = _values(game, inside, who)
            weights = self._weights(game, inside, who)  # [e', K]
            coefficients[who] = fit_by_rows(self.interpretable_model, inside, values, weights)
        return coefficients

    def _weights(self, game: ForwardGame, inside: Tensor, who: Tensor) -> Tensor:
        if isinstance(self.similarity_func, ExpKernel):
            return self.similarity_func.of_game(game, inside, who)
        out = torch.empty(len(who), len(inside), dtype=torch.float64)
        for i, row in enumerate(who.tolist()):
            original, more = _one(game, row)
            for k, sample in enumerate(inside):
                perturbed = _perturb(game, row, sample)
                shown = _sample_of(game, sample)
                out[i, k] = float(self.similarity_func(original, perturbed, shown, **more))
        return out

    def _perturbed(self, game: ForwardGame, row: int, n_samples: int) -> Tensor:
        """[K, p] bool: the samples that perturb_func makes for a row."""
        original, more = _one(game, row)
        make = self.perturb_func
        if inspect.isgeneratorfunction(make):
            drawn = [sample for _, sample in zip(range(n_samples), make(original, **more))]  # noqa: B905
        else:
            drawn = [make(original, **more) for _ in range(n_samples)]
        at = game.asked.features - game.asked.features.min()
        return torch.cat([sample.reshape(1, -1) for sample in drawn]).cpu()[:, at] > 0


def half_samples(p: int, n_samples: int, seed: int) -> Tensor:
    """[n_samples, p] bool, each feature present in half; or all 2^p, if they are not more."""
    if p < 62 and (1 << p) <= n_samples:
        return torch.arange(1 << p)[:, None] >> torch.arange(p) & 1 == 1
    half = torch.rand((n_samples + 1) // 2, p, generator=generator(seed, "lime", p)) < 0.5
    return torch.stack([half, ~half], 1).flatten(0, 1)[:n_samples]


def _values(game: ForwardGame, inside: Tensor, who: Tensor) -> Tensor:
    """[e', K] values of samples; equal ones are evaluated once."""
    words, at = torch.unique(pack(inside), dim=0, return_inverse=True)
    first = torch.full((len(words),), len(inside)).scatter_reduce(
        0, at, torch.arange(len(inside)), "amin"
    )
    return game.values(*of_members(inside[first], 0), who)[:, at, 0]


def _sample_of(game: ForwardGame, inside: Tensor) -> Tensor:
    """[1, features] int64: a sample over all feature numbers, as captum's functions see it."""
    at = game.asked.features - game.asked.features.min()
    out = torch.zeros(1, int(at.max()) + 1, dtype=torch.int64)
    out[0, at] = inside.long()
    return out.to(game.x[0].device)


def _one(game: ForwardGame, row: int) -> tuple[Any, dict[str, Any]]:
    """A row's inputs, and the keywords that captum hands to its functions."""
    asked = game.asked
    at = slice(None) if game.whole else slice(row, row + 1)

    def cut(a: Tensor) -> Tensor:
        return a[at] if len(a) > 1 else a

    shift = asked.features - asked.features.min()
    masks = [
        shift[cut(held)].reshape(-1, *shape).to(x.device)
        for held, shape, x in zip(asked.players, game.shapes, asked.inputs, strict=True)
    ]
    more = {
        "num_interp_features": int(shift.max()) + 1,
        "baselines": asked.back([cut(b) for b in asked.baselines]),
        "feature_mask": asked.back(masks),
    }
    return asked.back([cut(x) for x in asked.inputs]), more


def _perturb(game: ForwardGame, row: int, inside: Tensor) -> Any:
    """A row's inputs with the absent features replaced."""
    original, more = _one(game, row)
    shown = _sample_of(game, inside)[0].bool()
    given = (original,) if game.asked.single else original
    bases, masks = more["baselines"], more["feature_mask"]
    if game.asked.single:
        bases, masks = (bases,), (masks,)
    parts = [
        torch.where(shown[mask], x, base) for x, base, mask in zip(given, bases, masks, strict=True)
    ]
    return game.asked.back(parts)
