"""The whole layer in plain PyTorch, equation by equation: it defines the right result.

The comments give the equation numbers of Satorras, Hoogeboom & Welling, "E(n) Equivariant Graph
Neural Networks" (arXiv 2102.09844). :func:`egcl` is the layer as in the paper. :func:`messages` is
its edge pass with the first linear split, as the kernels compute it.

All functions work on any device, in any floating-point dtype, and can be differentiated to any
order. Node i is the receiver, node j the sender. N nodes, E edges, F input, H hidden and O output
features, A edge attributes, B node attributes, D coordinate dimensions.
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
    """A layer's MLPs as functions of the rows of a matrix.

    The names are those of the submodules of a layer. An MLP that the layer does not have is None.

    Attributes
    ----------
    edge_mlp : callable
        phi_e: ``[h_i ; h_j ; r ; a]`` ``[E, 2F + 1 + A]`` to n ``[E, H]``.
    node_mlp : callable
        phi_h: ``[h ; M ; node_attr]`` ``[N, F + H + B]`` to ``[N, O]``.
    att_mlp : callable or None
        phi_inf: n ``[E, H]`` to the gate ``[E, 1]``.
    coord_mlp : callable or None
        phi_x: m ``[E, H]`` to s ``[E, 1]``.
    coord_mlp_vel : callable or None
        phi_v: h ``[N, F]`` to ``[N, 1]``.
    """

    edge_mlp: Map
    node_mlp: Map
    att_mlp: Map | None = None
    coord_mlp: Map | None = None
    coord_mlp_vel: Map | None = None


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
    node_mask: Tensor | None = None,
    v: Tensor | None = None,
    residual: bool = True,
    carry_velocity: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """One layer: eqs. 3 to 6 of the paper, 7 with velocities, 8 with attention.

    Does not check its arguments; :func:`egnn_fast.functional.egcl` does.

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
        How coordinate updates are normalised, clamped, aggregated and scaled. The other options
        are in ``maps``.
    edge_attr : Tensor [E, A], optional
        Edge attributes in the user's edge order.
    node_attr : Tensor [N, B], optional
        Attributes that only the node MLP reads.
    edge_mask : Tensor [E] or [E, 1], optional
        Factor on each edge's message and coordinate update; bool or floating point.
    node_mask : Tensor [N] or [N, 1], optional
        Factor on all edges of a node, on its new features and on its velocity.
    v : Tensor [N, D], optional
        Velocities, if the layer has phi_v.
    residual : bool
        Add h to the node MLP's output; needs F = O.
    carry_velocity : bool
        Return the new velocities.

    Returns
    -------
    (h, x, v)
        ``h [N, O]``, ``x [N, D]`` and ``v [N, D]``. The new velocity is the new x minus the old x;
        it is None without velocities or ``carry_velocity``.

    Raises
    ------
    ValueError
        There are velocities, but the layer has no phi_v.
    """
    receiver, sender = graph.shared_edge_index()  # i and j of each edge
    # the masks as factors of nodes [N] and of edges [E]; an edge has those of both its ends
    nodes, edges = _as_factor(node_mask, x.dtype), _as_factor(edge_mask, x.dtype)
    if nodes is not None:
        both_ends = nodes[receiver] * nodes[sender]
        edges = both_ends if edges is None else edges * both_ends
        v = None if v is None else v * nodes.unsqueeze(1)
    weight = coord_weight(graph, options, edges, x.dtype)

    # eq. 3: n_ij = phi_e(h_i, h_j, |x_i - x_j|^2, a_ij)
    d = x[receiver] - x[sender]
    r = (d * d).sum(dim=1, keepdim=True)
    parts = [h[receiver], h[sender], r]
    if edge_attr is not None:
        parts.append(edge_attr)
    n = maps.edge_mlp(torch.cat(parts, dim=1))
    # eq. 8: m_ij = phi_inf(n_ij) n_ij; and the summand t_ij of eq. 4
    m, t = _edge_model(n, d, r, maps.att_mlp, maps.coord_mlp, options, edges)
    # eq. 5 and the sum of eq. 4, in the precision of x although autocast lowers that of m
    message_sum = segment_sum(m.to(d.dtype), receiver, h.shape[0])
    coord_sum = None if t is None else segment_sum(t, receiver, h.shape[0])

    new_h, new_x, step = update_nodes(
        h, x, v, message_sum, coord_sum, maps, options,
        node_attr=node_attr, weight=weight, residual=residual,
    )  # fmt: skip
    if nodes is not None:
        new_h = new_h * nodes.unsqueeze(1).to(new_h.dtype)
    return new_h, new_x, step if carry_velocity and v is not None else None


def _as_factor(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A mask ``[K]`` or ``[K, 1]``, bool or floating point, as a factor ``[K]`` in ``dtype``."""
    return None if mask is None else mask.reshape(-1).to(dtype)


