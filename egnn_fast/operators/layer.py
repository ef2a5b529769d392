"""``egnn_fast::layer``: a whole layer (paper, eqs. 3 to 8) as one PyTorch operator.

:mod:`egnn_fast.functional` checks the arguments. Only :func:`try_direct_layer` takes arguments that
nobody has checked; the C++ extension checks those. For autocast see
:mod:`egnn_fast.operators.messages`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from egnn_fast.graph import Graph
from egnn_fast.operators import second_order
from egnn_fast.operators.autograd import Operator, wants_grad
from egnn_fast.operators.budget import activation_budget
from egnn_fast.operators.direct import DirectOperator, direct_calls_allowed
from egnn_fast.operators.messages import in_dtype_of, messages, product_precision
from egnn_fast.operators.registry import kernels_of
from egnn_fast.operators.signature import LAYER, encode_options
from egnn_fast.options import Options
from egnn_fast.runtime.eager import PLAIN_TYPES, is_plain, transforming
from egnn_fast.weights import LayerWeights


def _fake(*args: Any) -> tuple[Tensor, ...]:
    call = LAYER.Arguments(*args)
    nodes, dim = call.x.shape
    hidden, out = call.edge_w1.shape[0], call.node_w2.shape[0]
    has_head = call.coord_w2 is not None
    moves = has_head or call.v is not None
    return (
        call.h.new_empty((nodes, out)),
        call.x.new_empty((nodes if moves else 0, dim)),
        call.x.new_empty((nodes if call.carry_velocity else 0, dim)),
        call.h.new_empty((nodes, hidden)),
        call.x.new_empty((nodes if has_head else 0, dim)),
        call.h.new_empty((0,)),  # activations: stored in the storage of a tensor without elements
    )


OPERATOR = Operator(LAYER, fake=_fake, double_backward=second_order.layer(messages))
_direct = DirectOperator(OPERATOR, "LayerKernel")


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
    carry_velocity: bool,
    backend: str = "cpu",
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Run a whole layer on checked arguments.

    Parameters
    ----------
    h, x : Tensor [N, F] and [N, D]
        Node features and coordinates.
    graph : Graph
        N nodes, E edges.
    weights : LayerWeights
        All weights.
    options : Options
        What is not a tensor.
    v : Tensor [N, D] or None
        Velocities.
    edge_attr, edge_mask, node_attr : Tensor [E, A], [E] and [N, B], or None
        Attributes and the mask, a factor on each edge.
    coord_weight : Tensor [N] or None
        The mean's factor on a node's sum of coordinate updates; None for a sum.
    residual : bool
        Add h to the new features.
    carry_velocity : bool
        Return the new velocities.
    backend : str
        ``"cpu"`` or ``"triton"``.

    Returns
    -------
    ``h [N, O]``, ``x [N, D]`` and ``v [N, D]`` in the dtype of ``x``. The new x is None or empty
    (``[0, D]``) if the layer does not move nodes, v is so unless ``carry_velocity``.
    """
    inputs = (h, x, v, edge_attr, edge_mask, node_attr, coord_weight, *weights)
    graph_tensors = (graph.rowptr, graph.senders, graph.perm, graph.first)
    encoded = (*encode_options(options), options.coord_scale, residual, carry_velocity, backend)
    results: Any = None
    if backend == "cpu":
        results = _direct(inputs, graph_tensors, (*encoded, "highest", 0))
    if results is None:
        precision = product_precision(backend, x, graph)
        args = (*in_dtype_of(x, inputs), *graph_tensors, *encoded, precision)
        results = OPERATOR(*args, _stored_elements(args))
    new_h, new_x, new_v, *_ = results
    return new_h, new_x, new_v


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
    carry_velocity: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None] | None:
    """:func:`layer` as a direct call without masks, on arguments that nobody has checked.

    Parameters and result are those of :func:`layer`. Returns None if the call cannot be direct, or
    if a tensor is not contiguous or does not fit the others: the caller then checks the arguments
    and calls :func:`layer`.

    Raises
    ------
    ValueError
        ``edge_attr`` does not have a row for each edge.
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
    coord_weight = graph.inverse_degree(x.dtype) if options.coord_agg == "mean" else None
    results: Any = _direct(
        (h, x, v, edge_attr, None, node_attr, coord_weight, *weights),
        (graph.rowptr, graph.senders, graph.perm, graph.first),
        (
            *encode_options(options), options.coord_scale, residual, carry_velocity, "cpu",
            "highest", 0,
        ),
        checked=False,
    )  # fmt: skip
    return results


def _stored_elements(args: tuple[Any, ...]) -> int:
    """How many elements of activations the call stores; 0 without a backward or over the budget.

    ``args`` are the operator's without the last one, ``stored_elements``, which this is.
    """
    budget = 0 if transforming() else activation_budget()
    inputs = args[: LAYER.n_inputs]
    if not budget or args[LAYER.index("backend")] != "cpu" or not wants_grad(*inputs):
        return 0
    # fake and lazy tensors have no memory to read
    if not all(t is None or is_plain(t) for t in inputs):
        return 0
    size: int = kernels_of("cpu").layer_stored_elements((*args, 0))
    return size if size * args[0].element_size() <= budget else 0
