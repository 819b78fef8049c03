"""mlp_shapley beside the product it needs: `python benchmarks/ops/bench_mlp_shapley.py`.

The game is that of a 30-128-128-1 ReLU network with 100 background rows: "crossed", 10 antithetic
pairs of orders shared by all background rows (58,000 evaluations of the model), and "nested", 2
pairs for each of them (11,600). The floor is the second layer's product on as many rows, by
packed_linear or delta_linear in pieces that the caches hold. Entries that a ReLU leaves zero in
neighbouring rows are left out, so the floor can be undercut. "torch" is the reference: masked
inputs, the model, the reduction.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.linear import seconds
from benchmarks.machine import describe, isa
from microtome._seed import generator
from microtome.ops import (
    GELU,
    IDENTITY,
    RELU,
    delta_linear,
    mlp_shapley,
    pack_weights,
    packed_linear,
    use_backend,
)

ROOT = Path(__file__).resolve().parents[2]
WIDTH, COLUMNS, ROWS = 128, 30, 100
DESIGNS = {"crossed": (1, 10), "nested": (ROWS, 2)}  # strata, units: pairs of orders
ACTIVATIONS = {"relu": (RELU, nn.ReLU), "gelu": (GELU, nn.GELU)}
ALLOWED = {"fp32": 1e-5, "bf16": 2e-2}  # of the largest gain
PIECE = 2320  # rows of the floor's product that are multiplied at once
Arguments = dict[str, Any]


def network(x: Tensor, target: Tensor, activation: type[nn.Module]) -> nn.Sequential:
    """A network trained for 200 steps, so that its units are neither all alive nor all dead."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Linear(COLUMNS, WIDTH), activation(), nn.Linear(WIDTH, WIDTH), activation()]
        net = nn.Sequential(*layers, nn.Linear(WIDTH, 1))
    adam = torch.optim.Adam(net.parameters(), 1e-3)
    for _ in range(200):
        adam.zero_grad()
        (net(x) - target).square().mean().backward()  # type: ignore[no-untyped-call]
        adam.step()
    return net.requires_grad_(False)


def game(design: str, activation: str, explicands: int) -> Arguments:
    """The arguments of mlp_shapley, but for the precision.

    Columns are correlated, and the target is a sum of products and steps of them.
    """
    g = generator(0, "mlp_shapley")
    x = torch.randn(600, 8, generator=g) @ torch.randn(8, COLUMNS, generator=g) / 8**0.5
    x = x + 0.5 * torch.randn(600, COLUMNS, generator=g)
    target = (x[:, :1] * x[:, 1:2]).tanh() + (x[:, 2:3] > x[:, 3:4]) - x[:, 4:9].mean(1, True).abs()
    code, module = ACTIVATIONS[activation]
    layers = [layer for layer in network(x, target, module) if isinstance(layer, nn.Linear)]
    S, U = DESIGNS[design]
    orders = torch.rand(S, U, 1, COLUMNS, generator=g).argsort(-1).to(torch.int32)
    return {
        "x": x[ROWS : ROWS + explicands].contiguous(),
        "background": x[:ROWS].contiguous(),
        "ranks": orders,
        "weights": [layer.weight.detach() for layer in layers],
        "biases": [layer.bias.detach() for layer in layers],
        "activations": [code, code, IDENTITY],
    }


