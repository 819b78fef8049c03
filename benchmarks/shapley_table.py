"""Tables from a Shapley JSON, and the figures that a page may take from it."""

from __future__ import annotations

from typing import Any

Result = dict[str, Any]
Row = dict[str, Any]


def markdown(result: Result) -> str:
    """The machine, then one table a case and thread count."""
    m = result["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in m["versions"].items() if version)
    lines = [
        f"{m['cpu']}, {m['cores']} cores, {' '.join(m['flags'])}; level in use: {m['isa']}; "
        f"{m['date']}; commit {m['commit']}",
        f"Python {m['python']}, {versions}",
    ]
    for case, threads in dict.fromkeys((row["case"], row["threads"]) for row in result["rows"]):
        rows = [r for r in result["rows"] if (r["case"], r["threads"]) == (case, threads)]
        lines += ["", f"**{case}**, {threads} thread{'s' if threads > 1 else ''}", ""]
        lines += _table(rows)
    return "\n".join(lines)


def _table(rows: list[Row]) -> list[str]:
    if any("working_mib" in row for row in rows):
        lines = ["| contender | working MiB | ms |", "|---|---|---|"]
        for row in rows:
            lines.append(f"| {row['contender']} | {row['working_mib']:.0f} | {row['ms']:.0f} |")
        return lines
    head = "| contender | ms a row | least - most | model rows | error | ms for 3 % | first ms |"
    lines = [head, "|" + "---|" * 7]
    for row in rows:
        if row["status"] != "ok":
            problem = f"{row['status']}: {row.get('error', '')}"
            lines.append(f"| {row['contender']} | {problem} | | | | | |")
            continue
        error = f"{row['error']:.4f}" if "error" in row else ""
        equal = f"{row['ms_for_3_percent']:.2f}" if "error" in row else ""
        lines.append(
            f"| {row['contender']} | {row['ms']:.3f} | {row['ms_least']:.3f} - "
            f"{row['ms_most']:.3f} | {row['evaluations']:.0f} | {error} | {equal} | "
            f"{row.get('first_ms', 0.0):.1f} |"
        )
    return lines


def figures(result: Result) -> set[str]:
    """Every figure that a README may state from it, as it would be printed."""
    said: set[str] = set()
    names = ("ms", "ms_least", "ms_most", "error", "ms_for_3_percent", "first_ms", "working_mib")
    for row in result["rows"]:
        values = [row[name] for name in names if name in row]
        said |= {f"{value:.{places}f}" for value in values for places in (1, 2, 3)}
        if "error" in row and row["status"] == "ok":
            said |= {f"{100 * row['error']:.1f}", f"{row['error']:.4f}"}
        if row["case"] == "heads-144":
            said.add(f"{row['ms'] / 1e3:.1f}")  # seconds
    return said
