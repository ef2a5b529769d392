"""A layer around an edge pass in PyTorch's own operations: P and Q before it, the updates after it.

The fused layer's second derivative runs so, and what benchmarks compare it with.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

from egnn_fast import reference
from egnn_fast.graph import Graph
from egnn_fast.options import Options
from egnn_fast.weights import LayerWeights

EdgePass = Callable[..., tuple[Tensor, Tensor | None]]


def layer(
    edge_pass: EdgePass,
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
    backend: str,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``(h, x, v)`` of a layer; see :func:`egnn_fast.functional.egcl`.

    ``edge_pass`` is :func:`egnn_fast.operators.ops.messages`; ``coord_weight [N]`` is what the
    mean divides by, inverted.
    """
    w_pq, b_pq, edge = weights.split(h.shape[1])
    m, total = edge_pass(
        F.linear(h, w_pq, b_pq), x, graph, edge, options, edge_attr, edge_mask, backend
    )
    act = options.activation_fn()
    update = reference.node_model(h, m, node_attr, weights, act)
    shift = None
    if options.updates_coords and total is not None:
        shift = scale_shift(total, coord_weight, options)
    gate = None if v is None else reference.velocity_gate(h, weights, act)
    return apply_updates(h, x, v, update, shift, gate, residual)


def scale_shift(total: Tensor, coord_weight: Tensor | None, options: Options) -> Tensor:
    """The coordinate update ``[N, D]`` from the sum over senders: mean or sum, and the scale."""
    shift = total if coord_weight is None else total * coord_weight.unsqueeze(1)
    return shift if options.coord_scale == 1 else shift * options.coord_scale


def apply_updates(
    h: Tensor,
    x: Tensor,
    v: Tensor | None,
    update: Tensor,
    shift: Tensor | None,
    gate: Tensor | None,
    residual: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Residual, velocity and coordinate update: ``(h, x, v)``, v the whole step that x made.

    ``gate [N, 1]`` is phi_v(h), needed where there are velocities.
    """
    new_h = h + update if residual else update
    if v is None:
        return new_h, x if shift is None else x + shift, None
    assert gate is not None
    step = gate.to(v.dtype) * v
    if shift is not None:
        step = step + shift
    return new_h, x + step, step
