"""The ops: each a torch op with a pure-PyTorch reference and as many native kernels as pay."""

from microtome._csr import Entries
from microtome._pending import check_now, synchronize
from microtome.ops._explain import attach, explain
from microtome.ops._registry import info, use_backend
from microtome.ops.attribution_scores import attribution_scores
from microtome.ops.batch_topk_encode import batch_topk_encode
from microtome.ops.cascade_attention import cascade_attention, swap_key_attention
from microtome.ops.coalition_gram import coalition_gram
from microtome.ops.coalition_inputs import coalition_inputs
from microtome.ops.delta_linear import delta_linear
from microtome.ops.feature_clamp import feature_clamp
from microtome.ops.jump_relu import jump_relu
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
from microtome.ops.sae_update import Code, RowGradients, UpdateRule, moments_for, sae_update
from microtome.ops.screen_weights import Screen, screen_weights
from microtome.ops.shapley_reduce import shapley_reduce
from microtome.ops.solu import solu
from microtome.ops.sparse_decode import sparse_decode
from microtome.ops.threshold_encode import threshold_encode
from microtome.ops.topk_encode import topk_encode
from microtome.ops.topk_encode_fp8 import topk_encode_fp8

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
    "Entries",
    "RowGradients",
    "Screen",
    "UpdateRule",
    "attribution_scores",
    "batch_topk_encode",
    "cascade_attention",
    "check_now",
    "coalition_gram",
    "coalition_inputs",
    "delta_linear",
    "explain",
    "feature_clamp",
    "info",
    "jump_relu",
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
    "solu",
    "sparse_decode",
    "swap_key_attention",
    "synchronize",
    "threshold_encode",
    "topk_encode",
    "topk_encode_fp8",
    "use_backend",
]

attach(globals())
del attach
