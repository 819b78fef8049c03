"""A hierarchy of features, as scipy and shap write one down."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from microtome.errors import ArgumentError, ShapeError


class Tree:
    """A binary tree over M features: nodes 0 .. M - 1 are features, M .. 2 M - 2 join two nodes.

    Args:
        op: name for messages.
        clustering: [M - 1, 2 or more]: of each joining node its two children and their distance;
            the last is the root. Where a distance is negative the node is not split.
        features: M.

    Attributes:
        clustering: as given.
        children: [M - 1, 2].
        split: [M - 1] bool.
        sizes: [2 M - 1], features below each node.
        below: [2 M - 1, M] bool, which.
    """

    def __init__(self, op: str, clustering: Any, features: int) -> None:
        table = np.asarray(clustering, dtype=np.float64)
        if table.ndim != 2 or table.shape[0] != features - 1 or table.shape[1] < 2:
            msg = (
                f"{op}: the masker's clustering must be [features - 1, 2 or more] = "
                f"[{features - 1}, ...] for {features} features, got shape {list(table.shape)}."
            )
            raise ShapeError(msg)
        self.features, self.clustering = features, table
        self.children = table[:, :2].astype(np.int64)
        self.split = table[:, 2] >= 0 if table.shape[1] > 2 else np.ones(len(table), dtype=bool)
        self.below = np.zeros((2 * features - 1, features), dtype=bool)
        self.below[np.arange(features), np.arange(features)] = True
        for node, (left, right) in enumerate(self.children, features):
            if not (0 <= left < node and 0 <= right < node):
                msg = (
                    f"{op}: node {node} of the masker's clustering joins {left} and {right}; a node"
                    " may join earlier ones only."
                )
                raise ArgumentError(msg)
            self.below[node] = self.below[left] | self.below[right]
        self.sizes = self.below.sum(1)
        if self.sizes[-1] != features:
            msg = f"{op}: the masker's clustering leaves features out, or joins some twice."
            raise ArgumentError(msg)

    @property
    def root(self) -> int:
        return 2 * self.features - 2

    def parts(self, node: int) -> tuple[int, int] | None:
        """The two children, or None for a feature or a node that is not split."""
        at = node - self.features
        if at < 0 or not self.split[at]:
            return None
        return int(self.children[at, 0]), int(self.children[at, 1])

    def evaluations(self) -> int:
        """How many coalitions the exact Owen values take, both ends among them."""
        contexts = [0] * (2 * self.features - 1)
        contexts[self.root] = 1
        total = 2
        for node in range(self.root, self.features - 1, -1):
            parts = self.parts(node)
            if parts is not None:
                total += 2 * contexts[node]
                for part in parts:
                    contexts[part] = 2 * contexts[node]
        return total

    def lowered(self, nodes: Tensor) -> Tensor:
        """[e, M, o] values of features from [e, 2 M - 1, o] of nodes, shared out by sizes."""
        out = nodes.clone()
        for node in range(self.root, self.features - 1, -1):
            for child in self.children[node - self.features].tolist():
                out[:, child] += out[:, node] * (self.sizes[child] / self.sizes[node])
        return out[:, : self.features]

    def ranks(self, shape: tuple[int, ...], stream: torch.Generator) -> Tensor:
        """[*shape, M] int32: random orders in which the features below a node are neighbours."""
        start = torch.zeros(2 * self.features - 1, *shape, dtype=torch.int32)
        for node in range(self.root, self.features - 1, -1):
            left, right = self.children[node - self.features].tolist()
            turned = torch.randint(2, shape, generator=stream, dtype=torch.int32)
            start[left] = start[node] + turned * int(self.sizes[right])
            start[right] = start[node] + (1 - turned) * int(self.sizes[left])
        return start[: self.features].movedim(0, -1).contiguous()
