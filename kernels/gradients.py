"""What the passes backward share: where gradients go, sums for the weights, the first layer's."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from egnn_fast.kernels.device import (
    add_rows_at,
    load_vector,
    operand,
    product,
    senders_of,
    store_rows,
)
from egnn_fast.kernels.records import VECTOR_COLUMNS, VECTORS
from egnn_fast.kernels.rows import add_block_rows


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


# the tile in which the gradients of VECTORS are summed, a column each, then of edge attributes
_COLUMNS = tl.constexpr(VECTOR_COLUMNS)
_VECTORS = tl.constexpr(len(VECTORS))


@triton.jit
def _add_to(place, total, inside):
    """Add a tile to what this program alone writes to."""
    if inside is None:
        tl.store(place, tl.load(place) + total)
    else:
        tl.store(place, tl.load(place, mask=inside, other=0.0) + total, mask=inside)


@triton.jit
def store_matrix(place, total, rows: tl.constexpr, columns: tl.constexpr):
    """Add a tile to a row-major matrix."""
    r = tl.arange(0, total.shape[0])
    c = tl.arange(0, total.shape[1])
    at = place + r[:, None] * columns + c[None, :]
    if rows == total.shape[0] and columns == total.shape[1]:
        _add_to(at, total, None)
    else:
        _add_to(at, total, (r < rows)[:, None] & (c < columns)[None, :])


@triton.jit
def no_vectors(spec):
    """The tile in which the gradients of VECTORS are summed, each a column."""
    return tl.zeros((spec.HP, _COLUMNS), tl.float32)


@triton.jit
def _factors(column: tl.constexpr, factor):
    here = tl.arange(0, _COLUMNS)[None, :] == column
    return tl.where(here, factor[:, None], 0.0)


@triton.jit
def _add_columns(total, factors, values, spec):
    # the values, operands, are laid out as in the products for the weights' matrices
    return tl.dot(tl.trans(values), operand(factors, spec), total, input_precision=spec.DOT)


@triton.jit
def add_vector(total, column: tl.constexpr, factor, values, spec):
    """Add the sum over edges of ``factor * values``, operands, to a column of the tile."""
    return _add_columns(total, _factors(column, factor), values, spec)


@triton.jit
def store_vectors(place, total, weights, spec):
    """Add the tile to the sums of VECTORS, and of the edge attributes' matrix behind them."""
    row = tl.arange(0, spec.HP)[:, None]
    column = tl.arange(0, _COLUMNS)[None, :]
    inside = row < spec.H
    _add_to(place + column * spec.H + row, total, inside & (column < _VECTORS))
    if weights.w_a is not None:
        attr = column - _VECTORS
        place += _VECTORS * spec.H
        _add_to(place + row * spec.A + attr, total, inside & (attr >= 0) & (attr < spec.A))


@triton.jit
def first_gradients(
    edges, inputs, weights, w_a, gradients, begin_edge, start, stop, e, live, i, user, first, last,
    d, r, g_z1, g_d, vectors, carry_p, carry_x, carry_row, head_row, spec,
):  # fmt: skip
    """From the gradients of a block's first linear layer and of d to those of all inputs.

    Returns the sums over edges that go on: ``(vectors, carry_p, carry_x)``.
    """
    H: tl.constexpr = spec.H
    if gradients.weights is not None:
        factors = _factors(0, r)
        if w_a is not None:
            attr = tl.arange(0, _COLUMNS)[None, :] - _VECTORS
            place = inputs.edge_attr + user.to(tl.int64)[:, None] * spec.A + attr
            inside = live[:, None] & (attr >= 0) & (attr < spec.A)
            factors += tl.load(place, mask=inside, other=0.0)
        vectors = _add_columns(vectors, factors, operand(g_z1, spec), spec)
    if w_a is not None:  # noqa: SIM102
        if gradients.edge_attr is not None:
            g_a = product(operand(g_z1, spec), operand(w_a, spec), spec)
            store_rows(gradients.edge_attr, user, live, g_a, spec.A, spec.A)
    if gradients.receiver is not None:
        g_r = tl.sum(g_z1 * load_vector(weights.w_r, spec)[None, :], axis=1)
        g_d += (2.0 * g_r)[:, None] * d
    carry_p, carry_x = add_block_rows(
        gradients.p, 2 * H, H, g_z1, carry_p, None,
        gradients.receiver, spec.D, g_d, carry_x, None,
        edges.order, start, stop, first, last, carry_row, head_row,
        spec.OPERAND, spec.PART, False,
    )  # fmt: skip
    # read anew: held until here they would take registers
    j = senders_of(edges, e, live, i)
    if gradients.messages is not None:
        store_rows(gradients.messages, e - begin_edge, live, g_z1, H, H)
    elif gradients.p is not None:
        add_rows_at(gradients.p.out + H, j, live, g_z1, 2 * H, H)
    if gradients.shifts is not None:
        store_rows(gradients.shifts, e - begin_edge, live, g_d, spec.D, spec.D)
    elif gradients.receiver is not None:
        add_rows_at(gradients.sender, j, live, g_d, spec.D, spec.D)
    return vectors, carry_p, carry_x
