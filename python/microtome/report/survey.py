"""One streamed pass over a store: how often, how strongly and where every feature fires."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from microtome import _check


class Rows(Protocol):
    """What the survey reads: an ActivationStore or one of its views."""

    manifest: dict[str, Any]

    def __len__(self) -> int: ...
    def rows(self, index: slice | Tensor) -> Tensor: ...
    def tokens(self, index: slice | Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Survey:
    """Firing statistics of every feature over the rows of a store, first positions left out.

    The first position of a context is an attention sink in many transformers: its activation is
    far larger than any other whatever the text says, and would crowd out every other peak.

    Attributes:
        n_rows: rows counted.
        context_length: rows a context.
        firings: [f] int64, rows on which the feature's activation is positive.
        maximum: [f] float32, the largest activation, in units of the unit-norm decoder rows.
        total: [f] float64, the sum of the activations.
        token_types: [f] float32, exp of the entropy of the feature's activation over token types:
            1 means that one token carries it all, 5 that it is spread as over five equal ones.
        contexts_fired: [f] int64, contexts in which it fires at all.
        peak_rows: [f, c] int64, rows of the c largest activations, one a context at most; -1 where
            there are fewer.
        pairs: keys feature * vocabulary + token, sorted, and the activation of each, both [m].
        vocabulary: more than any token.
    """

    n_rows: int
    context_length: int
    firings: Tensor
    maximum: Tensor
    total: Tensor
    token_types: Tensor
    contexts_fired: Tensor
    peak_rows: Tensor
    pairs: tuple[Tensor, Tensor]
    vocabulary: int

    @property
    def density(self) -> Tensor:
        """[f] float64, the share of rows on which the feature fires."""
        return self.firings.double() / max(self.n_rows, 1)

    def top_tokens(self, feature: int, count: int = 3) -> list[tuple[int, float]]:
        """The token types that carry most of a feature's activation, each with its share."""
        keys, weights = self.pairs
        low, high = torch.searchsorted(
            keys, torch.tensor([feature * self.vocabulary, (feature + 1) * self.vocabulary])
        ).tolist()
        mine = weights[low:high]
        best = torch.argsort(mine, descending=True, stable=True)[:count]
        whole = float(mine.sum()) or 1.0
        return [
            (int(keys[low + i]) % self.vocabulary, float(mine[i]) / whole) for i in best.tolist()
        ]


def entries(code: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The positive entries of a SparseCode as (row [m], feature [m], value [m])."""
    values = code.values.detach().float()
    if code.offsets is None:
        k = values.shape[-1]
        rows = torch.arange(values.numel() // max(k, 1)).repeat_interleave(k)
    else:
        counts = code.offsets.diff()
        rows = torch.arange(counts.numel()).repeat_interleave(counts)
    values, features = values.reshape(-1), code.indices.reshape(-1).long()
    fires = values > 0
    return rows[fires], features[fires], values[fires]


def survey(
    sae: Any, store: Rows, *, peaks: int = 12, batch_rows: int = 2048, progress: bool = False
) -> Survey:
    """Read a store once and collect every feature's firing statistics and highest peaks.

    Args:
        sae: its `encode(x [n, d])` returns a SparseCode; `n_features` is f.
        store: rows and tokens, with `context_length` in its manifest.
        peaks: how many peaks a feature keeps.
        batch_rows: rows a batch, rounded to whole contexts.
        progress: show a progress bar.

    Returns:
        A Survey. Memory: O(f * peaks) plus one number for each (feature, token type) pair that
        occurs; the [rows, f] code is never formed.

    Raises:
        ArgumentError: peaks is less than 1.
    """
    _check.between("survey", "peaks", peaks, 1, 1000)
    f, length = int(sae.n_features), int(store.manifest["context_length"])
    step = max(1, batch_rows // length) * length
    counted = 0
    vocabulary = 1 << 32  # a key of (feature, token): no tokenizer has more types
    firings, contexts = torch.zeros(f, dtype=torch.int64), torch.zeros(f, dtype=torch.int64)
    total = torch.zeros(f, dtype=torch.float64)
    best, best_rows = torch.zeros(f, peaks), torch.full((f, peaks), -1)
    keys, weights = torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.float64)
    bar = tqdm(
        total=len(store), unit="token", unit_scale=True, desc="features", disable=not progress
    )
    for start in range(0, len(store), step):
        stop = min(start + step, len(store))
        x, tokens = store.rows(slice(start, stop)), store.tokens(slice(start, stop))
        with torch.no_grad():
            row, feature, value = entries(sae.encode(x))
        inside = (row + start) % length != 0
        row, feature, value = row[inside], feature[inside], value[inside]
        counted += stop - start + (start - stop) // length
        firings += torch.bincount(feature, minlength=f)
        total.index_add_(0, feature, value.double())
        first = _first_of_each(
            feature * (len(store) // length + 1) + (row + start) // length, value
        )
        contexts += torch.bincount(feature[first], minlength=f)
        _keep_best(best, best_rows, feature[first], value[first], row[first] + start)
        keys, weights = _add_pairs(
            keys, weights, feature * vocabulary + tokens[row], value.double()
        )
        bar.update(stop - start)
    bar.close()
    share = weights / total[keys // vocabulary]
    entropy = torch.zeros(f, dtype=torch.float64).index_add_(
        0, keys // vocabulary, -share * share.log()
    )
    return Survey(
        n_rows=counted,
        context_length=length,
        firings=firings,
        maximum=best[:, 0].clone(),
        total=total,
        token_types=entropy.exp().float(),
        contexts_fired=contexts,
        peak_rows=best_rows,
        pairs=(keys, weights),
        vocabulary=vocabulary,
    )


def _first_of_each(group: Tensor, value: Tensor) -> Tensor:
    """The position of the largest value of every group (the earliest, where two are equal)."""
    order = torch.argsort(value, descending=True, stable=True)
    order = order[torch.argsort(group[order], stable=True)]
    ranked = group[order]
    return (
        order[torch.cat([torch.ones(1, dtype=torch.bool), ranked[1:] != ranked[:-1]])]
        if order.numel()
        else order
    )


def _keep_best(
    best: Tensor, best_rows: Tensor, feature: Tensor, value: Tensor, row: Tensor
) -> None:
    """Merge a batch's peaks into best [f, c] and best_rows [f, c], in place, largest first."""
    peaks = best.shape[1]
    order = torch.argsort(value, descending=True, stable=True)
    order = order[torch.argsort(feature[order], stable=True)]
    feature, value, row = feature[order], value[order], row[order]
    touched, counts = torch.unique_consecutive(feature, return_counts=True)
    rank = torch.arange(feature.numel()) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    place = torch.arange(touched.numel()).repeat_interleave(counts)
    kept = rank < peaks
    new = torch.zeros(touched.numel(), peaks)
    new_rows = torch.full((touched.numel(), peaks), -1)
    new[place[kept], rank[kept]] = value[kept]
    new_rows[place[kept], rank[kept]] = row[kept]
    both = torch.cat([best[touched], new], dim=1)  # [t, 2 c]
    top, pick = torch.sort(both, dim=1, descending=True, stable=True)
    best[touched] = top[:, :peaks]
    best_rows[touched] = torch.cat([best_rows[touched], new_rows], dim=1).gather(1, pick[:, :peaks])


def _add_pairs(keys: Tensor, weights: Tensor, more: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    joined, where = torch.unique(torch.cat([keys, more]), return_inverse=True)
    sums = torch.zeros(joined.numel(), dtype=torch.float64).index_add_(
        0, where, torch.cat([weights, value])
    )
    return joined, sums
