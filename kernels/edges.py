"""A block of edges: its numbers, the nodes that the edges join, and their first linear layer."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from egnn_fast.kernels.device import load_rows, load_vector, operand, product


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
    return Pairs(user, i, j, d, tl.sum(d * d, axis=1))


@triton.jit
def nodes_of(edges, block):
    """``(i, j)``: receivers and senders of a block; ``i`` is -1 where there is no edge."""
    if edges.receivers is not None:
        i = tl.load(edges.receivers + block.edge, mask=block.live, other=-1)
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
    return i, senders_of(edges, block, i)


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
