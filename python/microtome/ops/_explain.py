"""What each backend says to a call, asked without computing it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from microtome.errors import ArgumentError
from microtome.ops import _registry


def explain(call: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """Say which backends could run a call, and why the others cannot; nothing is computed.

    Each op's function has it as its own, too: `topk_encode.explain(x, W_enc, k=32)`.

    Args:
        call: a function that calls an op, such as `microtome.ops.topk_encode` or `sae.encode`.
        *args: as `call` takes them.
        **kwargs: as `call` takes them.

    Returns:
        The name of the first op that the call comes to, each of its inputs with shape, dtype and
        device, and each backend with "can run it" or its reason.

    Raises:
        ArgumentError: the call came to its end without an op.
        MicrotomeError: what the call's own checks raise.

    Example:
        >>> import torch
        >>> from microtome.ops import topk_encode
        >>> said = topk_encode.explain(torch.ones(2, 3).double(), torch.ones(4, 3).double(), k=1)
        >>> [line for line in said.splitlines() if "cpu:" in line]
        ['  cpu: dtype float64 (has float32)']
    """
    asking = _registry.asking.set(True)
    try:
        call(*args, **kwargs)
    except _registry.Asked as answer:
        return str(answer)
    finally:
        _registry.asking.reset(asking)
    msg = f"explain: {getattr(call, '__name__', call)!s:.60} called no op. Pass an op's function."
    raise ArgumentError(msg)


def attach(functions: dict[str, Any]) -> None:
    """Give the function of every op its `explain`."""
    for name in _registry.OPS:
        function = functions.get(name)
        if function is not None:
            function.explain = functools.partial(explain, function)
