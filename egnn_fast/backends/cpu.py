"""Calls the C++ kernels: gets a call's record, allocates the outputs, names what does not fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from egnn_fast.runtime import native

_ACTIVATION_CODES = {"silu": 0, "relu": 1, "leaky_relu": 2}
# the edge pass's differentiable inputs in the operator's order, which csrc/records.h repeats
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
_LAYER_HEAD = _LAYER.index("w_x")
_PHI_H = tuple(k for k, name in enumerate(_LAYER) if name.startswith("node_"))
# what only the coordinates' cotangents reach
_MOVING = tuple(
    map(
        _LAYER.index,
        ("v", "coord_weight", "w3", "b3", "w_x", "vel_w1", "vel_b1", "vel_w2", "vel_b2"),
    )
)
Shapes = tuple[tuple[int, ...], ...]


class MessagesKernel:
    """The edge pass with given options.

    Parameters
    ----------
    scalars : sequence
        The operator's scalars from ``activation`` on.
    """

    name, inputs = "messages", _MESSAGES
    # what the operator's derivative takes before its inputs
    before = ("g_m", "g_x")
    # inputs whose shapes give the call's widths; each must have two dimensions
    sized_by = tuple(map(_MESSAGES.index, ("pq", "x", "w_a")))

    def __init__(self, scalars: Sequence[Any]) -> None:
        self._scalars = _record_scalars(scalars)

    def record(self, tensors: Sequence[Any]) -> Any:
        """The argument record of the operator's inputs and graph tensors, which must outlive it.

        None unless they are dense tensors on the CPU whose shapes and dtypes fit each other.
        """
        return _core().messages_record(tensors, torch.get_num_threads(), self._scalars)

    @staticmethod
    def dense(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Inputs and graph tensors as the kernel reads them."""
        # w_r and w_a are columns of the first linear's weight: read in place, by their row stride
        return [
            t if t is None or k == 4 or (k == 5 and t.stride(1) == 1) else t.contiguous()
            for k, t in enumerate(tensors)
        ]

    def shapes(self, tensors: Sequence[Any]) -> tuple[Shapes, Shapes]:
        """The shapes expected of :attr:`before` and of the inputs.

        csrc/records.h has them too, and only accepts or refuses: these are for the message.
        """
        n, hidden, dim = tensors[0].shape[0], tensors[0].shape[1] // 2, tensors[1].shape[1]
        attrs = 0 if tensors[5] is None else tensors[5].shape[1]
        inputs = (
            (n, 2 * hidden), (n, dim), (_ANY, attrs), (_ANY,),
            (hidden,), (hidden, attrs), (hidden, hidden), (hidden,),
            (hidden,), (1,), (hidden, hidden), (hidden,), (hidden,),
        )  # fmt: skip
        return ((n, hidden), (_ANY, dim)), inputs

    @staticmethod
    def kept_size(record: Any) -> int:
        """Nothing but the inputs is needed for the backward."""
        return 0

    def forward(
        self, record: Any, tensors: Sequence[Any], kept: int | None
    ) -> tuple[Tensor | None, ...]:
        """M and X, None without a head."""
        x = tensors[1]
        n, dim = x.shape
        outputs = (
            x.new_empty(n, record.hidden),
            x.new_empty(n, dim) if tensors[_MESSAGES_HEAD] is not None else None,
        )
        _core().forward(record, outputs)
        return outputs

    def backward(
        self,
        record: Any,
        cotangents: Sequence[Tensor | None],
        constants: Sequence[Tensor],
        tensors: Sequence[Any],
        needed: Sequence[bool],
    ) -> list[Tensor | None] | None:
        """The gradients of the inputs that are needed; None if the cotangents do not fit.

        ``record`` is that of ``tensors``, the dense inputs and graph tensors.
        """
        g_m, g_x = _contiguous(cotangents)
        g_x = g_x if tensors[_MESSAGES_HEAD] is not None else None
        found = _empty_gradients(_contiguous(tensors[:N_MESSAGES]), needed)
        if g_m is None and g_x is None:
            return [None if t is None else t.zero_() for t in found]
        return found if _core().backward(record, (g_m, g_x), found) else None


