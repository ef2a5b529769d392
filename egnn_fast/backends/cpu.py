"""Calls the C++ kernels: makes a call's record, allocates the outputs, names wrong tensors.

The kernels take arguments in the order of :mod:`egnn_fast.operators.signature`. When this module is
imported, it compares that table with the extension's; if they differ, the extension is not used.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from egnn_fast.operators.signature import ANY, GRAPH, LAYER, MESSAGES, Signature
from egnn_fast.options import ACTIVATIONS
from egnn_fast.runtime import native

_MIN_POOLED = 1 << 15  # elements from which memory of the pool is faster than new memory
_ACTIVATION_CODES = {name: code for code, name in enumerate(ACTIVATIONS)}
# scalars that choose how a call runs and are no options of the layer
_RUN_BY = ("backend", "precision", "stored_elements")


def _options_of(signature: Signature) -> list[str]:
    """The names of the options among an operator's scalars, of which they are the first."""
    return [each.name for each in signature.scalars if each.name not in _RUN_BY]


def _names(signature: Signature) -> dict[str, list[str]]:
    """An operator's names in order, in the form in which the extension exports them."""
    return {
        "inputs": list(signature.names),
        "shapes": [each.shape for each in signature.inputs],
        "graph": list(GRAPH),
        "options": _options_of(signature),
        "outputs": list(signature.outputs),
        "cotangents": list(signature.cotangents),
        "constants": list(signature.constants),
        "activations": list(ACTIVATIONS),
    }


def _reject_another_version() -> None:
    """Reject an extension whose names differ from ours: it would read one argument as another."""
    exported: dict[str, Any] = getattr(native.core, "signatures", dict)()
    for signature in (MESSAGES, LAYER):
        theirs = exported.get(signature.name, {})
        for part, names in _names(signature).items():
            pairs = itertools.zip_longest(names, theirs.get(part, ()))
            different = [
                f"{here!r} here and {there!r} there" for here, there in pairs if here != there
            ]
            if different:
                native.reject(
                    "the C++ extension egnn_fast._core was built from another version of "
                    "egnn_fast; build it again with `pip install .` from a checkout "
                    f"({part} of egnn_fast::{signature.name}: {', '.join(different)})"
                )
                return


if native.core is not None:
    _reject_another_version()


