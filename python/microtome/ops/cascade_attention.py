"""Attention of many runs that share a prefix of keys, and the repair of one changed key."""

from __future__ import annotations

import torch
from torch import Tensor

from microtome import _check
from microtome.ops import _attention_cpu
from microtome.ops import _attention_rows as inputs
from microtome.ops._registry import Backend, Op, triton_backend


def cascade_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_base: Tensor,
    v_base: Tensor,
    rows: Tensor,
    q_positions: Tensor,
    first: Tensor,
    scale: float,
    softcap: float = 0.0,
    window: int = 0,
) -> tuple[Tensor, Tensor]:
    """Causal attention of n ragged runs, each over a shared prefix and then its own keys.

    Row r = (example, start, kv_at, kv_count, q_at, q_count) owns the packed keys kv_at ..
    kv_at + kv_count - 1, at positions start, start + 1, ...; its queries are q_at .. q_at +
    q_count - 1. A query at position p sees the keys at positions [max(first[example],
    p - window + 1), p], below `start` those of the base run `example`, from `start` on its own:

        s[x]  = scale <q, k[x]>, then softcap * tanh(s / softcap) where softcap > 0
        lse   = log sum_x exp(s[x]);   z = sum_x exp(s[x] - lse) v[x]

    Args:
        q: [Tq, h, dh] float32 (float64 on the reference). Any stride between tokens, so a slice of
            one packed product is taken as it is.
        k: [T, hk, dh], h a multiple of hk: head j of q uses key head j // (h / hk).
        v: [T, hk, dv].
        k_base: [b, t, hk, dh], the keys of b base runs, any stride between examples and tokens.
            b = 0 or t = 0 for none.
        v_base: [b, t, hk, dv].
        rows: [n, 6] int32. start <= t, or up to first[example]; example is ignored where b = 0.
        q_positions: [Tq] int32, start <= position < start + kv_count in each query's row. Every
            query belongs to exactly one row.
        first: [b] int32, the first position that is no padding, 0 for none.
        scale: of the scores, usually 1 / sqrt(dh).
        softcap: bound on the scores, 0 for none.
        window: keys that a query sees, itself included; 0 for all.

    Returns:
        z [Tq, h, dv] and lse [Tq, h], dtype of q, accumulated in float32 with the largest score
        subtracted. A query before first[example] sees nothing: z = 0, lse = -inf.

    Raises:
        ShapeError, DtypeError, DeviceError: the letters above do not agree.
        ArgumentError: a row reaches outside its tensors, a query belongs to no row or to two. On a
            GPU a later call raises; the answers to the queries concerned are arbitrary meanwhile.
        BackendError: a demanded backend cannot run these inputs.

    Not differentiable. Deterministic: the same bits for any number of threads. 2 (dh + dv) h
    floating-point operations for each query and key; no prefix is copied, no [Tq, keys] formed. A
    value that is not finite may reach neighbours that do not see it, as in any masked product.
    Source: online softmax, Milakov and Gimelshein 2018, arXiv:1805.02867; a prefix shared by many
    suffixes, Juravsky et al. 2024, arXiv:2402.05099.

    Example:
        >>> import torch
        >>> q, k, v = torch.zeros(1, 1, 2), torch.zeros(1, 1, 2), torch.tensor([[[3.0]]])
        >>> prefix = torch.zeros(1, 2, 1, 2), torch.tensor([[[[0.0]], [[6.0]]]])
        >>> rows, first = torch.tensor([[0, 2, 0, 1, 0, 1]]), torch.tensor([0])
        >>> z, _ = cascade_attention(q, k, v, *prefix, rows, torch.tensor([2]), first, scale=1.0)
        >>> z.round(decimals=3)
        tensor([[[3.]]])
    """
    sizes = inputs.check_tensors(
        "cascade_attention",
        {
            "q": (q, "Tq h dh"),
            "k": (k, "T hk dh"),
            "v": (v, "T hk dv"),
            "k_base": (k_base, "b t hk dh"),
            "v_base": (v_base, "b t hk dv"),
        },
        {"rows": (rows, "n 6"), "q_positions": (q_positions, "Tq"), "first": (first, "b")},
    )
    _check.columns("cascade_attention", "rows", rows, inputs.CASCADE)
    inputs.check_scalars("cascade_attention", sizes, scale, softcap, window)
    if _check.readable(q) and not inputs.checks_itself(q):
        inputs.check_cascade(q, k, k_base, rows, q_positions, first)
    z, lse = _attend(
        q, k, v, k_base, v_base, rows, q_positions, first, float(scale), float(softcap), window
    )
    return z, lse


