"""What each op does with its inputs inside `torch.autocast`: the one table, and how it is applied.

Autocast hands an op a mixture: x in bfloat16 out of a cast linear layer, W_enc as the float32
parameter that it is. torch knows three ways with a mixture: cast down (`linear`), cast up
(`softmax`), promote to the widest (`cat`). No op here casts down: what a bfloat16 product saves is
taken by the screens, and the answer stays that of the float32 weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

WIDEST, FLOAT32, AS_GIVEN = "widest", "float32", "as given"
_NARROW = (torch.bfloat16, torch.float16)
_TYPES = ("cpu", "cuda")


class Decision(NamedTuple):
    """How an op takes its floating-point inputs under autocast.

    Attributes:
        cast: WIDEST: where they differ, bfloat16 and float16 become float32. FLOAT32: they always
            do. AS_GIVEN: none is cast. In every case float64 is left alone (autocast makes none),
            what an op updates in place is never cast, and sums are taken in float32.
        why: the reason.
        keep: arguments that are never cast.
    """

    cast: str
    why: str
    keep: tuple[str, ...] = ()


_EXACT = Decision(
    WIDEST, "the answer is that of the float32 weights; widening x is exact", ("stats",)
)
_CODE = Decision(WIDEST, "values and decoder rows meet in float32 sums anyway")
_FLOAT32_ONLY = "no backend takes narrower inputs; widening is exact"

DECISIONS: dict[str, Decision] = {
    "topk_encode": _EXACT,
    "topk_encode_fp8": _EXACT,
    "batch_topk_encode": _EXACT,
    "threshold_encode": _EXACT,
    "screen_weights": Decision(FLOAT32, "a screen bounds the error against float32 weights"),
    "sparse_decode": _CODE,
    "sparse_decode_grad_values": _CODE,
    "sparse_decode_grad_W_dec": _CODE,
    "sparse_decode_csr": _CODE,
    "sparse_decode_csr_grad_values": _CODE,
    "sparse_decode_csr_grad_W_dec": _CODE,
    "sae_loss": Decision(WIDEST, "a loss is summed in float32, as torch's losses are"),
    "sae_update": Decision(FLOAT32, "parameters are float32 masters; only gradients are widened"),
    "feature_clamp": Decision(WIDEST, "the change is computed from the float32 rows of the SAE"),
    "solu": Decision(AS_GIVEN, "float32 inside at any dtype, so a cast would only cost memory"),
    "solu_grad_x": Decision(
        AS_GIVEN, "float32 inside at any dtype, so a cast would only cost memory"
    ),
    "patch_rows": Decision(FLOAT32, _FLOAT32_ONLY),
    "pack_weights": Decision(FLOAT32, _FLOAT32_ONLY),
    "packed_linear": Decision(FLOAT32, _FLOAT32_ONLY, ("packed",)),
    "delta_linear": Decision(
        FLOAT32, "the base is float32 by construction; the product is bfloat16", ("packed",)
    ),
    "cascade_attention": Decision(FLOAT32, _FLOAT32_ONLY),
    "swap_key_attention": Decision(FLOAT32, _FLOAT32_ONLY),
    "attribution_scores": Decision(WIDEST, "differences and products are float32 anyway"),
    "random_ranks": Decision(AS_GIVEN, "integers"),
    "coalition_inputs": Decision(WIDEST, "bits are moved, and x and background must share a dtype"),
    "coalition_gram": Decision(AS_GIVEN, "float64 throughout, which autocast leaves alone"),
    "shapley_reduce": Decision(FLOAT32, "values are averaged in float64; widening is exact"),
    "mlp_shapley": Decision(FLOAT32, "bfloat16 products are asked for by precision='bf16'"),
}


def enabled(device: torch.device) -> bool:
    """Whether autocast is on for tensors of a device."""
    return device.type in _TYPES and torch.is_autocast_enabled(device.type)


def dtypes(op: str, tensors: Mapping[str, Tensor | None]) -> dict[str, torch.dtype]:
    """The dtype that each tensor will have inside the op; that of a None is left out."""
    present = {name: t for name, t in tensors.items() if t is not None}
    seen = {name: t.dtype for name, t in present.items()}
    decision = DECISIONS.get(op)
    if decision is None or not any(enabled(t.device) for t in present.values()):
        return seen
    return dict(zip(seen, _after(decision, list(seen), list(seen.values())), strict=True))


def cast(op: str, names: Sequence[str], args: Sequence[object]) -> list[object]:
    """The op's arguments as its body takes them, by the op's decision; lists of tensors too.

    Args:
        op: a key of DECISIONS.
        names: of the arguments, "" for one that must stay as it is.
        args: the arguments.
    """
    named = [
        (name, tensor)
        for name, value in zip(names, args, strict=True)
        for tensor in (value if isinstance(value, (list, tuple)) else [value])
        if isinstance(tensor, Tensor)
    ]
    kinds = [tensor.dtype for _, tensor in named]
    after = iter(_after(DECISIONS[op], [name for name, _ in named], kinds))

    def taken(value: object) -> object:
        if isinstance(value, (list, tuple)):
            return [taken(one) for one in value]
        return value.to(next(after)) if isinstance(value, Tensor) else value

    return [taken(value) for value in args]


def _after(
    decision: Decision, names: Sequence[str], dtypes: Sequence[torch.dtype]
) -> list[torch.dtype]:
    held = ("", *decision.keep)
    taking = {
        d for n, d in zip(names, dtypes, strict=True) if n not in held and d.is_floating_point
    }
    widens = decision.cast == FLOAT32 or (
        decision.cast == WIDEST and len(taking) > 1 and torch.float64 not in taking
    )
    return [
        torch.float32 if widens and d in _NARROW and n not in held else d
        for n, d in zip(names, dtypes, strict=True)
    ]
