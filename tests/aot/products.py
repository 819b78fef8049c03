"""32-bit products in a compiled kernel that could pass 2^31.

A place in a tensor is an index times a stride. Triton passes both as 32-bit integers where they
fit, and multiplies them so, unless the kernel widens one first. So no product of two numbers known
at run time alone may be 32 bits wide, and neither may a constant's with a number that was loaded,
passed in or counted by a loop, unless its range is known to be small. A program's number times the
size of its block is fine: it is within what the grid covers, which a size counts.
"""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

KERNELS = Path(__file__).parents[2] / "kernels"
LIMIT = 2**31

_LINE = re.compile(r"\s*(%[\w#:]+) = \"?([\w.]+)\"?(.*?)(?: loc\((#loc\d*)\))?$")
_LOOP = re.compile(r"scf\.for (%\w+) = %[\w#]+ to (%[\w#]+) step")
_NUMBERED = re.compile(r"(#loc\d*) = loc\((.*)\)$")
_PLACE = re.compile(r"\"([^\"]*)\":(\d+):(\d+)")


class Value(NamedTuple):
    """What is known of a number.

    Attributes:
        limit: its largest magnitude.
        program: whether it is a program's number, or a part of one.
        over: the constant it was divided by last.
        grown: whether it is a product that could pass 2^31.
    """

    limit: int | None = None
    program: bool = False
    over: int | None = None
    grown: bool = False


def narrow_products(ttir: str) -> list[str]:
    """The products of a kernel's Triton IR that could pass 2^31, as they stand in its source."""
    lines = ttir.splitlines()
    places = dict(m.groups() for m in map(_NUMBERED.match, lines) if m)
    values: dict[str, Value] = {}
    found = []
    for line in lines:
        if loop := _LOOP.search(line):
            values[loop[1]] = Value(values.get(loop[2], Value()).limit)
        match = _LINE.match(line)
        if not match:
            continue
        name, op, rest, at = match.groups()
        inputs, _, types = rest.partition(" : ")
        operands = [values.get(o, Value()) for o in re.findall(r"%[\w#]+", inputs)]
        values[name] = value = _value(op.removeprefix("arith."), rest, operands)
        if value.grown and re.search(r"\bi32\b|xi32>", types):
            found.append(_source(at, places))
    return sorted(set(found))


def _value(op: str, rest: str, operands: list[Value]) -> Value:
    """What is known of an operation's result."""
    limits = [value.limit for value in operands]
    numbers = [limit for limit in limits if limit is not None]
    known = len(numbers) == len(limits)
    match op:
        case "constant":
            number = re.search(r"(?:dense<)?(-?\d+)>? : ", rest)
            return Value(abs(int(number[1])) if number else None)
        case "tt.make_range":
            return Value(int(re.findall(r"end = (\d+)", rest)[0]))
        case "tt.get_program_id":
            return Value(program=True)
        case "muli" | "shli":
            return _product(operands, shift=op == "shli")
        case "addi" | "subi":
            moved = all(v.program or v.limit is not None for v in operands)
            return Value(sum(numbers) if known else None, moved and not known)
        case "remsi" | "remui":
            return Value(limits[1], operands[0].program)
        case "divsi" | "divui":
            return Value(limits[0], operands[0].program, limits[1])
        case "minsi" | "minui" | "andi":
            return Value(min(numbers) if numbers else None, any(v.program for v in operands))
        case "maxsi" | "maxui":
            return Value(max(numbers) if known else None)
        case "select":
            return Value(max(numbers[-2:]) if None not in limits[1:] else None)
        case "cmpi" | "cmpf":
            return Value(1)
        case "extsi" | "extui" | "trunci" | "tt.splat" | "tt.broadcast" | "tt.expand_dims":
            return operands[0]._replace(grown=False)
        case "tt.reshape" | "tt.trans":
            return operands[0]._replace(grown=False)
    return Value()


def _product(operands: list[Value], *, shift: bool) -> Value:
    """What is known of a product, or of a number shifted by bits."""
    factors = [*operands]
    if shift and factors[1].limit is not None:
        factors[1] = Value(1 << factors[1].limit)
    limits = [value.limit for value in factors if value.limit is not None]
    if len(limits) == 2:
        return Value(limits[0] * limits[1], grown=limits[0] * limits[1] >= LIMIT)
    if not limits:
        return Value(grown=True)
    other = factors[0] if factors[0].limit is None else factors[1]
    if limits[0] == 1:
        return other._replace(grown=False)
    # Nothing grows where it was divided by as much; a grid covers a program's number of blocks.
    return Value(grown=limits[0] != other.over and not other.program)


def _source(at: str, places: dict[str, str]) -> str:
    """module: expression, of the innermost source line that a location stands for."""
    text = places.get(at, "")
    while not (place := _PLACE.search(text)):
        inner = re.search(r"#loc\d*", text)  # a name's, or the callee's of a call
        if inner is None or inner[0] not in places:
            return f"an unknown place ({at})"
        text = places[inner[0]]
    path, line, column = place.groups()
    stem = Path(path).stem
    return f"{stem}: {_products(stem).get((int(line), int(column)), f'line {line}')}"


@cache
def _products(stem: str) -> dict[tuple[int, int], str]:
    """Source of each product in a kernel file by where Triton says it is.

    That is one past where its first factor begins, and where its last begins before Triton 3.7.
    """
    path = KERNELS / f"{stem}.py"
    if not path.exists():
        return {}
    out: dict[tuple[int, int], str] = {}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult | ast.LShift):
            last = node.right
            while isinstance(last, ast.BinOp):
                last = last.right
            for place in ((node.lineno, node.col_offset + 1), (last.lineno, last.col_offset)):
                out.setdefault(place, ast.unparse(node))
    return out
