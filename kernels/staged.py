"""The edge pass for widths whose weights no multiprocessor holds, forward.

A chunk of edges at a time goes through these stages; between them stand the products by w2 and w3,
which are the BLAS's. ``tile`` is a matrix ``[chunk, H]`` in the operands' type; the chunk begins at
``begin_edge``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from egnn_fast.kernels.device import (
    activation,
    block_of_edges,
    first_linear,
    gate_of,
    geometry,
    load_matrix,
    load_rows,
    load_vector,
    mask_of,
    nodes_of,
    not_finite,
    run_of_blocks,
    store_rows,
    users_of,
)
from egnn_fast.kernels.head import shift_of
from egnn_fast.kernels.rows import add_block_rows, finish_block_rows


@triton.jit
def load_linear(tile, place, live, bias, spec):
    """A linear layer's output, given its product."""
    return load_rows(tile, place, live, spec.H, spec.H, spec.HP) + load_vector(bias, spec)[None, :]


@triton.jit(do_not_specialize=("begin_edge", "end_edge", "num_blocks"))
def staged_first(
    edges, inputs, weights, numbers, tile, added, begin_edge, end_edge, num_blocks, spec
):
    """Write the first layer's activations.

    ``added``, a tile, is the product of the edge attributes where they are many, else None.
    """
    begin, end = run_of_blocks(num_blocks)
    w_a = None
    if weights.w_a is not None:
        w_a = load_matrix(weights.w_a, spec.H, spec.A, spec.HP, spec.AP)
    for block in tl.range(begin, end, disable_licm=True):
        _, _, e, live, first, last = block_of_edges(edges, begin_edge, end_edge, block, spec)
        i, j = nodes_of(edges, e, live, first, last)
        _, r = geometry(inputs, i, j, live, spec)
        z = first_linear(inputs, weights, w_a, users_of(edges, e, live), live, i, j, r, spec)
        if added is not None:
            z += load_rows(added, e - begin_edge, live, spec.H, spec.H, spec.HP)
        store_rows(tile, e - begin_edge, live, activation(z, numbers, spec), spec.H, spec.H)


@triton.jit(do_not_specialize=("begin_edge", "end_edge", "num_blocks"))
def staged_messages(
    edges, inputs, weights, numbers, tile, messages, rows, begin_edge, end_edge, num_blocks, spec
):
    """From the product by w2 to the messages, and to their sums M.

    ``messages`` is a tile for the one, ``rows`` is where the other go; either may be None.
    """
    begin, end = run_of_blocks(num_blocks)
    head_row = tl.load(edges.block_rows + 2 * begin)
    carry_row = tl.full((), -1, tl.int32)
    carry = tl.zeros((spec.HP,), tl.float32)
    nothing = tl.zeros((1,), tl.float32)
    last = head_row
    for block in tl.range(begin, end, disable_licm=True):
        start, stop, e, live, first, last = block_of_edges(edges, begin_edge, end_edge, block, spec)
        m = activation(load_linear(tile, e - begin_edge, live, weights.b2, spec), numbers, spec)
        if weights.w_g is not None:
            m *= gate_of(m, weights, spec)[:, None]
        m *= mask_of(inputs, users_of(edges, e, live), live)[:, None]
        if messages is not None:
            store_rows(messages, e - begin_edge, live, m, spec.H, spec.H)
        if rows is not None:
            broken = not_finite(tl.sum(m.to(spec.OPERAND).to(tl.float32), axis=1))
            carry, _ = add_block_rows(
                rows, spec.H, spec.H, m, carry, broken, None, 1, None, nothing, None,
                edges.order, start, stop, first, last, carry_row, head_row,
                spec.OPERAND, spec.PART, False,
            )  # fmt: skip
            carry_row = last
    if rows is not None:
        finish_block_rows(rows, spec.H, carry, last, head_row)


@triton.jit(do_not_specialize=("begin_edge", "end_edge", "num_blocks"))
def staged_shifts(
    edges, inputs, weights, numbers, tile, rows, begin_edge, end_edge, num_blocks, spec
):
    """From the product by w3 to the sums X."""
    begin, end = run_of_blocks(num_blocks)
    head_row = tl.load(edges.block_rows + 2 * begin)
    carry_row = tl.full((), -1, tl.int32)
    carry = tl.zeros((spec.DP,), tl.float32)
    nothing = tl.zeros((1,), tl.float32)
    last = head_row
    for block in tl.range(begin, end, disable_licm=True):
        start, stop, e, live, first, last = block_of_edges(edges, begin_edge, end_edge, block, spec)
        i, j = nodes_of(edges, e, live, first, last)
        d, r = geometry(inputs, i, j, live, spec)
        a3 = activation(load_linear(tile, e - begin_edge, live, weights.b3, spec), numbers, spec)
        s = tl.sum(a3 * load_vector(weights.w_x, spec)[None, :], axis=1)
        mask = mask_of(inputs, users_of(edges, e, live), live)
        t = shift_of(d, r, s, numbers, spec) * mask[:, None]
        _, carry = add_block_rows(
            None, 1, 1, None, nothing, None,
            rows, spec.D, t, carry, not_finite(tl.sum(t, axis=1)),
            edges.order, start, stop, first, last, carry_row, head_row,
            spec.OPERAND, spec.PART, False,
        )  # fmt: skip
        carry_row = last
    finish_block_rows(rows, spec.D, carry, last, head_row)
