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
from egnn_fast.backends.triton.edges import (
    in_stages_if_too_large,
    launches,
    run_backward,
    run_forward,
)
from egnn_fast.operators.signature import LAYER, MESSAGES

__all__ = ["launches", "layer", "layer_backward", "messages", "messages_backward"]


@in_stages_if_too_large
def messages(*args: Any) -> tuple[Tensor, Tensor]:
    """``egnn_fast::messages`` by Triton: M ``[N, H]`` and X ``[N, D]`` (no rows without a head)."""
    with _current(args[MESSAGES.index("x")].device):
        call = Call("forward", args)
        m, shift = call.zeros(call.hidden), call.zeros(call.dim) if call.has_head else None
        if call.num_edges:
            run_forward(call, m, shift)
        m = call.width.narrow(m, 1)
        return m, m.new_empty((0, call.dim)) if shift is None else shift


@in_stages_if_too_large
def messages_backward(*args: Any) -> list[Tensor]:
    """``egnn_fast::messages_backward`` by Triton: the gradients needed, in order."""
    before, forward_args, needed = MESSAGES.split_backward(args)
    g_m, g_x = before
    inputs = forward_args[: MESSAGES.n_inputs]
    with _current(inputs[MESSAGES.index("x")].device):
        call = Call("backward", forward_args, (*needed, g_m is None, g_x is None))
        if not call.has_head:
            g_x = None
        if call.num_edges == 0 or (g_m is None and g_x is None):
            # dense, as the operator's fake says
            return [t.new_zeros(t.shape) for t, n in zip(inputs, needed, strict=True) if n]
        grads = run_backward(call, g_m, g_x, needed)
        return [
            grad.to(t.dtype).reshape(t.shape)
            for t, grad, n in zip(inputs, grads, needed, strict=True)
            if n and grad is not None
        ]


@in_stages_if_too_large
def layer(*args: Any) -> tuple[Tensor, ...]:
    """``egnn_fast::layer`` by Triton: new h, x and v, then the sums M and X; no activations."""
    with _current(args[LAYER.index("x")].device):
        return layers.forward(args)


@in_stages_if_too_large
def layer_backward(*args: Any) -> list[Tensor]:
    """``egnn_fast::layer_backward`` by Triton: the gradients needed, in order."""
    (*cotangents, m, shift, _), forward_args, needed = LAYER.split_backward(args)
    with _current(forward_args[LAYER.index("x")].device):
        return layers.Backward(cotangents, m, shift, forward_args, needed).run()


@contextmanager
def _current(device: torch.device) -> Iterator[None]:
    """Triton launches on the current device, which need not be the tensors'.

    The products around the kernels follow the call's precision, not the autocast that is on when a
    derivative is computed.
    """
    on_device = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with on_device, torch.autocast(device.type, enabled=False):
        yield
