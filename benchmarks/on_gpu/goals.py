"""What was to be reached before anything was measured: the acceptance table, judged from rows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]
CUBLAS, TORCH, SPARSIFY, OPENAI = "bf16 product", "torch", "eai-sparsify", "OpenAI-style"
UNMEASURED = "not measured yet"


@dataclass(frozen=True)
class Goal:
    """One number to reach.

    Attributes:
        item: the row's item.
        shape: the row's shape.
        against: "floor", a contender beside it, or a figure of the row itself.
        limit: the bound.
        least: the contender must be at least `limit` times slower; else ours may be at most `limit`
            times it (or the figure at most `limit`).
        what: the kernel, for the page.
    """

    item: str
    shape: str
    against: str
    limit: float
    least: bool = False
    what: str = ""

    def words(self) -> str:
        """The goal in a few words."""
        if self.least:
            return f"at least {self.limit:g} times faster than {self.against}"
        if self.against in FIGURES:
            return f"{FIGURES[self.against]} at most {self.limit:g}"
        return f"at most {self.limit:g} times the {self.against}"

    def value(self, row: Row) -> float | None:
        """The number that is judged, or None where the row lacks it."""
        if self.against == "floor":
            found = row.get("over_floor")
        elif self.against in FIGURES:
            found = row.get("figures", {}).get(self.against)
        else:
            other = row.get("beside", {}).get(self.against, {})
            found = other.get("ratio")
            found = 1 / found if self.least and found else found
        return float(found) if isinstance(found, (int, float)) else None

    def met(self, value: float) -> bool:
        """Whether a value reaches the goal."""
        return value >= self.limit if self.least else value <= self.limit


FIGURES = {
    "dense_latent_ratio": "a latent on every row: time over that without",
    "memory_share": "peak memory as a share of the dense step's",
    "memory_ratio": "peak memory over (parameters + states + x and gradient + 64 MiB)",
}

MIXED = "bf16 rows over float32 parameters"
GOALS = (
    Goal("topk_encode", "S", CUBLAS, 1.45, what="exact top-k encode"),
    Goal("topk_encode", "M", CUBLAS, 1.25, what="exact top-k encode"),
    Goal("topk_encode", "L", CUBLAS, 1.25, what="exact top-k encode"),
    Goal("sae_loss bf16", "M", "floor", 1.35, what="decode, loss and gradient of the values"),
    Goal("sae_loss", "M", "floor", 1.35, what="decode, loss and gradient of the values, float32"),
    Goal("sae_update", "M", "floor", 1.3, what="segments, gradients and Adam"),
    Goal("sae_update", "M", "dense_latent_ratio", 1.05, what="segments with one dense latent"),
    Goal("sae_update mixed", "M", "floor", 1.3, what=f"segments, gradients and Adam, {MIXED}"),
    Goal("sae_update int8", "M", "floor", 1.4, what="8-bit optimizer states"),
    Goal("batch_topk_encode", "M", CUBLAS, 1.3, what="BatchTopK encode"),
    Goal("batch_topk_encode", "M", TORCH, 2.0, least=True, what="BatchTopK encode"),
    Goal("threshold_encode", "M", CUBLAS, 1.3, what="JumpReLU encode"),
    *(
        goal
        for item, kind in (("step mixed", MIXED), ("step", "float32"))
        for goal in (
            Goal(item, "M", "floor", 1.35, what=f"full TopK step, {kind}"),
            Goal(item, "L", "floor", 1.35, what=f"full TopK step, {kind}"),
            Goal(item, "M", SPARSIFY, 1.7, least=True, what=f"full TopK step, {kind}"),
            Goal(item, "M", OPENAI, 1.4, least=True, what=f"full TopK step, {kind}"),
            Goal(item, "M", "memory_share", 0.05, what=f"extra memory of a step, {kind}"),
            Goal(item, "M", "memory_ratio", 1.05, what=f"all memory of a step, {kind}"),
        )
    ),
    Goal("patch_rows", "768", "floor", 1.15, what="expand and patch"),
    Goal("feature_clamp", "M", "floor", 1.2, what="SAE-feature clamp"),
    Goal("coalition_inputs", "784", "floor", 1.3, what="masked inputs"),
    Goal("shapley_reduce", "784", "floor", 1.3, what="marginal contributions"),
)  # fmt: skip


def judge(row: Row) -> list[dict[str, Any]]:
    """The goals of a row that was measured, with the numbers reached."""
    out = []
    for goal in GOALS:
        if (goal.item, goal.shape) != (row["item"], row.get("shape", "")):
            continue
        value = goal.value(row)
        if value is not None:
            words = goal.words()
            out.append({"goal": words, "value": value, "met": goal.met(value)})
    return out


def acceptance(rows: Iterable[Row]) -> str:
    """The acceptance table in Markdown; rows that no result holds say so.

    Where several backends ran, the best value stands.
    """
    rows = list(rows)
    lines = ["| kernel | item | shape | goal | reached |", "|---|---|---|---|---|"]
    for goal in GOALS:
        values = [
            (value, row)
            for row in rows
            if (row["item"], row.get("shape", "")) == (goal.item, goal.shape)
            and row["status"] == "ok"
            and (value := goal.value(row)) is not None
        ]
        reached = UNMEASURED
        if values:
            pick = max if goal.least else min
            value, row = pick(values, key=lambda pair: pair[0])
            verdict = "met" if goal.met(value) else "not met"
            reached = f"{value:.3g} ({verdict}, {row.get('backend') or 'auto'})"
        what = f"| {goal.what} | `{goal.item}` | {goal.shape} | {goal.words()} | {reached} |"
        lines.append(what)
    return "\n".join(lines)
