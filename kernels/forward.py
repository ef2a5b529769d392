"""The edge pass forward: one kernel, edge blocks in receiver order."""

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
    load_vector,
    load_weights,
    mask_of,
    nodes_of,
    not_finite,
    operand,
    product,
    run_of_blocks,
    users_of,
)
from egnn_fast.kernels.head import shift_of
from egnn_fast.kernels.rows import add_block_rows, finish_block_rows


@triton.jit(do_not_specialize=("begin_edge", "end_edge", "num_blocks"))
def edge_forward(
    edges, inputs, weights, numbers, m_rows, x_rows, begin_edge, end_edge, num_blocks, spec
):
    """The rows of ``M [N, H]`` and ``X [N, D]``; each program takes an equal run of blocks."""
    begin, end = run_of_blocks(num_blocks)
    head_row = tl.load(edges.block_rows + 2 * begin)

    if spec.STREAMED < 2:
        w2 = load_weights(weights.w2, spec)
    if weights.w3 is not None:  # noqa: SIM102
        if spec.STREAMED < 1:
            w3 = load_weights(weights.w3, spec)
    w_a = None
    if weights.w_a is not None:
        w_a = load_matrix(weights.w_a, spec.H, spec.A, spec.HP, spec.AP)

    carry_row = tl.full((), -1, tl.int32)
    carry_m = tl.zeros((spec.HP,), tl.float32)
    carry_x = tl.zeros((spec.DP,), tl.float32)
    last = head_row
    for block in tl.range(begin, end, disable_licm=True):
        start, stop, e, live, first, last = block_of_edges(edges, begin_edge, end_edge, block, spec)
        i, j = nodes_of(edges, e, live, first, last)
        user = users_of(edges, e, live)
        d, r = geometry(inputs, i, j, live, spec)
        z = first_linear(inputs, weights, w_a, user, live, i, j, r, spec)

        if spec.STREAMED >= 2:
            w2 = load_weights(weights.w2, spec)
        z = (
            product(operand(activation(z, numbers, spec), spec), tl.trans(w2), spec)
            + load_vector(weights.b2, spec)[None, :]
        )
        m = activation(z, numbers, spec)
        if weights.w_g is not None:
            m *= gate_of(m, weights, spec)[:, None]
        mask = mask_of(inputs, user, live)
        if inputs.edge_mask is not None:  # what is no edge is in no row's sum anyway
            m *= mask[:, None]
        # an edge whose message is not finite must not touch other rows; the head shows it, but for
        # an infinity that ReLU took away
        shift_broken, t = None, None
        if weights.w3 is None:
            broken = not_finite(tl.sum(m.to(spec.OPERAND).to(tl.float32), axis=1))
        else:
            if spec.STREAMED >= 1:
                w3 = load_weights(weights.w3, spec)
            z = (
                product(operand(m, spec), tl.trans(w3), spec)
                + load_vector(weights.b3, spec)[None, :]
            )
            a3 = activation(z, numbers, spec)
            s = tl.sum(a3 * load_vector(weights.w_x, spec)[None, :], axis=1)
            broken = s
            if spec.ACT != 0:
                broken += tl.sum(m.to(spec.OPERAND).to(tl.float32), axis=1)
            broken = not_finite(broken)
            t = shift_of(d, r, s, numbers, spec) * mask[:, None]
            shift_broken = not_finite(tl.sum(t, axis=1))
        carry_m, carry_x = add_block_rows(
            m_rows, spec.H, spec.H, m, carry_m, broken,
            x_rows, spec.D, t, carry_x, shift_broken,
            edges.order, start, stop, first, last, carry_row, head_row,
            spec.OPERAND, spec.PART, False,
        )  # fmt: skip
        carry_row = last
    finish_block_rows(m_rows, spec.H, carry_m, last, head_row)
    if weights.w3 is not None:
        finish_block_rows(x_rows, spec.D, carry_x, last, head_row)
