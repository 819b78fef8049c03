"""The filter's inline assembly, executed by a reader of the few instructions that it uses.

The interpreter knows no assembly. Here it runs `append_scores` as a GPU would, with the three texts
read instruction by instruction for every element, on the real memory behind the pointers.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from microtome._seed import generator
from microtome.testing.triton import INTERPRETED, MARKS

pytestmark = [
    *MARKS,
    pytest.mark.skipif(not INTERPRETED, reason="a GPU runs the assembly itself"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, of infinities and NaN
]
if INTERPRETED:
    import numpy as np

    triton = pytest.importorskip("triton")
    tl = triton.language
    from microtome.kernels import lists
    from triton.runtime.interpreter import TensorHandle

    @triton.jit
    def _append_kernel(
        score, lowest, count, index, value, first, f, capacity,
        BM: tl.constexpr, BN: tl.constexpr, LEAF: tl.constexpr,
    ):  # fmt: skip
        lists.append_scores(
            tl.load(score + tl.arange(0, BM)[:, None] * BN + tl.arange(0, BN)[None, :]),
            tl.load(lowest + tl.arange(0, BM)), tl.arange(0, BM), first, f, count, index, value,
            capacity, BM, BN, LEAF,
        )  # fmt: skip


def signed(x: int) -> int:
    return (x & 0xFFFFFFFF) - ((x & 0x80000000) << 1)


def execute(text: str, operands: Sequence[int]) -> dict[int, int]:
    """Run one text on operands $0, $1, ... as integers; return what it wrote to them."""
    lines = [line.strip() for line in re.split(r"[;\n]", text.strip().strip("{}"))]
    lines = [line for line in lines if line and not line.startswith(".reg")]
    labels = {line.rstrip(":"): i for i, line in enumerate(lines) if line.endswith(":")}
    state: dict[str, int] = {f"${i}": x for i, x in enumerate(operands)}
    at = 0

    def read(name: str) -> int:
        return state[name] if name in state else int(name)

    while at < len(lines):
        line, at = lines[at], at + 1
        if line.endswith(":"):
            continue
        guard = re.match(r"@(!?)(\w+)\s+", line)
        if guard:
            line = line[guard.end() :]
            if bool(state[guard[2]]) == (guard[1] == "!"):
                continue
        name, _, rest = line.partition(" ")
        arguments = [a.strip(" []") for a in rest.split(",")]
        if name == "bra":
            at = labels[arguments[0]]
            continue
        if name == "st.global.b32":
            ctypes.c_uint32.from_address(read(arguments[0])).value = read(arguments[1])
            continue
        a, *more = [read(x) for x in arguments[1:]]
        b = more[0] if more else 0
        if name.startswith("setp."):
            _, how, kind = name.split(".")
            x, y = (signed(a), signed(b)) if kind == "s32" else (a, b)
            result = int({"eq": x == y, "ne": x != y, "le": x <= y}[how])
        elif name == "shf.l.wrap.b32":  # the high half of (b, a) shifted left
            result = (((b << 32 | a) << more[1]) >> 32) & 0xFFFFFFFF
        elif name == "mad.wide.u32":
            result = a * b + more[1]
        elif name == "selp.b32":
            result = a if more[1] else b
        elif name == "max.s32":
            result = max(signed(a), signed(b)) & 0xFFFFFFFF
        elif name == "atom.relaxed.gpu.global.add.u32":
            cell = ctypes.c_uint32.from_address(a)
            result, cell.value = cell.value, cell.value + b
        else:
            simple = {
                "mov.b32": a, "popc.b32": a.bit_count(), "and.b32": a & b, "add.u32": a + b,
                "sub.u32": a - b, "sub.s32": a - b, "xor.b32": a ^ b,
                "shr.u32": a >> min(b, 32), "shl.b32": a << min(b, 32),
                "bfind.u32": a.bit_length() - 1, "mad.lo.u32": a * b + sum(more[1:]),
            }  # fmt: skip
            result = simple[name] & 0xFFFFFFFF
        state[arguments[0]] = result
    return {int(name[1:]): x for name, x in state.items() if name.startswith("$")}


def inline(
    asm: Any, constraints: str, args: Sequence[Any], dtype: Any, is_pure: bool, pack: int
) -> Any:
    """`tl.inline_asm_elementwise`, last element first, as no order is promised."""
    results = constraints.count("=")
    datas = np.broadcast_arrays(*[np.asarray(getattr(a, "handle", a).data) for a in args])
    shape = datas[0].shape
    bits = [d.view(f"u{d.dtype.itemsize}") for d in map(np.ascontiguousarray, datas)]
    out = np.zeros((results, *shape), np.uint32)
    for place in reversed(list(np.ndindex(shape))):
        written = execute(
            str(getattr(asm, "value", asm)), [0] * results + [int(b[place]) for b in bits]
        )
        for i in range(results):
            out[(i, *place)] = written[i]
    kind = tl.block_type(tl.int32, list(shape))
    made = [tl.tensor(TensorHandle(o.view(np.int32), tl.int32), kind) for o in out]
    return made[0] if results == 1 else tuple(made)


@pytest.mark.parametrize(
    ("BN", "LEAF", "capacity"), [(256, 8, 40), (128, 8, 9), (128, 32, 200), (64, 16, 3)]
)
def test_the_assembly_keeps_what_the_portable_form_keeps(
    BN: int, LEAF: int, capacity: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tl, "inline_asm_elementwise", inline)
    BM, first, f = 6 + 2, 1000, 1000 + BN - 5
    score = torch.randn(BM, BN, generator=generator(3, "assembly"))
    lowest = torch.full((BM,), 1.5)
    score[1, 7] = score[1, 100 % BN] = 1.5  # equal: kept
    lowest[2] = float("inf")  # no list
    score[2, 3] = float("nan")
    score[3] = 9.0  # all of them: more than fit
    score[4] = -9.0  # none
    score[5, 11] = float("nan")
    lowest[6] = -3e38
    lowest[7], score[7, ::3] = 0.0, -0.0
    score[:, BN - 5 :] = float("-inf")  # features that do not exist
    kept = []
    for leaf in (0, LEAF):
        count = torch.full((BM,), 2, dtype=torch.int32)
        index = torch.full((BM, capacity), -1, dtype=torch.int32)
        value = torch.full((BM, capacity), -1.0)
        _append_kernel[(1,)](
            score, lowest, count, index, value, first, f, capacity, BM=BM, BN=BN, LEAF=leaf,
            enable_fp_fusion=True,
        )  # fmt: skip
        assert (index[:, :2] == -1).all()  # what others have reserved
        kept.append((count, index, value))
    (count, index, value), (count_too, index_too, value_too) = kept
    assert torch.equal(count, count_too)
    assert count[2:5].tolist() == [2, 2 + BN - 5, 2]
    for row in range(BM):
        held = min(int(count[row]), capacity) - 2
        for i, v in ((index, value), (index_too, value_too)):
            features = i[row, 2 : 2 + held].long()
            assert len(set(features.tolist())) == held
            assert (i[row, 2 + held :] == -1).all()
            expected = score[row, features - first]
            assert torch.equal(v[row, 2 : 2 + held].nan_to_num(7.0), expected.nan_to_num(7.0))
        if int(count[row]) <= capacity:
            assert set(index[row].tolist()) == set(index_too[row].tolist())