def cascade_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_base: Tensor,
    v_base: Tensor,
    rows: Tensor,
    q_positions: Tensor,
    first: Tensor,
    scale: float,
    softcap: float,
    window: int,
) -> tuple[Tensor, Tensor]:
    """Row by row: the prefix and the row's own keys put together, and a mask."""
    inputs.check_cascade(q, k, k_base, rows, q_positions, first)
    z = q.new_zeros(q.shape[0], q.shape[1], v.shape[2])
    lse = q.new_full(q.shape[:2], -torch.inf)
    b, t = k_base.shape[:2]
    for example, start, kv_at, kv_count, q_at, q_count in rows.tolist():
        prefix, own = min(start, t) if b else 0, slice(kv_at, kv_at + kv_count)
        keys = torch.cat([k_base[example, :prefix], k[own]]) if b else k[own]
        values = torch.cat([v_base[example, :prefix], v[own]]) if b else v[own]
        where = torch.cat([torch.arange(prefix), start + torch.arange(kv_count)]).to(q.device)
        queries = slice(q_at, q_at + q_count)
        allowed = _allowed(q_positions[queries], where, int(first[example]) if b else 0, window)
        z[queries], lse[queries] = _attention(q[queries], keys, values, allowed, scale, softcap)
    return z, lse


def _allowed(positions: Tensor, where: Tensor, first: int, window: int) -> Tensor:
    """[queries, keys]: which keys, at positions `where`, each query may see."""
    i, j = positions[:, None], where[None]
    allowed = (j <= i) & (j >= first)
    return allowed & (j > i - window) if window else allowed


def _attention(
    q: Tensor, keys: Tensor, values: Tensor, allowed: Tensor, scale: float, softcap: float
) -> tuple[Tensor, Tensor]:
    """Softmax attention of q [m, h, dh] over keys [x, hk, dh] where allowed [m, x]."""
    group = q.shape[1] // keys.shape[1]
    keys, values = (part.repeat_interleave(group, 1) for part in (keys, values))
    scores = scale * torch.einsum("mhd,xhd->mhx", q, keys)
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~allowed[:, None], -torch.inf)
    lse = torch.logsumexp(scores, -1)  # [m, h]
    weights = torch.exp(scores - lse[..., None]).masked_fill(~allowed[:, None], 0.0)
    return torch.einsum("mhx,xhd->mhd", weights, values), lse


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_base: Tensor,
    v_base: Tensor,
    rows: Tensor,
    q_positions: Tensor,
    first: Tensor,
    scale: float,
    softcap: float,
    window: int,
) -> tuple[Tensor, Tensor]:
    Tq, h, _ = q.shape
    return q.new_empty(Tq, h, v.shape[2]), q.new_empty(Tq, h)


