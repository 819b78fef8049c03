"""Tests written with CPU tensors, run on a GPU: the ops move there and their answers come back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from microtome._pending import check_now
from microtome.ops._registry import Backend, Op


@contextmanager
def ops_on(device: str) -> Iterator[None]:
    """Inside the block the body of every op runs on copies of its tensors on `device`.

    The copies keep strides and what lies between elements. What an op writes into its arguments
    is written back. Checks are made before an op returns, as on the CPU. Autograd,
    torch.compile and the checks of the public functions see the tensors of the test.
    """
    choose = Op.choose

    def chosen(op: Op, *args: Any) -> Backend:
        copies = tuple(copy(a, device) if isinstance(a, Tensor) else a for a in args)
        backend = choose(op, *copies)
        moved = Backend(backend.name, backend.impl, backend.why_not)
        moved.__dict__["run"] = lambda *_: run(op, backend, args, copies)  # before it is cached
        return moved

    with mock.patch.object(Op, "choose", chosen), check_now():
        yield


def run(op: Op, backend: Backend, args: tuple[Any, ...], copies: tuple[Any, ...]) -> Any:
    """The backend's answer to `copies`, on the CPU; what it wrote is written to `args`."""
    out = backend.run(*copies)
    # Torch leaves out arguments at the end that are at their default.
    arguments = op.torch_op._schema.arguments[: len(args)]
    for argument, mine, copied in zip(arguments, args, copies, strict=True):
        if argument.is_write and isinstance(mine, Tensor):
            mine.copy_(copied)
    back: Callable[[Tensor], Tensor] = Tensor.cpu
    return tree_map_only(Tensor, back, out)


def copy(tensor: Tensor, device: str) -> Tensor:
    """The whole storage on the device, seen as the tensor sees its own."""
    whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
    return whole.to(device, copy=True).as_strided(
        tensor.size(), tensor.stride(), tensor.storage_offset()
    )
