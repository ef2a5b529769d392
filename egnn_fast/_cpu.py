"""Calls the C++ kernels: fills their argument record from tensors and allocates the outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from egnn_fast import _native

_ACTIVATION_CODES = {"silu": 0, "relu": 1, "leaky_relu": 2}
_N_DIFF = 13
# the layer's differentiable inputs in the operator's order, which is the record's too
_LAYER = (
    "h", "x", "v", "edge_attr", "edge_mask", "node_attr", "coord_weight",
    "w1", "b1", "w2", "b2", "node_w1", "node_b1", "node_w2", "node_b2", "w_g", "b_g",
    "w3", "b3", "w_x", "vel_w1", "vel_b1", "vel_w2", "vel_b2",
)  # fmt: skip
_N_LAYER = len(_LAYER)
_W1, _NODE_W2, _W_X = map(_LAYER.index, ("w1", "node_w2", "w_x"))
_PHI_H = tuple(k for k, name in enumerate(_LAYER) if name.startswith("node_"))
# what only the coordinates' cotangents reach
_MOVING = tuple(
    map(
        _LAYER.index,
        ("v", "coord_weight", "w3", "b3", "w_x", "vel_w1", "vel_b1", "vel_w2", "vel_b2"),
    )
)


def messages(*args: Any) -> tuple[Tensor, Tensor]:
    """``egnn_fast::messages`` on the CPU."""
    pq, x = args[0], args[1]
    n, width = pq.shape
    m = pq.new_empty((n, width // 2))
    shift = x.new_empty((n if args[12] is not None else 0, x.shape[1]))
    record, _keep = _record(args)
    _core().forward(record, (m.data_ptr(), shift.data_ptr()))
    return m, shift


def messages_backward(g_m: Tensor | None, g_x: Tensor | None, *args: Any) -> list[Tensor]:
    """``egnn_fast::messages_backward`` on the CPU."""
    needed = args[-1]
    has_head = args[12] is not None
    if g_m is None and (g_x is None or not has_head):
        return [torch.zeros_like(t) for t, n in zip(args[:_N_DIFF], needed, strict=True) if n]
    record, _keep = _record(args)
    cotangents = _contiguous((g_m, g_x))
    found = _empty_gradients(args[:_N_DIFF], needed)
    _core().backward(record, _addresses(cotangents), _addresses(found))
    return [t for t in found if t is not None]


def layer(*args: Any) -> tuple[Tensor, ...]:
    """``egnn_fast::layer`` on the CPU."""
    record, _keep = _layer_record(args)
    h, x, v = args[:3]
    w1, node_w2 = args[_W1], args[_NODE_W2]
    carry, size = args[_N_LAYER + 11 :]
    n, dim = x.shape
    has_head = args[_W_X] is not None
    moves = has_head or v is not None
    h_out = h.new_empty((n, node_w2.shape[0]))
    x_out = x.new_empty((n if moves else 0, dim))
    v_out = x.new_empty((n if carry else 0, dim))
    m = h.new_empty((n, w1.shape[0]))
    shift = x.new_empty((n if has_head else 0, dim))
    kept = h.new_empty((size,))
    outputs = (
        h_out.data_ptr(), x_out.data_ptr() if moves else 0, v_out.data_ptr() if carry else 0,
        m.data_ptr(), shift.data_ptr(), kept.data_ptr() if size else 0,
    )  # fmt: skip
    _core().layer_forward(record, outputs)
    return h_out, x_out, v_out, m, shift, kept


def layer_kept_size(args: tuple[Any, ...], num_edges: int) -> int:
    """Elements in which ``egnn_fast::layer``, called with ``args``, can keep its activations."""
    record, _keep = _layer_record(args)
    return int(_core().layer_kept_size(record, num_edges))


def layer_backward(
    g_h: Tensor | None,
    g_x: Tensor | None,
    g_v: Tensor | None,
    m: Tensor,
    shift: Tensor,
    kept: Tensor,
    *args: Any,
) -> list[Tensor]:
    """``egnn_fast::layer_backward`` on the CPU."""
    record, _keep = _layer_record(args)
    cotangents = _contiguous((g_h, g_x, g_v, m, shift, kept))
    given = _addresses(cotangents)
    if not kept.numel():
        given[5] = 0
    found = _empty_gradients(args[:_N_LAYER], args[-1])
    places = _addresses(found)
    # what the cotangents do not reach is not written; one without elements reaches nothing
    unreached = (() if given[0] else _PHI_H) + (() if given[1] or given[2] else _MOVING)
    for k in unreached:
        tensor = found[k]
        if tensor is not None:
            tensor.zero_()
            places[k] = 0
    _core().layer_backward(record, given, places)
    return [t for t in found if t is not None]


def _layer_record(args: tuple[Any, ...]) -> tuple[Any, list[Tensor | None]]:
    """The layer's argument record, and the tensors that must outlive the call."""
    t = _contiguous(args[: _N_LAYER + 4])
    activation, slope, norm, tanh, clamp, scale, residual = args[_N_LAYER + 4 : _N_LAYER + 11]
    h, x, _, edge_attr, edge_mask, node_attr, _, w1 = args[:8]
    n, features = h.shape
    hidden, width = w1.shape
    sizes = (
        torch.get_num_threads(), n, features, hidden, args[_NODE_W2].shape[0], x.shape[1],
        width - 2 * features - 1,
        0 if node_attr is None else node_attr.shape[1],
        -1 if edge_attr is None else edge_attr.shape[0],
        -1 if edge_mask is None else edge_mask.shape[0],
    )  # fmt: skip
    scalars = (h.dtype is torch.float64, _ACTIVATION_CODES[activation], slope, norm, tanh, clamp)
    return _core().LayerArgs(_addresses(t), sizes, scalars, scale, residual), t


def _record(args: tuple[Any, ...]) -> tuple[Any, list[Tensor | None]]:
    """The edge pass's argument record, and the tensors that must outlive the call."""
    activation, slope, norm, tanh, clamp = args[17:22]
    # w_r and w_a are columns of the first linear's weight: read in place, by their row stride
    t = [
        v if v is None or k == 4 or (k == 5 and v.stride(1) == 1) else v.contiguous()
        for k, v in enumerate(args[:17])
    ]
    pq, x, edge_attr, edge_mask, w_r, w_a = t[:6]
    sizes = (
        torch.get_num_threads(), pq.shape[0], pq.shape[1] // 2, x.shape[1],
        0 if w_a is None else w_a.shape[1],
        -1 if edge_attr is None else edge_attr.shape[0],
        -1 if edge_mask is None else edge_mask.shape[0],
        w_r.stride(0),
        0 if w_a is None else w_a.stride(0),
    )  # fmt: skip
    scalars = (pq.dtype is torch.float64, _ACTIVATION_CODES[activation], slope, norm, tanh, clamp)
    return _core().Args(_addresses(t), sizes, scalars), t


def _contiguous(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in tensors]


def _addresses(tensors: Sequence[Tensor | None]) -> list[int]:
    return [0 if t is None else t.data_ptr() for t in tensors]


def _empty_gradients(tensors: Sequence[Any], needed: Sequence[bool]) -> list[Tensor | None]:
    return [
        torch.empty(t.shape, dtype=t.dtype) if need else None
        for t, need in zip(tensors, needed, strict=True)
    ]


def _core() -> Any:
    if _native.core is None:
        raise RuntimeError(_native.load_error)
    return _native.core
