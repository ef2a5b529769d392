"""What a layer does at its nodes: P and Q before the edges, new features and coordinates after.

Each program takes a tile of nodes through whole MLPs, so a layer is few launches and its
activations stay on chip. Weights come as the user has them: float32, unsplit, of any width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from egnn_fast.kernels.blocks import node_blocks
from egnn_fast.kernels.device import activation, load_rows, operand, product, store_rows
from egnn_fast.kernels.records import Numbers, Plan, Weights, only


class Nodes(NamedTuple):
    """``h [N, F]``, ``x [N, D]``, ``v [N, D]``, ``node_attr [N, B]``, ``coord_weight [N]``.

    All float32; the last three may be None.
    """

    h: Any
    x: Any
    v: Any
    node_attr: Any
    coord_weight: Any


class NodeWeights(NamedTuple):
    """The node MLP φ_h and, unless None, the velocity MLP φ_v, as ``LayerWeights`` has them."""

    node_w1: Any
    node_b1: Any
    node_w2: Any
    node_b2: Any
    vel_w1: Any
    vel_b1: Any
    vel_w2: Any
    vel_b2: Any


class NodeOutputs(NamedTuple):
    """New ``h [N, O]``, ``x [N, D]`` and ``v [N, D]``; the latter may be None."""

    h: Any
    x: Any
    v: Any


class LayerSizes(NamedTuple):
    """Sizes of a layer's nodes.

    Attributes
    ----------
    nodes : N
    features, hidden, out, attrs : F, H, O, B: widths of h, of the MLPs, of new h, of node_attr
    residual : whether h is added to its update
    few : whether there are few nodes: see :func:`egnn_fast.kernels.blocks.few_nodes`
    """

    nodes: int
    features: int
    hidden: int
    out: int
    attrs: int
    residual: bool
    few: bool


class NodeSizes(NamedTuple):
    """Sizes of a layer, constants of its kernels.

    Attributes
    ----------
    F, H, O, B : widths of h, of the MLPs, of new h, of node_attr
    TILE : nodes of a program
    CHUNK : columns of a matrix that are multiplied at once
    RESIDUAL : whether h is added to its update
    """

    F: Any
    H: Any
    O: Any  # noqa: E741
    B: Any
    TILE: Any
    CHUNK: Any
    RESIDUAL: Any

    @classmethod
    def of(cls, *sizes: Any) -> NodeSizes:
        """A record of constants."""
        return cls(*(tl.constexpr(size) for size in sizes))


@triton.jit
def _tile(nodes, sizes):
    """``(row, live)``: this program's nodes, and which of them exist."""
    row = tl.program_id(0) * sizes.TILE + tl.arange(0, sizes.TILE)
    return row, row < nodes


@triton.jit
def _chunk(base, row, live, stride, begin, width: tl.constexpr, CHUNK: tl.constexpr):
    """``[TILE, CHUNK]``: columns from ``begin`` on of rows of a matrix ``[., width]``, 0 beyond."""
    column = begin + tl.arange(0, CHUNK)
    address = base + row.to(tl.int64)[:, None] * stride + column[None, :]
    return tl.load(address, mask=live[:, None] & (column < width)[None, :], other=0.0)


@triton.jit
def _bias(base, total, width: tl.constexpr):
    """``total [TILE, W]`` plus a vector ``[width]``, which is added to each row."""
    column = tl.arange(0, total.shape[1])
    return total + tl.load(base + column, mask=column < width, other=0.0)[None, :]


@triton.jit
def _linear(total, values, stride, row, live, width: tl.constexpr, weight, w_stride, sizes, spec):
    """``total [TILE, HP]`` plus ``values weightᵀ``, of ``[N, width]`` and ``[H, width]``."""
    unit = tl.arange(0, spec.HP)
    for begin in range(0, width, sizes.CHUNK):
        left = _chunk(values, row, live, stride, begin, width, sizes.CHUNK)
        right = _chunk(weight, unit, unit < sizes.H, w_stride, begin, width, sizes.CHUNK)
        total += product(operand(left, spec), tl.trans(operand(right, spec)), spec)
    return total


# the fields of NodeSizes that project_nodes reads
PROJECTED = ("F", "H", "TILE", "CHUNK")


