"""The layer in plain PyTorch, equation by equation: the definition of what is right.

Satorras, Hoogeboom & Welling, "E(n) Equivariant Graph Neural Networks" (arXiv 2102.09844).
Any device and dtype, differentiable to any order. Node i receives, node j sends.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from egnn_fast.graph import Graph
from egnn_fast.options import UNIT_NORM_EPS, Activation, Options
from egnn_fast.weights import EdgeWeights, LayerWeights

Map = Callable[[Tensor], Tensor]


class Maps(NamedTuple):
    """A layer's MLPs as functions of rows, under the names of the modules that hold them.

    ``edge_mlp`` (phi_e) maps ``[h_i ; h_j ; r ; a]`` to n ``[E, H]``, ``node_mlp`` (phi_h)
    ``[h ; M ; node_attr]`` to ``[N, O]``; ``att_mlp`` (phi_inf) n to the gate ``[E, 1]``,
    ``coord_mlp`` (phi_x) m to s ``[E, 1]``, ``coord_mlp_vel`` (phi_v) h to ``[N, 1]``. None where
    the layer has no such part.
    """

    edge_mlp: Map
    node_mlp: Map
    att_mlp: Map | None = None
    coord_mlp: Map | None = None
    coord_mlp_vel: Map | None = None


def maps_of(weights: LayerWeights, options: Options, activation: Activation | None = None) -> Maps:
    """The MLPs with these weights; ``activation`` replaces the one that ``options`` names."""
    act = activation or options.activation_fn()
    w = weights
    return Maps(
        lambda z: act(_mlp(z, w.edge_w1, w.edge_b1, w.edge_w2, w.edge_b2, act)),
        lambda z: _mlp(z, w.node_w1, w.node_b1, w.node_w2, w.node_b2, act),
        _gate(w.att_w, w.att_b),
        _head(w.coord_w1, w.coord_b1, w.coord_w2, options, act),
        None if w.vel_w1 is None else lambda h: velocity_gate(h, w, act),
    )


def egcl(
    h: Tensor,
    x: Tensor,
    graph: Graph,
    maps: Maps,
    options: Options,
    *,
    edge_attr: Tensor | None = None,
    node_attr: Tensor | None = None,
    edge_mask: Tensor | None = None,
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
    maps : Maps
        The layer's MLPs, made by :func:`maps_of` or from its submodules.
    options : Options
        How coordinates are normalised and clamped; the rest is in the MLPs.
    edge_attr : Tensor [E, A], optional
        Edge attributes in the user's edge order.
    node_attr : Tensor [N, B], optional
        Attributes that enter the node MLP only.
    edge_mask : Tensor [E], optional
        Factor on every message and coordinate update.

    Returns
    -------
    (update, messages, shift)
        ``update [N, O]``: the node MLP's output, without residual; ``messages [N, H]``: the sum
        of the messages; ``shift [N, D]``: the sum of the coordinate updates, None without a head.
    """
    receiver, sender = graph.shared_edge_index()
    d = x[receiver] - x[sender]
    r = (d * d).sum(dim=1, keepdim=True)
    parts = [h[receiver], h[sender], r]
    if edge_attr is not None:
        parts.append(edge_attr)
    n = maps.edge_mlp(torch.cat(parts, dim=1))
    m, t = _edge_model(n, d, r, maps.att_mlp, maps.coord_mlp, options, edge_mask)
    # under autocast m is of low precision, its sum is not
    messages = segment_sum(m.to(d.dtype), receiver, h.shape[0])
    parts = [h, messages] if node_attr is None else [h, messages, node_attr]
    update = maps.node_mlp(torch.cat(parts, dim=1))
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
    (bias in p), under autocast also of lower precision than ``x``; ``receiver``, ``sender``,
    ``edge_attr`` and ``edge_mask`` hold one entry an edge. Returns the sums over senders
    ``M [N, H]`` and ``X [N, D]`` (None without a head), before any mean or scale.
    """
    d = x[receiver] - x[sender]
    r = (d * d).sum(dim=1, keepdim=True)
    # under autocast a linear leaves p and q in its dtype; their sum has that of the distances
    z1 = p[receiver].to(d.dtype) + q[sender].to(d.dtype) + r * weights.w_r
    if edge_attr is not None and weights.w_a is not None:
        z1 = z1 + edge_attr @ weights.w_a.T
    act = options.activation_fn()
    n = act(F.linear(act(z1), weights.w2, weights.b2))
    w_g, w_x = (None if w is None else w.reshape(1, -1) for w in (weights.w_g, weights.w_x))
    gate, head = _gate(w_g, weights.b_g), _head(weights.w3, weights.b3, w_x, options, act)
    m, t = _edge_model(n, d, r, gate, head, options, edge_mask)
    shift = None if t is None else segment_sum(t, receiver, p.shape[0])
    return segment_sum(m.to(d.dtype), receiver, p.shape[0]), shift


def _gate(w: Tensor | None, b: Tensor | None) -> Map | None:
    """phi_inf; None without attention."""
    return None if w is None else lambda n: torch.sigmoid(F.linear(n, w, b))


def _head(
    w1: Tensor | None, b1: Tensor | None, w2: Tensor | None, options: Options, act: Activation
) -> Map | None:
    """phi_x; None without a coordinate head."""
    if w1 is None or w2 is None:
        return None
    if options.coord_tanh:
        return lambda m: torch.tanh(_mlp(m, w1, b1, w2, None, act))
    return lambda m: _mlp(m, w1, b1, w2, None, act)


def _edge_model(
    n: Tensor,
    d: Tensor,
    r: Tensor,
    gate: Map | None,
    head: Map | None,
    options: Options,
    edge_mask: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """From phi_e's output to an edge's message m and coordinate update t."""
    mask = None if edge_mask is None else edge_mask.reshape(-1, 1)
    m = n if gate is None else n * gate(n)
    if mask is not None:
        m = m * mask
    if head is None:
        return m, None
    t = head(m) * _direction(d, r, options)
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
    z = torch.cat(parts, dim=1)
    return _mlp(z, weights.node_w1, weights.node_b1, weights.node_w2, weights.node_b2, act)


def velocity_gate(h: Tensor, weights: LayerWeights, act: Activation) -> Tensor:
    """phi_v(h) ``[N, 1]``: the factor on a node's velocity (eq. 7)."""
    assert weights.vel_w1 is not None and weights.vel_w2 is not None
    return _mlp(h, weights.vel_w1, weights.vel_b1, weights.vel_w2, weights.vel_b2, act)


def _mlp(
    z: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, act: Activation
) -> Tensor:
    """Linear, activation, linear."""
    return F.linear(act(F.linear(z, w1, b1)), w2, b2)


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
