"""Calls the C++ kernels: fills their argument record from tensors and allocates the outputs.

A kernel object holds what two calls of one kind share. The operators make one for each call;
:mod:`egnn_fast.shortcuts` keeps it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from egnn_fast import _native

_ACTIVATION_CODES = {"silu": 0, "relu": 1, "leaky_relu": 2}
# the edge pass's differentiable inputs in the operator's order, which is the record's too
_MESSAGES = (
    "pq", "x", "edge_attr", "edge_mask", "w_r", "w_a", "w2", "b2", "w_g", "b_g", "w3", "b3", "w_x",
)  # fmt: skip
N_MESSAGES = len(_MESSAGES)
_MESSAGES_HEAD = _MESSAGES.index("w_x")
# the same of the layer
_LAYER = (
    "h", "x", "v", "edge_attr", "edge_mask", "node_attr", "coord_weight",
    "w1", "b1", "w2", "b2", "node_w1", "node_b1", "node_w2", "node_b2", "w_g", "b_g",
    "w3", "b3", "w_x", "vel_w1", "vel_b1", "vel_w2", "vel_b2",
)  # fmt: skip
N_LAYER = len(_LAYER)
Outputs = tuple[Tensor | None, ...]
_NODE_W2, _LAYER_HEAD = _LAYER.index("node_w2"), _LAYER.index("w_x")
_PHI_H = tuple(k for k, name in enumerate(_LAYER) if name.startswith("node_"))
# what only the coordinates' cotangents reach
_MOVING = tuple(
    map(
        _LAYER.index,
        ("v", "coord_weight", "w3", "b3", "w_x", "vel_w1", "vel_b1", "vel_w2", "vel_b2"),
    )
)


class MessagesKernel:
    """The edge pass for inputs of some widths and dtype.

    Attributes
    ----------
    outputs : tuple of int
        Which of the operator's outputs there are.
    NODE_ROWS, EDGE_ROWS : tuple of int
        Which inputs have a row for each node and each edge.

    Parameters
    ----------
    inputs : sequence
        The operator's differentiable inputs; of them only widths, dtype and what is None count.
    scalars : sequence
        The operator's scalars from ``activation`` on.
    """

    NODE_ROWS, EDGE_ROWS = (0, 1), (2, 3)

    def __init__(self, inputs: Sequence[Any], scalars: Sequence[Any]) -> None:
        pq, x, w_a = inputs[0], inputs[1], inputs[5]
        self.hidden, self.dim = pq.shape[1] // 2, x.shape[1]
        self.attrs = 0 if w_a is None else w_a.shape[1]
        self.has_head = inputs[_MESSAGES_HEAD] is not None
        self.outputs = (0, 1) if self.has_head else (0,)
        self.scalars = _record_scalars(pq, scalars)

    @staticmethod
    def dense(inputs: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Inputs as the kernel reads them."""
        # w_r and w_a are columns of the first linear's weight: read in place, by their row stride
        return [
            t if t is None or k == 4 or (k == 5 and t.stride(1) == 1) else t.contiguous()
            for k, t in enumerate(inputs)
        ]

    def record(self, tensors: Sequence[Any]) -> Any:
        """The argument record of inputs and graph tensors, which must outlive it."""
        pq, _, edge_attr, edge_mask, w_r, w_a = tensors[:6]
        sizes = (
            torch.get_num_threads(), pq.shape[0], self.hidden, self.dim, self.attrs,
            -1 if edge_attr is None else edge_attr.shape[0],
            -1 if edge_mask is None else edge_mask.shape[0],
            w_r.stride(0),
            0 if w_a is None else w_a.stride(0),
        )  # fmt: skip
        return _core().Args(addresses(tensors), sizes, self.scalars)

    @staticmethod
    def kept_size(record: Any, num_edges: int) -> int:
        """Nothing but the inputs is needed for the backward."""
        return 0

    def forward(self, record: Any, pq: Tensor, x: Tensor, kept: int = 0) -> Outputs:
        """M and X, None without a head."""
        n = pq.shape[0]
        outputs = (
            pq.new_empty(n, self.hidden),
            x.new_empty(n, self.dim) if self.has_head else None,
        )
        _core().forward(record, addresses(outputs))
        return outputs

    def backward(
        self,
        cotangents: Sequence[Tensor | None],
        tensors: Sequence[Any],
        gradients: Sequence[Tensor | None],
    ) -> None:
        """Fill the gradients that are not None."""
        _core().backward(self.record(tensors), addresses(cotangents), addresses(gradients))


