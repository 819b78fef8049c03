"""The white box: a multilayer perceptron is walked inside one kernel, nothing materialised."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from microtome import _check, _native, ops
from microtome.errors import ArgumentError
from microtome.shapley.game import Game
from microtome.shapley.inputs import InputGame
from microtome.shapley.running import Moments

_SAMPLE, _SHARE = 24, 40  # the shift of bf16 is measured on 24 walks, or a 40th where that is more
_MOST_STRATA, _FEWEST = 64, 8  # which lie in so many strata; of fewer, no spread is estimated
_FAR_BELOW = 0.15  # of the standard error: both together are 1.1 % more at most


def layers_of(f: Any) -> tuple[list[nn.Linear], list[int]] | str:
    """The Linear layers of an nn.Sequential and the activation after each, or why there are none.

    Identity and dropout in evaluation mode are passed over, Flatten too at the start.
    """
    if isinstance(f, nn.Linear):
        f = nn.Sequential(f)
    if not isinstance(f, nn.Sequential):
        return "f is no nn.Sequential of Linear layers and pointwise activations"
    if type(f).forward is not nn.Sequential.forward or "forward" in vars(f):
        return "f computes its forward in its own way"
    if torch.is_autocast_enabled(next((a.device.type for a in f.parameters()), "cpu")):
        return "autocast is on, and the kernel computes in float32"
    linear: list[nn.Linear] = []
    codes: list[int] = []
    for module in flat(f):
        if type(module) is nn.Linear:
            linear.append(module)
            codes.append(ops.IDENTITY)
            continue
        if isinstance(module, nn.Identity) or (
            isinstance(module, nn.Dropout | nn.AlphaDropout) and not module.training
        ):
            continue
        if isinstance(module, nn.Flatten) and not linear and module.start_dim == 1:
            continue
        code = _activation(module)
        if code is None or not linear or codes[-1] != ops.IDENTITY:
            return f"the layer {module} is not a Linear layer or an activation the kernel knows"
        codes[-1] = code
    if not linear:
        return "f has no Linear layer"
    if changed(f):
        return "f carries hooks or layers with forwards of their own, which the kernel passes over"
    if any(layer.weight.dtype != torch.float32 for layer in linear):
        return "the weights are not float32"
    return linear, codes


def changed(f: nn.Module) -> bool:
    """Whether a module does something else than its type and its parameters say."""
    hooks = torch.nn.modules.module
    anywhere = bool(hooks._global_forward_hooks or hooks._global_forward_pre_hooks)
    return anywhere or any(
        m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in f.modules()
    )


def flat(f: nn.Sequential) -> list[nn.Module]:
    """The modules of a Sequential and of those in it, in order; one that is there twice, twice."""
    out: list[nn.Module] = []
    for module in f:
        out += flat(module) if type(module) is nn.Sequential else [module]
    return out


def _activation(module: nn.Module) -> int | None:
    if isinstance(module, nn.GELU):
        return ops.GELU_TANH if module.approximate == "tanh" else ops.GELU
    if isinstance(module, nn.LeakyReLU):
        return ops.LEAKY_RELU if module.negative_slope == 0.01 else None
    if isinstance(module, nn.ELU):
        return ops.ELU if module.alpha == 1.0 else None
    if isinstance(module, nn.Softplus):
        return ops.SOFTPLUS if (module.beta, module.threshold) == (1.0, 20.0) else None
    plain = {
        nn.ReLU: ops.RELU,
        nn.SiLU: ops.SILU,
        nn.Tanh: ops.TANH,
        nn.Sigmoid: ops.SIGMOID,
    }
    return plain.get(type(module))


def mlp_walker(op: str, game: Game, strata: int, precision: str) -> MlpWalker | None:
    """The walker of a game whose model is a multilayer perceptron, or None.

    Raises:
        ArgumentError: an unknown precision, or one demanded where there is no white-box path.
    """
    _check.one_of(op, "precision", precision, ("auto", "fp32", "bf16"))
    why = "the game is not one of a model's inputs"
    if isinstance(game, InputGame):
        found = layers_of(game.f)
        if not isinstance(found, str) and game.rows.x.dtype == torch.float32:
            return MlpWalker(game, found, strata, precision)
        why = found if isinstance(found, str) else "x is not float32"
    if precision == "bf16":
        msg = f"{op}: precision='bf16' needs the white-box path, but {why}. Use precision='auto'."
        raise ArgumentError(msg)
    return None


def bound_of_mean(sample: Tensor, cells: float) -> Tensor:
    """[e]: a 95% bound on the RMS over k entries of a mean of `cells` vectors like the sample's.

    Args:
        sample: [e, s, k] float64, s of them.
        cells: how many the mean is of.

    |E d|^2 is estimated by the mean of <d, d'> over pairs of two, which has no bias, while |mean
    d|^2 has the noise of all k entries in it. Its standard error is that of a U-statistic (W.
    Hoeffding 1948), and the noise of the cells themselves is |d|^2 / cells. No bit of a row
    depends on the other rows.
    """
    s = sample.shape[1]
    grams = torch.stack([(sample * sample[:, c : c + 1]).mean(2) for c in range(s)], 1)  # [e, s, s]
    # Row by row: sums over the whole of a tensor are added in an order that depends on its sizes.
    return torch.stack([_bound_of_mean(gram, s * (s - 1), cells) for gram in grams.unbind()])


def _bound_of_mean(gram: Tensor, pairs: int, cells: float) -> Tensor:
    """The same from the products [s, s] of one row's vectors."""
    s, own = len(gram), gram.diagonal()
    means = (gram.sum(1) - own) / (s - 1)  # of a vector's products with the others
    square = means.mean()
    spread = (gram.square().sum() - own.square().sum()) / pairs - square.square()
    among = (means.var() - spread / (s - 1)).clamp(min=0)
    error = ((4 * (s - 2) * among + 2 * spread.clamp(min=0)) / pairs).sqrt()
    return (square.clamp(min=0) + 2 * error + own.mean() / cells).sqrt()