class _Kernel:
    """What the kernels of both operators have in common.

    Parameters
    ----------
    scalars : sequence
        The operator's.
    """

    signature: Signature
    # inputs with two dimensions, whose shapes give the sizes N, E, H, ...
    sized_by: tuple[str, ...]
    # how many of the operator's scalars are options of the layer; they come first
    n_options: int

    def __init__(self, scalars: Sequence[Any]) -> None:
        activation, *others = scalars[: self.n_options]
        self._options = (_ACTIVATION_CODES[activation], *others)

    def record(self, tensors: Sequence[Any]) -> Any:
        """The argument record of a call, whose inputs and graph tensors must outlive it.

        None unless they are dense tensors on the CPU whose shapes and dtypes fit each other.
        """
        raise NotImplementedError

    @staticmethod
    def dense(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Inputs and graph tensors, copied where the kernel cannot read their strides."""
        return _contiguous(tensors)

    def dense_record(self, tensors: Sequence[Any]) -> tuple[Any, Sequence[Any]]:
        """A call's record and the tensors whose addresses it holds.

        ``tensors`` are the inputs and the graph's; they are copied only if they are not dense. The
        record is None if they do not fit each other.
        """
        record = self.record(tensors)
        if record is None:
            tensors = self.dense(tensors)
            record = self.record(tensors)
        return record, tensors

    def backward_shapes(self, sizes: Sequence[int], call: Any) -> tuple[tuple[int, ...], ...]:
        """The shapes of the cotangents and constants of the operator's derivative."""
        raise NotImplementedError


class MessagesKernel(_Kernel):
    """The edge pass, with the options of its operator's ``scalars``."""

    signature, sized_by = MESSAGES, ("pq", "x", "w_a")
    n_options = len(_options_of(MESSAGES))
    # columns of the first linear's weight, which the kernel reads with any row stride
    _STRIDED = tuple(map(MESSAGES.index, ("w_r", "w_a")))
    _HEAD = MESSAGES.index("w_x")

    def record(self, tensors: Sequence[Any]) -> Any:
        """See :meth:`_Kernel.record`."""
        return _core().messages_record(tensors, torch.get_num_threads(), self._options)

    @classmethod
    def dense(cls, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
        """See :meth:`_Kernel.dense`."""
        w_r, w_a = cls._STRIDED
        return [
            t if t is None or k == w_r or (k == w_a and t.stride(1) == 1) else t.contiguous()
            for k, t in enumerate(tensors)
        ]

    def backward_shapes(self, sizes: Sequence[int], call: Any) -> tuple[tuple[int, ...], ...]:
        """See :meth:`_Kernel.backward_shapes`."""
        nodes, _, hidden, dim, *_ = sizes
        return (nodes, hidden), (ANY, dim)

    @staticmethod
    def stored_elements(record: Any) -> int:
        """0: the backward needs nothing but the inputs."""
        return 0

    def forward(
        self, record: Any, tensors: Sequence[Any], stored: int | None
    ) -> tuple[Tensor | None, ...]:
        """M ``[N, H]`` and X ``[N, D]``, None without a head."""
        x = tensors[MESSAGES.index("x")]
        n, dim = x.shape
        outputs = (
            x.new_empty(n, record.hidden),
            x.new_empty(n, dim) if tensors[self._HEAD] is not None else None,
        )
        _core().messages_forward(record, outputs)
        return outputs

    def backward(
        self,
        record: Any,
        cotangents: Sequence[Tensor | None],
        constants: Sequence[Tensor],
        tensors: Sequence[Any],
        needed: Sequence[bool],
    ) -> list[Tensor | None] | None:
        """The gradients of the inputs, None where they are not needed.

        ``record`` is that of ``tensors``, the dense inputs and graph tensors. Returns None if the
        cotangents do not fit them.
        """
        g_m, g_x = _contiguous(cotangents)
        g_x = g_x if tensors[self._HEAD] is not None else None
        grads = _empty_gradients(_contiguous(tensors[: MESSAGES.n_inputs]), needed)
        if g_m is None and g_x is None:
            return [None if t is None else t.zero_() for t in grads]
        return grads if _core().messages_backward(record, (g_m, g_x), grads) else None


class LayerKernel(_Kernel):
    """A whole layer, with the options of its operator's ``scalars``."""

    signature, sized_by = LAYER, ("h", "x", "node_attr", "edge_w1", "node_w1", "node_w2")
    n_options = len(_options_of(LAYER))
    _HEAD = LAYER.index("coord_w2")
    _CARRY = _options_of(LAYER).index("carry_velocity")
    # inputs that get a gradient from h alone, and from x and v alone, in every layer
    _FEATURES, _MOVES = (
        tuple(
            k
            for k, each in enumerate(LAYER.inputs)
            if each.reached_by == outputs and not each.by_head
        )
        for outputs in ("h", "x v")
    )

    def record(self, tensors: Sequence[Any]) -> Any:
        """See :meth:`_Kernel.record`."""
        return _core().layer_record(tensors, torch.get_num_threads(), self._options)

    def backward_shapes(self, sizes: Sequence[int], call: Any) -> tuple[tuple[int, ...], ...]:
        """See :meth:`_Kernel.backward_shapes`."""
        nodes, _, hidden, dim, _, _, _, out = sizes
        has_head = call.coord_w2 is not None
        return (
            (nodes, out), (nodes if has_head or call.v is not None else ANY, dim),
            (nodes if call.carry_velocity else ANY, dim), (nodes, hidden),
            (nodes if has_head else 0, dim), (0,),
        )  # fmt: skip

    @staticmethod
    def stored_elements(record: Any) -> int:
        """Elements in which the layer can store its activations for the backward."""
        return int(_core().layer_stored_elements(record))

    def forward(
        self, record: Any, tensors: Sequence[Any], stored: int | None
    ) -> tuple[Tensor | None, ...]:
        """New h, x and v, then the constants M, X and activations; None for what the layer lacks.

        ``stored`` is the number of elements of the activations; 0: the backward computes them
        again; None: no backward follows, and there are no constants. The activations are the
        storage of a tensor without elements, so that a recomputation under another budget saves
        tensors of the same shapes.
        """
        h, x, v = tensors[:3]
        n, dim = x.shape
        has_head = tensors[self._HEAD] is not None
        outputs = (
            h.new_empty(n, record.out_features),
            x.new_empty(n, dim) if has_head or v is not None else None,
            x.new_empty(n, dim) if self._options[self._CARRY] else None,
        )
        if stored is None:
            _core().layer_forward(record, (*outputs, None, None, None))
            return (*outputs, None, None, None)
        m, shift = h.new_empty(n, record.hidden), x.new_empty(n if has_head else 0, dim)
        memory = _pooled(stored, h.dtype) if stored > _MIN_POOLED else h.new_empty(stored)
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
        """See :meth:`MessagesKernel.backward`; ``constants`` are M, X and the activations."""
        *sums, memory = constants
        dense = _without_empty((*cotangents, *sums))
        grads = _empty_gradients(tensors[: LAYER.n_inputs], needed)
        g_h, g_x, g_v = dense[:3]
        features, moves = g_h is not None, g_x is not None or g_v is not None
        # the kernel does not write gradients that no cotangent reaches: these are zero
        written = grads
        if not features or not moves:
            written = list(grads)
            for k in (() if features else self._FEATURES) + (() if moves else self._MOVES):
                grad = grads[k]
                if grad is not None:
                    grad.zero_()
                    written[k] = None
        storage = memory.untyped_storage()
        size = storage.nbytes()
        address = storage.data_ptr() if size else 0
        fits = _core().layer_backward(record, dense, address, size, written)
        return grads if fits else None


def messages(*args: Any) -> tuple[Tensor, Tensor]:
    """``egnn_fast::messages`` on the CPU."""
    kernel, tensors, record = _checked(MessagesKernel, args)
    m, shift = kernel.forward(record, tensors, 0)
    return m, m.new_empty((0, tensors[1].shape[1])) if shift is None else shift


def messages_backward(*args: Any) -> list[Tensor]:
    """``egnn_fast::messages_backward`` on the CPU."""
    return _gradients(MessagesKernel, args)


def layer(*args: Any) -> tuple[Tensor, ...]:
    """``egnn_fast::layer`` on the CPU."""
    kernel, tensors, record = _checked(LayerKernel, args)
    h, x, v, *constants = kernel.forward(record, tensors, args[LAYER.index("stored_elements")])
    x, v = (h.new_empty((0, tensors[1].shape[1])) if t is None else t for t in (x, v))
    return h, x, v, *constants


def layer_stored_elements(args: Sequence[Any]) -> int:
    """Elements in which ``egnn_fast::layer``, called with ``args``, can store its activations.

    0 if the arguments have no record, such as tensors that the dispatcher has not resolved yet.
    """
    kernel = LayerKernel(args[LAYER.n_tensors :])
    record, _ = kernel.dense_record(args[: LAYER.n_tensors])
    return 0 if record is None else kernel.stored_elements(record)


def layer_backward(*args: Any) -> list[Tensor]:
    """``egnn_fast::layer_backward`` on the CPU."""
    return _gradients(LayerKernel, args)


def _gradients(kind: type[MessagesKernel | LayerKernel], args: Sequence[Any]) -> list[Tensor]:
    """The needed gradients, from the arguments of an operator's derivative."""
    signature = kind.signature
    before, forward_args, needed = signature.split_backward(args)
    outputs = len(signature.outputs)
    cotangents, constants = before[:outputs], before[outputs:]
    kernel, tensors, record = _checked(kind, forward_args, before)
    grads = kernel.backward(record, cotangents, constants, tensors, needed)
    if grads is None:
        raise ValueError(
            f"egnn_fast::{signature.name}_backward: the cotangents do not fit the inputs"
        )
    return [t for t in grads if t is not None]


def _checked(kind: Any, args: Sequence[Any], before: Sequence[Any] = ()) -> Any:
    """The kernel for an operator's arguments, its dense tensors, and their record.

    ``before`` are the cotangents and constants, which the operator's derivative takes before the
    inputs. Raises ValueError, naming the argument, for a tensor with another shape or dtype than
    the kernel expects.
    """
    signature: Signature = kind.signature
    name, call = signature.name, signature.Arguments(*args)
    kernel, tensors = kind(args[signature.n_tensors :]), args[: signature.n_tensors]
    for each in kind.sized_by:
        t = getattr(call, each)
        if t is not None and t.dim() != 2:
            raise ValueError(
                f"egnn_fast::{name}: {each}: expected 2 dimensions, got {list(t.shape)}"
            )
    sizes, dtype = signature.sizes(call), tensors[0].dtype
    names_before = (*signature.cotangents, *signature.constants)
    _check(name, names_before, before, kernel.backward_shapes(sizes, call), dtype)
    _check(name, signature.names, args[: signature.n_inputs], signature.shapes(*sizes), dtype)
    # checked before rowptr is read and strided tensors are copied
    _require_memory(name, names_before, before)
    _require_memory(name, (*signature.names, *GRAPH), tensors)
    _check_graph(name, tensors[signature.n_inputs :], sizes[0])
    record, tensors = kernel.dense_record(tensors)
    if record is None:
        raise ValueError(
            f"egnn_fast::{name}: the tensors do not fit each other: weights of an MLP or "
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
    """Raise ValueError, naming the tensor, for another shape, dtype or device."""
    # not strict: there are no cotangents and constants in the forward
    for name, t, shape in zip(names, tensors, shapes, strict=False):
        if t is None or (t.shape == shape and t.dtype is dtype and t.is_cpu):
            continue
        same = len(shape) == t.dim() and all(
            n in (ANY, size) for n, size in zip(shape, t.shape, strict=True)
        )
        if not same or t.dtype is not dtype or not t.is_cpu:
            expected = ", ".join("*" if n == ANY else str(n) for n in shape)
            raise ValueError(
                f"egnn_fast::{operator}: {name}: expected [{expected}] of {dtype} on cpu, "
                f"got {list(t.shape)} of {t.dtype} on {t.device}"
            )


def _check_graph(operator: str, graph: Sequence[Any], nodes: int) -> None:
    """Raise ValueError, naming the tensor, if the graph's tensors do not fit each other."""
    rowptr, senders, perm, first = graph
    edges = ANY if senders is None else senders.shape[0]
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


def _pooled(count: int, dtype: torch.dtype) -> Tensor:
    """Uninitialised memory of the extension's pool, whose pages a training step reuses."""
    buffer: Tensor = from_dlpack(_core().buffer(count, dtype is torch.float64))
    return buffer


def _require_memory(operator: str, names: Sequence[str], tensors: Sequence[Tensor | None]) -> None:
    """Raise ValueError, naming the argument, if the memory of a tensor was freed."""
    for name, t in zip(names, tensors, strict=False):
        if t is not None and t.numel() and not t.data_ptr():
            raise ValueError(
                f"egnn_fast::{operator}: {name}: a tensor of shape {list(t.shape)} without memory; "
                "was its storage freed?"
            )


def _contiguous(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in tensors]


def _without_empty(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Dense tensors; None for those without elements, which contribute nothing."""
    return [None if t is None or not t.numel() else t.contiguous() for t in tensors]


def _empty_gradients(tensors: Sequence[Any], needed: Sequence[bool]) -> list[Tensor | None]:
    """Uninitialised memory for the gradients that are needed, of dense tensors."""
    return [torch.empty_like(t) if need else None for t, need in zip(tensors, needed, strict=True)]


def _core() -> Any:
    if native.core is None:
        raise RuntimeError(native.load_error)
    return native.core
