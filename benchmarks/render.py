"""Tables from the JSON under results/, and the check that README's figures stand in it.

`python benchmarks/run.py --render benchmarks/results/*.json` prints both tables.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks import patching_table, shapley_table

Result = dict[str, Any]
Row = dict[str, Any]
_DECIMAL = re.compile(r"(?<![\w.])\d+\.\d+(?![\w.])")


def read(paths: Iterable[Path]) -> list[Result]:
    """Load results, oldest first."""
    results = [json.loads(path.read_text()) for path in paths]
    return sorted(results, key=lambda result: str(result["machine"]["date"]))


def markdown(result: Result) -> str:
    """Everything in one result: the machine, its ceilings, and one table a case."""
    if result.get("kind") == "patching":
        return patching_table.markdown(result)
    if result.get("kind") == "shapley":
        return shapley_table.markdown(result)
    m, limits = result["machine"], result["ceilings"]
    versions = ", ".join(f"{name} {version}" for name, version in m["versions"].items() if version)
    lines = [
        f"{m['cpu']}, {m['cores']} cores, {' '.join(m['flags'])}; level in use: {m['isa']}, "
        f"screen {m['screen']}; {m['threads']} threads; {m['date']}; commit {m['commit']}",
        f"Python {m['python']}, {versions}",
        f"ceilings: copy {limits['copy_gbs']:.1f} GB/s, fp32 product {limits['fp32_gflops']:.0f} "
        f"(as G32: {limits['g32_gflops']:.0f}), bf16 {limits['bf16_gflops']:.0f} GFLOP/s",
    ]
    if result.get("imports"):
        seconds = result["imports"]
        lines.append(
            f"imports: torch {seconds['torch']:.2f} s; microtome adds {seconds['microtome']:.3f} s,"
            f" microtome.ops {seconds['ops']:.3f} s more"
        )
    for name in dict.fromkeys(row["case"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["case"] == name]
        lines += [
            "",
            f"**{_title(name, result)}**",
            "",
            *_table(rows, result["floors"].get(name, {})),
        ]
    return "\n".join(lines)


def _title(name: str, result: Result) -> str:
    sizes = result["cases"].get(name)
    return (
        f"{name}: (n, d, f, k) = ({sizes['n']}, {sizes['d']}, {sizes['f']}, {sizes['k']})"
        if sizes
        else name
    )


def _table(rows: list[Row], floors: dict[str, Any]) -> list[str]:
    kept = "candidates: mean, median, p99, max"
    head = f"| op | contender | G32 | quartiles | ms | floor | peak MiB | {kept} | FVU |"
    lines = [head, "|" + "---|" * (head.count("|") - 1)]
    for row in rows:
        floor = floors.get(row["op"])
        allowed = f"{floor['ratio']:.2f}" if floor else ""
        if row["status"] != "ok":
            problem = f"{row['status']}: {row['error']}" if "error" in row else row["status"]
            lines.append(f"| {row['op']} | {row['contender']} | {problem} | | | {allowed} | | | |")
            continue
        if "extra_mib" in row:
            memory = f"{row['extra_mib']:.0f} of {row['limit_mib']:.0f}"
            lines.append(f"| {row['op']} | {row['contender']} | | | | | {memory} | | |")
            continue
        low, high = row["ratio_quartiles"]
        peak = f"{row['peak_mib']:.0f}" + (
            f" of {row['allowed_mib']:.0f}" if "allowed_mib" in row else ""
        )
        s = row.get("survivors")
        kept = f"{s['mean']:.1f}, {s['median']:.0f}, {s['p99']:.0f}, {s['max']}" if s else ""
        fvu = f"{row['fvu']:.4f} after {row['fvu_steps']}" if "fvu" in row else ""
        lines.append(
            f"| {row['op']} | {row['contender']} | {row['ratio']:.2f} | {low:.2f} - {high:.2f} "
            f"| {row['ms']:.1f} | {allowed} | {peak} | {kept} | {fvu} |"
        )
    return lines


def readme_table(result: Result) -> str:
    """README's table in units of G32: a line an op and contender, a column a case."""
    if result.get("kind") == "patching":
        return patching_table.readme_table(result)
    cases = [name for name in result["cases"] if any(row["case"] == name for row in result["rows"])]
    lines = ["| | " + " | ".join(cases) + " |", "|---|" + "---|" * len(cases)]
    keys = dict.fromkeys((row["op"], row["contender"]) for row in result["rows"] if "ratio" in row)
    for op in dict.fromkeys(op for op, _ in keys):
        for contender in (c for o, c in keys if o == op):
            cells = [_cell(result, name, op, contender) for name in cases]
            lines.append(f"| {op}, {contender} | " + " | ".join(cells) + " |")
        floors = [result["floors"].get(name, {}).get(op) for name in cases]
        lines.append(
            f"| {op}, floor | "
            + " | ".join(f"{x['ratio']:.2f}" if x else "" for x in floors)
            + " |"
        )
    return "\n".join(lines)


def _cell(result: Result, case: str, op: str, contender: str) -> str:
    for row in result["rows"]:
        if (row["case"], row["op"], row["contender"]) == (case, op, contender):
            return f"{row['ratio']:.2f}" if row["status"] == "ok" else "FAILED"
    return ""


def figures(results: Iterable[Result]) -> set[str]:
    """Every figure that a README may state, as it would be printed."""
    said: set[str] = set()
    for result in results:
        if result.get("kind") == "patching":
            said |= patching_table.figures(result)
            continue
        if result.get("kind") == "shapley":
            said |= shapley_table.figures(result)
            continue
        said |= {f"{v:.1f}" for v in result["ceilings"].values()}
        imports = result.get("imports") or {}
        said |= {f"{v:.{places}f}" for v in imports.values() for places in (2, 3)}
        for floors in result["floors"].values():
            said |= {f"{floor['ratio']:.2f}" for floor in floors.values()}
        for row in result["rows"]:
            if row["status"] != "ok":
                continue
            ratios = [row["ratio"], *row["ratio_quartiles"]] if "ratio" in row else []
            said |= {f"{v:.{places}f}" for v in ratios for places in (1, 2)}
            if "fvu" in row:
                said |= {f"{row['fvu']:.{places}f}" for places in (2, 3, 4)}
            if "survivors" in row:
                said.add(f"{row['survivors']['mean']:.1f}")
    return said


def unsupported(readme: str, results: Iterable[Result]) -> list[str]:
    """Find decimal numbers in README's speed section that no result holds.

    The section runs from a heading that starts with "Speed" to the next heading.

    Args:
        readme: the text.
        results: what `read` returned.

    Returns:
        The numbers that no JSON holds, in order. Version numbers with two points are not decimals.
    """
    section = re.search(r"^#+ Speed.*?(?=^#+ |\Z)", readme, re.MULTILINE | re.DOTALL)
    if section is None:
        return []
    said = figures(results)
    return [number for number in _DECIMAL.findall(section.group()) if number not in said]
