"""The fused edge pass and the fused layer as PyTorch operators.

``egnn_fast::messages`` is the edge pass, ``egnn_fast::layer`` a whole layer as one native call;
:mod:`egnn_fast.operators.autograd` gives both their derivatives. :mod:`egnn_fast.functional`
checks the arguments, except those of a direct call without masks, which the extension checks.
Under autocast everything is brought to the dtype of ``x`` on the CPU: distances, MLPs and sums keep
its precision. GPU kernels take autocast's dtype for the MLPs' products alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from egnn_fast.backends import cpu
from egnn_fast.graph import Graph, cache
from egnn_fast.operators import second_order
from egnn_fast.operators.autograd import Operator, Tensors, lib, wants_grad
from egnn_fast.operators.budget import activation_budget
from egnn_fast.operators.direct import DirectWay, direct_calls_allowed
from egnn_fast.operators.precision import matmul_precision
from egnn_fast.options import LAYER_INPUTS, EdgeWeights, LayerWeights, Options
from egnn_fast.runtime.eager import PLAIN_TYPES, is_plain, transforming

_GRAPH = "Tensor rowptr, Tensor? senders, Tensor? perm, Tensor? first"
_OPTIONS = "str activation, float slope, float norm, bool tanh, float clamp"

# what gradients flow to, in the operators' order; the graph's four tensors and scalars follow
MESSAGES_DIFF = ("pq", "x", "edge_attr", "edge_mask", *EdgeWeights._fields)
LAYER_DIFF = (*LAYER_INPUTS, *LayerWeights._fields)
_ALWAYS = {
    "pq", "x", "h", "w_r", "w2", "b2",
    "edge_w1", "edge_b1", "edge_w2", "edge_b2", "node_w1", "node_b1", "node_w2", "node_b2",
}  # fmt: skip


def _schema(names: Sequence[str]) -> str:
    return ", ".join(f"Tensor{'' if name in _ALWAYS else '?'} {name}" for name in names)


def _where(names: Sequence[str], prefixes: tuple[str, ...]) -> tuple[bool, ...]:
    return tuple(name.startswith(prefixes) for name in names)


# its place among the arguments of messages and layer
_BACKEND, _LAYER_BACKEND = len(MESSAGES_DIFF) + 4 + 5, len(LAYER_DIFF) + 4 + 5 + 3
_HEAD = _where(MESSAGES_DIFF, ("w3", "b3", "w_x"))


def _messages_reached(needed: Sequence[bool], cotangents: Tensors, inputs: Tensors) -> list[bool]:
    # the coordinate head's weights have a gradient only if X is used
    if cotangents[1] is not None:
        return list(needed)
    return [need and not head for need, head in zip(needed, _HEAD, strict=True)]


def _messages_fake(pq: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    has_head = rest[MESSAGES_DIFF.index("w_x") - 2] is not None
    m = x.new_empty((pq.shape[0], pq.shape[1] // 2))
    return m, x.new_empty((x.shape[0] if has_head else 0, x.shape[1]))


_PHI_H = _where(LAYER_DIFF, ("node_",))
_MOVES = _where(LAYER_DIFF, ("v", "coord_"))
_EDGES = _where(LAYER_DIFF, ("edge_", "att_"))
_X = _where(LAYER_DIFF, ("x",))
_COORD_W2 = LAYER_DIFF.index("coord_w2")


def _layer_reached(needed: Sequence[bool], cotangents: Tensors, inputs: Tensors) -> list[bool]:
    # officially, too, parameters that the loss does not reach have no gradient
    features = cotangents[0] is not None
    moves = cotangents[1] is not None or cotangents[2] is not None
    if features and moves:
        return list(needed)
    # without a coordinate head only the velocity moves a node: no edge does
    edges = features or inputs[_COORD_W2] is not None
    place = edges or cotangents[1] is not None
    return [
        need
        and (features or not in_phi_h)
        and (moves or not in_move)
        and (edges or not in_edge)
        and (place or not is_x)
        for need, in_phi_h, in_move, in_edge, is_x in zip(
            needed, _PHI_H, _MOVES, _EDGES, _X, strict=True
        )
    ]


def _layer_fake(h: Tensor, x: Tensor, v: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    weights = LayerWeights(*rest[4 : 4 + len(LayerWeights._fields)])
    carry = rest[-4]
    n, dim = x.shape
    hidden, out = weights.edge_w1.shape[0], weights.node_w2.shape[0]
    has_head = weights.coord_w2 is not None
    moves = has_head or v is not None
    return (
        h.new_empty((n, out)),
        x.new_empty((n if moves else 0, dim)),
        x.new_empty((n if carry else 0, dim)),
        h.new_empty((n, hidden)),
        x.new_empty((n if has_head else 0, dim)),
        h.new_empty((0,)),  # its storage may be larger
    )


_messages = Operator(
    "messages",
    f"{_schema(MESSAGES_DIFF)}, {_GRAPH}, {_OPTIONS}, str backend, str precision",
    outputs=2,
    kept=0,
    n_diff=len(MESSAGES_DIFF),
    n_tensors=len(MESSAGES_DIFF) + 4,
    fake=_messages_fake,
    reached=_messages_reached,
    double_backward=second_order.messages,
)


def _kernel(backend: str) -> Any:
    """The module with a backend's kernels."""
    if backend == "cpu":
        return cpu
    if backend == "triton":
        return import_module("egnn_fast.backends.triton")
    raise ValueError(f"backend: {backend!r} has no kernels")


