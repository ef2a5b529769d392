"""Second derivatives: of the edge pass by the reference, of the layer through its edge pass.

The edge pass is a sum over edges, so the derivative of its derivative is one too: chunks of
edges, added up, keep the memory bounded.
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
from egnn_fast.operators.autograd import spread
from egnn_fast.operators.precision import float32_products, in_float32
from egnn_fast.operators.signature import GRAPH, LAYER, MESSAGES, decode_options
from egnn_fast.options import Options
from egnn_fast.weights import EdgeWeights, LayerWeights

EdgePass = Callable[..., tuple[Tensor, Tensor | None]]

# elements of a [chunk, H] tensor; a chunk keeps some forty of them alive
CHUNK_ELEMENTS = 1 << 20
# the inputs that have a row for each edge
_EDGE_INPUTS = tuple(map(MESSAGES.names.index, ("edge_attr", "edge_mask")))


def messages(cotangents: Sequence[Tensor | None], *args: Any) -> list[Tensor]:
    """The derivative of ``messages_backward``.

    ``args`` are those of ``messages_backward``, which ends with ``needed``, and ``needed2``.
    ``cotangents`` belong to its outputs, the gradients that ``needed`` marks. Returns a gradient
    for each of the cotangents of M and X and the inputs that ``needed2`` marks.
    """
    *args, needed2 = args  # type: ignore[assignment]
    call = MESSAGES.BackwardArguments(*args)
    g_m, g_x, inputs = call.g_m, call.g_x, [getattr(call, name) for name in MESSAGES.names]
    graph = _graph(call)
    options = decode_options(call)
    towards = spread(cotangents, call.needed)

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
        local, local_towards = (
            [t[rows] if t is not None and k in _EDGE_INPUTS else t for k, t in enumerate(tensors)]
            for tensors in (inputs, towards)
        )
        grads = _chunk(
            local, local_towards, g_m, g_x, receiver[begin:end], sender[begin:end], options,
            needed2, call.backend, call.precision,
        )  # fmt: skip
        for k, (total, grad) in enumerate(zip(totals, grads, strict=True)):
            if total is None or grad is None:
                continue
            if k - 2 in _EDGE_INPUTS:
                total[rows] = grad
            else:
                total += grad
    return [t for t in totals if t is not None]


def _graph(call: Any) -> Graph:
    return Graph.trusted(*(getattr(call, name) for name in GRAPH), None, None)


@contextmanager
def _autograd(device: str, backend: str, precision: str) -> Iterator[None]:
    """Differentiation inside an operator, where autograd is switched off.

    Autocast is off, and float32 products have the precision of the call, whatever is set now.
    """
    key = torch._C.DispatchKey.AutogradFunctionality
    with (
        torch._C._SetExcludeDispatchKeyGuard(key, False),
        torch.autocast(device, enabled=False),
        # the CPU has one precision
        nullcontext() if backend == "cpu" else float32_products(in_float32(precision)),
        torch.enable_grad(),
    ):
        yield


def layer(edge_pass: EdgePass) -> Callable[..., list[Tensor]]:
    """The derivative of ``layer_backward``, by differentiating :func:`layer_around` twice.

    ``edge_pass`` is the operator ``messages``: its own derivatives keep the memory bounded.
    """

    def double_backward(cotangents: Sequence[Tensor | None], *args: Any) -> list[Tensor]:
        *args, needed2 = args  # type: ignore[assignment]
        call = LAYER.BackwardArguments(*args)
        inputs = [getattr(call, name) for name in LAYER.names]
        g_out = [getattr(call, name) for name in LAYER.cotangents]
        towards = spread(cotangents, call.needed)
        with _autograd(call.h.device.type, call.backend, call.precision):
            leaves: list[Any] = _leaves([*g_out, *inputs])
            tensors = dict(zip(LAYER.names, leaves[len(g_out) :], strict=True))
            weights = LayerWeights(*(tensors[name] for name in LayerWeights._fields))
            options = decode_options(
                call,
                coord_scale=call.coord_scale,
                attention=weights.att_w is not None,
                coord_agg=None if weights.coord_w2 is None else "sum",
            )
            outputs = layer_around(
                partial(edge_pass, precision=in_float32(call.precision)),
                tensors["h"], tensors["x"], _graph(call), weights, options,
                **{k: tensors[k] for k in ("v", "edge_attr", "edge_mask", "node_attr")},
                coord_weight=tensors["coord_weight"], residual=call.residual, backend=call.backend,
            )  # fmt: skip
            value = call.h.new_zeros(())
            for g, output in zip(leaves[: len(g_out)], outputs, strict=True):
                if g is not None and output is not None:
                    value = value + (g * output).sum()
            grads = _second(value, leaves[len(g_out) :], towards, leaves, needed2)
        return [
            _own(t, grad) for t, grad, n in zip([*g_out, *inputs], grads, needed2, strict=True) if n
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
    """A layer in PyTorch's operations around an edge pass: ``(h [N, O], x [N, D], v [N, D])``.

    ``edge_pass`` is :func:`egnn_fast.operators.ops.messages`; ``coord_weight [N]`` is what the
    mean divides by, inverted. v is the step that x made, None where nothing moves. The other
    arguments are those of :func:`egnn_fast.functional.egcl`.
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


def _own(tensor: Any, grad: Tensor | None) -> Tensor:
    """A gradient of the tensor's shape in memory of its own, dense, as the operator's fake says."""
    if grad is None:
        return tensor.new_zeros(tensor.shape)
    return grad.detach().clone(memory_format=torch.contiguous_format)


def _leaves(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [None if t is None else t.detach().requires_grad_() for t in tensors]


def _second(
    value: Tensor,
    inputs: Sequence[Any],
    towards: Sequence[Tensor | None],
    leaves: Sequence[Any],
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """The gradient, for the leaves needed, of <gradient of value for inputs, towards>."""
    pairs = [(leaf, v) for leaf, v in zip(inputs, towards, strict=True) if v is not None]
    first = torch.autograd.grad(
        value, [leaf for leaf, _ in pairs], create_graph=True, allow_unused=True
    )
    total = value.new_zeros(())
    for grad, (_, v) in zip(first, pairs, strict=True):
        if grad is not None:
            total = total + (grad * v).sum()
    out: list[Tensor | None] = [None] * len(leaves)
    if not total.requires_grad:
        return out
    wanted = [k for k, need in enumerate(needed) if need]
    second = torch.autograd.grad(total, [leaves[k] for k in wanted], allow_unused=True)
    for k, grad in zip(wanted, second, strict=True):
        out[k] = grad
    return out


def _chunk(
    inputs: list[Any],
    towards: list[Tensor | None],
    g_m: Tensor | None,
    g_x: Tensor | None,
    receiver: Tensor,
    sender: Tensor,
    options: Options,
    needed2: Sequence[bool],
    backend: str,
    precision: str,
) -> list[Tensor | None]:
    """The second derivative's share of one chunk of edges."""
    with _autograd(inputs[0].device.type, backend, precision):
        leaves: list[Any] = _leaves([g_m, g_x, *inputs])
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
        return _second(value, leaves[2:], towards, leaves, needed2)
