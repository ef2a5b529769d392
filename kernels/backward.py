"""The edge pass backward: one kernel that runs each block forward again, then back."""

from __future__ import annotations

import triton
import triton.language as tl

from egnn_fast.kernels.device import (
    activation_and_slope,
    gate_of,
    load_matrix,
    load_rows,
    load_vector,
    load_weights,
    operand,
    product,
    run_of_blocks,
    shared_slope,
    slope_from_shared,
)
from egnn_fast.kernels.edges import block_of_edges, first_linear, mask_of, pairs_of, prefetch_block
from egnn_fast.kernels.gradients import (
    B2,
    B3,
    FLUSH,
    W_G,
    W_X,
    Cotangents,
    Gradients,
    add_first_weights,
    add_matrix,
    add_vector,
    first_gradients,
    flush_matrix,
    flush_vectors,
    no_vectors,
    sums_of_program,
)
from egnn_fast.kernels.head import head_gradient, shift_gradients
from egnn_fast.kernels.records import Chunk, Plan, Problem
from egnn_fast.kernels.rows import Sums, finish_block_rows, no_carry, take_block_rows


@triton.jit
def _add_matrix(total, address, left, right, IN_MEMORY: tl.constexpr, spec):
    """Add ``leftᵀ right`` of operands ``[BLOCK, HP]``: to ``total``, or to the sums in memory."""
    left = tl.trans(left)
    if IN_MEMORY:
        outer = tl.dot(left, right, input_precision=spec.DOT)
        add_matrix(address, outer, spec)
        tl.debug_barrier()
        return total
    else:
        return tl.dot(left, right, total, input_precision=spec.DOT)


