"""Calls the C++ kernels: fills their argument record from tensors and allocates the outputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from egnn_fast import _native

_ACTIVATION_CODES = {"silu": 0, "relu": 1, "leaky_relu": 2}
_N_DIFF = 13


def messages(*args: Any) -> tuple[Tensor, Tensor]:
    """``egnn_fast::messages`` on the CPU."""
    pq, x = args[0], args[1]
    n, width = pq.shape
    m = pq.new_empty((n, width // 2))
    shift = x.new_empty((n if args[12] is not None else 0, x.shape[1]))
    a, _keep = _record(args)
    a.m, a.shift = m.data_ptr(), shift.data_ptr()
    _core().forward(a)
    return m, shift


def messages_backward(g_m: Tensor | None, g_x: Tensor | None, *args: Any) -> list[Tensor]:
    """``egnn_fast::messages_backward`` on the CPU."""
    needed = args[-1]
    has_head = args[12] is not None
    if g_m is None and (g_x is None or not has_head):
        return [torch.zeros_like(t) for t, n in zip(args[:_N_DIFF], needed, strict=True) if n]
    a, _keep = _record(args)
    g_m = None if g_m is None else g_m.contiguous()
    g_x = None if g_x is None else g_x.contiguous()
    a.g_m, a.g_shift = _pointer(g_m), _pointer(g_x)
    found = [
        torch.empty(t.shape, dtype=t.dtype) if need else None
        for t, need in zip(args[:_N_DIFF], needed, strict=True)
    ]
    (
        a.g_pq, a.g_coords, a.g_edge_attr, a.g_edge_mask, a.g_w_r, a.g_w_a, a.g_w2, a.g_b2,
        a.g_w_g, a.g_b_g, a.g_w3, a.g_b3, a.g_w_x,
    ) = map(_pointer, found)  # fmt: skip
    _core().backward(a)
    return [t for t in found if t is not None]


def _core() -> Any:
    if _native.core is None:
        raise RuntimeError(_native.load_error)
    return _native.core


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _record(args: tuple[Any, ...]) -> tuple[Any, list[Tensor | None]]:
    """The kernels' argument record, and the tensors that must outlive the call."""
    activation, slope, norm, tanh, clamp = args[17:22]
    # w_r and w_a are columns of the first linear's weight: read in place, by their row stride
    t = [
        v if v is None or k == 4 or (k == 5 and v.stride(1) == 1) else v.contiguous()
        for k, v in enumerate(args[:17])
    ]
    pq, x, edge_attr, edge_mask, w_r, w_a = t[:6]
    core = _core()
    a = core.Args()
    a.is_double = pq.dtype == torch.float64
    a.threads = torch.get_num_threads()
    a.num_nodes, a.hidden = pq.shape[0], pq.shape[1] // 2
    a.coord_dim = x.shape[1]
    a.attr_dim = 0 if w_a is None else w_a.shape[1]
    a.attr_rows = -1 if edge_attr is None else edge_attr.shape[0]
    a.mask_rows = -1 if edge_mask is None else edge_mask.shape[0]
    a.w_r_stride = w_r.stride(0)
    a.w_a_stride = 0 if w_a is None else w_a.stride(0)
    (
        a.pq, a.x, a.edge_attr, a.edge_mask, a.w_r, a.w_a, a.w2, a.b2, a.w_g, a.b_g, a.w3, a.b3,
        a.w_x, a.rowptr, a.senders, a.perm, a.first,
    ) = map(_pointer, t)  # fmt: skip
    a.activation = _ACTIVATION_CODES[activation]
    a.negative_slope, a.norm, a.tanh, a.clamp = slope, norm, tanh, clamp
    return a, t