class MlpWalker:
    """Moments of marginals straight from `mlp_shapley`.

    With precision "auto" and AMX, whose bf16 products are several times faster than float32 ones
    (those of AVX512-BF16 save less than the check costs), a first look measures, on the walks of
    some background rows, by how much bf16 shifts the values. A 95% bound on the RMS over players
    has to stay below 15% of that of the row's standard errors so far, or the row is done in
    float32. `note` says which and by how much.
    """

    engine = "mlp"

    def __init__(
        self, game: InputGame, found: tuple[list[nn.Linear], list[int]], strata: int, precision: str
    ) -> None:
        linear, self.codes = found
        self.game, self.precision = game, precision
        # By row: units walked in bf16, and the bound on their shift in standard errors.
        self.units = torch.zeros(game.explicands, dtype=torch.int64)
        self.part = torch.zeros(game.explicands, dtype=torch.float64)
        self.rows, self.moments = torch.empty(0, dtype=torch.int64), Moments()
        none = torch.empty(0)
        self.weights = [layer.weight.detach() for layer in linear]
        self.biases = [none if layer.bias is None else layer.bias.detach() for layer in linear]
        deep = len(linear) > 2 and self.weights[0].device.type == "cpu"
        self.low = deep and not _native.why_absent() and _native.isa() == "amx"

    def __call__(self, ranks: Tensor, paired: bool, who: Tensor) -> tuple[Tensor, Tensor]:
        U = ranks.shape[1]
        self.game.evaluations += (
            len(who)
            * self.game.backgrounds
            * U
            * ranks.shape[2]
            * (ranks.shape[3] - 1)
            * (2 if paired else 1)
        )
        if self.precision == "fp32" or (self.precision == "auto" and not self.low):
            return self._run(ranks, paired, who, "fp32")
        mean, m2 = self._run(ranks, paired, who, "bf16")
        if self.precision == "bf16":
            return mean, m2
        # A row's precision depends on its own numbers alone, so that no other row can change it.
        error = self._error(mean, m2, who, U)
        part = self._shift(ranks, paired, who) / error
        near = ~(part <= _FAR_BELOW)
        self.units[who[~near]] += U
        self.part[who] = part * (self.units[who] / self.moments.count)
        if bool(near.any()):
            mean[near], m2[near] = self._run(ranks, paired, who[near], "fp32")
        return mean, m2

    @property
    def note(self) -> str:
        """Which rows got bf16 products, and by how much these shift them at most."""
        if self.precision == "bf16":
            return "bf16 products, as demanded; their shift was not measured"
        low = self.units > 0
        if not bool(low.any()):
            return ""
        rows = "" if bool(low.all()) else f" in {int(low.sum())} of {len(low)} rows"
        part = float(self.part[low].max())
        return f"bf16 products{rows}, shift at most {part:.1%} of the standard error"

    def _error(self, mean: Tensor, m2: Tensor, who: Tensor, units: int) -> Tensor:
        """[e]: RMS standard error over players of what rows have walked so far, and this round."""
        keep = torch.isin(self.rows, who)
        if int(keep.sum()) < len(who):  # rows that begin
            self.moments = Moments()
        elif self.moments.mean is not None and self.moments.m2 is not None:
            self.moments.mean, self.moments.m2 = self.moments.mean[keep], self.moments.m2[keep]
        self.rows = who
        self.moments.add(mean, m2, units)
        return self.moments.estimate()[1].square().mean((1, 2)).sqrt()

    def _shift(self, ranks: Tensor, paired: bool, who: Tensor) -> Tensor:
        """[e]: a bound on the RMS shift of a row's values by bf16, from some walks in both.

        They are those of a few strata. Of one stratum, or very few, it is their own RMS shift,
        which has the noise of single walks in it.
        """
        S, U = ranks.shape[:2]
        wanted = max(_SAMPLE, S * U // _SHARE)
        some = torch.arange(0, S, max(1, S // min(wanted, _MOST_STRATA))) if S > 1 else None
        units = 1 if some is None else min(U, math.ceil(wanted / len(some)))
        part = ranks[:, :1] if some is None else ranks[some, :units]
        low, high = (
            self._run(part, paired, who, precision, some)[0] for precision in ("bf16", "fp32")
        )
        apart = (low - high).flatten(2)  # [e, s, p o]
        if apart.shape[1] < _FEWEST:
            return apart.square().mean((1, 2)).sqrt()
        return bound_of_mean(apart, S * self.moments.count / units)

    def _run(
        self, ranks: Tensor, paired: bool, who: Tensor, precision: str, some: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        rows = self.game.rows
        background = rows.background if some is None else rows.background[some]
        x = rows.x if len(who) == len(rows.x) else rows.x[who]
        return ops.mlp_shapley(
            x, background, ranks, self.weights, self.biases, self.codes, self.game.player,
            paired=paired, precision=precision,
        )  # fmt: skip
