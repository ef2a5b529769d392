"""The edge pass forward: one kernel, edge blocks in receiver order."""

from __future__ import annotations

import triton
import triton.language as tl

from egnn_fast.kernels.device import (
    activation,
    add_block_rows,
    block_of_edges,
    finish_block_rows,
    inverse_norm,
    load_matrix,
    load_rows,
    load_vector,
    load_weights,
    product,
    run_of_blocks,
    sigmoid,
    tanh,
)


@triton.jit(do_not_specialize=("begin_edge", "end_edge", "num_blocks"))
def edge_forward(
    edges, inputs, weights, numbers, m_rows, x_rows, begin_edge, end_edge, num_blocks, spec
):
    """The rows of ``M [N, H]`` and ``X [N, D]``; each program takes an equal run of blocks."""
    begin, end = run_of_blocks(num_blocks)
    head_row = tl.load(edges.block_rows + 2 * begin)

    if not spec.STREAM:
        w2 = load_weights(weights.w2, spec)
        if weights.w3 is not None:
            w3 = load_weights(weights.w3, spec)
    if weights.w_a is not None:
        w_a = load_matrix(weights.w_a, spec.H, spec.A, spec.HP, spec.AP)
    if weights.w_g is not None:
        b_g = tl.load(weights.b_g).to(tl.float32)

    carry_row = tl.full((), -1, tl.int32)
    carry_m = tl.zeros((spec.HP,), tl.float32)
    carry_x = tl.zeros((spec.DP,), tl.float32)
    last = head_row
    for block in tl.range(begin, end, disable_licm=True):
        e, live, i, j, first, last = block_of_edges(edges, begin_edge, end_edge, block, spec)
        user = e
        if edges.perm is not None:
            user = tl.load(edges.perm + e, mask=live, other=0)
        d = load_rows(inputs.x, i, live, spec.D, spec.D, spec.DP)
        d -= load_rows(inputs.x, j, live, spec.D, spec.D, spec.DP)
        r = tl.sum(d * d, axis=1)
        z = load_rows(inputs.pq, i, live, 2 * spec.H, spec.H, spec.HP)
        z += load_rows(inputs.pq + spec.H, j, live, 2 * spec.H, spec.H, spec.HP)
        z += r[:, None] * load_vector(weights.w_r, spec)[None, :]
        if weights.w_a is not None:
            a = load_rows(inputs.edge_attr, user, live, spec.A, spec.A, spec.AP)
            z += product(a, tl.trans(w_a), spec)

        if spec.STREAM:
            w2 = load_weights(weights.w2, spec)
        z = (
            product(activation(z, numbers, spec), tl.trans(w2), spec)
            + load_vector(weights.b2, spec)[None, :]
        )
        m = activation(z, numbers, spec)
        if weights.w_g is not None:
            m *= sigmoid(tl.sum(m * load_vector(weights.w_g, spec)[None, :], axis=1) + b_g)[:, None]
        mask = live.to(tl.float32)
        if inputs.edge_mask is not None:
            mask = tl.load(inputs.edge_mask + user, mask=live, other=0.0)
        m *= mask[:, None]
        if weights.w3 is not None:
            if spec.STREAM:
                w3 = load_weights(weights.w3, spec)
            z = product(m, tl.trans(w3), spec) + load_vector(weights.b3, spec)[None, :]
            a3 = activation(z, numbers, spec)
            s = tl.sum(a3 * load_vector(weights.w_x, spec)[None, :], axis=1)
        # an edge whose message is not finite must not touch other rows; the head shows it, but for
        # an infinity that ReLU took away
        check = tl.zeros((spec.BLOCK,), tl.float32)
        if weights.w3 is not None:
            check += s
        if weights.w3 is None or spec.ACT != 0:
            check += tl.sum(m.to(spec.OPERAND).to(tl.float32), axis=1)
        broken = tl.where(tl.abs(check) < float("inf"), 0, 1)
        carry_m = add_block_rows(
            m_rows, spec.H, spec.H, m, i, first, last, carry_m, carry_row, head_row,
            broken, spec.OPERAND, spec.EXACT, False,
        )  # fmt: skip
        if weights.w3 is not None:
            if spec.TANH:
                s = tanh(s)
            t = d * s[:, None]
            if spec.NORM != 0:
                inverse, _ = inverse_norm(r, numbers, spec)
                t *= inverse[:, None]
            if spec.CLAMP:
                t = tl.clamp(t, -numbers.clamp, numbers.clamp, tl.PropagateNan.ALL)
            t *= mask[:, None]
            carry_x = add_block_rows(
                x_rows, spec.D, spec.D, t, i, first, last, carry_x, carry_row, head_row,
                broken, tl.float32, spec.EXACT, False,
            )  # fmt: skip
        carry_row = last
    finish_block_rows(m_rows, spec.H, carry_m, last, head_row)
    if weights.w3 is not None:
        finish_block_rows(x_rows, spec.D, carry_x, last, head_row)
