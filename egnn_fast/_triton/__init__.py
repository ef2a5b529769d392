"""Calls the Triton kernels.

``precision`` is that of the matrix products: "highest" (as accurate as float32), "high" (tf32),
"bf16" or "fp16". Coordinates, distances, sums and the weights' gradients are float32 always.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from egnn_fast._triton import staged
from egnn_fast._triton.backward import Backward
from egnn_fast._triton.call import Call
from egnn_fast.kernels.forward import edge_forward

# how often the passes ran
launches = {"forward": 0, "backward": 0}


def messages(*args: Any) -> tuple[Tensor, Tensor]:
    """``egnn_fast::messages`` by Triton."""
    with _current(args[1].device):
        return _messages(*args)


def _messages(*args: Any) -> tuple[Tensor, Tensor]:
    call = Call("forward", args)
    m, shift = call.zeros(call.hidden), call.zeros(call.dim) if call.has_head else None
    if call.num_edges:
        if call.staged:
            staged.forward(call, m, shift)
        else:
            _fused(call, m, shift)
        launches["forward"] += 1
    m = call.width.narrow(m, 1)
    return m, m.new_empty((0, call.dim)) if shift is None else shift


def _fused(call: Call, m: Tensor, shift: Tensor | None) -> None:
    part = call.part(0, call.num_edges)
    m_rows = call.rows(m, part.programs)
    x_rows = None if shift is None else call.rows(shift, part.programs)
    edge_forward[(part.programs,)](
        call.edges(part), call.inputs, call.weights, call.numbers,
        m_rows, x_rows, 0, call.num_edges, part.blocks, call.spec,
        **call.launch_options,
    )  # fmt: skip
    call.finish(part, m_rows, x_rows)


def messages_backward(g_m: Tensor | None, g_x: Tensor | None, *args: Any) -> list[Tensor]:
    """``egnn_fast::messages_backward`` by Triton."""
    with _current(args[1].device):
        return _messages_backward(g_m, g_x, *args)


def _messages_backward(g_m: Tensor | None, g_x: Tensor | None, *args: Any) -> list[Tensor]:
    *args, needed = args  # type: ignore[assignment]
    call = Call("backward", args)
    if not call.has_head:
        g_x = None
    if call.num_edges == 0 or (g_m is None and g_x is None):
        return [torch.zeros_like(t) for t, n in zip(args, needed, strict=False) if n]
    kind = staged.Backward if call.staged else Backward
    found = kind(call, g_m, g_x, needed).run()
    launches["backward"] += 1
    return [
        grad.to(t.dtype).reshape(t.shape)
        for t, grad, n in zip(args, found, needed, strict=False)
        if n and grad is not None
    ]


def _current(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