@triton.jit(do_not_specialize=("nodes", "w_stride"))
def project_nodes(h, edge_w1, edge_b1, w_stride, pq, m, shift, nodes, sizes, spec):
    """P = h W_iᵀ + b1 (programs ``(., 0)``) or Q = h W_jᵀ (``(., 1)``) of a tile of nodes.

    And 0 in the sums of the edge pass, ``m [N, W]`` and ``shift [N, D]``, which may be None. These
    and ``pq [N, 2 W]`` have the channels that the edge kernels take, W = spec.H.
    """
    row, live = _tile(nodes, sizes)
    half = tl.program_id(1)
    z = tl.zeros((sizes.TILE, spec.HP), tl.float32)
    if half == 0:
        if m is not None:
            store_rows(m, row, live, z, spec.H, spec.H)
        z = _bias(edge_b1, z, sizes.H)
    elif shift is not None:
        nothing = tl.zeros((sizes.TILE, spec.DP), tl.float32)
        store_rows(shift, row, live, nothing, spec.D, spec.D)
    weight = edge_w1 + half * sizes.F
    z = _linear(z, h, sizes.F, row, live, sizes.F, weight, w_stride, sizes, spec)
    store_rows(pq + half * spec.H, row, live, z, 2 * spec.H, spec.H)


