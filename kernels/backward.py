"""The edge pass backward: one kernel that runs each block forward again, then back."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from egnn_fast.kernels.device import (
    activation_and_slope,
    add_rows_at,
    block_of_edges,
    first_linear,
    inverse_norm,
    load_matrix,
    load_rows,
    load_vector,
    load_weights,
    mask_of,
    product,
    run_of_blocks,
    senders_of,
    sigmoid,
    store_rows,
    tanh,
)
from egnn_fast.kernels.rows import add_block_rows, finish_block_rows


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


# columns of the tile in which the gradients of VECTORS are summed
_COLUMNS = tl.constexpr(16)


@triton.jit
def _add_to(place, total, inside):
    """Add a tile to what this program alone writes to."""
    if inside is None:
        tl.store(place, tl.load(place) + total)
    else:
        tl.store(place, tl.load(place, mask=inside, other=0.0) + total, mask=inside)


@triton.jit
def _store_matrix(place, total, rows: tl.constexpr, columns: tl.constexpr):
    """Add a tile to a row-major matrix."""
    r = tl.arange(0, total.shape[0])
    c = tl.arange(0, total.shape[1])
    at = place + r[:, None] * columns + c[None, :]
    if rows == total.shape[0] and columns == total.shape[1]:
        _add_to(at, total, None)
    else:
        _add_to(at, total, (r < rows)[:, None] & (c < columns)[None, :])


@triton.jit
def _add_vector(total, column: tl.constexpr, factor, values, spec):
    """Add the sum over edges of ``factor * values`` to a column of the tile.

    The values are laid out as in the products for the weights' matrices.
    """
    here = tl.arange(0, _COLUMNS)[None, :] == column
    right = tl.where(here, factor[:, None], 0.0).to(spec.OPERAND)
    return tl.dot(tl.trans(values.to(spec.OPERAND)), right, total, input_precision=spec.DOT)


@triton.jit
def _add_matrix(total, place, left, right, spec):
    """Add the sum over edges of their outer products: in registers, or at ``place``."""
    left, right = tl.trans(left.to(spec.OPERAND)), right.to(spec.OPERAND)
    if spec.SPILL_WEIGHTS:
        found = tl.dot(left, right, input_precision=spec.DOT)
        _store_matrix(place, found, spec.H, spec.H)
        tl.debug_barrier()
        return total
    else:
        return tl.dot(left, right, total, input_precision=spec.DOT)


@triton.jit(do_not_specialize=("begin_edge", "end_edge", "num_blocks"))
def edge_backward(
    edges, inputs, weights, numbers, cotangents, gradients, begin_edge, end_edge, num_blocks, spec
):
    """The gradients of a run of edges.

    The coordinate head is left out where X has no cotangent: ``weights.w3`` is None then.
    """
    begin, end = run_of_blocks(num_blocks)
    head_row = tl.load(edges.block_rows + 2 * begin)
    H: tl.constexpr = spec.H
    has_head: tl.constexpr = weights.w3 is not None
    has_gate: tl.constexpr = weights.w_g is not None
    has_attr: tl.constexpr = weights.w_a is not None
    for_weights: tl.constexpr = gradients.weights is not None
    for_x: tl.constexpr = gradients.receiver is not None

    if not spec.STREAM:
        w2 = load_weights(weights.w2, spec)
        if has_head:
            w3 = load_weights(weights.w3, spec)
    w_a = None
    if has_attr:
        w_a = load_matrix(weights.w_a, H, spec.A, spec.HP, spec.AP)
    if has_gate:
        b_g = tl.load(weights.b_g).to(tl.float32)
    if for_weights:
        own = gradients.weights + tl.program_id(0).to(tl.int64) * spec.K
        vectors = tl.zeros((spec.HP, _COLUMNS), tl.float32)
        g_w2 = tl.zeros((1, 1) if spec.SPILL_WEIGHTS else (spec.HP, spec.HP), tl.float32)
        g_w3 = tl.zeros((1, 1) if spec.SPILL_WEIGHTS else (spec.HP, spec.HP), tl.float32)
        if has_attr:
            g_w_a = tl.zeros((spec.HP, spec.AP), tl.float32)
        g_b_g = 0.0

    carry_row = tl.full((), -1, tl.int32)
    carry_p = tl.zeros((spec.HP,), tl.float32)
    carry_x = tl.zeros((spec.DP,), tl.float32)
    last = head_row
    for block in tl.range(begin, end, disable_licm=True):
        start, stop, e, live, i, j, first, last = block_of_edges(
            edges, begin_edge, end_edge, block, spec
        )
        user, d, r, z = first_linear(edges, inputs, weights, w_a, e, live, i, j, spec)
        mask = mask_of(inputs, user, live)

        a1, slope1 = activation_and_slope(z, numbers, spec)
        # what waits for its use does so in the operands' type
        a1, slope1 = a1.to(spec.OPERAND), slope1.to(spec.OPERAND)
        if spec.STREAM:
            w2 = load_weights(weights.w2, spec)
        z = product(a1, tl.trans(w2), spec) + load_vector(weights.b2, spec)[None, :]
        n, slope2 = activation_and_slope(z, numbers, spec)
        share = mask
        if has_gate:
            gate = sigmoid(tl.sum(n * load_vector(weights.w_g, spec)[None, :], axis=1) + b_g)
            share = mask * gate
        g_mask = tl.zeros((spec.BLOCK,), tl.float32)
        g_d = tl.zeros((spec.BLOCK, spec.DP), tl.float32)

        g_m = tl.zeros((spec.BLOCK, spec.HP), tl.float32)
        if has_head:
            m = (n * share[:, None]).to(spec.OPERAND)
            if spec.STREAM:
                w3 = load_weights(weights.w3, spec)
            z = product(m, tl.trans(w3), spec) + load_vector(weights.b3, spec)[None, :]
            a3, slope3 = activation_and_slope(z, numbers, spec)
            s = tl.sum(a3 * load_vector(weights.w_x, spec)[None, :], axis=1)
            if spec.TANH:
                s = tanh(s)
            u = d
            if spec.NORM != 0:
                inverse, norm = inverse_norm(r, numbers, spec)
                u = d * inverse[:, None]
            g_x = load_rows(cotangents.x, i, live, spec.D, spec.D, spec.DP)
            t = u * s[:, None]
            if spec.CLAMP:
                inside = tl.abs(t) <= numbers.clamp
                t = tl.clamp(t, -numbers.clamp, numbers.clamp, tl.PropagateNan.ALL)
                g_mask += tl.sum(t * g_x, axis=1)
                g_x = tl.where(inside, g_x, 0.0)
            else:
                g_mask += tl.sum(t * g_x, axis=1)
            g_x *= mask[:, None]
            g_s = tl.sum(g_x * u, axis=1)
            if spec.TANH:
                g_s *= 1.0 - s * s
            # the gradient of u, then of d by it
            g_d = g_x * s[:, None]
            if spec.NORM == 2:
                along = tl.sum(d * g_d, axis=1) * inverse * inverse
                along = tl.where(norm > 0, tl.div_rn(along, tl.where(norm > 0, norm, 1.0)), 0.0)
                g_d = g_d * inverse[:, None] - d * along[:, None]
            elif spec.NORM == 1:
                g_d *= inverse[:, None]
            g_z3 = g_s[:, None] * load_vector(weights.w_x, spec)[None, :] * slope3
            g_z3 = g_z3.to(spec.OPERAND)
            if for_weights:
                vectors = _add_vector(vectors, 3, g_s, a3, spec)
                vectors = _add_vector(vectors, 2, live.to(tl.float32), g_z3, spec)
                g_w3 = _add_matrix(g_w3, own + H * H, g_z3, m, spec)
            if spec.STREAM:
                w3 = load_weights(weights.w3, spec)
            g_m = product(g_z3, w3, spec)
        if cotangents.m is not None:
            g_m += load_rows(cotangents.m, i, live, H, H, spec.HP)

        if has_gate or gradients.edge_mask is not None:
            along_m = tl.sum(g_m * n, axis=1)
        if gradients.edge_mask is not None:
            if has_gate:
                g_mask += along_m * gate
            else:
                g_mask += along_m
            tl.store(gradients.edge_mask + user, g_mask, mask=live)
        g_n = share[:, None] * g_m
        if has_gate:
            g_gate = along_m * share * (1.0 - gate)
            g_n += g_gate[:, None] * load_vector(weights.w_g, spec)[None, :]
            if for_weights:
                vectors = _add_vector(vectors, 4, g_gate, n, spec)
                g_b_g += tl.sum(g_gate, axis=0)
        g_z2 = (g_n * slope2).to(spec.OPERAND)
        if for_weights:
            vectors = _add_vector(vectors, 1, live.to(tl.float32), g_z2, spec)
            g_w2 = _add_matrix(g_w2, own, g_z2, a1, spec)
        if spec.STREAM:
            w2 = load_weights(weights.w2, spec)
        g_z1 = product(g_z2, w2, spec) * slope1
        if for_weights:
            vectors = _add_vector(vectors, 0, r, g_z1, spec)
        if has_attr:
            if for_weights:
                a = load_rows(inputs.edge_attr, user, live, spec.A, spec.A, spec.AP)
                g_w_a += product(tl.trans(g_z1), a, spec)
            if gradients.edge_attr is not None:
                store_rows(
                    gradients.edge_attr, user, live, product(g_z1, w_a, spec), spec.A, spec.A
                )
        if for_x:
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
        elif for_x:
            add_rows_at(gradients.sender, j, live, g_d, spec.D, spec.D)
        carry_row = last

    if gradients.p is not None:
        finish_block_rows(gradients.p, H, carry_p, last, head_row)
    if for_x:
        finish_block_rows(gradients.receiver, spec.D, carry_x, last, head_row)
    if for_weights:
        if not spec.SPILL_WEIGHTS:
            _store_matrix(own, g_w2, H, H)
            if has_head:
                _store_matrix(own + H * H, g_w3, H, H)
        own += 2 * H * H
        row = tl.arange(0, spec.HP)[:, None]
        column = tl.arange(0, _COLUMNS)[None, :]
        _add_to(own + column * H + row, vectors, (row < H) & (column < 5))
        own += 5 * H
        if has_attr:
            _store_matrix(own, g_w_a, H, spec.A)
        own += H * spec.A
        tl.store(own, tl.load(own) + g_b_g)
