"""Calls the C++ kernels: fills their argument record from tensors and allocates the outputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from egnn_fast import _native

_ACTIVATION_CODES = {"silu": 0, "relu": 1, "leaky_relu": 2}
_N_DIFF = 13
# the record's names of the layer's inputs and of their gradients, in the operator's order
_LAYER = (
    "h", "x", "v", "edge_attr", "edge_mask", "node_attr", "coord_weight",
    "w1", "b1", "w2", "b2", "node_w1", "node_b1", "node_w2", "node_b2", "w_g", "b_g",
    "w3", "b3", "w_x", "vel_w1", "vel_b1", "vel_w2", "vel_b2",
)  # fmt: skip
_LAYER_GRADS = tuple(f"g_{'coords' if name == 'x' else name}" for name in _LAYER)
# what only the coordinates' cotangents reach
_MOVING = ("v", "coord_weight", "w3", "b3", "w_x", "vel_w1", "vel_b1", "vel_w2", "vel_b2")
_GRAPH = ("rowptr", "senders", "perm", "first")
_N_LAYER = len(_LAYER)


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


def layer(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``egnn_fast::layer`` on the CPU."""
    a, _keep = _layer_record(args)
    h, x, v = args[:3]
    n, dim = x.shape
    has_head = args[_LAYER.index("w_x")] is not None
    moves = has_head or v is not None
    h_out = h.new_empty((n, a.out_features))
    x_out = x.new_empty((n if moves else 0, dim))
    v_out = x.new_empty((n if args[-1] else 0, dim))
    m = h.new_empty((n, a.hidden))
    shift = x.new_empty((n if has_head else 0, dim))
    a.h_out, a.m, a.shift = h_out.data_ptr(), m.data_ptr(), shift.data_ptr()
    a.x_out = x_out.data_ptr() if moves else 0
    a.v_out = v_out.data_ptr() if args[-1] else 0
    _core().layer_forward(a)
    return h_out, x_out, v_out, m, shift


def layer_backward(
    g_h: Tensor | None,
    g_x: Tensor | None,
    g_v: Tensor | None,
    m: Tensor,
    shift: Tensor,
    *args: Any,
) -> list[Tensor]:
    """``egnn_fast::layer_backward`` on the CPU."""
    needed = args[-1]
    a, _keep = _layer_record(args)
    cotangents = [None if g is None else g.contiguous() for g in (g_h, g_x, g_v, m, shift)]
    a.g_h_out, a.g_x_out, a.g_v_out, a.m, a.shift = map(_pointer, cotangents)
    found = [
        torch.empty(t.shape, dtype=t.dtype) if need else None
        for t, need in zip(args[:_N_LAYER], needed, strict=True)
    ]
    # what the cotangents do not reach is not written; one without elements reaches nothing
    features, moves = a.g_h_out != 0, a.g_x_out != 0 or a.g_v_out != 0
    for name, attribute, tensor in zip(_LAYER, _LAYER_GRADS, found, strict=True):
        if tensor is None:
            continue
        if (name.startswith("node_") and not features) or (name in _MOVING and not moves):
            tensor.zero_()
        else:
            setattr(a, attribute, tensor.data_ptr())
    _core().layer_backward(a)
    return [t for t in found if t is not None]


def _layer_record(args: tuple[Any, ...]) -> tuple[Any, list[Tensor | None]]:
    """The layer's argument record, and the tensors that must outlive the call."""
    t: list[Any] = [v if v is None else v.contiguous() for v in args[: _N_LAYER + 4]]
    activation, slope, norm, tanh, clamp, scale, residual = args[_N_LAYER + 4 : _N_LAYER + 11]
    h, x, _, edge_attr, edge_mask, node_attr, _, w1 = t[:8]
    node_w2 = t[_LAYER.index("node_w2")]
    a = _core().LayerArgs()
    for name, tensor in zip(_LAYER + _GRAPH, t, strict=True):
        if tensor is not None:
            setattr(a, name, tensor.data_ptr())
    a.is_double = h.dtype == torch.float64
    a.threads = torch.get_num_threads()
    a.num_nodes, a.in_features = h.shape
    a.out_features, a.hidden = node_w2.shape
    a.coord_dim = x.shape[1]
    a.attr_dim = w1.shape[1] - 2 * h.shape[1] - 1
    a.node_attr_dim = 0 if node_attr is None else node_attr.shape[1]
    a.attr_rows = -1 if edge_attr is None else edge_attr.shape[0]
    a.mask_rows = -1 if edge_mask is None else edge_mask.shape[0]
    a.activation = _ACTIVATION_CODES[activation]
    a.negative_slope, a.norm, a.tanh, a.clamp = slope, norm, tanh, clamp
    a.coord_scale, a.residual = scale, residual
    return a, t


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
