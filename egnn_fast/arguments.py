"""Checks of a layer's arguments: wrong input is named before any kernel runs."""

from __future__ import annotations

import torch
from torch import Tensor

from egnn_fast import ops
from egnn_fast.edge_cache import graph_of
from egnn_fast.graph import EdgeIndexLike, Graph, as_edge_index
from egnn_fast.options import EdgeWeights, LayerWeights, Options


def check_nodes(h: Tensor, x: Tensor, name: str = "h") -> None:
    """Node features ``[N, F]`` and coordinates ``[N, D]`` that go together."""
    check_float(name, h, 2)
    check_float("x", x, 2)
    if x.shape[1] < 1:
        raise ValueError(f"x: expected [N, D] with D >= 1, got {list(x.shape)}")
    if x.shape[0] != h.shape[0]:
        raise ValueError(f"x: expected {h.shape[0]} rows as {name} has, got {x.shape[0]}")
    check_like("x", x, h, name)


def check_float(name: str, value: object, dim: int) -> None:
    """``value`` is a floating-point tensor of ``dim`` dimensions."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if not value.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point tensor, got {value.dtype}")
    if value.dim() != dim:
        raise ValueError(f"{name}: expected {dim} dimensions, got shape {list(value.shape)}")


def check_like(name: str, value: Tensor, other: Tensor, other_name: str) -> None:
    """``value`` lies on the device of ``other`` and, outside autocast, has its dtype."""
    if value.device != other.device:
        raise ValueError(
            f"{name}: expected device {other.device} as {other_name} has, got {value.device}"
        )
    if value.dtype != other.dtype and not torch.is_autocast_enabled(other.device.type):
        raise TypeError(
            f"{name}: expected dtype {other.dtype} as {other_name} has, got {value.dtype}"
        )


def check_shape(name: str, value: Tensor, shape: tuple[int, ...]) -> None:
    """``value`` has exactly this shape."""
    if tuple(value.shape) != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(value.shape)}")


def resolve_graph(graph: Graph | EdgeIndexLike, h: Tensor) -> Graph:
    """A Graph for what the user passed, on the device and of the size of ``h``."""
    if not isinstance(graph, Graph):
        if torch.compiler.is_compiling():
            # nothing may be kept between calls there, so an operator sorts
            graph = ops.graph_in_trace(as_edge_index(graph), h.shape[0])
        else:
            graph = graph_of(graph, h.shape[0])
    if graph.num_nodes != h.shape[0]:
        raise ValueError(f"graph: has {graph.num_nodes} nodes, but h has {h.shape[0]} rows")
    if graph.device != h.device:
        raise ValueError(f"graph: expected device {h.device} as h has, got {graph.device}")
    return graph


def check_edge_rows(name: str, value: Tensor, graph: Graph) -> None:
    """``value`` has a row for each edge."""
    # the operator compares with an implicit graph's size itself; here it would be a constant
    if graph.is_complete and torch.compiler.is_compiling():
        return
    if value.shape[0] != graph.num_edges:
        raise ValueError(
            f"{name}: expected a row for each of the {graph.num_edges} edges, got {value.shape[0]}"
        )


def check_edge_attr(edge_attr: Tensor | None, width: int, graph: Graph, like: Tensor) -> None:
    """``edge_attr [E, width]``, or None where the layer takes none."""
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
    """A mask as a floating-point vector; bool and ``[rows, 1]`` are taken too."""
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
    """Shapes, dtypes and presence of the split edge weights."""
    shapes: dict[str, tuple[int, ...] | None] = {
        "w_r": (hidden,),
        "w_a": None if weights.w_a is None else (hidden, weights.w_a.shape[-1]),
        "w2": (hidden, hidden),
        "b2": (hidden,),
        "w_g": (hidden,) if options.attention else None,
        "b_g": (1,) if options.attention else None,
        "w3": (hidden, hidden) if options.updates_coords else None,
        "b3": (hidden,) if options.updates_coords else None,
        "w_x": (hidden,) if options.updates_coords else None,
    }
    _check_weights(weights, shapes, like)


def check_layer_weights(
    weights: LayerWeights, options: Options, features: int, node_attrs: int, like: Tensor
) -> int:
    """The same for a whole layer's weights; returns the edge-attribute width."""
    check_float("weights.edge_w1", weights.edge_w1, 2)
    hidden, width = weights.edge_w1.shape
    attrs = width - 2 * features - 1
    if attrs < 0:
        raise ValueError(
            f"h: has {features} features, but the layer was built for fewer "
            f"(its edge MLP takes {width} inputs, 2 * features + 1 + edge attributes)"
        )
    if weights.node_w1.shape[-1] != features + hidden + node_attrs:
        expected = weights.node_w1.shape[-1] - hidden
        raise ValueError(
            f"h and node_attr: expected {expected} features together as the node MLP takes, "
            f"got {features} and {node_attrs}"
        )
    att, head = options.attention, options.updates_coords
    shapes: dict[str, tuple[int, ...] | None] = {
        "edge_b1": (hidden,),
        "edge_w2": (hidden, hidden),
        "edge_b2": (hidden,),
        "att_w": (1, hidden) if att else None,
        "att_b": (1,) if att else None,
        "coord_w1": (hidden, hidden) if head else None,
        "coord_b1": (hidden,) if head else None,
        "coord_w2": (1, hidden) if head else None,
    }
    _check_weights(weights, shapes, like)
    return attrs


def _check_weights(
    weights: EdgeWeights | LayerWeights, shapes: dict[str, tuple[int, ...] | None], like: Tensor
) -> None:
    for name, shape in shapes.items():
        value = getattr(weights, name)
        if shape is None:
            if value is not None:
                raise ValueError(f"weights.{name}: expected None with these options, got a tensor")
            continue
        if value is None:
            raise ValueError(f"weights.{name}: expected shape {list(shape)}, got None")
        check_shape(f"weights.{name}", value, shape)
        check_like(f"weights.{name}", value, like, "x")