def floor(rows: int, precision: str) -> Callable[[], Tensor]:
    """The second layer's product on `rows` rows."""
    g = generator(0, "floor")
    x, W = torch.randn(PIECE, WIDTH, generator=g).relu(), torch.randn(WIDTH, WIDTH, generator=g)
    packed, bias = pack_weights(W, precision), torch.zeros(WIDTH)
    base, index = torch.zeros(1, WIDTH), torch.zeros(PIECE, dtype=torch.int32)
    sizes = [PIECE] * (rows // PIECE) + [rows % PIECE] * (rows % PIECE > 0)

    def run() -> Tensor:
        y = base
        for n in sizes:
            if precision == "fp32":
                y = packed_linear(x[:n], packed, WIDTH, bias)
            else:
                y = delta_linear(x[:n], base, base, index[:n], packed, WIDTH)
        return y

    return run


def reference(arguments: Arguments) -> Tensor:
    """The means by plain torch."""
    with use_backend("reference"):
        return mlp_shapley(**arguments)[0]


def wide(arguments: Arguments) -> Arguments:
    """The same game in float64."""
    tensors = {name: arguments[name].double() for name in ("x", "background")}
    layers = {name: [t.double() for t in arguments[name]] for name in ("weights", "biases")}
    return {**arguments, **tensors, **layers}


def measure(design: str, activation: str, precision: str, e: int, reps: int) -> dict[str, Any]:
    """One row: the check, then ours, the floor and torch in turn."""
    arguments = game(design, activation, e)
    one = {**arguments, "x": arguments["x"][:1]}
    row: dict[str, Any] = {
        "design": design,
        "activation": activation,
        "precision": precision,
        "explicands": e,
    }
    exact = reference(wide(one))
    error = (mlp_shapley(**one, precision=precision)[0] - exact).abs().max() / exact.abs().max()
    row["error"] = float(error)
    if not row["error"] <= ALLOWED[precision]:
        return {**row, "status": "FAILED", "why": f"error {error:.1e} > {ALLOWED[precision]:.0e}"}
    rows = DESIGNS[design][1] * 2 * (COLUMNS - 1) * ROWS
    product = floor(rows, precision)
    contenders: dict[str, Callable[[int], Tensor]] = {
        "mlp_shapley": lambda _: mlp_shapley(**arguments, precision=precision)[0],
        "floor": lambda _: product(),
        "torch": lambda _: reference(one),
    }
    times = seconds(contenders, 1, reps)
    best = {name: min(t) for name, t in times.items()}
    best["mlp_shapley"] /= e
    row.update(
        status="ok",
        evaluations=rows,
        reps=reps,
        ms={name: 1e3 * t for name, t in best.items()},
        median_ms={
            name: 1e3 * statistics.median(t) / (e if name == "mlp_shapley" else 1)
            for name, t in times.items()
        },
        of_floor=best["floor"] / best["mlp_shapley"],
    )
    return row


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    start = f"| {row['design']} | {row['activation']} | {row['precision']} | {row['explicands']} |"
    if row["status"] != "ok":
        return f"{start} FAILED: {row['why']} |"
    ms = row["ms"]
    return (
        f"{start} {ms['mlp_shapley']:.2f} | {ms['floor']:.2f} | {100 * row['of_floor']:.0f} % | "
        f"{ms['torch']:.1f} | {row['error']:.0e} |"
    )


def main(words: Sequence[str] | None = None) -> int:
    """Print the table and write it to <out>/mlp_shapley-<isa>.json; 1 if a row FAILED."""
    parser = argparse.ArgumentParser(description="Shapley values of an MLP: ms for an explicand")
    parser.add_argument("--explicands", type=int, nargs="+", default=[1, 256])
    parser.add_argument("--designs", nargs="+", default=list(DESIGNS), choices=DESIGNS)
    parser.add_argument("--activations", nargs="+", default=list(ACTIVATIONS), choices=ACTIVATIONS)
    parser.add_argument("--reps", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "ops")
    options = parser.parse_args(words)
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    result: dict[str, Any] = {"op": "mlp_shapley", "machine": describe(options.threads), "rows": []}
    print("| design | activation | precision | explicands | ms | floor | of it | torch | error |")
    try:
        for design in options.designs:
            for activation in options.activations:
                for precision in ALLOWED:
                    for e in options.explicands:
                        row = measure(design, activation, precision, e, options.reps)
                        print(line(row), flush=True)
                        result["rows"].append(row)
    finally:
        torch.set_num_threads(before)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"mlp_shapley-{isa()}.json").write_text(json.dumps(result, indent=1) + "\n")
    return int(any(row["status"] != "ok" for row in result["rows"]))


if __name__ == "__main__":
    sys.exit(main())
