"""A block of edges: their indices, the nodes that they join, and their first linear layer."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from egnn_fast.kernels.device import (
    load_rows,
    load_vector,
    operand,
    product,
    rounded_product,
)


class EdgeBlock(NamedTuple):
    """A block of edges in receiver order.

    Attributes
    ----------
    begin, end : int32
        The number of its first edge, and one past that of its last.
    chunk : int32
        The number of the first edge of the chunk.
    edge : [BLOCK], int32
        The edges' numbers; those beyond ``end`` do not exist.
    live : [BLOCK], bool
        Which edges exist.
    first, last : int32
        The rows (receivers) of its first and last edge.
    """

    begin: Any
    end: Any
    chunk: Any
    edge: Any
    live: Any
    first: Any
    last: Any


class Pairs(NamedTuple):
    """The pairs of nodes that the edges of a block join.

    Attributes
    ----------
    user : [BLOCK], int32
        The user's numbers of the edges: rows of edge_attr and edge_mask.
    i, j : [BLOCK], int32
        Receivers, -1 where there is no edge, and senders.
    d : [BLOCK, DP], float32
        x_i - x_j, 0 beyond the dimension.
    r : [BLOCK], float32
        The square of d.
    """

    user: Any
    i: Any
    j: Any
    d: Any
    r: Any


@triton.jit
def block_of_edges(edges, begin_edge, end_edge, number, spec):
    """The EdgeBlock of this number, of the blocks of an EdgeList from ``begin_edge`` on."""
    begin = begin_edge + number * spec.BLOCK
    end = tl.minimum(begin + spec.BLOCK, end_edge)
    edge = begin + tl.arange(0, spec.BLOCK)
    first = tl.load(edges.block_rows + 2 * number)
    last = tl.load(edges.block_rows + 2 * number + 1)
    return EdgeBlock(begin, end, begin_edge, edge, edge < end, first, last)


@triton.jit
def positions_of(block):
    """The edges' numbers ``[BLOCK]``, counted from the chunk's first edge: rows of its tiles."""
    return block.edge - block.chunk


@triton.jit
def pairs_of(edges, inputs, block, spec):
    """The Pairs of a block."""
    i, j = nodes_of(edges, block)
    user = users_of(edges, block)
    d = load_rows(inputs.x, i, block.live, spec.D, spec.D, spec.DP)
    d -= load_rows(inputs.x, j, block.live, spec.D, spec.D, spec.DP)
    return Pairs(user, i, j, d, tl.sum(rounded_product(d, d, spec), axis=1))


@triton.jit
def _load_nodes(edges, block):
    """``(i, j)`` of a list of edges, in one load.

    The compiler repeats a load that has fewer elements than threads in every layout that uses it,
    and its threads then wait for one row after the other. This load has enough to be done once.
    """
    BLOCK: tl.constexpr = block.edge.shape[0]
    COPIES: tl.constexpr = 2 if BLOCK <= 32 else 1
    column = tl.arange(0, 2 * COPIES)[None, :]
    of_sender = column // COPIES
    # as numbers: on AMD an offset from a pointer to a small tensor is taken for one of 32 bits
    receivers, senders = edges.receivers.to(tl.int64), edges.senders.to(tl.int64)
    at = receivers + of_sender * (senders - receivers) + 4 * block.edge.to(tl.int64)[:, None]
    both = tl.load(at.to(tl.pointer_type(tl.int32)), mask=block.live[:, None], other=-1)
    if COPIES == 2:
        both, _ = tl.split(tl.reshape(both, (BLOCK, 2, 2)))
    i, j = tl.split(both)
    return i, tl.maximum(j, 0)


@triton.jit
def nodes_of(edges, block):
    """``(i, j)``: receivers and senders of a block; ``i`` is -1 where there is no edge."""
    if edges.receivers is not None:
        i, j = _load_nodes(edges, block)
    else:
        # binary search: the last row that begins at or before the edge
        i = tl.zeros_like(block.edge) + block.first
        high = tl.zeros_like(block.edge) + block.last
        span = block.last - block.first
        while span > 0:
            middle = i + ((high - i + 1) >> 1)
            begun = tl.load(edges.order.rowptr + middle) <= block.edge
            i = tl.where(begun, middle, i)
            high = tl.where(begun, high, middle - 1)
            span = span >> 1
        i = tl.where(block.live, i, -1)
        j = senders_of(edges, block, i)
    return i, j


@triton.jit
def senders_again(edges, block, i):
    """The senders ``[BLOCK]`` of a block, loaded again, given its receivers ``i``."""
    if edges.receivers is not None:
        _, j = _load_nodes(edges, block)
        return j
    else:
        return senders_of(edges, block, i)


@triton.jit
def senders_of(edges, block, i):
    """The senders ``[BLOCK]`` of a block, given its receivers ``i``."""
    if edges.senders is not None:
        return tl.load(edges.senders + block.edge, mask=block.live, other=0)
    else:
        i = tl.maximum(i, 0)
        j = tl.load(edges.first + i)
        j += block.edge - tl.load(edges.order.rowptr + i).to(tl.int32)
        return tl.where(block.live, j + (j >= i).to(tl.int32), 0)


@triton.jit
def users_of(edges, block):
    """The user's numbers ``[BLOCK]`` of a block's edges."""
    if edges.perm is not None:
        return tl.load(edges.perm + block.edge, mask=block.live, other=0)
    else:
        return block.edge


@triton.jit
def mask_of(inputs, user, live):
    """The edges' mask ``[BLOCK]``, 0 where there is no edge."""
    if inputs.edge_mask is not None:
        return tl.load(inputs.edge_mask + user, mask=live, other=0.0)
    else:
        return live.to(tl.float32)