def swap_key_attention(
    z: Tensor,
    lse: Tensor,
    q: Tensor,
    k_base: Tensor,
    v_base: Tensor,
    q_new: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    rows: Tensor,
    first: Tensor,
    scale: float,
    softcap: float = 0.0,
    window: int = 0,
    total: int | None = None,
) -> Tensor:
    """Attention of a base run in which one position's query, key and value are replaced, n times.

    Row r = (example, position, stop) is the base run `example`, whose answers are z and lse, with
    q_new[r], k_new[r], v_new[r] at `position`; its tokens are position .. stop - 1. The first
    attends in full. A later one, i, sees one other key:

        w_old = exp(s_old - lse[i]);  w_new = exp(s_new - lse[i])
        z'[i] = (z[i] - w_old v_old + w_new v_new) / (1 - w_old + w_new)

    and is computed in full where w_old > 1/2 or w_new is large, for there the quotient loses
    digits. A token whose window does not reach `position` keeps z[i] bit for bit.

    Args:
        z: [b, t, h, dv] float32 (float64 on the reference): cascade_attention of the base run.
        lse: [b, t, h], from the same call.
        q: [b, t, h, dh], the base run's queries; any stride between examples and tokens.
        k_base: [b, t, hk, dh], h a multiple of hk; any stride between examples and tokens.
        v_base: [b, t, hk, dv], likewise.
        q_new: [n, h, dh]; any stride between rows, as k_new and v_new.
        k_new: [n, hk, dh].
        v_new: [n, hk, dv].
        rows: [n, 3] int32, 0 <= position <= stop <= t.
        first: [b] int32, the first position that is no padding, 0 for none.
        scale: as in cascade_attention, and softcap and window.
        softcap: bound on the scores, 0 for none.
        window: keys that a query sees, itself included; 0 for all.
        total: T, where it is known: the sum over rows of stop - position. Saves reading `rows`.

    Returns:
        [T, h, dv], dtype of q: the rows' tokens one after another. Its error against float64 is at
        most 4 times that of plain float32 attention: the base run's own error comes in, doubled
        where half of its weight is taken out.

    Raises:
        ShapeError, DtypeError, DeviceError: the letters above do not agree.
        ArgumentError: a row reaches outside the base run, or total is not the sum. On a GPU a
            later call raises; the answers are arbitrary meanwhile, or NaN.
        BackendError: a demanded backend cannot run these inputs.

    Not differentiable. Deterministic: the same bits for any number of threads. 4 dh + 4 dv
    floating-point operations for each token and head that is not computed in full.
    """
    sizes = inputs.check_tensors(
        "swap_key_attention",
        {
            "z": (z, "b t h dv"),
            "lse": (lse, "b t h"),
            "q": (q, "b t h dh"),
            "k_base": (k_base, "b t hk dh"),
            "v_base": (v_base, "b t hk dv"),
            "q_new": (q_new, "n h dh"),
            "k_new": (k_new, "n hk dh"),
            "v_new": (v_new, "n hk dv"),
        },
        {"rows": (rows, "n 3"), "first": (first, "b")},
    )
    _check.columns("swap_key_attention", "rows", rows, inputs.SWAP)
    inputs.check_scalars("swap_key_attention", sizes, scale, softcap, window)
    if total is None:
        total = int((rows[:, 2] - rows[:, 1]).sum())
    if _check.readable(q) and not inputs.checks_itself(q):
        inputs.check_swap(q, rows, total)
    out: Tensor = _swap(
        z, lse, q, k_base, v_base, q_new, k_new, v_new, rows, first,
        float(scale), float(softcap), window, total,
    )  # fmt: skip
    return out


def swap_key_attention_reference(
    z: Tensor,
    lse: Tensor,
    q: Tensor,
    k_base: Tensor,
    v_base: Tensor,
    q_new: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    rows: Tensor,
    first: Tensor,
    scale: float,
    softcap: float,
    window: int,
    total: int,
) -> Tensor:
    """Every token in full, over a copy of the base run with one position replaced."""
    inputs.check_swap(q, rows, total)
    out = q.new_empty(total, q.shape[2], v_base.shape[3])
    at = 0
    for r, (example, position, stop) in enumerate(rows.tolist()):
        if position == stop:
            continue
        queries = q[example, position:stop].clone()
        keys, values = k_base[example, :stop].clone(), v_base[example, :stop].clone()
        queries[0], keys[position], values[position] = q_new[r], k_new[r], v_new[r]
        where = torch.arange(stop, device=q.device)
        allowed = _allowed(where[position:], where, int(first[example]), window)
        new, _ = _attention(queries, keys, values, allowed, scale, softcap)
        changed = allowed[:, position]
        changed[0] = True
        out[at : at + stop - position] = torch.where(
            changed[:, None, None], new, z[example, position:stop]
        )
        at += stop - position
    return out


def _fake_swap(
    z: Tensor,
    lse: Tensor,
    q: Tensor,
    k_base: Tensor,
    v_base: Tensor,
    q_new: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    rows: Tensor,
    first: Tensor,
    scale: float,
    softcap: float,
    window: int,
    total: int,
) -> Tensor:
    return q.new_empty(total, q.shape[2], v_base.shape[3])


_attend = Op(
    cascade_attention_reference,
    fake=_fake,
    backends=[
        triton_backend("microtome.kernels.cascade_attention:launch", torch.float32),
        Backend("cpu", "microtome.ops._attention_cpu:attend", _attention_cpu.why_not),
    ],
    looks=inputs.look_cascade,
)
_swap = Op(
    swap_key_attention_reference,
    fake=_fake_swap,
    backends=[
        triton_backend("microtome.kernels.cascade_attention:launch_swap", torch.float32),
        Backend("cpu", "microtome.ops._attention_cpu:swap", _attention_cpu.why_not),
    ],
    looks=inputs.look_swap,
)
