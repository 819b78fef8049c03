"""Sparse autoencoders: the module, fused training, evaluation, and the SAELens file layout."""

from microtome.sae.code import SparseCode
from microtome.sae.config import TrainConfig
from microtome.sae.evaluate import Evaluation, evaluate
from microtome.sae.sae import SAE, TopK
from microtome.sae.sharded import ShardedSAE
from microtome.sae.sharding import shard
from microtome.sae.source import ActivationSource, InMemory
from microtome.sae.train import TrainResult, train

__all__ = [
    "SAE",
    "ActivationSource",
    "Evaluation",
    "InMemory",
    "ShardedSAE",
    "SparseCode",
    "TopK",
    "TrainConfig",
    "TrainResult",
    "evaluate",
    "shard",
    "train",
]
