"""``egnn_fast::messages``: the fused edge pass (paper, eqs. 3, 5, 8 and the sum of 4).

:mod:`egnn_fast.functional` checks the arguments. Under autocast all inputs are converted to the
dtype of ``x``, so that distances, MLPs and sums have its precision. On GPUs P and Q keep the dtype
of autocast's linear, and the MLPs' matrix products use it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from egnn_fast.graph import Graph, cache
from egnn_fast.operators import second_order
from egnn_fast.operators.autograd import Operator, Tensors
from egnn_fast.operators.direct import DirectOperator
from egnn_fast.operators.precision import matmul_precision
from egnn_fast.operators.signature import MESSAGES, encode_options
from egnn_fast.options import Options
from egnn_fast.runtime.eager import transforming
from egnn_fast.weights import EdgeWeights


def _fake(*args: Any) -> tuple[Tensor, Tensor]:
    call = MESSAGES.Arguments(*args)
    (nodes, dim), hidden = call.x.shape, call.pq.shape[1] // 2
    rows = nodes if call.w_x is not None else 0
    return call.x.new_empty((nodes, hidden)), call.x.new_empty((rows, dim))


OPERATOR = Operator(MESSAGES, fake=_fake, double_backward=second_order.messages)
_direct = DirectOperator(OPERATOR, "MessagesKernel")


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
    """Run the fused edge pass on checked arguments.

    Parameters
    ----------
    pq : Tensor [N, 2H]
        P and Q side by side: the receiver's (with the bias) and the sender's part of the first
        linear.
    x : Tensor [N, D]
        Coordinates.
    graph : Graph
        N nodes, E edges.
    weights : EdgeWeights
        The rest of the edge MLP, the gate and the coordinate head.
    options : Options
        What is not a tensor.
    edge_attr, edge_mask : Tensor [E, A] and [E], or None
        Attributes and the mask, a factor on each edge.
    backend : str
        ``"cpu"`` or ``"triton"``.
    precision : str, optional
        Precision of matrix products on a GPU, see :func:`matmul_precision`; by default the current
        setting of PyTorch.

    Returns
    -------
    ``M [N, H]`` and ``X [N, D]`` in the dtype of ``x``: the sums over senders of messages and of
    coordinate updates. X is None or empty (``[0, D]``) without a coordinate head.
    """
    inputs = (pq, x, edge_attr, edge_mask, *weights)
    graph_tensors = (graph.rowptr, graph.senders, graph.perm, graph.first)
    encoded = encode_options(options)
    results: Any = None
    if backend == "cpu":
        results = _direct(inputs, graph_tensors, (*encoded, backend, "highest"))
    if results is None:
        current = product_precision(backend, x, graph)
        scalars = (*encoded, backend, current if precision is None else precision)
        results = OPERATOR(*in_dtype_of(x, inputs, backend), *graph_tensors, *scalars)
    m, shift = results
    return m, shift


def in_dtype_of(x: Tensor, tensors: Tensors, backend: str = "cpu") -> Tensors:
    """The inputs of an operator; under autocast, converted to the dtype of ``x``."""
    if not torch.is_autocast_enabled(x.device.type):
        return tensors
    cast = [None if t is None else t.to(x.dtype) for t in tensors]
    # GPU kernels gather P and Q, the first input, in the dtype of autocast's linear
    return cast if backend == "cpu" else [tensors[0], *cast[1:]]


def product_precision(backend: str, x: Tensor, graph: Graph) -> str:
    """Precision of a backend's matrix products by the current setting of PyTorch.

    The CPU has one precision, ``"highest"``; see :func:`matmul_precision`.
    """
    if backend == "cpu":
        return "highest"
    if not transforming():
        # cache E here: reading rowptr[-1] later, in the backend, would synchronise
        cache.store_for(graph.rowptr, "num_edges", graph.num_edges)
    return matmul_precision(x.device.type)
