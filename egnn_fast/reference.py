"""The layer in plain PyTorch, equation by equation: the definition of what is right.

Satorras, Hoogeboom & Welling, "E(n) Equivariant Graph Neural Networks" (arXiv 2102.09844).
Any device and dtype, differentiable to any order. Node i receives, node j sends.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from egnn_fast.graph import Graph
from egnn_fast.options import UNIT_NORM_EPS, Activation, EdgeWeights, LayerWeights, Options


def egcl(
    h: Tensor,
    x: Tensor,
    graph: Graph,
    weights: LayerWeights,
    options: Options,
    *,
    edge_attr: Tensor | None = None,
    node_attr: Tensor | None = None,
    edge_mask: Tensor | None = None,
    activation: Activation | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """One layer, unsplit: eqs. 3 to 6 of the paper (eq. 8 with attention).

    Parameters
    ----------
    h : Tensor [N, F]
        Node features.
    x : Tensor [N, D]
        Coordinates.
    graph : Graph
        N nodes, E edges.
    weights, options
        See :class:`LayerWeights` and :class:`Options`.
    edge_attr : Tensor [E, A], optional
        Edge attributes in the user's edge order.
    node_attr : Tensor [N, B], optional
        Attributes that enter the node MLP only.
    edge_mask : Tensor [E], optional
        Factor on every message and coordinate update.
    activation : callable, optional
        Replaces the activation that ``options`` names.

    Returns
    -------
    (update, messages, shift)
        ``update [N, O]``: the node MLP's output, without residual; ``messages [N, H]``: the sum
        of the messages; ``shift [N, D]``: the sum of the coordinate updates, None without a head.
    """
    act = activation or options.activation_fn()
    receiver, sender = graph.shared_edge_index()
    d = x[receiver] - x[sender]
    r = (d * d).sum(dim=1, keepdim=True)
    parts = [h[receiver], h[sender], r]
    if edge_attr is not None:
        parts.append(edge_attr)
    z1 = F.linear(torch.cat(parts, dim=1), weights.edge_w1, weights.edge_b1)
    edge = weights.edge_weights(w_r=weights.edge_w1[:, 2 * h.shape[1]], w_a=None)
    m, t = _edge_model(z1, d, r, edge, options, edge_mask, act)
    # under autocast m is of low precision, its sum is not
    messages = segment_sum(m.to(d.dtype), receiver, h.shape[0])
    update = node_model(h, messages, node_attr, weights, act)
    if t is None:
        return update, messages, None
    return update, messages, segment_sum(t, receiver, h.shape[0])


def messages(
    p: Tensor,
    q: Tensor,
    x: Tensor,
    receiver: Tensor,
    sender: Tensor,
    weights: EdgeWeights,
    options: Options,
    *,
    edge_attr: Tensor | None = None,
    edge_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The edge pass with the first linear split: what the fused kernels compute.

    ``p [N, H]`` and ``q [N, H]`` are the receiver's and the sender's part of the first linear
    (bias in p); ``receiver``, ``sender``, ``edge_attr`` and ``edge_mask`` hold one entry an edge.
    Returns the sums over senders ``M [N, H]`` and ``X [N, D]`` (None without a head), before any
    mean or scale.
    """
    d = x[receiver] - x[sender]
    r = (d * d).sum(dim=1, keepdim=True)
    z1 = p[receiver] + q[sender] + r * weights.w_r
    if edge_attr is not None and weights.w_a is not None:
        z1 = z1 + edge_attr @ weights.w_a.T
    m, t = _edge_model(z1, d, r, weights, options, edge_mask, options.activation_fn())
    shift = None if t is None else segment_sum(t, receiver, p.shape[0])
    return segment_sum(m.to(d.dtype), receiver, p.shape[0]), shift


def _edge_model(
    z1: Tensor,
    d: Tensor,
    r: Tensor,
    weights: EdgeWeights,
    options: Options,
    edge_mask: Tensor | None,
    act: Activation,
) -> tuple[Tensor, Tensor | None]:
    """From the first linear's output to an edge's message m and coordinate update t."""
    mask = None if edge_mask is None else edge_mask.reshape(-1, 1)
    n = act(F.linear(act(z1), weights.w2, weights.b2))
    m = n
    if weights.w_g is not None:
        m = n * torch.sigmoid(F.linear(n, weights.w_g.reshape(1, -1), weights.b_g))
    if mask is not None:
        m = m * mask
    if weights.w3 is None or weights.w_x is None:
        return m, None
    s = F.linear(act(F.linear(m, weights.w3, weights.b3)), weights.w_x.reshape(1, -1))
    if options.coord_tanh:
        s = torch.tanh(s)
    t = s * _direction(d, r, options)
    if options.coord_clamp is not None:
        t = t.clamp(-options.coord_clamp, options.coord_clamp)
    # the head is not zero at m = 0, so the mask acts here too
    return m, t if mask is None else t * mask


def _direction(d: Tensor, r: Tensor, options: Options) -> Tensor:
    """u = d / rho."""
    if options.coord_norm is None:
        return d
    if options.coord_norm == "unit":
        return d / (torch.sqrt(r.detach()) + UNIT_NORM_EPS)
    # sqrt has no derivative at 0; the norm's is taken as 0 there, to any order
    apart = r != 0
    norm = torch.where(apart, torch.where(apart, r, 1.0).sqrt(), 0.0)
    return d / (norm + float(options.coord_norm))


def node_model(
    h: Tensor,
    messages: Tensor,
    node_attr: Tensor | None,
    weights: LayerWeights,
    act: Activation,
) -> Tensor:
    """phi_h: the node MLP on ``[h ; M ; node_attr]``, without residual (eq. 6)."""
    parts = [h, messages] if node_attr is None else [h, messages, node_attr]
    z = act(F.linear(torch.cat(parts, dim=1), weights.node_w1, weights.node_b1))
    return F.linear(z, weights.node_w2, weights.node_b2)


def velocity_gate(h: Tensor, weights: LayerWeights, act: Activation) -> Tensor:
    """phi_v(h) ``[N, 1]``: the factor on a node's velocity (eq. 7)."""
    assert weights.vel_w1 is not None and weights.vel_w2 is not None
    z = act(F.linear(h, weights.vel_w1, weights.vel_b1))
    return F.linear(z, weights.vel_w2, weights.vel_b2)


def segment_sum(values: Tensor, index: Tensor, num_segments: int) -> Tensor:
    """Sum the rows of ``values [E, K]`` that share an index: ``[num_segments, K]``."""
    out = values.new_zeros((num_segments, values.shape[1]))
    return out.scatter_add_(0, index.unsqueeze(1).expand_as(values), values)


def coord_weight(
    graph: Graph, options: Options, edge_mask: Tensor | None, dtype: torch.dtype
) -> Tensor | None:
    """What the mean multiplies a node's summed coordinate updates by: 1 / max(sum of masks, 1).

    ``[N]``; None without a mean.
    """
    if options.coord_agg != "mean":
        return None
    if edge_mask is None:
        return graph.inverse_degree(dtype)
    receiver = graph.shared_edge_index()[0]
    total = segment_sum(edge_mask.reshape(-1, 1).to(dtype), receiver, graph.num_nodes)
    return total.squeeze(1).clamp(min=1).reciprocal()
