"""The rule by which tests/triton_aot.py finds 32-bit products that could pass 2^31."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

_SPEC = importlib.util.spec_from_file_location(
    "products", Path(__file__).parent / "aot/products.py"
)
assert _SPEC is not None
assert _SPEC.loader is not None
products = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(products)

HEAD = """
    %c1 = arith.constant 1 : i32 loc(#loc1)
    %c4 = arith.constant 4 : i32 loc(#loc1)
    %lane = tt.make_range {end = 64 : i32, start = 0 : i32} : tensor<64xi32> loc(#loc1)
    %c64 = arith.constant dense<64> : tensor<64xi32> loc(#loc1)
    %program = tt.get_program_id x : i32 loc(#loc1)
    %wide = arith.extsi %program : i32 to i64 loc(#loc1)
    %loaded = tt.load %place : !tt.ptr<i32> loc(#loc1)
"""
TAIL = '\n#loc1 = loc(unknown)\n#loc2 = loc("/somewhere/segments.py":90:1)\n'
FOUND = ["segments: line 90"]


@pytest.mark.parametrize(
    ("product", "found"),
    [
        ("%r = arith.muli %loaded, %stride : i32", FOUND),  # an index times a stride
        ("%r = arith.muli %program, %stride : i32", FOUND),
        ("%r = arith.muli %loaded, %c4 : i32", FOUND),
        ("%r = arith.shli %loaded, %c4 : i32", FOUND),
        ("%r = arith.muli %wide, %stride64 : i64", []),
        ("%r = arith.muli %program, %c4 : i32", []),  # as many as the grid covers
        ("%r = arith.muli %lane, %c64 : tensor<64xi32>", []),
        ("%r = arith.muli %loaded, %c1 : i32", []),
        ("%q = arith.divsi %loaded, %c4 : i32 loc(#loc2)\n%r = arith.muli %q, %c4 : i32", []),
        ("%q = arith.muli %program, %c4 : i32 loc(#loc2)\n%r = arith.muli %q, %c4 : i32", FOUND),
        ("%q = arith.remsi %loaded, %c4 : i32 loc(#loc2)\n%r = arith.muli %q, %c4 : i32", []),
        ("scf.for %i = %c4 to %c4 step %c4 {\n%r = arith.muli %i, %c4 : i32", []),
        ("scf.for %i = %c4 to %n step %c4 {\n%r = arith.muli %i, %c4 : i32", FOUND),
    ],
    ids=lambda value: value.split(" = ")[-1][:24] if isinstance(value, str) else "",
)
def test_a_product_is_found_where_it_could_pass_two_to_the_31(
    product: str, found: list[str]
) -> None:
    assert products.narrow_products(f"{HEAD}{product} loc(#loc2){TAIL}") == found


def test_a_product_is_named_by_its_source_also_inside_a_function_that_was_inlined() -> None:
    lines = Path(products.KERNELS, "segments.py").read_text().splitlines()
    line = next(i for i, text in enumerate(lines, 1) if "full * CHUNK" in text)
    column = lines[line - 1].index("full * CHUNK") + 1
    ttir = (
        f"{HEAD}%r = arith.muli %loaded, %stride : i32 loc(#loc5)\n"
        f'#loc3 = loc("/somewhere/segments.py":{line}:{column})\n'
        '#loc4 = loc("acc"(#loc3))\n#loc6 = loc("/somewhere/sae_update.py":1:1)\n'
        "#loc5 = loc(callsite(#loc4 at #loc6))\n"
    )
    assert products.narrow_products(ttir) == ["segments: full * CHUNK"]
