"""What the backward kernels share: sums for the weights, and the way back through z1."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from egnn_fast.kernels.device import add_rows_at, load_vector, operand, product, store_rows
from egnn_fast.kernels.edges import positions_of, senders_again
from egnn_fast.kernels.records import VECTOR_COLUMNS, VECTORS
from egnn_fast.kernels.rows import EdgeValues, add_block_rows


class Cotangents(NamedTuple):
    """The gradients of ``M [N, H]`` and ``X [N, D]``; None where nothing depends on them."""

    m: Any
    x: Any


class Gradients(NamedTuple):
    """Where gradients go; None for what is not wanted.

    Attributes
    ----------
    p : Rows [N, H] of [N, 2H]
        Of P; Q's lie beside it, zero at first.
    receiver : Rows [N, D]
        Of x, by the edges that a node receives.
    sender : [N, D], float32
        Of x, by the edges that a node sends: to be subtracted; zero at first.
    edge_attr : [E, A]; edge_mask : [E]
    messages : [chunk, H] and shifts : [chunk, D]
        If not None, each edge's part of Q's and x's gradient instead of sums over senders.
    weights : [programs, K], float32, zero at first
        Each program's sums for the weights, one after the other as in
        :func:`egnn_fast.kernels.records.weight_parts`.
    """

    p: Any
    receiver: Any
    sender: Any
    edge_attr: Any
    edge_mask: Any
    messages: Any
    shifts: Any
    weights: Any


# edges after which sums for the weights leave the matrix units, a multiple of all blocks: the units
# round each sum towards zero, and over many more edges the gradients would come out too small.
# Products as accurate as float32 are summed by other units anyway. In stages a chunk has at most
# FLUSH edges for each program, so those kernels never flush
FLUSH = tl.constexpr(2048)
# the tile in which the gradients of VECTORS are summed, a column each, then of edge attributes
_COLUMNS = tl.constexpr(VECTOR_COLUMNS)
_VECTORS = tl.constexpr(len(VECTORS))
W_R, B2, B3, W_X, W_G = (tl.constexpr(VECTORS.index(n)) for n in ("w_r", "b2", "b3", "w_x", "w_g"))


@triton.jit
def add_matrix(address, total, spec):
    """Add a tile ``[HP, HP]`` to a matrix ``[H, H]`` that this program alone writes to."""
    r = tl.arange(0, spec.HP)
    at = address + r[:, None] * spec.H + r[None, :]
    if spec.H == spec.HP:
        tl.store(at, tl.load(at) + total)
    else:
        inside = (r < spec.H)[:, None] & (r < spec.H)[None, :]
        tl.store(at, tl.load(at, mask=inside, other=0.0) + total, mask=inside)


@triton.jit
def sums_of_program(gradients, row, spec):
    """The address of this program's sums for the weights.

    ``row``, a node's number, is never negative, which the compiler cannot know: it therefore
    computes the address again for each use, and no register holds it.
    """
    program = tl.program_id(0) + (row < 0).to(tl.int32)
    return gradients.weights + program.to(tl.int64) * spec.K


@triton.jit
def flush_matrix(address, total, spec):
    """Add a tile of sums ``[HP, HP]`` to a matrix ``[H, H]`` in memory, rounded to nearest.

    Atomic, because loading the sums would take registers; the same bits each time, because no other
    program adds here and :func:`flush_vectors` ends with a barrier.
    """
    r = tl.arange(0, spec.HP)
    at = address + r[:, None] * spec.H + r[None, :]
    inside = None if spec.H == spec.HP else (r < spec.H)[:, None] & (r < spec.H)[None, :]
    tl.atomic_add(at, total, mask=inside, sem="relaxed")


@triton.jit
def no_vectors(spec):
    """The tile in which the gradients of VECTORS and w_a are summed, a column each; 0 at first."""
    return tl.zeros((spec.HP, _COLUMNS), tl.float32)


@triton.jit
def _factors(column: tl.constexpr, factor):
    """``[BLOCK, _COLUMNS]`` with ``factor [BLOCK]`` in a column, else 0."""
    here = tl.arange(0, _COLUMNS)[None, :] == column
    return tl.where(here, factor[:, None], 0.0)


@triton.jit
def _add_columns(total, factors, values, spec):
    # the values, operands, have the layout that the products for the weights' matrices give them
    return tl.dot(tl.trans(values), operand(factors, spec), total, input_precision=spec.DOT)


@triton.jit
def add_vector(total, column: tl.constexpr, factor, values, spec):
    """Add the sum over edges of ``factor [BLOCK] * values [BLOCK, HP]``, operands, to a column."""
    return _add_columns(total, _factors(column, factor), values, spec)


@triton.jit
def flush_vectors(address, total, weights, spec):
    """Add the tile of sums for VECTORS and w_a to memory, as :func:`flush_matrix` does."""
    row = tl.arange(0, spec.HP)[:, None]
    column = tl.arange(0, _COLUMNS)[None, :]
    inside = row < spec.H
    at = address + column * spec.H + row
    tl.atomic_add(at, total, mask=inside & (column < _VECTORS), sem="relaxed")
    if weights.w_a is not None:
        attr = column - _VECTORS
        at = address + _VECTORS * spec.H + row * spec.A + attr
        inside &= (attr >= 0) & (attr < spec.A)
        tl.atomic_add(at, total, mask=inside, sem="relaxed")
    # other threads may add the next sums
    tl.debug_barrier()


@triton.jit
def add_first_weights(vectors, inputs, w_a, block, pairs, g_z1, spec):
    """Add ∂w_r = Σ r g_z1 and ∂W_a = Σ g_z1 aᵀ of a block to their columns of ``vectors``."""
    factors = _factors(W_R, pairs.r)
    if w_a is not None:
        attr = tl.arange(0, _COLUMNS)[None, :] - _VECTORS
        address = inputs.edge_attr + pairs.user.to(tl.int64)[:, None] * spec.A + attr
        inside = block.live[:, None] & (attr >= 0) & (attr < spec.A)
        factors += tl.load(address, mask=inside, other=0.0)
    return _add_columns(vectors, factors, operand(g_z1, spec), spec)


@triton.jit
def first_gradients(problem, w_a, gradients, sums, block, pairs, g_z1, g_d, carry, spec):
    """From the gradients of z1 ``[BLOCK, HP]`` and of d ``[BLOCK, DP]`` to those of all inputs.

    ``∂a = W_aᵀ g_z1``, ``∂d += 2 (w_r · g_z1) d``; ∂P and ∂x of receivers go where Sums says, ∂Q
    and ∂x of senders into Gradients. Returns the next Carry.
    """
    H: tl.constexpr = spec.H
    if w_a is not None:  # noqa: SIM102
        if gradients.edge_attr is not None:
            g_a = product(operand(g_z1, spec), operand(w_a, spec), spec)
            store_rows(gradients.edge_attr, pairs.user, block.live, g_a, spec.A, spec.A)
    if gradients.receiver is not None:
        g_r = tl.sum(g_z1 * load_vector(problem.weights.w_r, spec)[None, :], axis=1)
        g_d += (2.0 * g_r)[:, None] * pairs.d
    values = EdgeValues(g_z1, g_d, None, None)
    carry = add_block_rows(sums, values, carry, block, problem.edges.order, 2 * H, False, spec)
    # loaded again: pairs.j would take registers until here
    j = senders_again(problem.edges, block, pairs.i)
    if gradients.messages is not None:
        store_rows(gradients.messages, positions_of(block), block.live, g_z1, H, H)
    elif gradients.p is not None:
        add_rows_at(gradients.p.out + H, j, block.live, g_z1, 2 * H, H)
    if gradients.shifts is not None:
        store_rows(gradients.shifts, positions_of(block), block.live, g_d, spec.D, spec.D)
    elif gradients.receiver is not None:
        add_rows_at(gradients.sender, j, block.live, g_d, spec.D, spec.D)
    return carry
