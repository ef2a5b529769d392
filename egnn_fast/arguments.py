"""Checks of a layer's arguments, made before any kernel runs. Errors name the argument."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from egnn_fast import backends
from egnn_fast.graph import Graph
from egnn_fast.graph.edge_cache import graph_of
from egnn_fast.graph.edge_lists import EdgeIndexLike, as_edge_index
from egnn_fast.operators.signature import (
    FIRST_LAYER_WEIGHT,
    FIRST_MESSAGES_WEIGHT,
    LAYER,
    MESSAGES,
)
from egnn_fast.options import Options
from egnn_fast.runtime.eager import PLAIN_OR_NONE, tracing
from egnn_fast.weights import EdgeWeights, LayerWeights


def check_nodes(h: Tensor, x: Tensor, name: str = "h") -> None:
    """Raise unless ``h [N, F]`` and ``x [N, D]`` are floating point and match; ``name`` is h's.

    Raises
    ------
    TypeError, ValueError
        A dtype, a number of dimensions or rows, or the device is wrong.
    """
    check_float(name, h, 2)
    check_float("x", x, 2)
    if x.shape[1] < 1:
        raise ValueError(f"x: expected [N, D] with D >= 1, got {list(x.shape)}")
    if x.shape[0] != h.shape[0]:
        raise ValueError(f"x: expected {h.shape[0]} rows as {name} has, got {x.shape[0]}")
    check_like("x", x, h, name)


def check_float(name: str, value: object, dim: int) -> None:
    """Raise unless ``value`` is a floating-point tensor of ``dim`` dimensions."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if not value.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point tensor, got {value.dtype}")
    if value.dim() != dim:
        raise ValueError(f"{name}: expected {dim} dimensions, got shape {list(value.shape)}")


def check_like(name: str, value: Tensor, other: Tensor, other_name: str) -> None:
    """Raise unless ``value`` has the device and, outside autocast, the dtype of ``other``."""
    if value.device != other.device:
        raise ValueError(
            f"{name}: expected device {other.device} as {other_name} has, got {value.device}"
        )
    if value.dtype != other.dtype and not torch.is_autocast_enabled(other.device.type):
        raise TypeError(
            f"{name}: expected dtype {other.dtype} as {other_name} has, got {value.dtype}"
        )


