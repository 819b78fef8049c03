"""What the cases of several ranks share: small data, an SAE away from its start, comparisons."""

import pytest
import torch

from microtome import SAE, TopK
from microtome.sae.sharded_step import ShardedStep
from microtome.sae.step import FusedStep

N, D, F = 33, 12, 50  # neither is a multiple of 2 or 3


def rows(seed: int = 0, n: int = N, d: int = D) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def moved(k: int = 7, f: int = F, **options) -> SAE:
    """An SAE away from where it starts, so that encoder and decoder differ."""
    sae = SAE(D, f, TopK(k), seed=1, **options)
    with torch.no_grad():
        sae.W_enc += 0.3 * rows(7, f)
        sae.b_enc += 0.1 * rows(8, 1, f)[0]
        sae.b_dec += rows(9, 1)[0]
    return sae


def same(mine: torch.Tensor, theirs: torch.Tensor, what: str = "") -> None:
    assert torch.equal(mine, theirs), f"{what}: {(mine - theirs).abs().max()}"


def mine_of(ours, tensor: torch.Tensor) -> torch.Tensor:
    """This rank's rows of a tensor over all features."""
    return tensor[ours.features.start : ours.features.stop]


def same_state(ours, step: ShardedStep, sae: SAE, alone: FusedStep) -> None:
    """Parameters, moments and counts are those of one process, to the bit."""
    whole = [*sae.parameters_in_order, *alone.moments, alone.since_fired]
    shards = [*ours.parameters_in_order, *step.moments, step.since_fired]
    for i, (a, b) in enumerate(zip(shards, whole, strict=True)):
        if a is None or b is None:
            assert a is b
            continue
        same(a, b if a.shape == b.shape == (D,) else mine_of(ours, b), f"tensor {i}")


def refuses(kind: type[BaseException], text: str, call) -> None:
    with pytest.raises(kind) as caught:
        call()
    assert text in str(caught.value), str(caught.value)