def _edge_model(
    n: Tensor,
    d: Tensor,
    r: Tensor,
    gate: Map | None,
    head: Map | None,
    options: Options,
    edge_mask: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """The messages and coordinate updates of edges, from phi_e's output: eq. 8, summand of eq. 4.

    Takes ``n [E, H]``, ``d [E, D]``, ``r [E, 1]`` and ``edge_mask [E]``. Returns ``m [E, H]`` and
    ``t [E, D]``, which is None without a head.
    """
    mask = None if edge_mask is None else edge_mask.unsqueeze(1)
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
    """u = d / rho ``[E, D]`` from ``d [E, D]`` and ``r [E, 1]``; ``coord_norm`` defines rho."""
    if options.coord_norm is None:
        return d
    if options.coord_norm == "unit":
        return d / (torch.sqrt(r.detach()) + UNIT_NORM_EPS)
    # sqrt has no derivative at 0; this makes all derivatives of the norm 0 there
    nonzero = r != 0
    norm = torch.where(nonzero, torch.where(nonzero, r, 1.0).sqrt(), 0.0)
    return d / (norm + float(options.coord_norm))


def update_nodes(
    h: Tensor,
    x: Tensor,
    v: Tensor | None,
    message_sum: Tensor,
    coord_sum: Tensor | None,
    maps: Maps,
    options: Options,
    *,
    node_attr: Tensor | None,
    weight: Tensor | None,
    residual: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The equations of nodes, 4, 6 and 7, from the sums over each node's senders.

    ``message_sum [N, H]`` and ``coord_sum [N, D]`` (None without a head) are M and X.
    ``weight [N]`` is the result of :func:`coord_weight`. Returns the new ``h [N, O]`` and
    ``x [N, D]``, and the step ``[N, D]`` from the old x to the new: the new velocity. The step is
    None with neither a head nor velocities.

    Raises
    ------
    ValueError
        There are velocities, but the layer has no phi_v.
    """
    update = node_model(h, message_sum, node_attr, maps.node_mlp)
    step = coord_model(h, v, coord_sum, weight, maps.coord_mlp_vel, options)
    new_h = h + update if residual else update
    return new_h, x if step is None else x + step, step


def node_model(h: Tensor, message_sum: Tensor, node_attr: Tensor | None, node_mlp: Map) -> Tensor:
    """Eq. 6: phi_h([h ; M ; node_attr]) ``[N, O]``, without the residual."""
    parts = [h, message_sum] if node_attr is None else [h, message_sum, node_attr]
    return node_mlp(torch.cat(parts, dim=1))


def coord_model(
    h: Tensor,
    v: Tensor | None,
    coord_sum: Tensor | None,
    weight: Tensor | None,
    velocity_mlp: Map | None,
    options: Options,
) -> Tensor | None:
    """The step of x: ``C sum_j t_ij`` of eq. 4, with velocities plus ``phi_v(h) v`` of eq. 7.

    ``[N, D]``; None with neither a head nor velocities. Shapes and errors as for
    :func:`update_nodes`.
    """
    shift = coord_sum
    if shift is not None and weight is not None:
        shift = shift * weight.unsqueeze(1)
    if shift is not None and options.coord_scale != 1:
        shift = shift * options.coord_scale
    if v is None:
        return shift
    if velocity_mlp is None:
        raise ValueError("v: the layer has no velocity MLP")
    step = velocity_mlp(h).to(v.dtype) * v
    return step if shift is None else step + shift


def coord_weight(
    graph: Graph, options: Options, edge_mask: Tensor | None, dtype: torch.dtype
) -> Tensor | None:
    """The mean's factor on a node's sum of coordinate updates: 1 / max(sum_j mask_ij, 1).

    ``[N]`` in ``dtype``, from ``edge_mask [E]`` (None: ones); None if there is no mean.
    """
    if options.coord_agg != "mean":
        return None
    if edge_mask is None:
        return graph.inverse_degree(dtype)
    receiver = graph.shared_edge_index()[0]
    total = segment_sum(edge_mask.unsqueeze(1).to(dtype), receiver, graph.num_nodes)
    return total.squeeze(1).clamp(min=1).reciprocal()


def segment_sum(values: Tensor, index: Tensor, num_segments: int) -> Tensor:
    """Row s of the result ``[num_segments, K]`` is the sum of ``values[index == s]``.

    ``values [E, K]``, ``index [E]`` int64.
    """
    out = values.new_zeros((num_segments, values.shape[1]))
    return out.scatter_add_(0, index.unsqueeze(1).expand_as(values), values)


def maps_of(weights: LayerWeights, options: Options, activation: Activation | None = None) -> Maps:
    """A layer's MLPs with these weights; ``activation`` replaces that of ``options``."""
    act = activation or options.activation_fn()
    w = weights
    return Maps(
        lambda z: act(_mlp(z, w.edge_w1, w.edge_b1, w.edge_w2, w.edge_b2, act)),
        lambda z: _mlp(z, w.node_w1, w.node_b1, w.node_w2, w.node_b2, act),
        _gate(w.att_w, w.att_b),
        _head(w.coord_w1, w.coord_b1, w.coord_w2, options, act),
        _velocity(w.vel_w1, w.vel_b1, w.vel_w2, w.vel_b2, act),
    )


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


def _velocity(
    w1: Tensor | None, b1: Tensor | None, w2: Tensor | None, b2: Tensor | None, act: Activation
) -> Map | None:
    """phi_v; None without velocities."""
    return None if w1 is None or w2 is None else lambda h: _mlp(h, w1, b1, w2, b2, act)


def _mlp(
    z: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, act: Activation
) -> Tensor:
    """Linear, activation, linear: ``z [K, in]`` to ``[K, out]``."""
    return F.linear(act(F.linear(z, w1, b1)), w2, b2)


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
    """The edge pass, eqs. 3, 5, 8 and the sum of 4, with the first linear split into P and Q.

    The kernels compute the same, and their second derivatives are those of this function. From
    phi_e's output on it runs the same code as :func:`egcl`.

    Parameters
    ----------
    p, q : Tensor [N, H]
        The receiver's (with the bias) and the sender's part of the first linear. Under autocast
        their dtype may be lower than that of ``x``.
    x : Tensor [N, D]
        Coordinates.
    receiver, sender : Tensor [E]
        The two ends of each edge. They may be a part of a graph's edges: the result is a sum over
        edges.
    weights : EdgeWeights
        The rest of the edge MLP, the gate and the coordinate head.
    options : Options
        As for :func:`egcl`, and the activation; aggregation and scale are not applied.
    edge_attr : Tensor [E, A], optional
        Edge attributes, in the order of ``receiver``.
    edge_mask : Tensor [E] or [E, 1], optional
        Factor on m and t, in the order of ``receiver``.

    Returns
    -------
    (M, X)
        ``[N, H]`` and ``[N, D]``: the sums of m and t over senders, without mean or scale. X is
        None without a head.
    """
    d = x[receiver] - x[sender]
    r = (d * d).sum(dim=1, keepdim=True)
    # under autocast p and q have a lower dtype; sum them in the dtype of the distances
    z1 = p[receiver].to(d.dtype) + q[sender].to(d.dtype) + r * weights.w_r
    if edge_attr is not None and weights.w_a is not None:
        z1 = z1 + edge_attr @ weights.w_a.T
    act = options.activation_fn()
    n = act(F.linear(act(z1), weights.w2, weights.b2))
    w_g, w_x = (None if w is None else w.reshape(1, -1) for w in (weights.w_g, weights.w_x))
    gate, head = _gate(w_g, weights.b_g), _head(weights.w3, weights.b3, w_x, options, act)
    m, t = _edge_model(n, d, r, gate, head, options, _as_factor(edge_mask, x.dtype))
    coord_sum = None if t is None else segment_sum(t, receiver, p.shape[0])
    return segment_sum(m.to(d.dtype), receiver, p.shape[0]), coord_sum
