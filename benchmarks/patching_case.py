"""The sweeps that are measured, their model and prompts, and what a contender has to offer."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

# The metric: the logit of the first token less that of the second, at the last position.
ANSWERS = (11, 12)


@dataclass(frozen=True)
class Shape:
    """A GPT-2 of these sizes; the MLP is four times as wide as the model.

    Attributes:
        layers: blocks.
        d: model width.
        heads: attention heads of a block.
        vocabulary: tokens.
        positions: the longest prompt.
    """

    layers: int = 12
    d: int = 768
    heads: int = 12
    vocabulary: int = 5000
    positions: int = 128


@dataclass(frozen=True)
class Sweep:
    """One grid: every (layer, position) of resid_pre, or every (layer, head) of z at all positions.

    Attributes:
        name: its word on the command line.
        site: "resid_pre" or "z".
        length: tokens of the prompt.
        shape: of the model.
        differ: "one" if clean and corrupted differ in one token, a quarter into the prompt, so that
            no cell before it can change anything; "all" if they differ in all.
    """

    name: str
    site: str
    length: int
    shape: Shape = Shape()
    differ: str = "one"

    @property
    def first(self) -> int:
        """The position of the first token that differs."""
        return self.length // 4 if self.differ == "one" else 0

    @property
    def columns(self) -> int:
        """Cells of a layer: positions, or heads."""
        return self.length if self.site == "resid_pre" else self.shape.heads

    def chosen(self, stride: int) -> list[int]:
        """Every stride-th column, the last among them; a peer that takes too long does only these.

        Each cell costs a peer the same, so the whole grid's time is the measured one times columns
        over chosen columns.
        """
        return list(range(stride - 1, self.columns, stride))


SWEEPS = {
    sweep.name: sweep
    for sweep in (
        Sweep("resid-16", "resid_pre", 16),
        Sweep("head-16", "z", 16),
        Sweep("resid-64", "resid_pre", 64),
        Sweep("head-64", "z", 64),
        Sweep("resid-16-all", "resid_pre", 16, differ="all"),
        Sweep("head-16-all", "z", 16, differ="all"),
        Sweep("resid-64-all", "resid_pre", 64, differ="all"),
        Sweep("head-64-all", "z", 64, differ="all"),
    )
}


@dataclass(frozen=True)
class Question:
    """A sweep with its model and prompts in hand.

    Attributes:
        sweep: what is asked.
        folder: where `save_model` put the model.
        model: a GPT2LMHeadModel loaded from it, in eval mode.
        clean: [1, length] int64, the run that activations are taken from.
        corrupted: [1, length] int64, the run that they are put into.
        columns: which columns of the grid are wanted.
        between: a contender that sweeps layer by layer calls it after each layer; time spent in it
            is not the sweep's.
    """

    sweep: Sweep
    folder: Path
    model: Any
    clean: Tensor
    corrupted: Tensor
    columns: list[int]
    between: Callable[[], None] = lambda: None

    def part(self, column: int) -> slice:
        """Where z of head `column` lies in the model width."""
        size = self.sweep.shape.d // self.sweep.shape.heads
        return slice(column * size, (column + 1) * size)


class Contender(NamedTuple):
    """One way to sweep, ready to be measured.

    Attributes:
        run: sweeps from the prompts to the grid [layers, columns], the clean run included.
        warm: a small piece of it, untimed: what happens once per process belongs to no sweep. None
            for one whole sweep, which is timed on its own: a model may be read and kept there.
        about: what there is to say of the last run, for the JSON.
    """

    run: Callable[[], Tensor]
    warm: Callable[[], object] | None
    about: Callable[[], dict[str, Any]] = dict


def metric(logits: Tensor) -> Tensor:
    """Logit difference of ANSWERS at the last position of the first row of logits [b, t, v]."""
    return logits[0, -1, ANSWERS[0]] - logits[0, -1, ANSWERS[1]]


def row_metric(logits: Tensor) -> Tensor:
    """The same for every row: [b]."""
    return logits[:, -1, ANSWERS[0]] - logits[:, -1, ANSWERS[1]]


def save_model(folder: Path, shape: Shape, seed: int = 0) -> Path:
    """Write a GPT-2 with random weights, once, and return where it lies.

    Args:
        folder: the cache; the model gets a folder of its own in it, named for its sizes.
        shape: the sizes.
        seed: of its initial weights.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = (shape.layers, shape.d, shape.heads, shape.vocabulary, shape.positions)
    path = folder / ("gpt2-" + "-".join(map(str, sizes)))
    if not (path / "config.json").exists():
        config = GPT2Config(
            n_layer=shape.layers,
            n_embd=shape.d,
            n_head=shape.heads,
            vocab_size=shape.vocabulary,
            n_positions=shape.positions,
            bos_token_id=None,
            eos_token_id=None,
        )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = GPT2LMHeadModel(config)
        partial = path.with_name(path.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        model.save_pretrained(partial)
        partial.rename(path)
    return path


def load_model(folder: Path) -> Any:
    """The saved model in float32 and eval mode, with transformers' own choice of attention."""
    from transformers import GPT2LMHeadModel

    return GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).eval()


def question(sweep: Sweep, folder: Path, *, stride: int = 1) -> Question:
    """Load the model and make the prompts: random tokens, one or all others in the corrupted."""
    generator = torch.Generator().manual_seed(sweep.length)
    vocabulary = sweep.shape.vocabulary
    clean = torch.randint(vocabulary, (1, sweep.length), generator=generator)
    corrupted = clean.clone()
    where = slice(sweep.first, sweep.first + 1 if sweep.differ == "one" else None)
    corrupted[:, where] = (clean[:, where] + vocabulary // 2) % vocabulary
    return Question(sweep, folder, load_model(folder), clean, corrupted, sweep.chosen(stride))
