"""Interaction indices as sums over coalitions, and of polynomials.

Every index is linear in the game: I(T) = sum over S of c(T, S) v(S), where c depends on the sizes
of T, of S and of their intersection alone. With the derivative D_T v(S) = sum over A in T of
(-1)^(|T| - |A|) v(S and A), t = |T| and order k:

    SII     mean of D_T v(S) over S without T, sizes alike (Grabisch and Roubens 1999)
    k-SII   SII of orders up to k, gathered so that they sum to v(all) - v(none) (Bordt and von
            Luxburg 2023)
    STII    D_T v(none) for t < k; (k / p) sum over S of D_T v(S) / C(p - 1, |S|) for t = k
            (Sundararajan et al. 2020)
    FSII    the polynomial of degree k that fits v best under the Shapley kernel's weights
            (Tsai et al. 2023, Faith-Shap)
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

INDICES = ("k-SII", "SII", "STII", "FSII")
_BERNOULLI = (1.0, -1 / 2, 1 / 6, 0.0, -1 / 30, 0.0, 1 / 42)


class Sets:
    """All sets of 1 to `order` of p players.

    Attributes:
        sets: tuples of players, by size, then in lexicographic order.
        sizes: [T] int64.
    """

    def __init__(self, p: int, order: int) -> None:
        self.p, self.order = p, order
        self.sets = tuple(
            T for t in range(1, order + 1) for T in itertools.combinations(range(p), t)
        )
        self.sizes = torch.tensor([len(T) for T in self.sets])
        self._mask = torch.zeros(len(self.sets), p)
        for row, T in enumerate(self.sets):
            self._mask[row, list(T)] = 1

    def __len__(self) -> int:
        return len(self.sets)

    def within(self, inside: Tensor) -> Tensor:
        """[K, T] int64: how many players of each set are in each coalition [K, p]."""
        return (inside.float() @ self._mask.T).long()

    def monomials(self, inside: Tensor) -> Tensor:
        """[K, T] float64: whether a set lies in a coalition."""
        return (self.within(inside) == self.sizes).double()

    def unions(self) -> Tensor:
        """[T, T] int64: sizes of the unions of two sets."""
        return self.sizes[:, None] + self.sizes - (self._mask @ self._mask.T).long()

    def holding(self) -> Tensor:
        """[T, A] bool: whether set A holds set T."""
        return (self._mask @ self._mask.T).long() == self.sizes[:, None]

    def coefficients(self, index: str, inside: Tensor) -> Tensor:
        """c(T, S) of SII or STII: [K, T] float64."""
        within = self.within(inside)
        size = inside.sum(1)[:, None].expand_as(within)
        tables = torch.zeros(self.order + 1, self.p + 1, self.order + 1, dtype=torch.float64)
        for t in range(1, self.order + 1):
            tables[t, :, : t + 1] = _table(index, self.p, t, self.order)
        return tables[self.sizes.expand_as(within), size, within]

    def of_polynomial(self, index: str, degree: int) -> Tensor:
        """[T, A]: SII or STII of the term of each set A of at most `degree` players."""
        holding = self.holding()[:, self.sizes <= degree]
        if index == "STII":  # at most of degree k, so that a term is the interaction of its set
            return torch.eye(len(self), dtype=torch.float64)[:, : holding.shape[1]]
        apart = self.sizes[: holding.shape[1]] - self.sizes[:, None]
        return torch.where(holding, 1 / (apart.double() + 1), 0.0)

    def gather(self) -> Tensor:
        """[T, T]: from SII to k-SII."""
        apart = self.sizes - self.sizes[:, None]
        weight = torch.tensor(_BERNOULLI, dtype=torch.float64)[apart.clamp(min=0)]
        return torch.where(self.holding(), weight, 0.0)


def _table(index: str, p: int, t: int, k: int) -> Tensor:
    """[p + 1, t + 1] float64: c by the size of S and by how many of T it holds."""
    table = torch.zeros(p + 1, t + 1, dtype=torch.float64)
    for size, a in itertools.product(range(p + 1), range(t + 1)):
        rest = size - a  # of S outside of T
        if not 0 <= rest <= p - t:
            continue
        if index == "SII":
            weight = 1 / ((p - t + 1) * math.comb(p - t, rest))
        elif t == k:
            weight = k / (p * math.comb(p - 1, rest))
        else:
            weight = float(rest == 0)
        table[size, a] = (-1) ** (t - a) * weight
    return table


def kernel_weights(p: int) -> Tensor:
    """[p + 1] float64: the Shapley kernel by size; 0 at the ends, which are constraints."""
    weights = torch.zeros(p + 1, dtype=torch.float64)
    for s in range(1, p):
        weights[s] = (p - 1) / (math.comb(p, s) * s * (p - s))
    return weights


def kernel_gram(sets: Sets) -> Tensor:
    """[A, A] float64: kernel weight times monomial A times monomial B, over all coalitions."""
    p, weights = sets.p, kernel_weights(sets.p)
    by_union = [
        sum(math.comb(p - u, s - u) * float(weights[s]) for s in range(max(u, 1), p))
        for u in range(p + 1)
    ]
    return torch.tensor(by_union, dtype=torch.float64)[sets.unions().clamp(max=p)]


def constrained(gram: Tensor) -> tuple[Tensor, Tensor]:
    """F [A, A] and d [A]: F moments + d Delta is the best fit whose terms sum to Delta.

    A direction that nothing determines is left at zero.
    """
    A = len(gram)
    gram = gram / (scale := float(gram.diagonal().mean().clamp(min=1e-300)))
    factor, failed = torch.linalg.cholesky_ex(gram)
    if int(failed) == 0 and float(factor.diagonal().square().amin()) > 1e-9:
        inverse = torch.cholesky_inverse(factor)
        ones = inverse.sum(1)
        d = ones / ones.sum()
        return (inverse - d[:, None] * ones) / scale, d
    bordered = torch.ones(A + 1, A + 1, dtype=gram.dtype)  # the normal equations and the constraint
    bordered[:A, :A] = gram
    bordered[A, A] = 0
    inverse = torch.linalg.pinv(bordered, rtol=1e-11, hermitian=True)
    return inverse[:A, :A] / scale, inverse[:A, A]