@triton.jit
def first_linear(problem, w_a, block, pairs, spec):
    """z1 = P_i + Q_j + w_r r + W_a a ``[BLOCK, HP]``; ``w_a`` is the matrix W_a, or None."""
    inputs = problem.inputs
    z = load_rows(inputs.pq, pairs.i, block.live, 2 * spec.H, spec.H, spec.HP)
    z += load_rows(inputs.pq + spec.H, pairs.j, block.live, 2 * spec.H, spec.H, spec.HP)
    z += pairs.r[:, None] * load_vector(problem.weights.w_r, spec)[None, :]
    if w_a is not None:
        a = load_rows(inputs.edge_attr, pairs.user, block.live, spec.A, spec.A, spec.AP)
        z += product(operand(a, spec), tl.trans(operand(w_a, spec)), spec)
    return z


@triton.jit
def _prefetch(address):
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [address.to(tl.int64)],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _prefetch_rows(base, index, stride, width: tl.constexpr):
    """Have L2 load rows of a row-major matrix, line by line of 128 bytes."""
    line: tl.constexpr = 1024 // base.dtype.element_ty.primitive_bitwidth
    row = base + index.to(tl.int64) * stride
    for begin in tl.static_range(0, width, line):
        _prefetch(row + begin)


@triton.jit
def prefetch_block(problem, g_m, begin_edge, end_edge, number, end, spec):
    """Have L2 load what the block of this number, below ``end``, reads of its nodes.

    That is rows of P and Q, senders' x, and rows of ``g_m``, the cotangent of M, unless None.
    Without a list of receivers, finding these costs more than it saves (assumed).
    """
    if spec.PREFETCH and spec.PTX and problem.edges.receivers is not None:
        edges, inputs = problem.edges, problem.inputs
        block = block_of_edges(edges, begin_edge, end_edge, tl.minimum(number, end - 1), spec)
        i, j = nodes_of(edges, block)
        i = tl.maximum(i, 0)
        _prefetch_rows(inputs.x, j, spec.D, 1)
        _prefetch_rows(inputs.pq, i, 2 * spec.H, spec.H)
        _prefetch_rows(inputs.pq + spec.H, j, 2 * spec.H, spec.H)
        if g_m is not None:
            _prefetch_rows(g_m, i, spec.H, spec.H)
