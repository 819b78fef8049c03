"""The layers of a multilayer perceptron as one program runs them, on a tile of pre-activations."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped"
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from microtome.kernels.activations import activate
from microtome.kernels.bf16 import rounded
from torch import Tensor

PROGRAMS = 512  # of the values of no player and of all, each of several tiles where they are more
# One stage: a further buffer would take the shared memory that the second layer fills.
OPTIONS = {"num_stages": 1, "enable_fp_fusion": True}


@triton.jit
def _first_kernel(
    inputs, weight, bias, player, out, rows, m, wide,
    GROUPED: tl.constexpr, HELD: tl.constexpr, HAS_BIAS: tl.constexpr,
    BR: tl.constexpr, B1: tl.constexpr,
):  # fmt: skip
    """out = inputs W_1^T over the columns that have a player, or that have none; and the bias."""
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    unit = tl.arange(0, B1)
    h = tl.zeros((BR, B1), tl.float32)
    if HAS_BIAS:
        h += tl.load(bias + unit, mask=unit < wide, other=0.0)[None, :]
    line, column = weight + unit, inputs + row * m
    for c in tl.range(0, m, loop_unroll_factor=4):
        a = tl.load(column, mask=row < rows, other=0.0)
        if GROUPED:
            a = tl.where((tl.load(player + c) < 0) == HELD, a, 0.0)
        h += a[:, None] * tl.load(line, mask=unit < wide, other=0.0)[None, :]
        column += 1
        line += wide
    at = row[:, None] * wide + unit[None, :]
    tl.store(out + at, h, mask=(row < rows)[:, None] & (unit < wide)[None, :])


@triton.jit
def _outputs(
    h, scratch, W_2, bias_2, W_out, bias_out, to, live, o, hidden,
    DEPTH: tl.constexpr, ACT_1: tl.constexpr, ACT_2: tl.constexpr, ACT_OUT: tl.constexpr,
    BF16: tl.constexpr, RESIDENT: tl.constexpr, UPCAST: tl.constexpr,
    BW: tl.constexpr, B1: tl.constexpr, B2: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Run the layers after the first on pre-activations [BW, B1], and store o outputs at `to`.

    W_2 is the second layer's weights themselves where RESIDENT, else where they lie.
    """
    i, j = tl.arange(0, B1), tl.arange(0, B2)
    a = activate(h, ACT_1)
    if DEPTH == 1:
        tl.store(to[:, None] + i[None, :], a, mask=live[:, None] & (i < o)[None, :])
    else:
        if DEPTH == 3:
            if RESIDENT:
                a = tl.dot(rounded(a, UPCAST), W_2)
            else:
                line = scratch + tl.arange(0, BW)[:, None] * B1
                tl.debug_barrier()  # the last step's are read
                tl.store(line + i[None, :], a)
                tl.debug_barrier()  # this step's are written
                a = tl.zeros((BW, B2), tl.float32)
                for start in range(0, B1, BK):
                    q = start + tl.arange(0, BK)
                    W = tl.load(W_2 + q[:, None] * B2 + j[None, :])
                    part = tl.load(line + q[None, :])
                    if BF16:
                        a = tl.dot(rounded(part, UPCAST), W, a)
                    else:
                        a = tl.dot(part, W, a, input_precision="ieee")
            a = activate(a + tl.load(bias_2 + j)[None, :], ACT_2)
        for k in range(0, o):
            readout = tl.load(W_out + tl.cast(k, tl.int64) * hidden + j, mask=j < hidden, other=0.0)
            value = tl.sum(a * readout[None, :], 1) + tl.load(bias_out + k)
            tl.store(to + k, activate(value, ACT_OUT), mask=live)