@triton.jit(do_not_specialize=("begin_edge", "end_edge", "num_blocks"))
def edge_backward(problem, cotangents, gradients, begin_edge, end_edge, num_blocks, spec):
    """The Gradients of a run of edges, given the Cotangents of M and X.

    The coordinate head is left out where X has no cotangent: ``problem.weights.w3`` is None then.
    """
    edges, inputs = problem.edges, problem.inputs
    weights, numbers = problem.weights, problem.numbers
    begin, end = run_of_blocks(num_blocks)
    head_row = tl.load(edges.block_rows + 2 * begin)
    H: tl.constexpr = spec.H
    has_head: tl.constexpr = weights.w3 is not None
    has_gate: tl.constexpr = weights.w_g is not None
    for_weights: tl.constexpr = gradients.weights is not None
    # edges that do not exist have no gradients anyway: their cotangents are 0
    has_share: tl.constexpr = has_gate or inputs.edge_mask is not None
    early: tl.constexpr = spec.SHARED_SLOPES > 0 and not (spec.TANH or spec.CLAMP)
    w2_in_memory: tl.constexpr = spec.IN_MEMORY >= 1
    w3_in_memory: tl.constexpr = spec.IN_MEMORY >= 2

    if spec.STREAMED < 2:
        w2 = load_weights(weights.w2, spec)
    if has_head and spec.STREAMED < 1:
        w3 = load_weights(weights.w3, spec)
    w_a = None
    if weights.w_a is not None:
        w_a = load_matrix(weights.w_a, spec.H, spec.A, spec.HP, spec.AP)
    if for_weights:
        own = gradients.weights + tl.program_id(0).to(tl.int64) * spec.K
        g_w2 = tl.zeros((1, 1) if w2_in_memory else (spec.HP, spec.HP), tl.float32)
        g_w3 = tl.zeros((1, 1) if w3_in_memory else (spec.HP, spec.HP), tl.float32)
    vectors = no_vectors(spec)
    g_b_g = 0.0

    sums = Sums(gradients.p, gradients.receiver, head_row)
    carry = no_carry(head_row, spec)
    for number in tl.range(begin, end, disable_licm=True):
        block = block_of_edges(edges, begin_edge, end_edge, number, spec)
        pairs = pairs_of(edges, inputs, block, spec)
        z = first_linear(problem, w_a, block, pairs, spec)
        mask = mask_of(inputs, pairs.user, block.live)

        a1, slope1 = activation_and_slope(z, numbers, spec)
        a1 = operand(a1, spec)
        slope1 = shared_slope(slope1, 0, spec)
        if spec.STREAMED >= 2:
            w2 = load_weights(weights.w2, spec)
        z = product(a1, tl.trans(w2), spec) + load_vector(weights.b2, spec)[None, :]
        n, slope2 = activation_and_slope(z, numbers, spec)
        slope2 = shared_slope(slope2, 1, spec)
        share = mask
        if has_gate:
            gate = gate_of(n, weights, spec)
            share = mask * gate
        shared = n
        if has_share:
            shared = n * share[:, None]
        g_mask = tl.zeros((spec.BLOCK,), tl.float32)
        g_d = tl.zeros((spec.BLOCK, spec.DP), tl.float32)
        g_m = tl.zeros((spec.BLOCK, spec.HP), tl.float32)
        if has_head:
            m = operand(shared, spec)
            if early:
                # then each part of a3 is used as it is computed, and takes no registers
                g_x = load_rows(cotangents.x, pairs.i, block.live, spec.D, spec.D, spec.DP)
                g_s = head_gradient(pairs, mask, g_x, mask, numbers, spec)
            if spec.STREAMED >= 1:
                w3 = load_weights(weights.w3, spec)
            z = product(m, tl.trans(w3), spec) + load_vector(weights.b3, spec)[None, :]
            a3, slope3 = activation_and_slope(z, numbers, spec)
            s = tl.sum(a3 * load_vector(weights.w_x, spec)[None, :], axis=1)
            if not early:
                g_x = load_rows(cotangents.x, pairs.i, block.live, spec.D, spec.D, spec.DP)
                g_s = head_gradient(pairs, s, g_x, mask, numbers, spec)
            if for_weights:
                vectors = add_vector(vectors, W_X, g_s, operand(a3, spec), spec)
            g_d, g_mask = shift_gradients(pairs, s, g_x, mask, numbers, spec)
            g_z3 = g_s[:, None] * load_vector(weights.w_x, spec)[None, :] * slope3
            g_z3 = operand(g_z3, spec)
            if for_weights:
                vectors = add_vector(vectors, B3, block.live.to(tl.float32), g_z3, spec)
                g_w3 = _add_matrix(g_w3, own + H * H, g_z3, m, w3_in_memory, spec)
            if spec.STREAMED >= 1:
                w3 = load_weights(weights.w3, spec)
            g_m = product(g_z3, w3, spec)
        if cotangents.m is not None:
            g_m = take_block_rows(cotangents.m, g_m, edges.order, block, spec)

        if has_gate or gradients.edge_mask is not None:
            along_m = tl.sum(g_m * n, axis=1)
        if gradients.edge_mask is not None:
            if has_gate:
                g_mask += along_m * gate
            else:
                g_mask += along_m
            tl.store(gradients.edge_mask + pairs.user, g_mask, mask=block.live)
        g_n = g_m
        if has_share:
            g_n *= share[:, None]
        if has_gate:
            g_gate = along_m * share * (1.0 - gate)
            g_n += g_gate[:, None] * load_vector(weights.w_g, spec)[None, :]
            if for_weights:
                vectors = add_vector(vectors, W_G, g_gate, operand(n, spec), spec)
                g_b_g += tl.sum(g_gate, axis=0)
        g_z2 = operand(g_n * slope_from_shared(slope2, 1, numbers, spec), spec)
        if for_weights:
            vectors = add_vector(vectors, B2, block.live.to(tl.float32), g_z2, spec)
            g_w2 = _add_matrix(g_w2, own, g_z2, a1, w2_in_memory, spec)
        if spec.STREAMED >= 2:
            w2 = load_weights(weights.w2, spec)
        g_z1 = product(g_z2, w2, spec) * slope_from_shared(slope1, 0, numbers, spec)
        if for_weights:
            vectors = add_first_weights(vectors, inputs, w_a, block, pairs, g_z1, spec)
        carry = first_gradients(problem, w_a, gradients, sums, block, pairs, g_z1, g_d, carry, spec)
        prefetch_block(problem, cotangents.m, begin_edge, end_edge, number + 1, end, spec)
        if for_weights and not spec.EXACT:  # noqa: SIM102
            if (block.begin + spec.BLOCK - begin_edge) % FLUSH == 0:
                at = sums_of_program(gradients, block.last, spec)
                if not w2_in_memory:
                    flush_matrix(at, g_w2, spec)
                    g_w2 = tl.zeros_like(g_w2)
                if has_head and not w3_in_memory:
                    flush_matrix(at + H * H, g_w3, spec)
                    g_w3 = tl.zeros_like(g_w3)
                flush_vectors(at + 2 * H * H, vectors, weights, spec)
                vectors = no_vectors(spec)

    finish_block_rows(sums, carry, spec)
    if for_weights:
        if not w2_in_memory:
            flush_matrix(own, g_w2, spec)
        if has_head and not w3_in_memory:
            flush_matrix(own + H * H, g_w3, spec)
        own += 2 * H * H
        flush_vectors(own, vectors, weights, spec)
        own += 5 * H + H * spec.A
        tl.store(own, tl.load(own) + g_b_g)


def launch_edge_backward(
    plan: Plan, problem: Problem, cotangents: Cotangents, gradients: Gradients, chunk: Chunk
) -> None:
    """Write or add to what Gradients has, for the edges of a chunk."""
    edge_backward[(chunk.programs,)](
        problem, cotangents, gradients, *chunk.arguments, plan.constants("edge_backward"),
        **plan.options,
    )  # fmt: skip