def _run_messages(*args: Any) -> tuple[Tensor, Tensor]:
    found: tuple[Tensor, Tensor] = _kernel(args[_BACKEND]).messages(*args)
    return found


def _run_messages_backward(g_m: Tensor | None, g_x: Tensor | None, *args: Any) -> list[Tensor]:
    found: list[Tensor] = _kernel(args[_BACKEND]).messages_backward(g_m, g_x, *args)
    return found


_DEVICES = ("CPU", "CUDA")
for _device in _DEVICES:
    lib.impl("messages", _run_messages, _device)
    lib.impl("messages_backward", _run_messages_backward, _device)
_direct_messages = DirectWay(_messages, cpu.MessagesKernel)


def messages(
    pq: Tensor,
    x: Tensor,
    graph: Graph,
    weights: EdgeWeights,
    options: Options,
    edge_attr: Tensor | None,
    edge_mask: Tensor | None,
    backend: str,
    precision: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The fused edge pass: ``pq [N, 2H]`` holds P and Q side by side.

    ``precision`` is that of a GPU's products; None: as PyTorch is set now.
    Returns ``M [N, H]`` and ``X [N, D]`` (None, or ``[0, D]``, without a coordinate head).
    """
    inputs = (pq, x, edge_attr, edge_mask, *weights)
    m: Tensor | None
    shift: Tensor | None
    found = None
    if backend == "cpu":
        scalars = (*_scalars(options), backend, "highest")
        found = _direct_messages(inputs, _graph_tensors(graph), scalars)
    if found is not None:
        m, shift = found
    else:
        now = _precision(backend, x, graph)
        scalars = (*_scalars(options), backend, now if precision is None else precision)
        m, shift = _messages(*_uncast(x, inputs, backend), *_graph_tensors(graph), *scalars)
    assert m is not None
    return m, shift


def _precision(backend: str, x: Tensor, graph: Graph) -> str:
    """That of a GPU's products; prepares its call."""
    if backend == "cpu":
        return "highest"
    if not transforming():
        # what the kernel would have to ask the device for
        cache.store_for(graph.rowptr, "num_edges", graph.num_edges)
    return matmul_precision(x.device.type)


_layer = Operator(
    "layer",
    f"{_schema(LAYER_DIFF)}, {_GRAPH}, {_OPTIONS}, float coord_scale, bool residual, bool carry, "
    "str backend, str precision, SymInt kept",
    outputs=3,
    kept=3,
    n_diff=len(LAYER_DIFF),
    n_tensors=len(LAYER_DIFF) + 4,
    fake=_layer_fake,
    reached=_layer_reached,
    double_backward=second_order.layer(messages),
)


def _run_layer(*args: Any) -> tuple[Tensor, ...]:
    found: tuple[Tensor, ...] = _kernel(args[_LAYER_BACKEND]).layer(*args)
    return found


def _run_layer_backward(*args: Any) -> list[Tensor]:
    backend = args[_layer.outputs + _layer.kept + _LAYER_BACKEND]
    found: list[Tensor] = _kernel(backend).layer_backward(*args)
    return found


for _device in _DEVICES:
    lib.impl("layer", _run_layer, _device)
    lib.impl("layer_backward", _run_layer_backward, _device)
_direct_layer = DirectWay(_layer, cpu.LayerKernel)


def layer(
    h: Tensor,
    x: Tensor,
    graph: Graph,
    weights: LayerWeights,
    options: Options,
    *,
    v: Tensor | None,
    edge_attr: Tensor | None,
    edge_mask: Tensor | None,
    node_attr: Tensor | None,
    coord_weight: Tensor | None,
    residual: bool,
    carry: bool,
    backend: str = "cpu",
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """A whole layer: ``(h [N, O], x [N, D], v [N, D])``.

    ``coord_weight [N]`` is what the mean divides by, inverted. x is None or empty (``[0, D]``)
    where nothing moves, and so is v unless ``carry``.
    """
    tensors = (h, x, v, edge_attr, edge_mask, node_attr, coord_weight, *weights)
    found = None
    if backend == "cpu":
        scalars = _layer_scalars(options, residual, carry)
        found = _direct_layer(tensors, _graph_tensors(graph), (*scalars, 0))
    if found is None:
        scalars = _layer_scalars(options, residual, carry, backend, _precision(backend, x, graph))
        args = (*_uncast(x, tensors), *_graph_tensors(graph), *scalars)
        found = _layer(*args, _kept_size(args))
    h_out, x_out, v_out = found[: _layer.outputs]
    assert h_out is not None
    return h_out, x_out, v_out


def try_direct_layer(
    h: Tensor,
    x: Tensor,
    graph: Any,
    weights: LayerWeights,
    options: Options,
    *,
    v: Tensor | None,
    edge_attr: Tensor | None,
    node_attr: Tensor | None,
    residual: bool,
    carry: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None] | None:
    """:func:`layer` as a direct call on arguments that nobody has checked, without masks.

    Returns None if the call cannot be direct, or if a tensor is strided or does not fit the others:
    the caller then checks the arguments and calls :func:`layer`. In the result x is None where
    nothing moves, and v unless ``carry``.

    Raises
    ------
    ValueError
        edge_attr has another number of rows than the graph has edges.
    """
    if not (
        direct_calls_allowed()
        and type(graph) is Graph
        and type(weights) is LayerWeights
        and type(x) in PLAIN_TYPES
        and x.dtype in (torch.float32, torch.float64)
        and x.is_cpu
        and (weights.att_w is not None) is options.attention
        and (weights.coord_w2 is not None) is (options.coord_agg is not None)
    ):
        return None
    weight = graph.inverse_degree(x.dtype) if options.coord_agg == "mean" else None
    found: Any = _direct_layer(
        (h, x, v, edge_attr, None, node_attr, weight, *weights),
        _graph_tensors(graph),
        (*_layer_scalars(options, residual, carry), 0),
        checked=False,
    )
    return found


def _kept_size(args: tuple[Any, ...]) -> int:
    """Elements in which a layer's call keeps its activations for the backward; 0: none."""
    budget = 0 if transforming() else activation_budget()
    tensors = args[: len(LAYER_DIFF)]
    if not budget or args[_LAYER_BACKEND] != "cpu" or not wants_grad(*tensors):
        return 0
    # fake and lazy tensors have no memory to read
    if not all(t is None or is_plain(t) for t in tensors):
        return 0
    size = cpu.layer_kept_size(args)
    return size if size * args[0].element_size() <= budget else 0


def norm_code(options: Options) -> float:
    """coord_norm as one number: 0 none, -1 "unit", else k."""
    if options.coord_norm is None:
        return 0.0
    return -1.0 if isinstance(options.coord_norm, str) else float(options.coord_norm)


def _graph_tensors(graph: Graph) -> tuple[Tensor | None, ...]:
    return graph.rowptr, graph.senders, graph.perm, graph.first


def _scalars(options: Options) -> tuple[str, float, float, bool, float]:
    return (
        options.activation, options.negative_slope, norm_code(options), options.coord_tanh,
        options.coord_clamp or 0.0,
    )  # fmt: skip


def _layer_scalars(
    options: Options, residual: bool, carry: bool, backend: str = "cpu", precision: str = "highest"
) -> tuple[Any, ...]:
    return (*_scalars(options), options.coord_scale, residual, carry, backend, precision)


def _uncast(x: Tensor, tensors: Tensors, backend: str = "cpu") -> Tensors:
    if not torch.is_autocast_enabled(x.device.type):
        return tensors
    found = [None if t is None else t.to(x.dtype) for t in tensors]
    # GPU kernels gather P and Q as autocast's linear left them
    return found if backend == "cpu" else [tensors[0], *found[1:]]
