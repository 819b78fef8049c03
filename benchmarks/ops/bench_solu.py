"""solu beside x * softmax(x), and beside a copy of as many bytes.

`python -m benchmarks.ops.bench_solu [CASE ...]`
"""

from __future__ import annotations

import functools

import torch

from benchmarks.side_by_side import Contest, main
from microtome._seed import generator
from microtome.ops import solu


def neurons(n: int, d: int) -> Contest:
    """The hidden layer of a SoLU model."""
    x = 2.0 * torch.randn(n, d, generator=generator(0, "solu", n, d))
    still = torch.empty_like(x)
    return Contest(
        ways={"solu": lambda: solu(x), "x * softmax(x)": lambda: x * x.softmax(-1)},
        unit=("copy_ into a buffer", lambda: still.copy_(x)),
        plain=x * x.softmax(-1),
        exact=x.double() * x.double().softmax(-1),
        picked=lambda answer: answer,
        figures={"rows": n, "columns": d, "MB": 1e-6 * x.nbytes},
    )


CASES = {
    "small": functools.partial(neurons, 2048, 2048),
    "wide": functools.partial(neurons, 512, 16384),
}

if __name__ == "__main__":
    main("solu", CASES)