class LayerKernel:
    """A whole layer for inputs of some widths and dtype; see :class:`MessagesKernel`."""

    NODE_ROWS, EDGE_ROWS = (0, 1, 2, 5, 6), (3, 4)

    def __init__(self, inputs: Sequence[Any], scalars: Sequence[Any]) -> None:
        h, x, v, _, _, node_attr, _, w1 = inputs[:8]
        *options, self.scale, self.residual, self.carry, _backend, _precision = scalars
        features = h.shape[1]
        self.hidden, width = w1.shape
        self.out, self.dim = inputs[_NODE_W2].shape[0], x.shape[1]
        self.has_head = inputs[_LAYER_HEAD] is not None
        self.moves = self.has_head or v is not None
        self.outputs = (0, *((1,) if self.moves else ()), *((2,) if self.carry else ()))
        self.widths = (
            features, self.hidden, self.out, self.dim, width - 2 * features - 1,
            0 if node_attr is None else node_attr.shape[1],
        )  # fmt: skip
        self.scalars = _record_scalars(h, options)

    def record(self, tensors: Sequence[Any]) -> Any:
        """The argument record of inputs and graph tensors, which must outlive it."""
        edge_attr, edge_mask = tensors[3], tensors[4]
        sizes = (
            torch.get_num_threads(), tensors[0].shape[0], *self.widths,
            -1 if edge_attr is None else edge_attr.shape[0],
            -1 if edge_mask is None else edge_mask.shape[0],
        )  # fmt: skip
        return _core().LayerArgs(addresses(tensors), sizes, self.scalars, self.scale, self.residual)

    @staticmethod
    def kept_size(record: Any, num_edges: int) -> int:
        """Elements in which the layer can keep its activations for the backward."""
        return int(_core().layer_kept_size(record, num_edges))

    @staticmethod
    def dense(inputs: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Inputs as the kernel reads them."""
        return _contiguous(inputs)

    def forward(self, record: Any, h: Tensor, x: Tensor, kept: int) -> Outputs:
        """New h, x and v, M and X, what is kept; None for what the layer has not."""
        n = h.shape[0]
        outputs = (
            h.new_empty(n, self.out),
            x.new_empty(n, self.dim) if self.moves else None,
            x.new_empty(n, self.dim) if self.carry else None,
            h.new_empty(n, self.hidden),
            x.new_empty(n, self.dim) if self.has_head else None,
            _reused(kept, h.dtype) if kept else None,
        )
        _core().layer_forward(record, addresses(outputs))
        return outputs

    def backward(
        self,
        cotangents: Sequence[Tensor | None],
        tensors: Sequence[Any],
        gradients: Sequence[Tensor | None],
    ) -> None:
        """Fill the gradients that are not None; ``cotangents`` with M, X and what was kept."""
        _core().layer_backward(self.record(tensors), addresses(cotangents), addresses(gradients))


def messages(*args: Any) -> tuple[Tensor, Tensor]:
    """``egnn_fast::messages`` on the CPU."""
    kernel = MessagesKernel(args[:N_MESSAGES], args[N_MESSAGES + 4 :])
    tensors = kernel.dense(args[: N_MESSAGES + 4])
    pq, x = args[:2]
    m, shift = kernel.forward(kernel.record(tensors), pq, x)
    assert m is not None
    return m, x.new_empty((0, kernel.dim)) if shift is None else shift


def messages_backward(g_m: Tensor | None, g_x: Tensor | None, *args: Any) -> list[Tensor]:
    """``egnn_fast::messages_backward`` on the CPU."""
    *args, needed = args  # type: ignore[assignment]
    inputs = args[:N_MESSAGES]
    kernel = MessagesKernel(inputs, args[N_MESSAGES + 4 :])
    if g_m is None and (g_x is None or not kernel.has_head):
        return [torch.zeros_like(t) for t, n in zip(inputs, needed, strict=True) if n]
    found = _empty_gradients(inputs, needed)
    kernel.backward(_contiguous((g_m, g_x)), kernel.dense(args[: N_MESSAGES + 4]), found)
    return [t for t in found if t is not None]


def layer(*args: Any) -> tuple[Tensor, ...]:
    """``egnn_fast::layer`` on the CPU."""
    kernel = LayerKernel(args[:N_LAYER], args[N_LAYER + 4 : -1])
    tensors = kernel.dense(args[: N_LAYER + 4])
    h, x = args[:2]
    h_out, x_out, v_out, m, shift, kept = kernel.forward(kernel.record(tensors), h, x, args[-1])
    assert h_out is not None
    assert m is not None
    x_out, v_out, shift = (
        x.new_empty((0, kernel.dim)) if t is None else t for t in (x_out, v_out, shift)
    )
    return h_out, x_out, v_out, m, shift, h.new_empty((0,)) if kept is None else kept


def layer_kept_size(args: Sequence[Any], num_edges: int) -> int:
    """Elements in which ``egnn_fast::layer``, called with ``args``, can keep its activations."""
    kernel = LayerKernel(args[:N_LAYER], args[N_LAYER + 4 :])
    tensors = kernel.dense(args[: N_LAYER + 4])
    return kernel.kept_size(kernel.record(tensors), num_edges)


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
    *args, _, needed = args  # type: ignore[assignment]
    inputs = args[:N_LAYER]
    kernel = LayerKernel(inputs, args[N_LAYER + 4 :])
    found = _empty_gradients(inputs, needed)
    # a tensor without elements has no address: it reaches nothing, and is as good as None
    cotangents = [
        None if t is None or not t.numel() else t.contiguous()
        for t in (g_h, g_x, g_v, m, shift, kept)
    ]
    features, moves = cotangents[0] is not None, any(t is not None for t in cotangents[1:3])
    # what the cotangents do not reach is not written
    places = list(found)
    for k in (() if features else _PHI_H) + (() if moves else _MOVING):
        tensor = found[k]
        if tensor is not None:
            tensor.zero_()
            places[k] = None
    kernel.backward(cotangents, kernel.dense(args[: N_LAYER + 4]), places)
    return [t for t in found if t is not None]


def _reused(count: int, dtype: torch.dtype) -> Tensor:
    """Empty memory from the core's pool: each step takes the pages of the one before."""
    found: Tensor = from_dlpack(_core().buffer(count, dtype is torch.float64))
    return found


def addresses(tensors: Sequence[Tensor | None]) -> list[int]:
    """Where the tensors lie; 0 for None."""
    return [0 if t is None else t.data_ptr() for t in tensors]


def _record_scalars(like: Tensor, scalars: Sequence[Any]) -> tuple[Any, ...]:
    activation, slope, norm, tanh, clamp = scalars[:5]
    return (like.dtype is torch.float64, _ACTIVATION_CODES[activation], slope, norm, tanh, clamp)


def _contiguous(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in tensors]


def _empty_gradients(tensors: Sequence[Any], needed: Sequence[bool]) -> list[Tensor | None]:
    return [t.new_empty(t.shape) if need else None for t, need in zip(tensors, needed, strict=True)]


def _core() -> Any:
    if _native.core is None:
        raise RuntimeError(_native.load_error)
    return _native.core