class LayerKernel:
    """A whole layer with given options; parameters and methods as of :class:`MessagesKernel`."""

    name, inputs = "layer", _LAYER
    before = ("g_h", "g_x", "g_v", "m", "shift", "kept")
    sized_by = tuple(map(_LAYER.index, ("h", "x", "node_attr", "w1", "node_w1", "node_w2")))

    def __init__(self, scalars: Sequence[Any]) -> None:
        *options, self._scale, self._residual, self._carry = scalars[: _N_OPTIONS + 3]
        self._scalars = _record_scalars(options)

    def record(self, tensors: Sequence[Any]) -> Any:
        """See :meth:`MessagesKernel.record`."""
        return _core().layer_record(
            tensors, torch.get_num_threads(), self._scalars, self._scale, self._residual
        )

    @staticmethod
    def dense(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Inputs and graph tensors as the kernel reads them."""
        return _contiguous(tensors)

    def shapes(self, tensors: Sequence[Any]) -> tuple[Shapes, Shapes]:
        """See :meth:`MessagesKernel.shapes`."""
        h, x, node_attr, w1, node_w1, node_w2 = (tensors[k] for k in self.sized_by)
        (n, _), (_, dim), (hidden, width), (out, _) = h.shape, x.shape, w1.shape, node_w2.shape
        node_attrs, v = 0 if node_attr is None else node_attr.shape[1], tensors[2]
        # by the weights, so that h or edge_attr is named, whichever is wrong
        features = node_w1.shape[1] - hidden - node_attrs
        attrs = width - 2 * features - 1
        has_head = tensors[_LAYER_HEAD] is not None
        inputs = (
            (n, features), (n, dim), (n, dim), (_ANY, attrs), (_ANY,), (n, node_attrs), (n,),
            (hidden, width), (hidden,), (hidden, hidden), (hidden,),
            (hidden, features + hidden + node_attrs), (hidden,), (out, hidden), (out,),
            (1, hidden), (1,), (hidden, hidden), (hidden,), (1, hidden),
            (hidden, features), (hidden,), (1, hidden), (1,),
        )  # fmt: skip
        before = (
            (n, out), (n if has_head or v is not None else _ANY, dim),
            (n if self._carry else _ANY, dim), (n, hidden), (n if has_head else 0, dim), (0,),
        )  # fmt: skip
        return before, inputs

    @staticmethod
    def kept_size(record: Any) -> int:
        """Elements in which the layer can keep its activations for the backward."""
        return int(_core().layer_kept_size(record))

    def forward(
        self, record: Any, tensors: Sequence[Any], kept: int | None
    ) -> tuple[Tensor | None, ...]:
        """New h, x and v, M and X, the kept activations; None for what the layer lacks.

        The activations are the storage of a tensor without elements, so that a recomputation under
        another budget saves tensors of the same shapes. ``kept`` is their number of elements; 0:
        the backward computes them again; None: no backward follows, and the last three are None.
        """
        h, x, v = tensors[:3]
        n, dim = x.shape
        has_head = tensors[_LAYER_HEAD] is not None
        outputs = (
            h.new_empty(n, record.out_features),
            x.new_empty(n, dim) if has_head or v is not None else None,
            x.new_empty(n, dim) if self._carry else None,
        )
        if kept is None:
            _core().layer_forward(record, (*outputs, None, None, None))
            return (*outputs, None, None, None)
        m, shift = h.new_empty(n, record.hidden), x.new_empty(n if has_head else 0, dim)
        memory = _reused(kept, h.dtype) if kept > _POOLED else h.new_empty(kept)
        _core().layer_forward(record, (*outputs, m, shift, memory))
        return (*outputs, m, shift, memory.resize_(0))

    def backward(
        self,
        record: Any,
        cotangents: Sequence[Tensor | None],
        constants: Sequence[Tensor],
        tensors: Sequence[Any],
        needed: Sequence[bool],
    ) -> list[Tensor | None] | None:
        """See :meth:`MessagesKernel.backward`; ``constants`` are M, X and what was kept."""
        *outputs, memory = constants
        given = _filled((*cotangents, *outputs))
        found = _empty_gradients(tensors[:N_LAYER], needed)
        features, moves = given[0] is not None, given[1] is not None or given[2] is not None
        # the kernel does not write gradients that no cotangent reaches: they are zero
        places = found
        if not features or not moves:
            places = list(found)
            for k in (() if features else _PHI_H) + (() if moves else _MOVING):
                tensor = found[k]
                if tensor is not None:
                    tensor.zero_()
                    places[k] = None
        kept = memory.untyped_storage()
        size = kept.nbytes()
        fits = _core().layer_backward(record, given, kept.data_ptr() if size else 0, size, places)
        return found if fits else None


def dense_record(kernel: Any, tensors: Sequence[Any]) -> tuple[Any, Sequence[Any]]:
    """A call's record and the dense tensors that it has the addresses of.

    ``tensors`` are the inputs and the graph's; they are copied only if they are not dense. The
    record is None if they do not fit each other.
    """
    record = kernel.record(tensors)
    if record is None:
        tensors = kernel.dense(tensors)
        record = kernel.record(tensors)
    return record, tensors


def messages(*args: Any) -> tuple[Tensor, Tensor]:
    """``egnn_fast::messages`` on the CPU."""
    kernel, tensors, record = _checked(MessagesKernel, args)
    m, shift = kernel.forward(record, tensors, 0)
    return m, m.new_empty((0, tensors[1].shape[1])) if shift is None else shift


def messages_backward(g_m: Tensor | None, g_x: Tensor | None, *args: Any) -> list[Tensor]:
    """``egnn_fast::messages_backward`` on the CPU."""
    *args, needed = args  # type: ignore[assignment]
    return _gradients(MessagesKernel, args, (g_m, g_x), (), needed)


def layer(*args: Any) -> tuple[Tensor, ...]:
    """``egnn_fast::layer`` on the CPU."""
    kernel, tensors, record = _checked(LayerKernel, args[:-1])
    h, x, v, m, shift, kept = kernel.forward(record, tensors, args[-1])
    x, v = (h.new_empty((0, tensors[1].shape[1])) if t is None else t for t in (x, v))
    return h, x, v, m, shift, kept


def layer_kept_size(args: Sequence[Any]) -> int:
    """Elements in which ``egnn_fast::layer``, called with ``args``, can keep its activations.

    0 if they have no record, as tensors that the dispatcher has not resolved yet.
    """
    kernel = LayerKernel(args[N_LAYER + 4 :])
    record, _ = dense_record(kernel, args[: N_LAYER + 4])
    return 0 if record is None else kernel.kept_size(record)


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
    return _gradients(LayerKernel, args, (g_h, g_x, g_v), (m, shift, kept), needed)


def _gradients(
    kind: Any,
    args: Sequence[Any],
    cotangents: Sequence[Tensor | None],
    constants: Sequence[Tensor],
    needed: Sequence[bool],
) -> list[Tensor]:
    kernel, tensors, record = _checked(kind, args, (*cotangents, *constants))
    found = kernel.backward(record, cotangents, constants, tensors, needed)
    if found is None:
        raise ValueError(f"egnn_fast::{kernel.name}_backward: the cotangents do not fit the inputs")
    return [t for t in found if t is not None]


def _checked(kind: Any, args: Sequence[Any], before: Sequence[Any] = ()) -> Any:
    """A kernel of this kind for an operator's arguments, their tensors, dense, and the record.

    Raises ValueError unless the tensors have the shapes and dtypes that the kernel expects.
    ``before`` are those that the operator's derivative takes before its inputs.
    """
    n = len(kind.inputs)
    kernel, tensors = kind(args[n + 4 :]), args[: n + 4]
    for k in kind.sized_by:
        if tensors[k] is not None and tensors[k].dim() != 2:
            raise ValueError(
                f"egnn_fast::{kind.name}: {kind.inputs[k]}: expected 2 dimensions, "
                f"got {list(tensors[k].shape)}"
            )
    expected, inputs = kernel.shapes(tensors)
    nodes, dtype = tensors[0].shape[0], tensors[0].dtype
    _check(kind.name, kind.before, before, expected, dtype)
    _check(kind.name, kind.inputs, tensors[:n], inputs, dtype)
    # before rowptr is read and strided tensors are copied
    _require_memory(kind.name, kind.before, before)
    _require_memory(kind.name, (*kind.inputs, "rowptr", "senders", "perm", "first"), tensors)
    _check_graph(kind.name, tensors[n:], nodes)
    record, tensors = dense_record(kernel, tensors)
    if record is None:
        raise ValueError(
            f"egnn_fast::{kind.name}: the tensors do not fit each other: weights of an MLP or "
            "edge_attr are missing, a width or D is 0, or residual needs F = O"
        )
    return kernel, tensors, record


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


def _require_memory(operator: str, names: Sequence[str], tensors: Sequence[Tensor | None]) -> None:
    """Raise ValueError, naming the argument, if the memory of a tensor was freed."""
    for name, t in zip(names, tensors, strict=False):
        if t is not None and t.numel() and not t.data_ptr():
            raise ValueError(
                f"egnn_fast::{operator}: {name}: a tensor of shape {list(t.shape)} without memory; "
                "was its storage freed?"
            )


def _record_scalars(scalars: Sequence[Any]) -> tuple[Any, ...]:
    activation, slope, norm, tanh, clamp = scalars[:_N_OPTIONS]
    return (_ACTIVATION_CODES[activation], slope, norm, tanh, clamp)


def _contiguous(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in tensors]


def _filled(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Dense cotangents; None for those without elements, which reach nothing."""
    return [None if t is None or not t.numel() else t.contiguous() for t in tensors]


def _empty_gradients(tensors: Sequence[Any], needed: Sequence[bool]) -> list[Tensor | None]:
    """Dense memory for the gradients of dense tensors."""
    return [torch.empty_like(t) if need else None for t, need in zip(tensors, needed, strict=True)]


def _core() -> Any:
    if native.core is None:
        raise RuntimeError(native.load_error)
    return native.core
