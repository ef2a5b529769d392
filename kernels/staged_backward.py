"""The edge pass for widths whose weights no multiprocessor holds, backward.

See :mod:`egnn_fast.kernels.staged`. The stages forward come first, then these, with products by w3
and w2 between them; the BLAS computes the gradients of w2 and w3 as products of tiles.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from egnn_fast.kernels.device import (
    activation_and_slope,
    gate_of,
    load_matrix,
    load_rows,
    load_vector,
    operand,
    run_of_blocks,
    store_rows,
)
from egnn_fast.kernels.edges import (
    block_of_edges,
    first_linear,
    mask_of,
    nodes_of,
    pairs_of,
    positions_of,
    users_of,
)
from egnn_fast.kernels.gradients import (
    B2,
    B3,
    W_G,
    W_X,
    Cotangents,
    Gradients,
    add_first_weights,
    add_vector,
    first_gradients,
    flush_vectors,
    no_vectors,
)
from egnn_fast.kernels.head import head_gradient, shift_gradients
from egnn_fast.kernels.records import Chunk, Plan, Problem
from egnn_fast.kernels.rows import Sums, finish_block_rows, no_carry
from egnn_fast.kernels.staged import load_linear


@triton.jit
def _sums_of_program(gradients, spec):
    """The address of this program's sums for the weights, which are without w2 and w3."""
    return gradients.weights + tl.program_id(0).to(tl.int64) * spec.K


@triton.jit(do_not_specialize=("begin_edge", "end_edge", "num_blocks"))
def staged_shifts_backward(
    problem, cotangents, gradients, tile, g_d, g_mask, begin_edge, end_edge, num_blocks, spec
):
    """In ``tile``, replace the product by w3 by the gradient of z3.

    And write, where not None, the head's parts of the gradients of d, ``g_d [chunk, D]``, and of
    the mask, ``g_mask [chunk]``.
    """
    edges, inputs = problem.edges, problem.inputs
    weights, numbers = problem.weights, problem.numbers
    begin, end = run_of_blocks(num_blocks)
    for_weights: tl.constexpr = gradients.weights is not None
    vectors = no_vectors(spec)
    for number in tl.range(begin, end, disable_licm=True):
        block = block_of_edges(edges, begin_edge, end_edge, number, spec)
        pairs = pairs_of(edges, inputs, block, spec)
        z = load_linear(tile, block, weights.b3, spec)
        a3, slope3 = activation_and_slope(z, numbers, spec)
        s = tl.sum(a3 * load_vector(weights.w_x, spec)[None, :], axis=1)
        g_x = load_rows(cotangents.x, pairs.i, block.live, spec.D, spec.D, spec.DP)
        mask = mask_of(inputs, pairs.user, block.live)
        g_s = head_gradient(pairs, s, g_x, mask, numbers, spec)
        g_shift, g_share = shift_gradients(pairs, s, g_x, mask, numbers, spec)
        g_z3 = g_s[:, None] * load_vector(weights.w_x, spec)[None, :] * slope3
        store_rows(tile, positions_of(block), block.live, g_z3, spec.H, spec.H)
        if g_d is not None:
            store_rows(g_d, positions_of(block), block.live, g_shift, spec.D, spec.D)
        if g_mask is not None:
            tl.store(g_mask + positions_of(block), g_share, mask=block.live)
        if for_weights:
            vectors = add_vector(vectors, W_X, g_s, operand(a3, spec), spec)
            vectors = add_vector(vectors, B3, block.live.to(tl.float32), operand(g_z3, spec), spec)
    if for_weights:
        flush_vectors(_sums_of_program(gradients, spec), vectors, weights, spec)


def launch_staged_shifts_backward(
    plan: Plan, problem: Problem, cotangents: Cotangents, gradients: Gradients,
    tile: Any, g_d: Any, g_mask: Any, chunk: Chunk,
) -> None:  # fmt: skip
    """Back through the coordinate head, for a chunk."""
    staged_shifts_backward[(chunk.programs,)](
        problem, cotangents, gradients, tile, g_d, g_mask, *chunk.arguments,
        plan.constants("staged_shifts_backward"), **plan.options,
    )  # fmt: skip


