"""Designs of permutations: which orders the walks follow, fixed by a seed alone.

Every design makes units that are independent and identically distributed, so that the spread of
units gives a standard error; within a unit permutations may depend on each other to cancel error.

    plain       one uniform permutation
    antithetic  a uniform permutation and its reverse
    orthogonal  A orthonormal directions on the sphere of permutations and their negatives, each
                sorted into a permutation; a negative gives the reverse (Mitchell et al. 2022,
                JMLR 23:43, orthogonal spherical codes)
    sobol       a scrambled Sobol point set on that sphere, and the reverses (ibid.)
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from microtome import _check
from microtome._seed import generator
from microtome.errors import ArgumentError
from microtome.shapley.coalitions import inverse

DESIGNS = ("plain", "antithetic", "orthogonal", "sobol")
_UNITS_WANTED = 4  # of the larger designs, so that a standard error has some units to go by


@dataclass(frozen=True)
class Design:
    """Walks of one stratum: U units of A walks, each of which also goes back if paired."""

    name: str
    p: int
    A: int
    U: int
    paired: bool

    @property
    def permutations(self) -> int:
        """How many permutations a stratum walks in all."""
        return self.U * self.A * (2 if self.paired else 1)

    @property
    def steps(self) -> int:
        """Coalitions that a unit evaluates, the ends not counted."""
        return self.A * (self.p - 1) * (2 if self.paired else 1)


def design_of(op: str, name: str, p: int, n_permutations: int) -> Design:
    """The design that walks at least `n_permutations` permutations.

    Raises:
        ArgumentError: an unknown design, or fewer than one permutation.
    """
    _check.one_of(op, "design", name, DESIGNS)
    if n_permutations < 1:
        msg = f"{op}: n_permutations must be at least 1, got n_permutations={n_permutations}."
        raise ArgumentError(msg)
    if name == "plain":
        return Design(name, p, 1, n_permutations, False)
    if p == 1:  # one order, which lies on no sphere
        name = "antithetic"
    pairs = math.ceil(n_permutations / 2)
    A = 1
    if name == "orthogonal":
        A = max(1, min(p - 1, pairs // _UNITS_WANTED))
    elif name == "sobol":
        A = max(1, 1 << int(math.log2(max(1, pairs // _UNITS_WANTED))))
    return Design(name, p, A, math.ceil(pairs / A), True)


@functools.lru_cache(maxsize=8)
def ranks(design: Design, S: int, first: int, units: int, seed: int) -> Tensor:
    """Ranks of units first .. first + units - 1 of S strata: [S, units, A, p] int32.

    The same arguments give the same ranks in every process.
    """
    p, A = design.p, design.A
    stream = generator(seed, "shapley", design.name, first)
    if design.name in ("plain", "antithetic"):
        keys = torch.rand(S, units, A, p, generator=stream, dtype=torch.float64)
    elif design.name == "orthogonal":
        square = torch.randn(S * units, p - 1, p - 1, generator=stream, dtype=torch.float64)
        q, r = torch.linalg.qr(square)
        q = q * r.diagonal(dim1=-2, dim2=-1).sign()[:, None]  # uniform on the orthogonal group
        keys = (q[:, :A] @ helmert(p)).reshape(S, units, A, p)
    else:
        keys = _sobol(S * units, A, p, stream).reshape(S, units, A, p)
    # Sorting keys and sorting their places are each other's inverse, and equally distributed.
    return inverse(torch.argsort(keys, dim=-1).to(torch.int32))


@functools.lru_cache(maxsize=8)
def helmert(p: int) -> Tensor:
    """[p - 1, p] orthonormal rows, each summing to zero: coordinates of the plane that permutations
    lie on.
    """
    basis = torch.tril(torch.ones(p, p, dtype=torch.float64), -1)[1:]
    basis[torch.arange(p - 1), torch.arange(1, p)] = -torch.arange(1, p, dtype=torch.float64)
    return basis / basis.norm(dim=1, keepdim=True)


def _sobol(sets: int, A: int, p: int, stream: torch.Generator) -> Tensor:
    """[sets, A, p] keys: scrambled Sobol points through the normal quantile onto the plane."""
    limit = torch.quasirandom.SobolEngine.MAXDIM
    if p - 1 > limit:
        msg = f"permutation: design='sobol' takes at most {limit + 1} players, got {p}."
        raise ArgumentError(msg)
    seeds = torch.randint(2**31, (sets,), generator=stream).tolist()
    points = [
        torch.quasirandom.SobolEngine(p - 1, scramble=True, seed=s).draw(A, dtype=torch.float64)
        for s in seeds
    ]
    uniform = torch.stack(points).clamp(1e-9, 1 - 1e-9)
    return torch.special.ndtri(uniform) @ helmert(p)