def launch_project_nodes(
    plan: Plan, sizes: LayerSizes, h: Any, edge_w1: Any, edge_b1: Any, pq: Any, m: Any, shift: Any
) -> None:
    """Write P and Q, and 0 in the sums m and shift, unless None."""
    own, warps = _node_sizes(plan, sizes)
    project_nodes[(-(-sizes.nodes // own.TILE.value), 2)](
        h, edge_w1, edge_b1, edge_w1.shape[1], pq, m, shift, sizes.nodes, only(own, PROJECTED),
        plan.constants("project_nodes"), num_warps=warps,
    )  # fmt: skip


def _node_sizes(plan: Plan, sizes: LayerSizes) -> tuple[NodeSizes, int]:
    """Sizes of the kernels over nodes, and their warps."""
    width = plan.spec.HP.value
    tile, chunk, warps = node_blocks(width, plan.precision, sizes.few, plan.arch)
    widths = (sizes.features, sizes.hidden, sizes.out, sizes.attrs)
    return NodeSizes.of(*widths, tile, chunk, sizes.residual), warps


@triton.jit(do_not_specialize=("nodes",))
def update_nodes(inputs, m, shift, weights, out, numbers, scale, nodes, sizes, spec):
    """NodeOutputs of a tile of Nodes: h' = φ_h([h ; M ; node_attr]) (+ h), x' = x + step.

    step = scale · coord_weight · X (+ φ_v(h) v), which is the new v. ``m [N, W]`` and
    ``shift [N, D]`` are the sums M and X; the latter may be None.
    """
    row, live = _tile(nodes, sizes)
    F: tl.constexpr = sizes.F
    H: tl.constexpr = sizes.H
    width: tl.constexpr = F + H + sizes.B
    z = _bias(weights.node_b1, tl.zeros((sizes.TILE, spec.HP), tl.float32), H)
    z = _linear(z, inputs.h, F, row, live, F, weights.node_w1, width, sizes, spec)
    z = _linear(z, m, spec.H, row, live, H, weights.node_w1 + F, width, sizes, spec)
    if inputs.node_attr is not None:
        B: tl.constexpr = sizes.B
        w_b = weights.node_w1 + F + H
        z = _linear(z, inputs.node_attr, B, row, live, B, w_b, width, sizes, spec)
    a = operand(activation(z, numbers, spec), spec)
    for begin in range(0, sizes.O, sizes.CHUNK):
        column = begin + tl.arange(0, sizes.CHUNK)
        w2 = _chunk(weights.node_w2, column, column < sizes.O, H, 0, H, spec.HP)
        update = product(a, tl.trans(operand(w2, spec)), spec)
        update += tl.load(weights.node_b2 + column, mask=column < sizes.O, other=0.0)[None, :]
        if sizes.RESIDUAL:
            update += _chunk(inputs.h, row, live, F, begin, F, sizes.CHUNK)
        address = out.h + row.to(tl.int64)[:, None] * sizes.O + column[None, :]
        tl.store(address, update, mask=live[:, None] & (column < sizes.O)[None, :])

    if out.x is not None:
        step = tl.zeros((sizes.TILE, spec.DP), tl.float32)
        if shift is not None:
            step = load_rows(shift, row, live, spec.D, spec.D, spec.DP)
            if inputs.coord_weight is not None:
                step *= tl.load(inputs.coord_weight + row, mask=live, other=0.0)[:, None]
            step *= scale
        if inputs.v is not None:
            z = _bias(weights.vel_b1, tl.zeros((sizes.TILE, spec.HP), tl.float32), H)
            z = _linear(z, inputs.h, F, row, live, F, weights.vel_w1, F, sizes, spec)
            unit = tl.arange(0, spec.HP)
            w = tl.load(weights.vel_w2 + unit, mask=unit < H, other=0.0)
            gate = tl.sum(activation(z, numbers, spec) * w[None, :], axis=1)
            gate += tl.load(weights.vel_b2)
            step += gate[:, None] * load_rows(inputs.v, row, live, spec.D, spec.D, spec.DP)
        x = load_rows(inputs.x, row, live, spec.D, spec.D, spec.DP) + step
        store_rows(out.x, row, live, x, spec.D, spec.D)
        if out.v is not None:
            store_rows(out.v, row, live, step, spec.D, spec.D)


def launch_update_nodes(
    plan: Plan, sizes: LayerSizes, inputs: Nodes, m: Any, shift: Any, weights: NodeWeights,
    out: NodeOutputs, numbers: Numbers, scale: float,
) -> None:  # fmt: skip
    """Write the NodeOutputs."""
    own, warps = _node_sizes(plan, sizes)
    update_nodes[(-(-sizes.nodes // own.TILE.value),)](
        inputs, m, shift, weights, out, numbers, float(scale), sizes.nodes, own,
        plan.constants("update_nodes"), num_warps=warps,
    )  # fmt: skip


# rows of a matrix that a program packs
PACKED_ROWS = 32


@triton.jit
def _pack_vector(source, stride, out, row, H, W):
    if out is not None:
        tl.store(out + row, tl.load(source + row * stride, mask=row < H, other=0.0), mask=row < W)


@triton.jit
def _pack_matrix(source, stride, out, row, H, W, columns, width, WP: tl.constexpr):
    """Rows of a matrix ``[H, columns]`` for one ``[W, width]``: ``(values, addresses, mask)``."""
    column = tl.arange(0, WP)[None, :]
    inside = (row < H)[:, None] & (column < columns)
    t = tl.load(source + row[:, None] * stride + column, mask=inside, other=0.0)
    return t, out + row[:, None] * width + column, (row < W)[:, None] & (column < width)


@triton.jit
def _pack_operand(source, out, row, H, W, spec):
    if out is not None:
        t, address, inside = _pack_matrix(source, H, out, row, H, W, H, W, spec.HP)
        tl.store(address, operand(t, spec).to(out.dtype.element_ty), mask=inside)


@triton.jit(
    do_not_specialize=("w_r_stride", "w_a_stride", "H", "W", "A"),
    # columns of a matrix begin anywhere
    do_not_specialize_on_alignment=("w_r", "w_a"),
)
def pack_weights(source, w_r, w_r_stride, w_a, w_a_stride, out, H, W, A, spec, ROWS: tl.constexpr):
    """Write Weights of H channels, ``source``, with W channels, ``out``: padding is 0.

    The products' matrices are rounded to the operands' type. Only weights that are not None in
    ``out`` are written. ``w_r [H]`` and ``w_a [H, A]`` are None in ``source``: they may be columns
    of another matrix, so they come with the strides of their rows. Sizes are arguments, not
    constants: one compiled kernel serves many layers.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    _pack_vector(w_r, w_r_stride, out.w_r, row, H, W)
    _pack_vector(source.b2, 1, out.b2, row, H, W)
    _pack_vector(source.w_g, 1, out.w_g, row, H, W)
    _pack_vector(source.b3, 1, out.b3, row, H, W)
    _pack_vector(source.w_x, 1, out.w_x, row, H, W)
    _pack_operand(source.w2, out.w2, row, H, W, spec)
    _pack_operand(source.w3, out.w3, row, H, W, spec)
    if out.w_a is not None:
        t, address, inside = _pack_matrix(w_a, w_a_stride, out.w_a, row, H, W, A, A, spec.AP)
        tl.store(address, t, mask=inside)


def launch_pack_weights(plan: Plan, source: Weights, out: Weights) -> None:
    """Write those of the Weights that are not None in ``out``; they may have fewer channels."""
    # weights that are not written are no arguments: with or without them one compiled kernel
    read = Weights(*(s if o is not None else None for s, o in zip(source, out, strict=True)))
    w_r, w_a = read.w_r, read.w_a
    r_stride = 0 if w_r is None else w_r.stride(0)
    a_stride, attrs = (0, 0) if w_a is None else (w_a.stride(0), w_a.shape[1])
    channels, width = source.w2.shape[0], plan.spec.H.value
    pack_weights[(-(-width // PACKED_ROWS),)](
        read._replace(w_r=None, w_a=None), w_r, r_stride, w_a, a_stride, out,
        channels, width, attrs, spec=plan.constants("pack_weights"), ROWS=PACKED_ROWS,
    )  # fmt: skip
