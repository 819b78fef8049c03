"""One small call of every op, through its public function: for what all ops promise alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from microtome import ops
from microtome._seed import generator
from microtome.ops.pack_weights import pack_weights

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Call:
    """One call of an op.

    Attributes:
        op: the op's name.
        function: takes `inputs` by name; returns a tensor, or several.
        inputs: tensors, lists of tensors, options.
        rows: inputs whose first dimension is a number of rows, which may be any.
        grads: inputs that the op is differentiable in.
        mutates: inputs that the op writes into.
    """

    op: str
    function: Callable[..., Any]
    inputs: Inputs
    rows: tuple[str, ...] = ()
    grads: tuple[str, ...] = ()
    mutates: tuple[str, ...] = ()
    options: Inputs = field(default_factory=dict)

    def __call__(self, inputs: Inputs | None = None) -> tuple[Tensor, ...]:
        """The outputs as a tuple."""
        out = self.function(**(self.inputs if inputs is None else inputs), **self.options)
        return (out,) if isinstance(out, Tensor) else tuple(out)


def calls(seed: int = 0, n: int = 4, screen: str = "auto") -> dict[str, Call]:
    """A call of every op that has a public function, by the op's name; n rows.

    `screen` is the kind that the step refreshes: Triton has "bf16" only.
    """
    g = generator(seed, "calls")
    f, d, k = 12, 6, 3

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    def table(*rows: Sequence[int]) -> Tensor:
        return torch.tensor(rows, dtype=torch.int32)

    sae = {"W_enc": draw(f, d), "b_enc": draw(f), "W_dec": draw(f, d), "b_dec": draw(d)}
    indices = torch.stack([torch.randperm(f, generator=g)[:k] for _ in range(n)]).int()
    code = {"values": draw(n, k).abs() + 0.1, "indices": indices}
    x, bases = draw(n, d), {"x_base": draw(2, d), "y_base": draw(2, 5)}
    q, kv = draw(n, 2, 4), (draw(n, 1, 4), draw(n, 1, 4))
    base = {"k_base": draw(1, 3, 1, 4), "v_base": draw(1, 3, 1, 4)}
    first = torch.zeros(1, dtype=torch.int32)
    swap = {"z": draw(1, n, 2, 4), "lse": draw(1, n, 2), "q": draw(1, n, 2, 4)}
    swap |= {"k_base": draw(1, n, 1, 4), "v_base": draw(1, n, 1, 4)}
    swap |= {"q_new": draw(1, 2, 4), "k_new": draw(1, 1, 4), "v_new": draw(1, 1, 4)}
    p = 3
    orders = torch.stack([torch.randperm(p, generator=g) for _ in range(4)]).int()
    weights = [draw(4, p), draw(2, 4)]
    made = [
        Call("topk_encode", ops.topk_encode, {"x": x, **{w: sae[w] for w in ("W_enc", "b_enc")}},
             ("x",), ("x", "W_enc", "b_enc"), options={"k": k}),
        Call("topk_encode_fp8", ops.topk_encode_fp8,
             {"x": x, **{w: sae[w] for w in ("W_enc", "b_enc")}},
             ("x",), ("x", "W_enc", "b_enc"), options={"k": k}),
        Call("screen_weights", lambda W_enc: ops.screen_weights(W_enc)[1:], {"W_enc": draw(n, d)},
             ("W_enc",)),
        Call("sparse_decode", ops.sparse_decode,
             {**code, "W_dec": sae["W_dec"], "b_dec": sae["b_dec"]},
             ("values", "indices"), ("values", "W_dec", "b_dec")),
        Call("sae_loss", ops.sae_loss,
             {"x": x, **code, "W_dec": sae["W_dec"], "b_dec": sae["b_dec"]},
             ("x", "values", "indices"), ("x", "values", "W_dec", "b_dec")),
        *_ragged(x, sae, draw),
        _update(x, code, sae, draw, screen),
        Call("patch_rows", ops.patch_rows,
             {"base": draw(2, n, d), "sources": draw(1, d), "rows": table((0, 0, n), (1, 1, n)),
              "table": table((0, 1, 0, 2, 0, ops.REPLACE), (1, 1, 0, d, 0, ops.ADD)),
              "factors": draw(2)}, options={"total": 2 * n - 1}),
        Call("pack_weights", ops.pack_weights, {"W": draw(n, d)}, ("W",)),
        Call("packed_linear", ops.packed_linear,
             {"x": x, "packed": pack_weights(draw(5, d)), "bias": draw(5)}, ("x",),
             options={"o": 5}),
        Call("delta_linear", ops.delta_linear,
             {"x": x, **bases, "index": torch.arange(n) % 2,
              "packed": pack_weights(draw(5, d), "bf16")}, ("x", "index"), options={"o": 5}),
        Call("cascade_attention", ops.cascade_attention,
             {"q": q, "k": kv[0], "v": kv[1], **base, "rows": table((0, 3, 0, n, 0, n)),
              "q_positions": 3 + torch.arange(n, dtype=torch.int32), "first": first},
             options={"scale": 0.5}),
        Call("swap_key_attention", ops.swap_key_attention,
             {**swap, "rows": table((0, 1, n)), "first": first},
             options={"scale": 0.5, "total": n - 1}),
        Call("attribution_scores", ops.attribution_scores,
             {"source": x, "base": draw(n, d), "grad": draw(n, d)}, ("source", "base", "grad"),
             options={"units": 2}),
        Call("random_ranks", ops.random_ranks, {"samples": torch.arange(n)}, ("samples",),
             options={"p": p, "seed": 1}),
        Call("coalition_inputs", ops.coalition_inputs,
             {"x": draw(2, p), "background": draw(1, p), "ranks": orders,
              "rows": table(*((i % 2, 0, i % 4, 0, 1) for i in range(n)))}, ("rows",)),
        Call("coalition_gram", ops.coalition_gram,
             {"coalitions": torch.arange(n)[:, None] % 8, "weights": draw(1, n).abs().double(),
              "values": draw(2, n, 1).double()}, options={"p": p}),
        Call("shapley_reduce", ops.shapley_reduce,
             {"values": draw(n, 1, 2, 2, 2 * p + 1, 1), "ranks": orders.reshape(1, 2, 2, p)},
             ("values",), options={"paired": True}),
        Call("mlp_shapley", ops.mlp_shapley,
             {"x": draw(n, p), "background": draw(1, p), "ranks": orders.reshape(1, 2, 2, p),
              "weights": weights, "biases": [draw(4), None]}, ("x",),
             options={"activations": [ops.RELU, ops.IDENTITY]}),
    ]  # fmt: skip
    return {call.op: call for call in made}


def _ragged(x: Tensor, sae: Inputs, draw: Callable[..., Tensor]) -> list[Call]:
    """Codes whose rows have any number of entries, and what works on few features or whole rows."""
    encoder = {w: sae[w] for w in ("W_enc", "b_enc", "b_dec")}
    n, f = x.shape[0], sae["W_enc"].shape[0]
    offsets = torch.arange(0, 2 * n + 1, 2)
    entries = {"values": draw(2 * n), "indices": torch.arange(2 * n, dtype=torch.int32) % f}

    def thresholded(**inputs: Any) -> tuple[Tensor, ...]:
        code, window, candidates = ops.threshold_encode(**inputs)
        return (*code, *window, candidates)

    return [
        Call("batch_topk_encode", ops.batch_topk_encode, {"x": x, **encoder}, ("x",),
             ("x", *encoder), options={"k": 2}),
        Call("threshold_encode", thresholded, {"x": x, **encoder, "threshold": draw(f).abs()},
             ("x",), ("x", *encoder), options={"bandwidth": 0.5, "capacity": n * f}),
        Call("sparse_decode_csr", ops.sparse_decode,
             {**entries, "W_dec": sae["W_dec"], "b_dec": sae["b_dec"], "offsets": offsets},
             (), ("values", "W_dec", "b_dec")),
        Call("feature_clamp", ops.feature_clamp,
             {"x": x, "features": torch.tensor([1, 4]), "targets": draw(2), **encoder,
              "W_dec": sae["W_dec"]}, ("x",), ("x", "targets", *encoder, "W_dec")),
        Call("solu", ops.solu, {"x": x}, ("x",), ("x",)),
    ]  # fmt: skip


def _update(x: Tensor, code: Inputs, sae: Inputs, draw: Callable[..., Tensor], kind: str) -> Call:
    """A step of Adam with a screen to refresh."""
    rule = ops.UpdateRule()
    params = {name: tensor.clone() for name, tensor in sae.items()}
    moments = ops.moments_for(tuple(params.values()), rule)  # type: ignore[arg-type]
    screen = ops.screen_weights(params["W_enc"], kind)
    state = {**params, **{f"moment_{i}": m for i, m in enumerate(moments)}}
    state |= {"shadow": screen.shadow, "stats": screen.stats}
    gradients = {"grad_values": draw(*code["values"].shape), "grad_out": draw(*x.shape)}

    def function(**inputs: Any) -> Tensor:
        parts = ops.Code(**{name: inputs[name] for name in (*code, *gradients)}, scale=0.5)
        return ops.sae_update(
            parts,
            inputs["x"],
            tuple(inputs[name] for name in params),  # type: ignore[arg-type]
            [inputs[f"moment_{i}"] for i in range(8)],
            rule,
            1,
            screen=ops.Screen(screen.kind, inputs["shadow"], inputs["stats"]),
        )

    return Call(
        "sae_update", function, {"x": x, **code, **gradients, **state},
        ("x", *code, *gradients), mutates=tuple(state),
    )  # fmt: skip