def check_shape(name: str, value: Tensor, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless ``value`` has exactly this shape."""
    if tuple(value.shape) != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(value.shape)}")


def resolve_graph(graph: Graph | EdgeIndexLike | Sequence[Graph], h: Tensor) -> Graph:
    """The Graph for a Graph, an edge list ``[2, E]`` or a sequence of Graphs (a batch).

    Raises
    ------
    TypeError, ValueError, IndexError
        The edge list is wrong, or the graph's device or number of nodes is not that of
        ``h [N, F]``.
    """
    if not isinstance(graph, Graph):
        if isinstance(graph, (list, tuple)) and graph and isinstance(graph[0], Graph):
            graph = Graph.batch(graph)
        else:
            graph = _graph_of_edges(graph, h)
    if graph.device != h.device:
        raise ValueError(f"graph: expected device {h.device} as h has, got {graph.device}")
    if graph.num_nodes != h.shape[0]:
        raise ValueError(f"graph: has {graph.num_nodes} nodes, but h has {h.shape[0]} rows")
    return graph


def _graph_of_edges(edge_index: Any, h: Tensor) -> Graph:
    device = h.device
    rows = edge_index if isinstance(edge_index, (list, tuple)) else (edge_index,)
    tensors = [row for row in rows if isinstance(row, Tensor)]
    for t in tensors:
        if t.device != device:
            raise ValueError(f"edge_index: expected device {device} as h has, got {t.device}")
    if not tensors:
        # lists of numbers have no device of their own: put them on the device of h
        edge_index = as_edge_index(edge_index, device)
    if device.type not in ("cpu", "meta") and not tracing():
        backends.warn_once(
            f"edge_index: on {device.type} an edge list is sorted at each call, which waits for "
            "the device; build a Graph once (Graph.from_edge_index) and pass that"
        )
    return graph_of(edge_index, h.shape[0])


def check_edge_rows(name: str, value: Tensor, graph: Graph) -> None:
    """Raise ValueError unless ``value [E, ...]`` has a row for each edge."""
    # A trace would record a complete graph's number of edges as a constant here. The operator
    # checks it at run time.
    if graph.is_complete and tracing():
        return
    if value.shape[0] != graph.num_edges:
        raise ValueError(
            f"{name}: expected a row for each of the {graph.num_edges} edges, got {value.shape[0]}"
        )


def check_edge_attr(edge_attr: Tensor | None, width: int, graph: Graph, like: Tensor) -> None:
    """Raise unless ``edge_attr`` is ``[E, width]``, or None if ``width`` is 0.

    Outside autocast its dtype must be that of ``like``, the coordinates; its device always.
    """
    if edge_attr is None:
        if width:
            raise ValueError(f"edge_attr: expected [E, {width}], got None")
        return
    check_float("edge_attr", edge_attr, 2)
    check_edge_rows("edge_attr", edge_attr, graph)
    if edge_attr.shape[1] != width:
        raise ValueError(f"edge_attr: expected [E, {width}], got {list(edge_attr.shape)}")
    check_like("edge_attr", edge_attr, like, "x")


def as_mask(name: str, mask: Tensor | None, rows: int | None, like: Tensor) -> Tensor | None:
    """A mask, given as ``[rows]`` or ``[rows, 1]``, bool or float, as ``[rows]`` in like's dtype.

    ``rows=None`` accepts any number of rows. None stays None.

    Raises
    ------
    TypeError, ValueError
        The shape, dtype or device is wrong.
    """
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(mask).__name__}")
    if mask.dim() == 2 and mask.shape[1] == 1:
        mask = mask.squeeze(1)
    if mask.dim() != 1 or (rows is not None and mask.shape[0] != rows):
        raise ValueError(
            f"{name}: expected shape [{'E' if rows is None else rows}], got {list(mask.shape)}"
        )
    if mask.device != like.device:
        raise ValueError(f"{name}: expected device {like.device} as x has, got {mask.device}")
    if mask.dtype == torch.bool:
        return mask.to(like.dtype)
    check_float(name, mask, 1)
    check_like(name, mask, like, "x")
    return mask.to(like.dtype)


def check_edge_weights(weights: EdgeWeights, options: Options, hidden: int, like: Tensor) -> None:
    """Raise unless the edge pass's weights fit ``options``, H = ``hidden`` and ``like``.

    Each weight must be a tensor or None as the options say, and have the right shape, and the dtype
    and device of ``like``, the coordinates.
    """
    if not isinstance(weights, EdgeWeights):
        raise TypeError(f"weights: expected EdgeWeights, got {type(weights).__name__}")
    _check_hidden("P", hidden)
    attrs = 0
    if weights.w_a is not None:
        check_float("weights.w_a", weights.w_a, 2)
        attrs = weights.w_a.shape[1]
    shapes = MESSAGES.shapes(0, 0, hidden, 0, attrs, 0, 0, 0)[FIRST_MESSAGES_WEIGHT:]
    present = MESSAGES.presence(gate=options.attention, head=options.updates_coords)
    expected = [
        s if p else None for s, p in zip(shapes, present[FIRST_MESSAGES_WEIGHT:], strict=True)
    ]
    if weights.w_a is None:
        expected[EdgeWeights._fields.index("w_a")] = None
    _check_weights(weights, tuple(expected), like)


def check_layer_weights(
    weights: LayerWeights, options: Options, features: int, node_attrs: int, like: Tensor
) -> int:
    """As :func:`check_edge_weights`, for a whole layer. Returns A, the width of ``edge_attr``.

    ``features`` is F, the width of h; ``node_attrs`` is B, the width of ``node_attr``.
    """
    if not isinstance(weights, LayerWeights):
        raise TypeError(f"weights: expected LayerWeights, got {type(weights).__name__}")
    try:
        (hidden, width), (_, inputs) = weights.edge_w1.shape, weights.node_w1.shape
        out, _ = weights.node_w2.shape
    except (AttributeError, ValueError):
        for name in ("edge_w1", "node_w1", "node_w2"):
            check_float(f"weights.{name}", getattr(weights, name), 2)
        raise
    _check_hidden("weights.edge_w1", hidden)
    attrs = width - 2 * features - 1
    if attrs < 0:
        raise ValueError(
            f"h: has {features} features, but the layer was built for fewer "
            f"(its edge MLP takes {width} inputs, 2 * features + 1 + edge attributes)"
        )
    if inputs != features + hidden + node_attrs:
        raise ValueError(
            f"h and node_attr: expected {inputs - hidden} features together as the node MLP takes, "
            f"got {features} and {node_attrs}"
        )
    shapes = LAYER.shapes(0, 0, hidden, 0, attrs, node_attrs, features, out)[FIRST_LAYER_WEIGHT:]
    present = LAYER.presence(
        gate=options.attention,
        head=options.updates_coords,
        velocity=weights.vel_w1 is not None,
    )[FIRST_LAYER_WEIGHT:]
    expected = tuple([s if p else None for s, p in zip(shapes, present, strict=True)])
    _check_weights(weights, expected, like)
    return attrs


def _check_hidden(name: str, hidden: int) -> None:
    if hidden < 1:
        raise ValueError(f"{name}: expected a hidden width of at least 1, got {hidden}")


def _check_weights(
    weights: EdgeWeights | LayerWeights,
    shapes: tuple[tuple[int, ...] | None, ...],
    like: Tensor,
) -> None:
    # This runs in every call of every layer, so correct weights take a fast path.
    if not torch.compiler.is_compiling() and _all_fit(weights, shapes, like):
        return
    for name, value, shape in zip(weights._fields, weights, shapes, strict=True):
        if shape is None:
            if value is not None:
                raise ValueError(f"weights.{name}: expected None with these options, got a tensor")
        elif value is None:
            raise ValueError(f"weights.{name}: expected shape {list(shape)}, got None")
        elif (
            not isinstance(value, Tensor)
            or value.shape != shape
            or value.dtype is not like.dtype
            or value.device != like.device
        ):
            check_float(f"weights.{name}", value, len(shape))
            check_shape(f"weights.{name}", value, shape)
            check_like(f"weights.{name}", value, like, "x")


def _all_fit(
    weights: EdgeWeights | LayerWeights, shapes: tuple[tuple[int, ...] | None, ...], like: Tensor
) -> bool:
    """Whether the weights are plain tensors of these shapes, with the dtype and device of ``like``.

    False may be wrong: the caller then checks the weights one by one.
    """
    return (
        PLAIN_OR_NONE.issuperset(map(type, weights))
        and tuple([None if t is None else t.shape for t in weights]) == shapes
        and {t.dtype for t in weights if t is not None} == {like.dtype}
        and {t.device for t in weights if t is not None} == {like.device}
    )
