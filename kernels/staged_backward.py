"""The edge pass for widths whose weights no multiprocessor holds, backward.

:mod:`egnn_fast.kernels.staged` says how. The stages forward come first, then these, with products
by w3 and w2 between them; the gradients of w2 and w3 are the BLAS's products of tiles.
"""

from __future__ import annotations

import triton
import triton.language as tl

from egnn_fast.kernels.device import (
    activation_and_slope,
    block_of_edges,
    first_linear,
    gate_of,
    geometry,
    load_matrix,
    load_rows,
    load_vector,
    mask_of,
    nodes_of,
    operand,
    run_of_blocks,
    store_rows,
    users_of,
)
from egnn_fast.kernels.gradients import (
    add_vector,
    first_gradients,
    flush_vectors,
    no_vectors,
)
from egnn_fast.kernels.head import head_gradient, shift_gradients
from egnn_fast.kernels.rows import finish_block_rows
from egnn_fast.kernels.staged import load_linear


@triton.jit
def _sums_of_program(gradients, spec):
    """Where this program's sums for the weights are: without w2's and w3's."""
    return gradients.weights + tl.program_id(0).to(tl.int64) * spec.K


@triton.jit(do_not_specialize=("begin_edge", "end_edge", "num_blocks"))
def staged_shifts_backward(
    edges, inputs, weights, numbers, cotangents, gradients, tile, g_d, g_mask,
    begin_edge, end_edge, num_blocks, spec,
):  # fmt: skip
    """From the product by w3 to the gradient of that layer's output, in its place.

    And, where not None, what the head gives to the gradients of d, ``g_d [chunk, D]``, and of the
    mask, ``g_mask [chunk]``.
    """
    begin, end = run_of_blocks(num_blocks)
    for_weights: tl.constexpr = gradients.weights is not None
    vectors = no_vectors(spec)
    for block in tl.range(begin, end, disable_licm=True):
        _, _, e, live, first, last = block_of_edges(edges, begin_edge, end_edge, block, spec)
        i, j = nodes_of(edges, e, live, first, last)
        d, r = geometry(inputs, i, j, live, spec)
        place = e - begin_edge
        z = load_linear(tile, place, live, weights.b3, spec)
        a3, slope3 = activation_and_slope(z, numbers, spec)
        s = tl.sum(a3 * load_vector(weights.w_x, spec)[None, :], axis=1)
        g_x = load_rows(cotangents.x, i, live, spec.D, spec.D, spec.DP)
        mask = mask_of(inputs, users_of(edges, e, live), live)
        g_s = head_gradient(d, r, s, g_x, mask, numbers, spec)
        g_shift, g_share = shift_gradients(d, r, s, g_x, mask, numbers, spec)
        g_z3 = g_s[:, None] * load_vector(weights.w_x, spec)[None, :] * slope3
        store_rows(tile, place, live, g_z3, spec.H, spec.H)
        if g_d is not None:
            store_rows(g_d, place, live, g_shift, spec.D, spec.D)
        if g_mask is not None:
            tl.store(g_mask + place, g_share, mask=live)
        if for_weights:
            vectors = add_vector(vectors, 3, g_s, operand(a3, spec), spec)
            vectors = add_vector(vectors, 2, live.to(tl.float32), operand(g_z3, spec), spec)
    if for_weights:
        flush_vectors(_sums_of_program(gradients, spec), vectors, weights, spec)


