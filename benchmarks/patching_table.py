"""Tables from a patching JSON, and the figures that a page may take from it."""

from __future__ import annotations

from typing import Any

Result = dict[str, Any]
Row = dict[str, Any]
OURS = "microtome"


def markdown(result: Result) -> str:
    """The machine, then one table a sweep."""
    m = result["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in m["versions"].items() if version)
    lines = [
        f"{m['cpu']}, {m['cores']} cores, {' '.join(m['flags'])}; level in use: {m['isa']}; "
        f"{m['threads']} threads; {m['date']}; commit {m['commit']}",
        f"Python {m['python']}, {versions}",
    ]
    for name, sweep in result["sweeps"].items():
        rows = [row for row in result["rows"] if row["sweep"] == name]
        if rows:
            lines += ["", f"**{name}**: {_title(sweep, rows)}", "", *_table(rows, sweep["floors"])]
    return "\n".join(lines)


def _title(sweep: Row, rows: list[Row]) -> str:
    what = "positions" if sweep["site"] == "resid_pre" else "heads"
    forwards = [row["forward_ms"] for row in rows if row["status"] == "ok"]
    beside = f"; a forward takes {min(forwards):.0f} - {max(forwards):.0f} ms" if forwards else ""
    return (
        f"{sweep['site']}, {sweep['layers']} layers x {sweep['columns']} {what}, "
        f"{sweep['length']} tokens{beside}"
    )


def _table(rows: list[Row], floors: dict[str, Row]) -> list[str]:
    variants = [
        row["variant"] for row in rows if row["contender"] == OURS and row["status"] == "ok"
    ]
    heads = [
        *(
            "contender",
            "how",
            "s",
            "least - most",
            "busy",
            "forwards",
            "first s",
            "x floor",
            "error",
            "of range",
            "peak MiB",
        ),
        *(f"x {variant}" for variant in variants),
    ]
    lines = [_line(heads), "|" + "---|" * len(heads)]
    blank = [""] * len(variants)
    for row in rows:
        if row["status"] != "ok":
            problem = f"{row['status']}: {row['error']}" if "error" in row else row["status"]
            lines.append(_line([row["contender"], row["variant"], problem, *[""] * 8, *blank]))
            continue
        low, high = row["spread"]
        check, ours = row["check"], row.get("ours", {})
        part = "" if row["part"] == 1 else f" ({row['part']:.2g} of the cells, scaled)"
        lines.append(
            _line(
                [
                    row["contender"],
                    row["variant"] + part,
                    f"{row['seconds']:.2f}",
                    f"{low:.2f} - {high:.2f}",
                    f"{row['busy']:.0%}",
                    f"{row['forwards']:.1f}",
                    f"{row['first_seconds']:.2f}" if "first_seconds" in row else "",
                    f"{row['over_floor']:.2f}" if "over_floor" in row else "",
                    *_agreement(check),
                    f"{row['working_mib']:.0f}",
                    *(f"{ours[v]['ratio']:.1f}" if v in ours else "" for v in variants),
                ]
            )
        )
    for name, how in (("all", "every cell"), ("changed", "changed cells")):
        floor = floors.get(name, {})
        if "seconds" in floor:
            said = [f"{floor['seconds']:.2f}", "", "", f"{floor['forwards']:.1f}"]
            flops = f"{how}, {floor['flops'] / 1e9:.0f} GFLOP"
            lines.append(_line(["floor", flops, *said, *[""] * 5, *blank]))
    return lines


def _agreement(check: Row) -> tuple[str, str]:
    """Its error, and over the range of the grid; the judge is not compared with itself."""
    if not check["cells"]:
        return "judge", ""
    return f"{check['error']:.1e}", f"{check['error_over_range']:.2%}"


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def readme_table(result: Result) -> str:
    """README's table: seconds a sweep, a line a contender and variant, a column a sweep."""
    names = [n for n in result["sweeps"] if any(row["sweep"] == n for row in result["rows"])]
    lines = [_line(["", *names]), "|---|" + "---|" * len(names)]
    for contender, variant in dict.fromkeys(
        (row["contender"], row["variant"]) for row in result["rows"] if row["status"] == "ok"
    ):
        cells = [_cell(result, name, contender, variant) for name in names]
        lines.append(_line([f"{contender}, {variant}", *cells]))
    for key, how in (("all", "every cell"), ("changed", "changed cells")):
        floors = [result["sweeps"][name]["floors"].get(key, {}) for name in names]
        said = [f"{floor['seconds']:.2f}" if "seconds" in floor else "" for floor in floors]
        lines.append(_line([f"floor, {how}", *said]))
    return "\n".join(lines)


def _cell(result: Result, name: str, contender: str, variant: str) -> str:
    for row in result["rows"]:
        if (row["sweep"], row["contender"], row["variant"]) == (name, contender, variant):
            return f"{row['seconds']:.2f}" if row["status"] == "ok" else "FAILED"
    return ""


def figures(result: Result) -> set[str]:
    """Every figure that a README may state from it, as it would be printed."""
    said: set[str] = set()
    for sweep in result["sweeps"].values():
        for floor in sweep["floors"].values():
            said |= {
                f"{floor[k]:.{p}f}" for k in ("seconds", "forwards") if k in floor for p in (1, 2)
            }
    for row in result["rows"]:
        if row["status"] != "ok":
            continue
        values = [row["seconds"], *row["spread"], row["forwards"]]
        values += [row[name] for name in ("first_seconds", "over_floor") if name in row]
        for ours in row.get("ours", {}).values():
            values += [ours["ratio"], *ours["ratio_range"], ours["ratio_in_forwards"]]
        said |= {f"{value:.{places}f}" for value in values for places in (1, 2)}
        said.add(f"{1e2 * row['check']['error_over_range']:.2f}")
    return said
