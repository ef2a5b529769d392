"""Calls the Triton kernels.

``precision`` is that of the matrix products: "highest" (as accurate as float32), "high" (tf32),
"bf16" or "fp16". Coordinates, distances, sums and the weights' gradients are float32 always.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from egnn_fast.backends.triton import layers
from egnn_fast.backends.triton.call import Call
from egnn_fast.backends.triton.edges import launches, run_backward, run_forward

__all__ = ["launches", "layer", "layer_backward", "messages", "messages_backward"]


def messages(*args: Any) -> tuple[Tensor, Tensor]:
    """``egnn_fast::messages`` by Triton."""
    with _current(args[1].device):
        call = Call("forward", args)
        m, shift = call.zeros(call.hidden), call.zeros(call.dim) if call.has_head else None
        if call.num_edges:
            run_forward(call, m, shift)
        m = call.width.narrow(m, 1)
        return m, m.new_empty((0, call.dim)) if shift is None else shift


def messages_backward(g_m: Tensor | None, g_x: Tensor | None, *args: Any) -> list[Tensor]:
    """``egnn_fast::messages_backward`` by Triton."""
    *args, needed = args  # type: ignore[assignment]
    with _current(args[1].device):
        call = Call("backward", args)
        if not call.has_head:
            g_x = None
        if call.num_edges == 0 or (g_m is None and g_x is None):
            # dense, as the operator's fake says
            return [t.new_zeros(t.shape) for t, n in zip(args, needed, strict=False) if n]
        return [
            grad.to(t.dtype).reshape(t.shape)
            for t, grad, n in zip(
                args, run_backward(call, g_m, g_x, needed), needed, strict=False
            )
            if n and grad is not None
        ]  # fmt: skip


def layer(*args: Any) -> tuple[Tensor, ...]:
    """``egnn_fast::layer`` by Triton."""
    with _current(args[1].device):
        return layers.forward(args)


def layer_backward(
    g_h: Tensor | None, g_x: Tensor | None, g_v: Tensor | None,
    m: Tensor, shift: Tensor, _kept: Tensor, *args: Any,
) -> list[Tensor]:  # fmt: skip
    """``egnn_fast::layer_backward`` by Triton."""
    *args, needed = args  # type: ignore[assignment]
    with _current(args[1].device):
        return layers.Backward((g_h, g_x, g_v), m, shift, args, needed).run()


@contextmanager
def _current(device: torch.device) -> Iterator[None]:
    """Triton launches on the current device, which need not be the tensors'.

    The products around the kernels follow the call's precision, not the autocast that is on when a
    derivative is computed.
    """
    on_device = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with on_device, torch.autocast(device.type, enabled=False):
        yield