@triton.jit(do_not_specialize=("begin_edge", "end_edge", "num_blocks"))
def staged_messages_backward(
    problem, cotangents, gradients, tile, g_messages, g_mask, begin_edge, end_edge, num_blocks, spec
):
    """In ``tile``, replace the product by w2 by the gradient of z2.

    ``g_messages``, a tile, and ``g_mask [chunk]`` are the head's parts of the gradients of the
    messages and of the mask; None without.
    """
    edges, inputs = problem.edges, problem.inputs
    weights, numbers = problem.weights, problem.numbers
    begin, end = run_of_blocks(num_blocks)
    has_gate: tl.constexpr = weights.w_g is not None
    for_weights: tl.constexpr = gradients.weights is not None
    vectors = no_vectors(spec)
    g_b_g = 0.0
    for number in tl.range(begin, end, disable_licm=True):
        block = block_of_edges(edges, begin_edge, end_edge, number, spec)
        user = users_of(edges, block)
        z = load_linear(tile, block, weights.b2, spec)
        n, slope2 = activation_and_slope(z, numbers, spec)
        mask = mask_of(inputs, user, block.live)
        share = mask
        if has_gate:
            gate = gate_of(n, weights, spec)
            share = mask * gate
        g_m = tl.zeros((spec.BLOCK, spec.HP), tl.float32)
        if g_messages is not None:
            g_m += load_rows(g_messages, positions_of(block), block.live, spec.H, spec.H, spec.HP)
        if cotangents.m is not None:
            i, _ = nodes_of(edges, block)
            g_m += load_rows(cotangents.m, i, block.live, spec.H, spec.H, spec.HP)
        if has_gate or gradients.edge_mask is not None:
            along_m = tl.sum(g_m * n, axis=1)
        if gradients.edge_mask is not None:
            g_share = along_m
            if has_gate:
                g_share *= gate
            if g_mask is not None:
                g_share += tl.load(g_mask + positions_of(block), mask=block.live, other=0.0)
            tl.store(gradients.edge_mask + user, g_share, mask=block.live)
        g_n = share[:, None] * g_m
        if has_gate:
            g_gate = along_m * share * (1.0 - gate)
            g_n += g_gate[:, None] * load_vector(weights.w_g, spec)[None, :]
            if for_weights:
                vectors = add_vector(vectors, W_G, g_gate, operand(n, spec), spec)
                g_b_g += tl.sum(g_gate, axis=0)
        g_z2 = g_n * slope2
        store_rows(tile, positions_of(block), block.live, g_z2, spec.H, spec.H)
        if for_weights:
            vectors = add_vector(vectors, B2, block.live.to(tl.float32), operand(g_z2, spec), spec)
    if for_weights:
        own = _sums_of_program(gradients, spec)
        flush_vectors(own, vectors, weights, spec)
        own += 5 * spec.H + spec.H * spec.A
        tl.store(own, tl.load(own) + g_b_g)


def launch_staged_messages_backward(
    plan: Plan, problem: Problem, cotangents: Cotangents, gradients: Gradients,
    tile: Any, g_messages: Any, g_mask: Any, chunk: Chunk,
) -> None:  # fmt: skip
    """Back through the messages, for a chunk."""
    staged_messages_backward[(chunk.programs,)](
        problem, cotangents, gradients, tile, g_messages, g_mask, *chunk.arguments,
        plan.constants("staged_messages_backward"), **plan.options,
    )  # fmt: skip


@triton.jit(do_not_specialize=("begin_edge", "end_edge", "num_blocks"))
def staged_first_backward(
    problem, gradients, tile, added, g_d, begin_edge, end_edge, num_blocks, spec
):
    """From the gradient of act(z1), a tile, to those of all inputs.

    ``g_d [chunk, D]`` is the head's part of the gradient of d, None without. With ``added`` (see
    staged_first) the gradient of z1 replaces that of act(z1).
    """
    edges, inputs = problem.edges, problem.inputs
    weights, numbers = problem.weights, problem.numbers
    begin, end = run_of_blocks(num_blocks)
    head_row = tl.load(edges.block_rows + 2 * begin)
    H: tl.constexpr = spec.H
    sums = Sums(gradients.p, gradients.receiver, head_row)
    w_a = None
    if weights.w_a is not None:
        w_a = load_matrix(weights.w_a, spec.H, spec.A, spec.HP, spec.AP)
    vectors = no_vectors(spec)
    carry = no_carry(head_row, spec)
    for number in tl.range(begin, end, disable_licm=True):
        block = block_of_edges(edges, begin_edge, end_edge, number, spec)
        pairs = pairs_of(edges, inputs, block, spec)
        z = first_linear(problem, w_a, block, pairs, spec)
        if added is not None:
            z += load_rows(added, positions_of(block), block.live, H, H, spec.HP)
        _, slope1 = activation_and_slope(z, numbers, spec)
        g_z1 = load_rows(tile, positions_of(block), block.live, H, H, spec.HP) * slope1
        if added is not None:
            store_rows(tile, positions_of(block), block.live, g_z1, H, H)
        g_shift = tl.zeros((spec.BLOCK, spec.DP), tl.float32)
        if g_d is not None:
            g_shift += load_rows(g_d, positions_of(block), block.live, spec.D, spec.D, spec.DP)
        if gradients.weights is not None:
            vectors = add_first_weights(vectors, inputs, w_a, block, pairs, g_z1, spec)
        carry = first_gradients(
            problem, w_a, gradients, sums, block, pairs, g_z1, g_shift, carry, spec
        )
    finish_block_rows(sums, carry, spec)
    if gradients.weights is not None:
        flush_vectors(_sums_of_program(gradients, spec), vectors, weights, spec)


def launch_staged_first_backward(
    plan: Plan, problem: Problem, gradients: Gradients, tile: Any, added: Any, g_d: Any,
    chunk: Chunk,
) -> None:  # fmt: skip
    """Back through z1, for a chunk."""
    staged_first_backward[(chunk.programs,)](
        problem, gradients, tile, added, g_d, *chunk.arguments,
        plan.constants("staged_first_backward"), **plan.options,
    )  # fmt: skip
