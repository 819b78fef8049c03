"""What a contender is measured on: activations, SAE weights, and batches to train on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from microtome._seed import generator
from microtome.testing import Case

HELD_OUT_ROWS = 512


@dataclass
class Inputs:
    """One case, in memory.

    Attributes:
        case: the sizes.
        x: [n, d] the timed batch.
        W_enc, b_enc, W_dec, b_dec: the weights that are timed; trained ones on real activations.
        initial: the four weights that training starts from.
        pool: [m, d] rows to train and evaluate on, or None for fresh Gaussian rows.
    """

    case: Case
    x: Tensor
    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    initial: tuple[Tensor, Tensor, Tensor, Tensor]
    pool: Tensor | None = None

    @property
    def weights(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The four timed weights: W_enc [f, d], b_enc [f], W_dec [f, d], b_dec [d]."""
        return self.W_enc, self.b_enc, self.W_dec, self.b_dec

    def batch(self, step: int) -> Tensor:
        """[n, d] training rows, the same for every contender."""
        g = generator(0, "batch", step)
        n, d = self.x.shape
        if self.pool is None:
            return torch.randn(n, d, generator=g)
        usable = self.pool.shape[0] - HELD_OUT_ROWS
        return self.pool[torch.randint(0, usable, (n,), generator=g)]

    def held_out(self) -> Tensor:
        """[512, d] rows that no batch contains."""
        if self.pool is None:
            return torch.randn(HELD_OUT_ROWS, self.x.shape[1], generator=generator(0, "held-out"))
        return self.pool[-HELD_OUT_ROWS:]


def initial_weights(
    f: int, d: int, b_dec: Tensor, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The usual start: unit decoder rows, the encoder equal to them, no encoder bias."""
    W_dec = torch.nn.functional.normalize(
        torch.randn(f, d, generator=generator(seed, "weights")), dim=1
    )
    return W_dec.clone(), torch.zeros(f), W_dec, b_dec


def gaussian(case: Case) -> Inputs:
    """Gaussian activations and random unit weights, with biases that no contender may skip."""
    W_enc, b_enc, W_dec, b_dec = initial_weights(case.f, case.d, torch.zeros(case.d))
    x = torch.randn(case.n, case.d, generator=generator(0, "x"))
    b_enc = 0.01 * torch.randn(case.f, generator=generator(0, "b_enc"))
    b_dec = 0.01 * torch.randn(case.d, generator=generator(0, "b_dec"))
    return Inputs(case, x, W_enc, b_enc, W_dec, b_dec, (W_enc, b_enc, W_dec, b_dec))


def save(path: Path, inputs: Inputs) -> None:
    """Write inputs with a pool to one safetensors file."""
    if inputs.pool is None:
        msg = "save: only inputs with a pool are worth a file; Gaussian ones are made anew."
        raise ValueError(msg)
    names = ("W_enc", "b_enc", "W_dec", "b_dec")
    tensors = {"x": inputs.x, "pool": inputs.pool, **dict(zip(names, inputs.weights, strict=True))}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: t.contiguous().clone() for name, t in tensors.items()}, path)


def load(path: Path, case: Case) -> Inputs:
    """Read what `save` wrote; training starts from the usual weights, b_dec at the pool's mean."""
    tensors = load_file(path)
    pool = tensors["pool"]
    initial = initial_weights(case.f, case.d, pool[:-HELD_OUT_ROWS].mean(0))
    weights = (tensors["W_enc"], tensors["b_enc"], tensors["W_dec"], tensors["b_dec"])
    return Inputs(case, tensors["x"], *weights, initial, pool)


def held_out_fvu(inputs: Inputs, weights: tuple[Tensor, Tensor, Tensor, Tensor]) -> float:
    """Fraction of variance unexplained on the held-out rows, by one program for all contenders.

        FVU = sum |x - x_hat|^2 / sum |x - mean x|^2

    Args:
        inputs: whose held-out rows and k are used.
        weights: W_enc [f, d], b_enc [f], W_dec [f, d], b_dec [d].
    """
    W_enc, b_enc, W_dec, b_dec = (w.detach() for w in weights)
    x = inputs.held_out()
    error = 0.0
    for rows in x.split(128):
        values, indices = torch.nn.functional.linear(rows - b_dec, W_enc, b_enc).topk(inputs.case.k)
        code = {"per_sample_weights": values.relu(), "mode": "sum"}
        error += float(
            (torch.nn.functional.embedding_bag(indices, W_dec, **code) + b_dec - rows)
            .double()
            .pow(2)
            .sum()
        )
    return error / float((x - x.mean(0)).double().pow(2).sum())