@triton.jit(do_not_specialize=("begin_edge", "end_edge", "num_blocks"))
def staged_messages_backward(
    edges, inputs, weights, numbers, cotangents, gradients, tile, g_messages, g_mask,
    begin_edge, end_edge, num_blocks, spec,
):  # fmt: skip
    """From the product by w2 to the gradient of that layer's output, in its place.

    ``g_messages``, a tile, and ``g_mask [chunk]`` are what the head gives to the gradients of the
    messages and of the mask; None without.
    """
    begin, end = run_of_blocks(num_blocks)
    has_gate: tl.constexpr = weights.w_g is not None
    for_weights: tl.constexpr = gradients.weights is not None
    vectors = no_vectors(spec)
    g_b_g = 0.0
    for block in tl.range(begin, end, disable_licm=True):
        _, _, e, live, first, last = block_of_edges(edges, begin_edge, end_edge, block, spec)
        place = e - begin_edge
        user = users_of(edges, e, live)
        z = load_linear(tile, place, live, weights.b2, spec)
        n, slope2 = activation_and_slope(z, numbers, spec)
        mask = mask_of(inputs, user, live)
        share = mask
        if has_gate:
            gate = gate_of(n, weights, spec)
            share = mask * gate
        g_m = tl.zeros((spec.BLOCK, spec.HP), tl.float32)
        if g_messages is not None:
            g_m += load_rows(g_messages, place, live, spec.H, spec.H, spec.HP)
        if cotangents.m is not None:
            i, _ = nodes_of(edges, e, live, first, last)
            g_m += load_rows(cotangents.m, i, live, spec.H, spec.H, spec.HP)
        if has_gate or gradients.edge_mask is not None:
            along_m = tl.sum(g_m * n, axis=1)
        if gradients.edge_mask is not None:
            g_share = along_m
            if has_gate:
                g_share *= gate
            if g_mask is not None:
                g_share += tl.load(g_mask + place, mask=live, other=0.0)
            tl.store(gradients.edge_mask + user, g_share, mask=live)
        g_n = share[:, None] * g_m
        if has_gate:
            g_gate = along_m * share * (1.0 - gate)
            g_n += g_gate[:, None] * load_vector(weights.w_g, spec)[None, :]
            if for_weights:
                vectors = add_vector(vectors, 4, g_gate, operand(n, spec), spec)
                g_b_g += tl.sum(g_gate, axis=0)
        g_z2 = g_n * slope2
        store_rows(tile, place, live, g_z2, spec.H, spec.H)
        if for_weights:
            vectors = add_vector(vectors, 1, live.to(tl.float32), operand(g_z2, spec), spec)
    if for_weights:
        own = _sums_of_program(gradients, spec)
        flush_vectors(own, vectors, weights, spec)
        own += 5 * spec.H + spec.H * spec.A
        tl.store(own, tl.load(own) + g_b_g)


@triton.jit(do_not_specialize=("begin_edge", "end_edge", "num_blocks"))
def staged_first_backward(
    edges, inputs, weights, numbers, gradients, tile, added, g_d,
    begin_edge, end_edge, num_blocks, spec,
):  # fmt: skip
    """From the gradient of the first layer's activations to those of all inputs.

    ``g_d [chunk, D]`` is what the head gives to the gradient of d, None without. With ``added``
    (see staged_first) the gradient of the first linear layer's output takes the place of the other.
    """
    begin, end = run_of_blocks(num_blocks)
    head_row = tl.load(edges.block_rows + 2 * begin)
    H: tl.constexpr = spec.H
    w_a = None
    if weights.w_a is not None:
        w_a = load_matrix(weights.w_a, spec.H, spec.A, spec.HP, spec.AP)
    vectors = no_vectors(spec)
    carry_row = tl.full((), -1, tl.int32)
    carry_p = tl.zeros((spec.HP,), tl.float32)
    carry_x = tl.zeros((spec.DP,), tl.float32)
    last = head_row
    for block in tl.range(begin, end, disable_licm=True):
        start, stop, e, live, first, last = block_of_edges(edges, begin_edge, end_edge, block, spec)
        i, j = nodes_of(edges, e, live, first, last)
        user = users_of(edges, e, live)
        d, r = geometry(inputs, i, j, live, spec)
        z = first_linear(inputs, weights, w_a, user, live, i, j, r, spec)
        if added is not None:
            z += load_rows(added, e - begin_edge, live, H, H, spec.HP)
        _, slope1 = activation_and_slope(z, numbers, spec)
        g_z1 = load_rows(tile, e - begin_edge, live, H, H, spec.HP) * slope1
        if added is not None:
            store_rows(tile, e - begin_edge, live, g_z1, H, H)
        g_shift = tl.zeros((spec.BLOCK, spec.DP), tl.float32)
        if g_d is not None:
            g_shift += load_rows(g_d, e - begin_edge, live, spec.D, spec.D, spec.DP)
        vectors, carry_p, carry_x = first_gradients(
            edges, inputs, weights, w_a, gradients, begin_edge, start, stop, e, live, i, user,
            first, last, d, r, g_z1, g_shift, vectors, carry_p, carry_x, carry_row, head_row, spec,
        )  # fmt: skip
        carry_row = last
    if gradients.p is not None:
        finish_block_rows(gradients.p, H, carry_p, last, head_row)
    if gradients.receiver is not None:
        finish_block_rows(gradients.receiver, spec.D, carry_x, last, head_row)
    if gradients.weights is not None:
        flush_vectors(_sums_of_program(gradients, spec), vectors, weights, spec)
