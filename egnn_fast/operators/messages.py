"""``egnn_fast::messages``: the fused edge pass as a PyTorch operator.

:mod:`egnn_fast.functional` checks the arguments. Under autocast everything is brought to the dtype
of ``x`` on the CPU: distances, MLPs and sums keep its precision. GPU kernels take autocast's dtype
for the MLPs' products alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from egnn_fast.graph import Graph, cache
from egnn_fast.operators import second_order
from egnn_fast.operators.autograd import Operator, Tensors
from egnn_fast.operators.direct import DirectWay
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
_direct = DirectWay(OPERATOR, "MessagesKernel")


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
    """Run the fused edge pass.

    Parameters
    ----------
    pq : Tensor [N, 2H]
        P and Q side by side.
    x : Tensor [N, D]
    edge_attr, edge_mask : Tensor [E, A] and [E], or None
    precision : str, optional
        That of a GPU's products; by default as PyTorch is set now.

    Returns
    -------
    ``M [N, H]`` and ``X [N, D]`` (None, or ``[0, D]``, without a coordinate head).
    """
    inputs = (pq, x, edge_attr, edge_mask, *weights)
    graph_tensors = (graph.rowptr, graph.senders, graph.perm, graph.first)
    encoded = encode_options(options)
    results: Any = None
    if backend == "cpu":
        results = _direct(inputs, graph_tensors, (*encoded, backend, "highest"))
    if results is None:
        now = product_precision(backend, x, graph)
        scalars = (*encoded, backend, now if precision is None else precision)
        results = OPERATOR(*in_dtype_of(x, inputs, backend), *graph_tensors, *scalars)
    m, shift = results
    return m, shift


def in_dtype_of(x: Tensor, tensors: Tensors, backend: str = "cpu") -> Tensors:
    """The inputs of an operator in the dtype of ``x`` under autocast."""
    if not torch.is_autocast_enabled(x.device.type):
        return tensors
    cast = [None if t is None else t.to(x.dtype) for t in tensors]
    # GPU kernels gather P and Q as autocast's linear left them
    return cast if backend == "cpu" else [tensors[0], *cast[1:]]


def product_precision(backend: str, x: Tensor, graph: Graph) -> str:
    """The precision of a backend's products as PyTorch is set now; the CPU has one alone."""
    if backend == "cpu":
        return "highest"
    if not transforming():
        # cached here: reading rowptr[-1] in the backend would synchronise
        cache.store_for(graph.rowptr, "num_edges", graph.num_edges)
    return matmul_precision(x.device.type)
