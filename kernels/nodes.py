"""What a layer does at its nodes: P and Q before the edges, new features and coordinates after.

Each program takes a tile of nodes through whole MLPs, so a layer is few launches and its
activations stay on chip. Weights come as the user has them: float32, unsplit, of any width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from egnn_fast.kernels.device import (
    activation,
    load_rows,
    operand,
    product,
    store_rows,
)


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
    """New ``h [N, O]``, ``x [N, D]`` and ``v [N, D]``; None for what there is not."""

    h: Any
    x: Any
    v: Any


class NodeSizes(NamedTuple):
    """Sizes of a layer, constants of its kernels.

    Attributes
    ----------
    F, H, O, B : input, hidden and output features, node attributes
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
    """Columns from ``begin`` on of rows of a matrix of ``width`` columns, 0 beyond."""
    column = begin + tl.arange(0, CHUNK)
    place = base + row.to(tl.int64)[:, None] * stride + column[None, :]
    return tl.load(place, mask=live[:, None] & (column < width)[None, :], other=0.0)


@triton.jit
def _bias(base, total, width: tl.constexpr):
    """``total [TILE, W]`` and a vector of ``width`` numbers added to each row."""
    column = tl.arange(0, total.shape[1])
    return total + tl.load(base + column, mask=column < width, other=0.0)[None, :]


@triton.jit
def _linear(total, values, stride, row, live, width: tl.constexpr, weight, w_stride, sizes, spec):
    """``total [TILE, HP]`` and the product of ``values [N, width]`` by a weight ``[H, width]``."""
    unit = tl.arange(0, spec.HP)
    for begin in range(0, width, sizes.CHUNK):
        left = _chunk(values, row, live, stride, begin, width, sizes.CHUNK)
        right = _chunk(weight, unit, unit < sizes.H, w_stride, begin, width, sizes.CHUNK)
        total += product(operand(left, spec), tl.trans(operand(right, spec)), spec)
    return total


# the sizes that project_nodes reads
PROJECTED = ("F", "H", "TILE", "CHUNK")


@triton.jit(do_not_specialize=("nodes", "w_stride"))
def project_nodes(h, edge_w1, edge_b1, w_stride, pq, m, shift, nodes, sizes, spec):
    """P (programs ``(., 0)``) or Q (``(., 1)``) of a tile, and 0 in the sums that edges add to.

    ``pq [N, 2 W]`` and ``m [N, W]`` have the channels that the edge kernels take, W = spec.H; m and
    ``shift [N, D]`` may be None.
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


@triton.jit(do_not_specialize=("nodes",))
def update_nodes(inputs, m, shift, weights, out, numbers, scale, nodes, sizes, spec):
    """New features of a tile by φ_h, and its new coordinates (and velocities) by φ_v and X.

    ``m [N, W]`` and ``shift [N, D]`` are the edges' sums M and X; the latter may be None.
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
        place = out.h + row.to(tl.int64)[:, None] * sizes.O + column[None, :]
        tl.store(place, update, mask=live[:, None] & (column < sizes.O)[None, :])

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


# rows of a matrix that a program packs
PACKED_ROWS = 32


@triton.jit
def _pack_vector(given, stride, out, row, H, W):
    if out is not None:
        tl.store(out + row, tl.load(given + row * stride, mask=row < H, other=0.0), mask=row < W)


@triton.jit
def _pack_matrix(given, stride, out, row, H, W, columns, width, WP: tl.constexpr):
    """Rows ``[H, columns]`` as rows ``[W, width]``: numbers, places, which of these exist."""
    column = tl.arange(0, WP)[None, :]
    inside = (row < H)[:, None] & (column < columns)
    t = tl.load(given + row[:, None] * stride + column, mask=inside, other=0.0)
    return t, out + row[:, None] * width + column, (row < W)[:, None] & (column < width)


@triton.jit
def _pack_operand(given, out, row, H, W, spec):
    if out is not None:
        t, place, inside = _pack_matrix(given, H, out, row, H, W, H, W, spec.HP)
        tl.store(place, operand(t, spec).to(out.dtype.element_ty), mask=inside)


@triton.jit(
    do_not_specialize=("w_r_stride", "w_a_stride", "H", "W", "A"),
    # columns of a matrix begin anywhere
    do_not_specialize_on_alignment=("w_r", "w_a"),
)
def pack_weights(given, w_r, w_r_stride, w_a, w_a_stride, out, H, W, A, spec, ROWS: tl.constexpr):
    """Weights of H channels as the edge kernels take them, of W: padding is 0.

    Matrices of the products are rounded to the operands' type. What is None, in ``out`` too, stays
    as it is. ``w_r`` and ``w_a [H, A]``, given beside the others, may be columns of another matrix,
    whose row strides are given. Sizes are no constants: one compiled kernel serves many layers.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    _pack_vector(w_r, w_r_stride, out.w_r, row, H, W)
    _pack_vector(given.b2, 1, out.b2, row, H, W)
    _pack_vector(given.w_g, 1, out.w_g, row, H, W)
    _pack_vector(given.b3, 1, out.b3, row, H, W)
    _pack_vector(given.w_x, 1, out.w_x, row, H, W)
    _pack_operand(given.w2, out.w2, row, H, W, spec)
    _pack_operand(given.w3, out.w3, row, H, W, spec)
    if out.w_a is not None:
        t, place, inside = _pack_matrix(w_a, w_a_stride, out.w_a, row, H, W, A, A, spec.AP)
        tl.store(place, t, mask=inside)
