"""The edge pass forward: one kernel, blocks of edges in receiver order."""

from __future__ import annotations

import triton
import triton.language as tl

from egnn_fast.kernels.device import (
    activation,
    gate_of,
    load_matrix,
    load_vector,
    load_weights,
    not_finite,
    operand,
    product,
    run_of_blocks,
)
from egnn_fast.kernels.edges import block_of_edges, first_linear, mask_of, pairs_of
from egnn_fast.kernels.head import shift_of
from egnn_fast.kernels.records import Chunk, Plan, Problem, Rows
from egnn_fast.kernels.rows import EdgeValues, Sums, add_block_rows, finish_block_rows, no_carry


@triton.jit(do_not_specialize=("begin_edge", "end_edge", "num_blocks"))
def edge_forward(problem, m_rows, x_rows, begin_edge, end_edge, num_blocks, spec):
    """The sums ``M [N, H]`` and, with a coordinate head, ``X [N, D]``: Rows.

    Each program takes an equal run of a Problem's blocks.
    """
    edges, inputs = problem.edges, problem.inputs
    weights, numbers = problem.weights, problem.numbers
    begin, end = run_of_blocks(num_blocks)
    head_row = tl.load(edges.block_rows + 2 * begin)
    sums = Sums(m_rows, x_rows, head_row)

    if spec.STREAMED < 2:
        w2 = load_weights(weights.w2, spec)
    if weights.w3 is not None:  # noqa: SIM102
        if spec.STREAMED < 1:
            w3 = load_weights(weights.w3, spec)
    w_a = None
    if weights.w_a is not None:
        w_a = load_matrix(weights.w_a, spec.H, spec.A, spec.HP, spec.AP)

    carry = no_carry(head_row, spec)
    for number in tl.range(begin, end, disable_licm=True):
        block = block_of_edges(edges, begin_edge, end_edge, number, spec)
        pairs = pairs_of(edges, inputs, block, spec)
        z = first_linear(problem, w_a, block, pairs, spec)

        if spec.STREAMED >= 2:
            w2 = load_weights(weights.w2, spec)
        z = (
            product(operand(activation(z, numbers, spec), spec), tl.trans(w2), spec)
            + load_vector(weights.b2, spec)[None, :]
        )
        m = activation(z, numbers, spec)
        if weights.w_g is not None:
            m *= gate_of(m, weights, spec)[:, None]
        mask = mask_of(inputs, pairs.user, block.live)
        if inputs.edge_mask is not None:  # edges that do not exist are in no row's sum anyway
            m *= mask[:, None]
        # an edge whose message is not finite must not reach other rows; s is not finite
        # then, except where ReLU turned -infinity into 0
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
            t = shift_of(pairs, s, numbers, spec) * mask[:, None]
            shift_broken = not_finite(tl.sum(t, axis=1))
        values = EdgeValues(m, t, broken, shift_broken)
        carry = add_block_rows(sums, values, carry, block, edges.order, spec.H, False, spec)
    finish_block_rows(sums, carry, spec)


def launch_edge_forward(
    plan: Plan, problem: Problem, m: Rows, x: Rows | None, chunk: Chunk
) -> None:
    """Write the rows of M and, unless None, of X that have edges."""
    edge_forward[(chunk.programs,)](
        problem, m, x, *chunk.arguments, plan.constants("edge_forward"), **plan.options
    )
