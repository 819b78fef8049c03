"""Least squares on coalitions: one factorisation for all explicands and outputs.

With x = z - (size / p) 1 for the bits z of a coalition, the constraint that values sum to
Delta = v(all) - v(none) is met by phi = Delta / p + beta, sum beta = 0, where beta fits
t = v(S) - v(none) - (size / p) Delta by x under the kernel's weights. The complement of S has -x,
so a pair enters as the half of the difference of its two t.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from microtome.ops import coalition_gram
from microtome.shapley.coalitions import unpack
from microtome.shapley.subsets import Drawn, Plan

_RIDGE = 1e-8  # of the Gram matrix's scale: what a direction must weigh to be determined
_WIDTH = 8  # columns multiplied at a time, always, so that no column depends on how many there are
_LEAST = 0.05  # degrees of freedom taken to be left, of units none of which has one


class Regression:
    """The fit of C rows' own coalitions, as matrices that take values to players.

    Args:
        drawn: the coalitions, U units for each of C rows.
        plan: how many of each size they are.
    """

    def __init__(self, drawn: Drawn, plan: Plan) -> None:
        C, U, w = drawn.words.shape
        p = plan.p
        self.p = p
        weights, rest = plan.weights(drawn.sizes)
        share = drawn.sizes.double() / p
        self.x = unpack(drawn.words.reshape(C * U, w), p).reshape(C, U, p).double()
        self.x -= share[:, None]
        nothing = torch.zeros(1, U, 1, dtype=torch.float64)
        with one_thread():
            gram = torch.stack(
                [coalition_gram(z, weights[None], nothing, p)[0][0, 1:, 1:] for z in drawn.words]
            )
            gram = _centred(gram)
            scale = gram.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
            full = gram + scale / p
            factor = _factor(full, scale)
            self.g = torch.cholesky_solve((self.x * weights[:, None]).mT, factor)  # [C, p, U]
            self.leverage = (self.x * self.g.mT).sum(2).clamp(0, 1)  # [C, U]
        # Without replacement, what is known of a stratum has no error.
        self.rest = torch.zeros_like(rest) if plan.complete else rest
        self.free = U - (p - 1)

    def fit(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Coefficients summing to zero, and their variances: both summed over the C rows.

        Args:
            targets: [C, U, c]: t of each unit, c columns that are fitted each by itself.

        Returns:
            beta and variance [p, c]. The variance is the sandwich estimate over units, which are a
            stratified sample without replacement; NaN where no degree of freedom is left.
        """
        C, U, c = targets.shape
        padded = torch.zeros(C, U, -(-c // _WIDTH) * _WIDTH, dtype=torch.float64)
        padded[:, :, :c] = targets
        betas, variances = [], []
        squares = self.g.square()
        with one_thread():
            for part in padded.split(_WIDTH, 2):
                beta = self.g @ part
                beta = beta - beta.mean(1, keepdim=True)
                squared = self._unshrunk((part - self.x @ beta).square_())
                betas.append(beta.sum(0))
                variances.append((squares @ squared).sum(0))
        variance = torch.cat(variances, 1)[:, :c]
        if self.free < 1 and bool((self.rest > 0).any()):
            variance = torch.full_like(variance, torch.nan)
        return torch.cat(betas, 1)[:, :c], variance

    def _unshrunk(self, squared: Tensor) -> Tensor:
        """Expected squares of the units' errors, from squares of their residuals, [C, U, c].

        The fit takes a share, the leverage, of a unit's error out of its residual. That share of
        the mean error is put back. (Dividing by what is left, the textbook's way, leaves nothing of
        a unit that is fitted exactly.)
        """
        left = (1 - self.leverage).sum(1)[:, None, None]
        mean = squared.sum(1, keepdim=True) / left.clamp(min=_LEAST)
        return (squared + self.leverage[:, :, None] * mean) * self.rest[:, None]


def _factor(full: Tensor, scale: Tensor) -> Tensor:
    """Cholesky factors; where coalitions leave a direction undetermined, of the ridged matrix."""
    factor, failed = torch.linalg.cholesky_ex(full)
    least = factor.diagonal(dim1=1, dim2=2).square().amin(1)
    weak = (failed > 0) | ~(least > _RIDGE * scale.flatten())
    if bool(weak.any()):
        eye = torch.eye(full.shape[1], dtype=torch.float64)
        factor[weak] = torch.linalg.cholesky(full[weak] + _RIDGE * scale[weak] * eye)
    return factor


def _centred(gram: Tensor) -> Tensor:
    """P gram P with P = 1 - 11^T / p: from bits to x."""
    gram = gram - gram.mean(1, keepdim=True)
    return gram - gram.mean(2, keepdim=True)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Products whose bits do not depend on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
