"""The ops: each a torch op with a pure-PyTorch reference and as many native kernels as pay."""

from microtome.ops._registry import info, use_backend
from microtome.ops.attribution_scores import attribution_scores
from microtome.ops.cascade_attention import cascade_attention, swap_key_attention
from microtome.ops.coalition_gram import coalition_gram
from microtome.ops.coalition_inputs import coalition_inputs
from microtome.ops.delta_linear import delta_linear
from microtome.ops.mlp_shapley import (
    ELU,
    GELU,
    GELU_TANH,
    IDENTITY,
    LEAKY_RELU,
    RELU,
    SIGMOID,
    SILU,
    SOFTPLUS,
    TANH,
    mlp_shapley,
)
from microtome.ops.pack_weights import pack_weights
from microtome.ops.packed_linear import packed_linear
from microtome.ops.patch_rows import ADD, REPLACE, SCALE, ZERO, patch_rows
from microtome.ops.random_ranks import random_ranks
from microtome.ops.sae_loss import sae_loss
from microtome.ops.sae_update import Code, UpdateRule, moments_for, sae_update
from microtome.ops.screen_weights import Screen, screen_weights
from microtome.ops.shapley_reduce import shapley_reduce
from microtome.ops.sparse_decode import sparse_decode
from microtome.ops.topk_encode import topk_encode

__all__ = [
    "ADD",
    "ELU",
    "GELU",
    "GELU_TANH",
    "IDENTITY",
    "LEAKY_RELU",
    "RELU",
    "REPLACE",
    "SCALE",
    "SIGMOID",
    "SILU",
    "SOFTPLUS",
    "TANH",
    "ZERO",
    "Code",
    "Screen",
    "UpdateRule",
    "attribution_scores",
    "cascade_attention",
    "coalition_gram",
    "coalition_inputs",
    "delta_linear",
    "info",
    "mlp_shapley",
    "moments_for",
    "pack_weights",
    "packed_linear",
    "patch_rows",
    "random_ranks",
    "sae_loss",
    "sae_update",
    "screen_weights",
    "shapley_reduce",
    "sparse_decode",
    "swap_key_attention",
    "topk_encode",
    "use_backend",
]
