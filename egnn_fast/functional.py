"""The layer as functions of its weights: the edge pass alone, and the whole layer."""

from __future__ import annotations

import torch
from torch import Tensor

from egnn_fast import arguments, backends, reference
from egnn_fast.graph import EdgeIndexLike, Graph
from egnn_fast.operators.layer import layer, try_direct_layer
from egnn_fast.operators.messages import messages
from egnn_fast.options import Activation, Options
from egnn_fast.runtime.eager import refuse_jit_trace, without_default_device
from egnn_fast.weights import EdgeWeights, LayerWeights

__all__ = ["egcl", "egcl_messages", "explain"]


@without_default_device
def egcl_messages(
    P: Tensor,
    Q: Tensor,
    x: Tensor,
    graph: Graph | EdgeIndexLike,
    weights: EdgeWeights,
    options: Options,
    *,
    edge_attr: Tensor | None = None,
    edge_mask: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The edge pass of a layer: distances, edge MLP, gate, coordinate head and both sums.

    With ``d = x_i - x_j`` and ``r = |d|^2``, for each edge from sender j to receiver i::

        n = act(w2 act(P_i + Q_j + w_r r + w_a a) + b2)     m = mask * gate(n) * n
        s = w_x . act(w3 m + b3)                            t = mask * clamp(s d / rho)

    These are equations 3, 5 and 8 of Satorras et al. (2021) and the sum in equation 4.

    Parameters
    ----------
    P, Q : Tensor [N, H]
        The receiver's and the sender's part of the edge MLP's first linear, ``h W_i^T + b1`` and
        ``h W_j^T``. Under autocast they may also be bfloat16 or float16, as a linear returns them
        there. The Triton kernels read them in that dtype, which halves the bytes gathered; other
        backends convert them to the dtype of ``x``. Gradients have the dtypes of P and Q.
    x : Tensor [N, D]
        Coordinates.
    graph : Graph, edge_index or list of Graph
        N nodes, E edges.
    weights : EdgeWeights
        The rest of the edge MLP, the gate and the coordinate head.
    options : Options
        If ``coord_agg`` is not None, X is computed. The mean and ``coord_scale`` are not applied;
        the caller does that.
    edge_attr : Tensor [E, A], optional
        Edge attributes in the user's edge order.
    edge_mask : Tensor [E] or [E, 1], optional
        Factor on m and t; bool or floating point. Differentiable.
    backend : str, optional
        See :func:`egnn_fast.use_backend`.

    Returns
    -------
    M : Tensor [N, H]
        Sum of the messages m over each receiver's senders, in the dtype of ``x``.
    X : Tensor [N, D] or None
        Sum of the coordinate updates t, in the dtype of ``x``; None without a coordinate head.

    Raises
    ------
    TypeError, ValueError, IndexError
        An argument is wrong; the message names it.
    BackendError
        The named backend cannot run the call.
    """
    refuse_jit_trace()
    arguments.check_nodes(P, x, "P")
    arguments.check_float("Q", Q, 2)
    arguments.check_shape("Q", Q, tuple(P.shape))
    arguments.check_like("Q", Q, P, "P")
    graph = arguments.resolve_graph(graph, P)
    arguments.check_edge_weights(weights, options, P.shape[1], x)
    width = 0 if weights.w_a is None else weights.w_a.shape[1]
    arguments.check_edge_attr(edge_attr, width, graph, x)
    mask = _edge_mask(edge_mask, graph, x)
    chosen = backends.select(backend, _call(x, P.shape[1], options.activation))
    if chosen == "reference":
        receiver, sender = graph.shared_edge_index()
        return reference.messages(
            P, Q, x, receiver, sender, weights, options, edge_attr=edge_attr, edge_mask=edge_mask
        )
    message_sum, coord_sum = messages(
        torch.cat(_to_common_dtype(P, Q, x), dim=1),
        x,
        graph,
        weights,
        options,
        edge_attr,
        mask,
        chosen,
    )
    return message_sum, coord_sum if options.updates_coords else None


@without_default_device
def egcl(
    h: Tensor,
    x: Tensor,
    graph: Graph | EdgeIndexLike,
    weights: LayerWeights,
    options: Options,
    *,
    edge_attr: Tensor | None = None,
    node_attr: Tensor | None = None,
    edge_mask: Tensor | None = None,
    node_mask: Tensor | None = None,
    v: Tensor | None = None,
    residual: bool = True,
    carry_velocity: bool = False,
    activation: Activation | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """One E(n)-equivariant graph convolution (Satorras et al. 2021, eqs. 3 to 8).

    Parameters
    ----------
    h : Tensor [N, F]
        Node features.
    x : Tensor [N, D]
        Coordinates.
    graph : Graph, edge_index or list of Graph
        N nodes, E edges. A raw ``edge_index`` holds receivers, then senders.
    weights : LayerWeights
        All weights; F, H, O and the attribute widths follow from their shapes.
    options : Options
        The settings that are not tensors.
    edge_attr : Tensor [E, A], optional
        Edge attributes in the user's edge order.
    node_attr : Tensor [N, B], optional
        Attributes that enter the node MLP only.
    edge_mask : Tensor [E] or [E, 1], optional
        Factor on each edge's message and coordinate update; bool or floating point.
    node_mask : Tensor [N] or [N, 1], optional
        Factor on every edge at a node, on the node's new features and on its velocity; bool or
        floating point. So a node of mask 0 is padding.
    v : Tensor [N, D], optional
        Velocities (eq. 7). Required if the weights have a velocity MLP, else not allowed.
    residual : bool
        Add h to the node MLP's output, which needs F = O.
    carry_velocity : bool
        Return the new velocity, ``v_i' = phi_v(h_i) v_i + c agg_j t_ij``.
    activation : callable, optional
        Used instead of the activation that ``options`` names, a function on tensors. The layer
        then runs on the reference.
    backend : str, optional
        See :func:`egnn_fast.use_backend`.

    Returns
    -------
    (h, x, v)
        The new features ``[N, O]``, coordinates ``[N, D]``, and velocity ``[N, D]``. The
        velocity is None without ``carry_velocity`` or without ``v``.

    Raises
    ------
    TypeError, ValueError, IndexError
        An argument is wrong; the message names it.
    BackendError
        The named backend cannot run the call.
    """
    refuse_jit_trace()
    if (
        node_mask is None
        and edge_mask is None
        and activation is None
        and backends.requested(backend) in ("auto", "cpu")
    ):
        # Fast path: the extension checks the tensors. If it rejects one, the checks below raise the
        # error that names it.
        results = try_direct_layer(
            h, x, graph, weights, options, v=v, edge_attr=edge_attr, node_attr=node_attr,
            residual=residual, carry_velocity=carry_velocity and v is not None,
        )  # fmt: skip
        if results is not None:
            new_h, moved, step = results
            return new_h, x if moved is None else moved, step
    arguments.check_nodes(h, x)
    graph = arguments.resolve_graph(graph, h)
    node_attrs = _check_node_attr(node_attr, h)
    attrs = arguments.check_layer_weights(weights, options, h.shape[1], node_attrs, x)
    arguments.check_edge_attr(edge_attr, attrs, graph, x)
    if residual and weights.node_w2.shape[0] != h.shape[1]:
        raise ValueError(
            f"residual: needs as many output as input features, "
            f"got {weights.node_w2.shape[0]} and {h.shape[1]}"
        )
    _check_velocity(v, weights.vel_w1 is not None, x)
    nodes = arguments.as_mask("node_mask", node_mask, x.shape[0], x)
    mask = _edge_mask(edge_mask, graph, x)

    name = None if activation is not None else options.activation
    chosen = backends.select(backend, _call(x, weights.edge_w1.shape[0], name))
    if chosen == "reference":
        return reference.egcl(
            h, x, graph, reference.maps_of(weights, options, activation), options,
            edge_attr=edge_attr, node_attr=node_attr, edge_mask=edge_mask, node_mask=node_mask,
            v=v, residual=residual, carry_velocity=carry_velocity,
        )  # fmt: skip
    # From here on use no code of the reference: the checks compare the two.
    mask, v = _with_node_mask(nodes, mask, v, graph)
    weight = _coord_weight(mask, graph, options, x.dtype)
    carry = carry_velocity and v is not None
    new_h, moved, step = layer(
        h, x, graph, weights, options, v=v, edge_attr=edge_attr, edge_mask=mask,
        node_attr=node_attr, coord_weight=weight, residual=residual, carry_velocity=carry,
        backend=chosen,
    )  # fmt: skip
    new_x = x if moved is None or not (options.updates_coords or v is not None) else moved
    if nodes is not None:
        new_h = new_h * nodes.unsqueeze(1).to(new_h.dtype)
    return new_h, new_x, step if carry else None


def egcl_by_maps(
    h: Tensor,
    x: Tensor,
    graph: Graph | EdgeIndexLike,
    maps: reference.Maps,
    options: Options,
    widths: tuple[int, int, int, int],
    changed: str,
    *,
    edge_attr: Tensor | None = None,
    node_attr: Tensor | None = None,
    edge_mask: Tensor | None = None,
    node_mask: Tensor | None = None,
    v: Tensor | None = None,
    residual: bool = True,
    carry_velocity: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """:func:`egcl` with any MLPs. Runs in plain PyTorch on every backend.

    ``widths`` are F, H, A and B, the widths of ``h``, messages, ``edge_attr`` and ``node_attr``.
    ``changed`` says which submodule no kernel knows; the warning quotes it. The other arguments,
    the result and the errors are those of :func:`egcl`.
    """
    features, hidden, edge_attrs, node_attrs = widths
    arguments.check_nodes(h, x)
    if h.shape[1] != features:
        raise ValueError(f"h: expected [N, {features}], got {list(h.shape)}")
    graph = arguments.resolve_graph(graph, h)
    if _check_node_attr(node_attr, h) != node_attrs:
        wanted = f"[N, {node_attrs}]" if node_attrs else None
        got = None if node_attr is None else list(node_attr.shape)
        raise ValueError(f"node_attr: expected {wanted}, got {got}")
    arguments.check_edge_attr(edge_attr, edge_attrs, graph, x)
    _check_velocity(v, maps.coord_mlp_vel is not None, x)
    arguments.as_mask("node_mask", node_mask, x.shape[0], x)
    _edge_mask(edge_mask, graph, x)
    backends.select(backend, _call(x, hidden, options.activation, changed))
    return reference.egcl(
        h, x, graph, maps, options, edge_attr=edge_attr, node_attr=node_attr, edge_mask=edge_mask,
        node_mask=node_mask, v=v, residual=residual, carry_velocity=carry_velocity,
    )  # fmt: skip


def explain(
    h: Tensor,
    x: Tensor,
    *,
    hidden: int,
    options: Options | None = None,
    activation: Activation | None = None,
    changed: str | None = None,
    backend: str | None = None,
) -> backends.Explanation:
    """Which backend and instruction set would run a layer on these tensors, and why.

    Parameters
    ----------
    h, x : Tensor
        Node features ``[N, F]`` and coordinates ``[N, D]``.
    hidden : int
        The layer's hidden width H.
    options, activation, backend
        As for :func:`egcl`.
    changed : str, optional
        Which submodule was modified after the layer was built, and how.

    Raises
    ------
    TypeError, ValueError
        ``h`` or ``x`` is wrong; the message names it.
    BackendError
        The named backend cannot run the call.
    """
    arguments.check_nodes(h, x)
    name = None if activation is not None else (options or Options()).activation
    return backends.explain_call(backend, _call(x, hidden, name, changed))


def _to_common_dtype(p: Tensor, q: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """P and Q ``[N, H]`` as they are if both have autocast's dtype, else in the dtype of ``x``."""
    if p.dtype == q.dtype == x.dtype:
        return p, q
    if p.dtype == q.dtype == torch.get_autocast_dtype(x.device.type):
        return p, q
    return p.to(x.dtype), q.to(x.dtype)


def _call(
    x: Tensor, hidden: int, activation: str | None, changed: str | None = None
) -> backends.Call:
    return backends.Call(x.device.type, x.dtype, hidden, x.shape[1], activation, changed)


def _check_velocity(v: Tensor | None, has_velocity_mlp: bool, x: Tensor) -> None:
    """Raise unless ``v`` is ``[N, D]`` like ``x``, or None without a velocity MLP."""
    if (v is not None) is not has_velocity_mlp:
        raise ValueError("v: needed exactly where the weights have a velocity MLP")
    if v is not None:
        arguments.check_float("v", v, 2)
        arguments.check_shape("v", v, tuple(x.shape))
        arguments.check_like("v", v, x, "x")


def _with_node_mask(
    nodes: Tensor | None, mask: Tensor | None, v: Tensor | None, graph: Graph
) -> tuple[Tensor | None, Tensor | None]:
    """Apply the node masks ``nodes [N]`` to ``mask [E]``, at both ends, and to ``v [N, D]``."""
    if nodes is None:
        return mask, v
    receiver, sender = graph.shared_edge_index()
    both_ends = nodes[receiver] * nodes[sender]
    mask = both_ends if mask is None else mask * both_ends
    return mask, None if v is None else v * nodes.unsqueeze(1)


def _coord_weight(
    mask: Tensor | None, graph: Graph, options: Options, dtype: torch.dtype
) -> Tensor | None:
    """The mean's factor at each node, ``[N]``: 1 / max(sum of its edges' masks, 1).

    ``mask`` is ``[E]``, or None for ones. Returns None unless ``coord_agg`` is "mean".
    """
    if options.coord_agg != "mean":
        return None
    if mask is None:
        return graph.inverse_degree(dtype)
    receiver = graph.shared_edge_index()[0]
    total = mask.new_zeros(graph.num_nodes).index_add(0, receiver, mask)
    return total.clamp(min=1).reciprocal()


def _edge_mask(edge_mask: Tensor | None, graph: Graph, x: Tensor) -> Tensor | None:
    """Check ``edge_mask [E]`` or ``[E, 1]`` and return it as ``[E]`` in the dtype of ``x``."""
    mask = arguments.as_mask("edge_mask", edge_mask, None, x)
    if mask is not None:
        arguments.check_edge_rows("edge_mask", mask, graph)
    return mask


def _check_node_attr(node_attr: Tensor | None, h: Tensor) -> int:
    """Check ``node_attr [N, B]`` against ``h [N, F]``; returns B, 0 for None."""
    if node_attr is None:
        return 0
    arguments.check_float("node_attr", node_attr, 2)
    if node_attr.shape[0] != h.shape[0]:
        raise ValueError(f"node_attr: expected {h.shape[0]} rows, got {node_attr.shape[0]}")
    arguments.check_like("node_attr", node_attr, h, "h")
    return node_attr.shape[1]
