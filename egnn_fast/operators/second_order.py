"""Second derivatives of the operators, computed by autograd.

Those of the edge pass differentiate :func:`egnn_fast.reference.messages`. The edge pass is a sum
over edges, and so is its second derivative: it is computed for one chunk of edges at a time, which
bounds the memory. Those of the layer differentiate :func:`layer_around`, which calls the operator
``messages`` for the edges.

Terms: ``directions`` are the cotangents of the first derivative's results, one for each input, or
None. With first gradients g_k of a value for its inputs, the second derivative is the gradient of
``sum_k <g_k, directions_k>``.

Private names of PyTorch used here, seen in releases 2.11 to 2.13:
``torch._C.DispatchKey.AutogradFunctionality`` and ``torch._C._SetExcludeDispatchKeyGuard``. In a
release without one of them a second derivative raises an AttributeError.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from egnn_fast import reference
from egnn_fast.graph import Graph
from egnn_fast.operators.autograd import fill_none
from egnn_fast.operators.precision import float32_products, second_order_precision
from egnn_fast.operators.signature import GRAPH, LAYER, MESSAGES, decode_options
from egnn_fast.options import Options
from egnn_fast.weights import EdgeWeights, LayerWeights

EdgePass = Callable[..., tuple[Tensor, Tensor | None]]

# elements of a [chunk, 2H] tensor; about forty such tensors [chunk, H] are alive at once
CHUNK_ELEMENTS = 1 << 20
# positions of the inputs that have a row for each edge
_EDGE_INPUTS = tuple(map(MESSAGES.names.index, ("edge_attr", "edge_mask")))


def messages(cotangents: Sequence[Tensor | None], *args: Any) -> list[Tensor]:
    """``messages_double_backward``: the derivative of ``messages_backward``.

    Parameters
    ----------
    cotangents : sequence of Tensor or None
        Those of the results of ``messages_backward``: the gradients for which ``needed`` is True.
    *args
        The arguments of ``messages_backward``, of which ``needed`` is the last, then ``needed2``:
        a bool for the cotangent of M, that of X and each input.

    Returns
    -------
    The gradients for which ``needed2`` is True, with the shapes of what they belong to.
    """
    *args, needed2 = args  # type: ignore[assignment]
    call = MESSAGES.BackwardArguments(*args)
    g_m, g_x, inputs = call.g_m, call.g_x, [getattr(call, name) for name in MESSAGES.names]
    graph = _graph(call)
    options = decode_options(call)
    directions = fill_none(cotangents, call.needed)

    totals = [
        t.new_zeros(t.shape) if need else None
        for t, need in zip([g_m, g_x, *inputs], needed2, strict=True)
    ]
    receiver, sender = graph.receivers, graph.sorted_senders()
    order = receiver.new_tensor([]) if graph.perm is None else graph.perm.long()
    chunk = max(1, CHUNK_ELEMENTS // call.pq.shape[1])
    for begin in range(0, graph.num_edges, chunk):
        end = min(begin + chunk, graph.num_edges)
        rows = slice(begin, end) if graph.perm is None else order[begin:end]
        # the rows of this chunk, in receiver order; `inputs` and `directions` have the user's order
        chunk_inputs, chunk_directions = (
            [t[rows] if t is not None and k in _EDGE_INPUTS else t for k, t in enumerate(tensors)]
            for tensors in (inputs, directions)
        )
        grads = _chunk_gradients(
            chunk_inputs, chunk_directions, g_m, g_x, receiver[begin:end], sender[begin:end],
            options, needed2, call.backend, call.precision,
        )  # fmt: skip
        for k, (total, grad) in enumerate(zip(totals, grads, strict=True)):
            if total is None or grad is None:
                continue
            if k - 2 in _EDGE_INPUTS:  # 2: the inputs follow the cotangents of M and X
                total[rows] = grad
            else:
                total += grad
    return [t for t in totals if t is not None]


def _graph(call: Any) -> Graph:
    return Graph.trusted(*(getattr(call, name) for name in GRAPH), None, None)


@contextmanager
def _enabled_autograd(device: str, backend: str, precision: str) -> Iterator[None]:
    """Switch autograd on inside an operator, where PyTorch has switched it off.

    Autocast is off, and products have the precision of the call, whatever is set by now.
    """
    key = torch._C.DispatchKey.AutogradFunctionality
    with (
        torch._C._SetExcludeDispatchKeyGuard(key, False),
        torch.autocast(device, enabled=False),
        # the CPU has one precision
        nullcontext() if backend == "cpu" else float32_products(second_order_precision(precision)),
        torch.enable_grad(),
    ):
        yield


def layer(edge_pass: EdgePass) -> Callable[..., list[Tensor]]:
    """``layer_double_backward``: differentiates :func:`layer_around` twice.

    ``edge_pass`` is :func:`egnn_fast.operators.messages.messages`, whose second derivative bounds
    the memory. Arguments and result of the function returned are as for :func:`messages`.
    """

    def double_backward(cotangents: Sequence[Tensor | None], *args: Any) -> list[Tensor]:
        *args, needed2 = args  # type: ignore[assignment]
        call = LAYER.BackwardArguments(*args)
        inputs = [getattr(call, name) for name in LAYER.names]
        g_out = [getattr(call, name) for name in LAYER.cotangents]
        directions = fill_none(cotangents, call.needed)
        with _enabled_autograd(call.h.device.type, call.backend, call.precision):
            leaves: list[Any] = _as_leaves([*g_out, *inputs])
            tensors = dict(zip(LAYER.names, leaves[len(g_out) :], strict=True))
            weights = LayerWeights(*(tensors[name] for name in LayerWeights._fields))
            options = decode_options(
                call,
                coord_scale=call.coord_scale,
                attention=weights.att_w is not None,
                coord_agg=None if weights.coord_w2 is None else "sum",
            )
            outputs = layer_around(
                partial(edge_pass, precision=second_order_precision(call.precision)),
                tensors["h"], tensors["x"], _graph(call), weights, options,
                **{k: tensors[k] for k in ("v", "edge_attr", "edge_mask", "node_attr")},
                coord_weight=tensors["coord_weight"], residual=call.residual, backend=call.backend,
            )  # fmt: skip
            value = call.h.new_zeros(())
            for g, output in zip(leaves[: len(g_out)], outputs, strict=True):
                if g is not None and output is not None:
                    value = value + (g * output).sum()
            grads = _differentiate_twice(value, leaves[len(g_out) :], directions, leaves, needed2)
        return [
            _as_result(t, grad)
            for t, grad, need in zip([*g_out, *inputs], grads, needed2, strict=True)
            if need
        ]

    return double_backward


def layer_around(
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
    """A layer in PyTorch's operations around an edge pass: P and Q before it, eqs. 4, 6, 7 after.

    ``edge_pass`` has the arguments of :func:`egnn_fast.operators.messages.messages`.
    ``coord_weight [N]`` is the mean's factor on X (:func:`egnn_fast.reference.coord_weight`). The
    other arguments are those of :func:`egnn_fast.functional.egcl`. Returns ``h [N, O]``,
    ``x [N, D]`` and the step ``[N, D]`` by which x changed, which is the new velocity; the step is
    None without a coordinate head and velocities.
    """
    w_pq, b_pq, edge = weights.split(h.shape[1])
    message_sum, coord_sum = edge_pass(
        F.linear(h, w_pq, b_pq), x, graph, edge, options, edge_attr, edge_mask, backend
    )
    return reference.update_nodes(
        h, x, v, message_sum, coord_sum if options.updates_coords else None,
        reference.maps_of(weights, options), options,
        node_attr=node_attr, weight=coord_weight, residual=residual,
    )  # fmt: skip


def _as_result(tensor: Any, grad: Tensor | None) -> Tensor:
    """A gradient as the operator's fake promises it: contiguous, of the tensor's shape, a copy.

    None becomes zeros.
    """
    if grad is None:
        return tensor.new_zeros(tensor.shape)
    return grad.detach().clone(memory_format=torch.contiguous_format)


def _as_leaves(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [None if t is None else t.detach().requires_grad_() for t in tensors]


def _differentiate_twice(
    value: Tensor,
    inputs: Sequence[Any],
    directions: Sequence[Tensor | None],
    leaves: Sequence[Any],
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """The second derivative for each of ``leaves``, None where it is 0 or not needed.

    ``value`` is a scalar that depends on ``leaves``, among which are ``inputs``; see the module's
    docstring.
    """
    pairs = [
        (leaf, direction)
        for leaf, direction in zip(inputs, directions, strict=True)
        if direction is not None
    ]
    first = torch.autograd.grad(
        value, [leaf for leaf, _ in pairs], create_graph=True, allow_unused=True
    )
    total = value.new_zeros(())
    for grad, (_, direction) in zip(first, pairs, strict=True):
        if grad is not None:
            total = total + (grad * direction).sum()
    grads: list[Tensor | None] = [None] * len(leaves)
    if not total.requires_grad:
        return grads
    wanted = [k for k, need in enumerate(needed) if need]
    second = torch.autograd.grad(total, [leaves[k] for k in wanted], allow_unused=True)
    for k, grad in zip(wanted, second, strict=True):
        grads[k] = grad
    return grads


def _chunk_gradients(
    inputs: list[Any],
    directions: list[Tensor | None],
    g_m: Tensor | None,
    g_x: Tensor | None,
    receiver: Tensor,
    sender: Tensor,
    options: Options,
    needed2: Sequence[bool],
    backend: str,
    precision: str,
) -> list[Tensor | None]:
    """What one chunk of edges adds to the second derivative of the edge pass.

    ``receiver`` and ``sender`` are the chunk's, as are the edge inputs among ``inputs`` and
    ``directions``. Returns a gradient or None for ``g_m [N, H]``, ``g_x [N, D]`` and each input.
    """
    with _enabled_autograd(inputs[0].device.type, backend, precision):
        leaves: list[Any] = _as_leaves([g_m, g_x, *inputs])
        leaf_m, leaf_x, pq, x, edge_attr, edge_mask, *weights = leaves
        p, q = pq.chunk(2, dim=1)
        m, shift = reference.messages(
            p, q, x, receiver, sender, EdgeWeights(*weights), options,
            edge_attr=edge_attr, edge_mask=edge_mask,
        )  # fmt: skip
        value = m.new_zeros(())
        if leaf_m is not None:
            value = value + (leaf_m * m).sum()
        if leaf_x is not None and shift is not None:
            value = value + (leaf_x * shift).sum()
        return _differentiate_twice(value, leaves[2:], directions, leaves, needed2)
