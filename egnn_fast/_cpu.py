"""Calls the C++ kernels: fills their argument record from tensors and allocates the outputs."""

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
_ANY = -1  # number of rows or columns
_POOLED = 1 << 15  # elements from which a buffer of the pool pays
_N_OPTIONS = 5  # scalars of Options that both operators take
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

    Parameters
    ----------
    inputs : sequence
        The operator's differentiable inputs; of them only widths, dtype and what is None count.
    scalars : sequence
        The operator's scalars from ``activation`` on.
    """

    def __init__(self, inputs: Sequence[Any], scalars: Sequence[Any]) -> None:
        pq, x, w_a = inputs[0], inputs[1], inputs[5]
        self.hidden, self.dim = pq.shape[1] // 2, x.shape[1]
        self.attrs = 0 if w_a is None else w_a.shape[1]
        self.has_head = inputs[_MESSAGES_HEAD] is not None
        self.dtype, self.scalars = pq.dtype, _record_scalars(pq, scalars)

    @staticmethod
    def dense(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Inputs and graph tensors as the kernel reads them."""
        # w_r and w_a are columns of the first linear's weight: read in place, by their row stride
        return [
            t if t is None or k == 4 or (k == 5 and t.stride(1) == 1) else t.contiguous()
            for k, t in enumerate(tensors)
        ]

    def record(self, tensors: Sequence[Any]) -> Any:
        """The argument record of dense inputs and graph tensors, which must outlive it."""
        pq, _, edge_attr, edge_mask, w_r, w_a = tensors[:6]
        sizes = (
            torch.get_num_threads(), pq.shape[0], self.hidden, self.dim, self.attrs,
            -1 if edge_attr is None else edge_attr.shape[0],
            -1 if edge_mask is None else edge_mask.shape[0],
            w_r.stride(0),
            0 if w_a is None else w_a.stride(0),
        )  # fmt: skip
        return _core().Args(addresses(tensors), sizes, self.scalars)

    def check(self, tensors: Sequence[Any], before: Sequence[Any] = ()) -> None:
        """Raise ValueError unless tensors have the shapes and dtypes that the kernel expects.

        ``tensors`` are the operator's; ``before`` are those that its derivative takes before them.
        """
        n, dtype = tensors[0].shape[0], self.dtype
        outputs = ((n, self.hidden), (_ANY, self.dim))
        _check("messages", ("g_m", "g_x"), before, outputs, dtype)
        _check("messages", _MESSAGES, tensors[:N_MESSAGES], self.shapes(n, _ANY), dtype)
        _check_graph("messages", tensors[N_MESSAGES:], n)

    @staticmethod
    def constant_shapes(n: int) -> list[tuple[int, ...]]:
        """The shapes of what is saved beside the inputs, for n nodes."""
        return []

    def shapes(self, n: int, edges: int) -> tuple[tuple[int, ...], ...]:
        """The inputs' shapes for ``n`` nodes and ``edges`` edges."""
        hidden = self.hidden
        return (
            (n, 2 * hidden), (n, self.dim), (edges, self.attrs), (edges,),
            (hidden,), (hidden, self.attrs), (hidden, hidden), (hidden,),
            (hidden,), (1,), (hidden, hidden), (hidden,), (hidden,),
        )  # fmt: skip

    @staticmethod
    def kept_size(record: Any, num_edges: int) -> int:
        """Nothing but the inputs is needed for the backward."""
        return 0

    def forward(self, record: Any, pq: Tensor, x: Tensor, kept: int) -> tuple[Tensor | None, ...]:
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
        constants: Sequence[Tensor],
        tensors: Sequence[Any],
        needed: Sequence[bool],
    ) -> list[Tensor | None]:
        """The gradients of the inputs that are needed."""
        g_m, g_x = _contiguous(cotangents)
        g_x = g_x if self.has_head else None
        found = _empty_gradients(_contiguous(tensors[:N_MESSAGES]), needed)
        if g_m is None and g_x is None:
            return [None if t is None else t.zero_() for t in found]
        _core().backward(self.record(tensors), addresses((g_m, g_x)), addresses(found))
        return found