@triton.jit
def _ends_kernel(
    first, held, scratch, W_2, bias_2, W_out, bias_out, out, rows, turns, each, shift, held_row, o,
    wide, hidden,
    DEPTH: tl.constexpr, ACT_1: tl.constexpr, ACT_2: tl.constexpr, ACT_OUT: tl.constexpr,
    BF16: tl.constexpr, RESIDENT: tl.constexpr, UPCAST: tl.constexpr,
    BW: tl.constexpr, B1: tl.constexpr, B2: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """The values of coalitions whose first layer is known: of all players, or of none.

    Row r has the pre-activations first[r % each + r // each * shift] + held[r // each].
    """
    unit = tl.arange(0, B1)
    scratch += tl.program_id(0).to(tl.int64) * BW * B1
    for turn in range(0, turns):
        row = (tl.program_id(0).to(tl.int64) * turns + turn) * BW + tl.arange(0, BW)
        live = row < rows
        mask = live[:, None] & (unit < wide)[None, :]
        i = row // each
        at = (row % each + i * shift)[:, None] * wide + unit[None, :]
        h = tl.load(first + at, mask=mask, other=0.0)
        h += tl.load(held + i[:, None] * held_row + unit[None, :], mask=mask, other=0.0)
        _outputs(
            h, scratch, W_2, bias_2, W_out, bias_out, out + row * o, live, o, hidden,
            DEPTH, ACT_1, ACT_2, ACT_OUT, BF16, RESIDENT, UPCAST, BW, B1, B2, BK,
        )  # fmt: skip


def geometry(
    widths: list[int], bf16: bool, rows: int, shared: int
) -> tuple[dict[str, int | bool], int]:
    """The tile, and its warps: 32 pre-activations a thread.

    Args:
        widths: of the layers before the last, or of the only one.
        bf16: whether there is a second layer in bf16. It stays in shared memory through all steps
            where that has room.
        rows: walks.
        shared: bytes of shared memory that a program may have; 0 in the interpreter.
    """
    B1, B2 = (max(triton.next_power_of_2(w), 16) for w in (widths[0], widths[-1]))
    wide = max(B1, B2)
    BW = 64 if bf16 and wide <= 128 else 32
    resident = bf16 and (not shared or shared >= 2 * B1 * (B2 + BW) + 1024)
    BK = min(B1, 16 if not bf16 else 64 if wide <= 128 else 32)
    if not shared:  # where every step of a program costs milliseconds
        BW, BK = min(max(triton.next_power_of_2(rows), 16), 256), B1
    warps = min(max(BW * wide // 1024, 1), 8)
    return {"RESIDENT": resident, "BW": BW, "B1": B1, "B2": B2, "BK": BK}, warps


def passed(constants: dict[str, Any]) -> int:
    """Activations of a walk that pass through memory on their way to the second layer."""
    return constants["B1"] if constants["DEPTH"] == 3 and not constants["RESIDENT"] else 0


@dataclass(frozen=True)
class Layers:
    """What the kernels read of a perceptron, and how.

    Attributes:
        W_1: [m, wide], transposed.
        bias_1: [wide].
        further: the second of three layers, transposed and padded to the tile, and its bias; the
            last layer's weights and bias. Two layers have no second, one layer neither.
        constants, options: of the kernels that run the layers.
    """

    W_1: Tensor
    bias_1: Tensor
    further: tuple[Tensor, Tensor, Tensor, Tensor]
    constants: dict[str, Any]
    options: dict[str, Any]

    @property
    def hidden(self) -> int:
        """Inputs of the last layer."""
        return self.further[2].shape[1]

    def first(self, rows: Tensor, player: Tensor | None, *, held: bool) -> Tensor:
        """[len(rows), wide]: the first layer over the columns that have a player, without a bias,
        or over those that have none, with it."""
        out = rows.new_empty(rows.shape[0], self.W_1.shape[1])
        BR = 8 if rows.is_cuda else 256
        _first_kernel[(triton.cdiv(rows.shape[0], BR),)](
            rows, self.W_1, self.bias_1, rows if player is None else player, out, *rows.shape,
            out.shape[1], GROUPED=player is not None, HELD=held, HAS_BIAS=held, BR=BR,
            B1=self.constants["B1"], enable_fp_fusion=True,
        )  # fmt: skip
        return out

    def ends(self, first: Tensor, held: Tensor, shape: tuple[int, int, int], shift: int) -> Tensor:
        """[explicands, rows, outputs]: values where row r of explicand i has the pre-activations
        first[r + i shift] + held[i]; of one row of `held`, each explicand has it."""
        count, each, o = shape
        out = first.new_empty(shape)
        constants = {**self.constants, "RESIDENT": False}  # without steps it would gain nothing
        turns = triton.cdiv(count * each, constants["BW"] * PROGRAMS)
        programs = triton.cdiv(count * each, constants["BW"] * turns)
        scratch = first.new_empty(programs * constants["BW"] * passed(constants))
        _ends_kernel[(programs,)](
            first, held, scratch, *self.further, out, count * each, turns,
            each, shift, held.stride(0) if len(held) > 1 else 0, o, first.shape[1], self.hidden,
            **constants, **self.options,
        )  # fmt: skip
        return out


def read_layers(
    weights: list[Tensor], biases: list[Tensor], activations: list[int], bf16: bool, rows: int
) -> Layers:
    """Lay out one to three layers for walks of `rows` rows."""
    depth, interpreted, shared = len(weights), not weights[0].is_cuda, 0
    if not interpreted:
        of = triton.runtime.driver.active.utils.get_device_properties(weights[0].device.index)
        shared = of["max_shared_mem"]
    bf16 = bf16 and depth == 3
    tile, warps = geometry(
        [W.shape[0] for W in weights[:-1]] or [weights[0].shape[0]], bf16, rows, shared
    )
    W_out, bias_out = weights[-1].contiguous(), _bias(biases[-1], weights[-1])
    W_2, bias_2 = W_out, bias_out
    if depth == 3:  # nothing reads the second layer behind a mask
        outs, ins = weights[1].shape
        kind = torch.bfloat16 if bf16 else torch.float32
        W_2 = W_out.new_zeros(tile["B1"], tile["B2"], dtype=kind)
        W_2[:ins, :outs] = weights[1].mT
        W_2 = W_2.float() if interpreted else W_2  # the interpreter multiplies bf16's raw bits
        bias_2 = W_out.new_zeros(tile["B2"])
        bias_2[:outs] = _bias(biases[1], weights[1])
    codes = {"ACT_1": activations[0], "ACT_2": activations[depth // 2], "ACT_OUT": activations[-1]}
    constants = {"DEPTH": depth, "BF16": bf16, "UPCAST": interpreted, **codes, **tile}
    return Layers(
        weights[0].mT.contiguous(), _bias(biases[0], weights[0]), (W_2, bias_2, W_out, bias_out),
        constants, {"num_warps": warps, **OPTIONS},
    )  # fmt: skip


def _bias(bias: Tensor, W: Tensor) -> Tensor:
    return bias.contiguous() if bias.numel() else W.new_zeros(W.shape[0])
