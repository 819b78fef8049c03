"""The games of the Shapley benchmark: a small network on a public table, and its values."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

# Of each background row: errors near 0.2 % of the RMS value, and 0.5 % for many explicands.
REFERENCE_PERMUTATIONS, REFERENCE_OF_MANY = 800, 80


@dataclass(frozen=True)
class Case:
    """One game and one budget.

    Attributes:
        name: for the table.
        columns: of the table: all 30, or its first few.
        backgrounds: rows that absent columns are drawn from; 1 is a row of zeros, the mean.
        coalitions: budget: coalitions of each explicand, every one over all background rows.
        explicands: rows explained together or, by peers that cannot, one by one.
        what: "shapley", "lime" (samples in place of coalitions) or "memory".
    """

    name: str
    columns: int
    backgrounds: int
    coalitions: int
    explicands: int = 4
    what: str = "shapley"


CASES = {
    case.name: case
    for case in (
        Case("mlp-30-100", 30, 100, 610),
        Case("mlp-30-100-more", 30, 100, 2135),
        Case("mlp-30-1", 30, 1, 610),
        Case("mlp-30-100-many", 30, 100, 610, explicands=256),
        Case("lime-5000", 30, 1, 5000, what="lime"),
        Case("mlp-784-100", 784, 100, 1569, explicands=1, what="memory"),
    )
}


@dataclass(frozen=True, eq=False)
class Question:
    """A case made real.

    Attributes:
        case: which.
        net: the network, an nn.Sequential with one output.
        background, x: [n, m], [e, m] float32.
        train: [469, m], for LIME's statistics.
        reference: [e, m] float64: nearly exact values; empty where nothing is judged.
    """

    case: Case
    net: nn.Sequential
    background: Tensor
    x: Tensor
    train: Tensor
    reference: Tensor

    def numpy(self, rows: Any) -> np.ndarray:
        """The network as a numpy function: [R, m] -> [R]."""
        with torch.no_grad():
            return self.net(torch.from_numpy(np.asarray(rows, dtype=np.float32)))[:, 0].numpy()

    def torch(self, rows: Tensor) -> Tensor:
        """The same as a torch function."""
        with torch.no_grad():
            return self.net(rows)[:, 0]


@dataclass(frozen=True)
class Contender:
    """A way to explain, ready to run.

    Attributes:
        run: takes a seed, explains every explicand, returns [e, m] values (None: not judged).
        evaluations: model rows of one explicand, as planned.
        about: more for the JSON, read after the runs.
    """

    run: Callable[[int], Tensor | None]
    evaluations: int = 0
    about: Callable[[], dict[str, Any]] = field(default=dict)


def table(columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """scikit-learn's breast-cancer table, standardised: train, its labels, test."""
    from sklearn.datasets import load_breast_cancer
    from sklearn.preprocessing import StandardScaler

    X, y = load_breast_cancer(return_X_y=True)
    order = np.random.RandomState(0).permutation(len(X))
    train, test = order[:469], order[469:]
    scaler = StandardScaler().fit(X[train])
    scaled = scaler.transform(X).astype(np.float32)[:, :columns]
    return (
        torch.from_numpy(scaled[train]),
        torch.from_numpy(y[train].astype(np.float32)),
        torch.from_numpy(scaled[test]),
    )


def network(rows: Tensor, labels: Tensor, hidden: int = 128) -> nn.Sequential:
    """m-128-128-1 with ReLU, 400 steps of Adam on all rows at once."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Linear(rows.shape[1], hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, 1),
        )
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    with torch.enable_grad():
        for _ in range(400):
            optimizer.zero_grad()
            loss = nn.functional.binary_cross_entropy_with_logits(net(rows)[:, 0], labels)
            loss.backward()
            optimizer.step()
    return net.eval().requires_grad_(False)


def wide(columns: int) -> tuple[nn.Sequential, Tensor, Tensor]:
    """A random 784-256-256-1 and random rows, for memory only."""
    generator = torch.Generator().manual_seed(0)
    sizes = (columns, 256, 256, 1)
    layers: list[nn.Module] = []
    for i, o in itertools.pairwise(sizes):
        layer = nn.Linear(i, o)
        with torch.no_grad():
            layer.weight.copy_(torch.randn(o, i, generator=generator) / i**0.5)
            layer.bias.zero_()
        layers += [layer, nn.ReLU()]
    net = nn.Sequential(*layers[:-1]).eval().requires_grad_(False)
    return net, *(torch.randn(n, columns, generator=generator) for n in (100, 1))


def question(case: Case, cache: Path) -> Question:
    """Make a case; the network and the reference are computed once and kept in `cache`."""
    if case.what == "memory":
        net, background, x = wide(case.columns)
        return Question(case, net, background, x, background, torch.empty(0))
    train, labels, test = table(case.columns)
    background = train[:100] if case.backgrounds > 1 else torch.zeros(1, case.columns)
    x = torch.cat([test, train])[: case.explicands]  # only the largest case reaches the second
    file = cache / f"shapley-{case.columns}-{case.backgrounds}-{case.explicands}.pt"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        net = network(train, labels)
        torch.save({"net": net.state_dict(), "reference": reference(net, x, background)}, file)
    kept = torch.load(file)
    net = network(train[:1], labels[:1])
    net.load_state_dict(kept["net"])
    return Question(case, net, background, x, train, kept["reference"])


def reference(net: nn.Sequential, x: Tensor, background: Tensor) -> Tensor:
    """Nearly exact values by a long run in float32 through the network itself, no kernel of ours.

    A single background row walks a hundred times as many permutations.
    """
    n, p = background.shape
    generator = torch.Generator().manual_seed(12345)
    each = REFERENCE_PERMUTATIONS if len(x) < 50 else REFERENCE_OF_MANY
    walks = each * (100 // n) // 2
    sums = torch.zeros(len(x), p, dtype=torch.float64)
    t = torch.arange(p + 1)
    for _ in range(walks):
        keys = torch.rand(n, p, generator=generator, dtype=torch.float64)
        for rank in (keys.argsort(1), p - 1 - keys.argsort(1)):
            inside = rank[:, None] < t[None, :, None]  # [n, p + 1, p]
            for i, row in enumerate(x):
                rows = torch.where(inside, row, background[:, None])
                values = net(rows.reshape(-1, p)).reshape(n, p + 1).double()
                steps = values[:, 1:] - values[:, :-1]
                sums[i] += steps.gather(1, rank).mean(0)
    return sums / (2 * walks)