class LayerKernel:
    """A whole layer for inputs of some widths and dtype; see :class:`MessagesKernel`."""

    def __init__(self, inputs: Sequence[Any], scalars: Sequence[Any]) -> None:
        h, x, v, _, _, node_attr, _, w1 = inputs[:8]
        *options, self.scale, self.residual, self.carry = scalars[: _N_OPTIONS + 3]
        features = h.shape[1]
        self.hidden, width = w1.shape
        self.out, self.dim = inputs[_NODE_W2].shape[0], x.shape[1]
        self.has_head = inputs[_LAYER_HEAD] is not None
        self.moves = self.has_head or v is not None
        self.widths = (
            features, self.hidden, self.out, self.dim, width - 2 * features - 1,
            0 if node_attr is None else node_attr.shape[1],
        )  # fmt: skip
        self.dtype, self.scalars = h.dtype, _record_scalars(h, options)

    def record(self, tensors: Sequence[Any]) -> Any:
        """The argument record of dense inputs and graph tensors, which must outlive it."""
        edge_attr, edge_mask = tensors[3], tensors[4]
        sizes = (
            torch.get_num_threads(), tensors[0].shape[0], *self.widths,
            -1 if edge_attr is None else edge_attr.shape[0],
            -1 if edge_mask is None else edge_mask.shape[0],
        )  # fmt: skip
        return _core().LayerArgs(addresses(tensors), sizes, self.scalars, self.scale, self.residual)

    def check(self, tensors: Sequence[Any], before: Sequence[Any] = ()) -> None:
        """See :meth:`MessagesKernel.check`."""
        n, dtype, dim = tensors[0].shape[0], self.dtype, self.dim
        outputs = (
            (n, self.out), (n if self.moves else _ANY, dim), (n if self.carry else _ANY, dim),
            *self.constant_shapes(n),
        )  # fmt: skip
        _check("layer", ("g_h", "g_x", "g_v", "m", "shift", "kept"), before, outputs, dtype)
        _check("layer", _LAYER, tensors[:N_LAYER], self.shapes(n, _ANY), dtype)
        _check_graph("layer", tensors[N_LAYER:], n)

    def constant_shapes(self, n: int) -> list[tuple[int, ...]]:
        """Those of M, X and what is kept."""
        return [(n, self.hidden), (n if self.has_head else 0, self.dim), (0,)]

    def shapes(self, n: int, edges: int) -> tuple[tuple[int, ...], ...]:
        """See :meth:`MessagesKernel.shapes`."""
        features, hidden, out, dim, attrs, node_attrs = self.widths
        return (
            (n, features), (n, dim), (n, dim), (edges, attrs), (edges,), (n, node_attrs), (n,),
            (hidden, 2 * features + 1 + attrs), (hidden,), (hidden, hidden), (hidden,),
            (hidden, features + hidden + node_attrs), (hidden,), (out, hidden), (out,),
            (1, hidden), (1,), (hidden, hidden), (hidden,), (1, hidden),
            (hidden, features), (hidden,), (1, hidden), (1,),
        )  # fmt: skip

    @staticmethod
    def kept_size(record: Any, num_edges: int) -> int:
        """Elements in which the layer can keep its activations for the backward."""
        return int(_core().layer_kept_size(record, num_edges)) if num_edges else 0

    @staticmethod
    def dense(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Inputs and graph tensors as the kernel reads them."""
        return _contiguous(tensors)

    def forward(self, record: Any, h: Tensor, x: Tensor, kept: int) -> tuple[Tensor | None, ...]:
        """New h, x and v, M and X, the kept activations; None for what the layer lacks.

        The activations are the storage of a tensor without elements, so that a recomputation under
        another budget saves tensors of the same shapes.
        """
        n = h.shape[0]
        memory = _reused(kept, h.dtype) if kept > _POOLED else h.new_empty(kept)
        outputs = (
            h.new_empty(n, self.out),
            x.new_empty(n, self.dim) if self.moves else None,
            x.new_empty(n, self.dim) if self.carry else None,
            h.new_empty(n, self.hidden),
            x.new_empty(n if self.has_head else 0, self.dim),
            memory,
        )
        _core().layer_forward(record, addresses(outputs))
        return (*outputs[:5], memory.resize_(0))

    def backward(
        self,
        cotangents: Sequence[Tensor | None],
        constants: Sequence[Tensor],
        tensors: Sequence[Any],
        needed: Sequence[bool],
    ) -> list[Tensor | None]:
        """The gradients of the inputs that are needed; ``constants`` are M, X and what was kept."""
        m, shift, memory = constants
        given = _filled((*cotangents, m, shift))
        found = _empty_gradients(tensors[:N_LAYER], needed)
        features, moves = given[0] is not None, given[1] is not None or given[2] is not None
        # what the cotangents do not reach is not written
        places = list(found)
        for k in (() if features else _PHI_H) + (() if moves else _MOVING):
            tensor = found[k]
            if tensor is not None:
                tensor.zero_()
                places[k] = None
        kept = memory.untyped_storage()
        kept_address = kept.data_ptr() if kept.nbytes() else 0
        _core().layer_backward(
            self.record(tensors), [*addresses(given), kept_address], addresses(places)
        )
        return found


def messages(*args: Any) -> tuple[Tensor, Tensor]:
    """``egnn_fast::messages`` on the CPU."""
    kernel, tensors = _checked(MessagesKernel, N_MESSAGES, args)
    m, shift = kernel.forward(kernel.record(tensors), *tensors[:2], 0)
    return m, m.new_empty((0, kernel.dim)) if shift is None else shift


def messages_backward(g_m: Tensor | None, g_x: Tensor | None, *args: Any) -> list[Tensor]:
    """``egnn_fast::messages_backward`` on the CPU."""
    *args, needed = args  # type: ignore[assignment]
    kernel, tensors = _checked(MessagesKernel, N_MESSAGES, args, (g_m, g_x))
    found = kernel.backward((g_m, g_x), (), tensors, needed)
    return [t for t in found if t is not None]


def layer(*args: Any) -> tuple[Tensor, ...]:
    """``egnn_fast::layer`` on the CPU."""
    kernel, tensors = _checked(LayerKernel, N_LAYER, args[:-1])
    h, x, v, m, shift, kept = kernel.forward(kernel.record(tensors), *tensors[:2], args[-1])
    x, v = (h.new_empty((0, kernel.dim)) if t is None else t for t in (x, v))
    return h, x, v, m, shift, kept


def layer_kept_size(args: Sequence[Any], num_edges: int) -> int:
    """Elements in which ``egnn_fast::layer``, called with ``args``, can keep its activations."""
    kernel, tensors = _checked(LayerKernel, N_LAYER, args)
    return int(kernel.kept_size(kernel.record(tensors), num_edges))


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
    cotangents, constants = (g_h, g_x, g_v), (m, shift, kept)
    kernel, tensors = _checked(LayerKernel, N_LAYER, args, (*cotangents, *constants))
    found = kernel.backward(cotangents, constants, tensors, needed)
    return [t for t in found if t is not None]


def fits(kernel: Any, constants: Sequence[Tensor], tensors: Sequence[Any], num_edges: int) -> bool:
    """Whether saved constants, inputs and graph tensors still are what a kernel was made for.

    Their memory may have been replaced since (``tensor.data = ...``), of which autograd knows
    nothing.
    """
    n, inputs = tensors[0].shape[0], tensors[:-4]
    present = [t for t in inputs if t is not None]
    shapes = zip(inputs, kernel.shapes(n, num_edges), strict=True)
    return (
        [t.shape for t in present] == [shape for t, shape in shapes if t is not None]
        and [t.shape for t in constants] == kernel.constant_shapes(n)
        and tensors[-4].shape[0] == n + 1
        and {t.dtype for t in present} == {kernel.dtype}
        and all([t.is_cpu for t in present])  # noqa: C419 (faster)
    )


def _checked(kind: Any, count: int, args: Sequence[Any], before: Sequence[Any] = ()) -> Any:
    """A kernel of this kind for an operator's arguments, and their tensors, checked and dense."""
    kernel, tensors = kind(args[:count], args[count + 4 :]), args[: count + 4]
    kernel.check(tensors, before)
    return kernel, kernel.dense(tensors)


def _check(
    operator: str,
    names: Sequence[str],
    tensors: Sequence[Tensor | None],
    shapes: Sequence[tuple[int, ...]],
    dtype: torch.dtype,
) -> None:
    # not strict: the operator itself has no tensors before its inputs
    for name, t, shape in zip(names, tensors, shapes, strict=False):
        if t is None or (t.shape == shape and t.dtype is dtype and t.is_cpu):
            continue
        same = len(shape) == t.dim() and all(
            n in (_ANY, size) for n, size in zip(shape, t.shape, strict=True)
        )
        if not same or t.dtype is not dtype or not t.is_cpu:
            expected = ", ".join("*" if n == _ANY else str(n) for n in shape)
            raise ValueError(
                f"egnn_fast::{operator}: {name}: expected [{expected}] of {dtype} on cpu, "
                f"got {list(t.shape)} of {t.dtype} on {t.device}"
            )


def _check_graph(operator: str, graph: Sequence[Any], nodes: int) -> None:
    rowptr, senders, perm, first = graph
    edges = _ANY if senders is None else senders.shape[0]
    _check(operator, ("rowptr",), (rowptr,), ((nodes + 1,),), torch.int64)
    _check(
        operator, ("senders", "perm", "first"), (senders, perm, first),
        ((edges,), (edges,), (nodes,)), torch.int32,
    )  # fmt: skip
    if senders is not None and int(rowptr[-1]) != edges:
        raise ValueError(
            f"egnn_fast::{operator}: rowptr: expected {edges}, the number of edges, at its end, "
            f"got {int(rowptr[-1])}"
        )
    if senders is None and first is None:
        raise ValueError(
            f"egnn_fast::{operator}: senders: expected a tensor unless first is given, got None"
        )


def _reused(count: int, dtype: torch.dtype) -> Tensor:
    """Empty memory from the core's pool: each step takes the pages of the one before."""
    found: Tensor = from_dlpack(_core().buffer(count, dtype is torch.float64))
    return found


def addresses(tensors: Sequence[Tensor | None]) -> list[int]:
    """The tensors' addresses; 0 for None and for those without elements."""
    return [0 if t is None else t.data_ptr() or _no_address(t) for t in tensors]


class NoAddress(ValueError):
    """A tensor has elements, but no memory: it was freed, or PyTorch has not made it yet."""


def _no_address(tensor: Tensor) -> int:
    if tensor.numel():
        raise NoAddress(
            f"a tensor of shape {list(tensor.shape)} has no memory that a kernel could read; "
            "was its storage freed?"
        )
    return 0


def _record_scalars(like: Tensor, scalars: Sequence[Any]) -> tuple[Any, ...]:
    activation, slope, norm, tanh, clamp = scalars[:5]
    return (like.dtype is torch.float64, _ACTIVATION_CODES[activation], slope, norm, tanh, clamp)


def _contiguous(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in tensors]


def _filled(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Dense cotangents; None for those without elements, which reach nothing."""
    return [None if t is None or not t.numel() else t.contiguous() for t in tensors]


def _empty_gradients(tensors: Sequence[Any], needed: Sequence[bool]) -> list[Tensor | None]:
    """Dense memory for the gradients of dense tensors."""
    return [torch.empty_like(t) if need else None for t, need in zip(tensors, needed, strict=True)]


def _core() -> Any:
    if _native.core is None:
        raise RuntimeError(_native.load_error)
    return _native.core
