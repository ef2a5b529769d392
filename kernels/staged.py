"""The edge pass for widths whose weights no multiprocessor holds, forward.

A chunk of edges at a time goes through these stages; between them stand the products by w2 and w3,
which the BLAS computes. A ``tile`` is a matrix ``[chunk, H]`` in the operands' type; its first row
is that of edge ``begin_edge``.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from egnn_fast.kernels.device import (
    activation,
    gate_of,
    load_matrix,
    load_rows,
    load_vector,
    not_finite,
    run_of_blocks,
    store_rows,
)
from egnn_fast.kernels.edges import (
    block_of_edges,
    first_linear,
    mask_of,
    pairs_of,
    positions_of,
    users_of,
)
from egnn_fast.kernels.head import shift_of
from egnn_fast.kernels.records import Chunk, Plan, Problem, Rows
from egnn_fast.kernels.rows import Carry, EdgeValues, Sums, add_block_rows, finish_block_rows


@triton.jit
def load_linear(tile, block, bias, spec):
    """A linear layer's output ``[BLOCK, HP]``: its product, a tile, and its bias."""
    z = load_rows(tile, positions_of(block), block.live, spec.H, spec.H, spec.HP)
    return z + load_vector(bias, spec)[None, :]


@triton.jit(do_not_specialize=("begin_edge", "end_edge", "num_blocks"))
def staged_first(problem, tile, added, begin_edge, end_edge, num_blocks, spec):
    """Write act(z1).

    ``added``, a tile, is the product W_a a where the edge attributes are many, else None.
    """
    edges, inputs, weights = problem.edges, problem.inputs, problem.weights
    begin, end = run_of_blocks(num_blocks)
    w_a = None
    if weights.w_a is not None:
        w_a = load_matrix(weights.w_a, spec.H, spec.A, spec.HP, spec.AP)
    for number in tl.range(begin, end, disable_licm=True):
        block = block_of_edges(edges, begin_edge, end_edge, number, spec)
        pairs = pairs_of(edges, inputs, block, spec)
        z = first_linear(problem, w_a, block, pairs, spec)
        if added is not None:
            z += load_rows(added, positions_of(block), block.live, spec.H, spec.H, spec.HP)
        a1 = activation(z, problem.numbers, spec)
        store_rows(tile, positions_of(block), block.live, a1, spec.H, spec.H)


def launch_staged_first(plan: Plan, problem: Problem, tile: Any, added: Any, chunk: Chunk) -> None:
    """Write act(z1) of a chunk."""
    staged_first[(chunk.programs,)](
        problem, tile, added, *chunk.arguments, plan.constants("staged_first"), **plan.options
    )


@triton.jit(do_not_specialize=("begin_edge", "end_edge", "num_blocks"))
def staged_messages(problem, tile, messages, rows, begin_edge, end_edge, num_blocks, spec):
    """From the product by w2 to the messages m, and to their sums M.

    ``messages`` is a tile for the one, ``rows`` are Rows for the other; either may be None.
    """
    edges, inputs = problem.edges, problem.inputs
    weights, numbers = problem.weights, problem.numbers
    begin, end = run_of_blocks(num_blocks)
    head_row = tl.load(edges.block_rows + 2 * begin)
    sums = Sums(rows, None, head_row)
    carry = Carry(tl.full((), -1, tl.int32), tl.zeros((spec.HP,), tl.float32), 0, head_row)
    for number in tl.range(begin, end, disable_licm=True):
        block = block_of_edges(edges, begin_edge, end_edge, number, spec)
        m = activation(load_linear(tile, block, weights.b2, spec), numbers, spec)
        if weights.w_g is not None:
            m *= gate_of(m, weights, spec)[:, None]
        m *= mask_of(inputs, users_of(edges, block), block.live)[:, None]
        if messages is not None:
            store_rows(messages, positions_of(block), block.live, m, spec.H, spec.H)
        if rows is not None:
            broken = not_finite(tl.sum(m.to(spec.OPERAND).to(tl.float32), axis=1))
            values = EdgeValues(m, None, broken, None)
            carry = add_block_rows(sums, values, carry, block, edges.order, spec.H, False, spec)
    finish_block_rows(sums, carry, spec)


def launch_staged_messages(
    plan: Plan, problem: Problem, tile: Any, messages: Any, rows: Rows | None, chunk: Chunk
) -> None:
    """Write the messages of a chunk, their sums, or both."""
    staged_messages[(chunk.programs,)](
        problem, tile, messages, rows, *chunk.arguments, plan.constants("staged_messages"),
        **plan.options,
    )  # fmt: skip


@triton.jit(do_not_specialize=("begin_edge", "end_edge", "num_blocks"))
def staged_shifts(problem, tile, rows, begin_edge, end_edge, num_blocks, spec):
    """From the product by w3 to the sums X: ``rows``, Rows."""
    edges, inputs = problem.edges, problem.inputs
    weights, numbers = problem.weights, problem.numbers
    begin, end = run_of_blocks(num_blocks)
    head_row = tl.load(edges.block_rows + 2 * begin)
    sums = Sums(None, rows, head_row)
    carry = Carry(tl.full((), -1, tl.int32), 0, tl.zeros((spec.DP,), tl.float32), head_row)
    for number in tl.range(begin, end, disable_licm=True):
        block = block_of_edges(edges, begin_edge, end_edge, number, spec)
        pairs = pairs_of(edges, inputs, block, spec)
        a3 = activation(load_linear(tile, block, weights.b3, spec), numbers, spec)
        s = tl.sum(a3 * load_vector(weights.w_x, spec)[None, :], axis=1)
        mask = mask_of(inputs, pairs.user, block.live)
        t = shift_of(pairs, s, numbers, spec) * mask[:, None]
        values = EdgeValues(None, t, None, not_finite(tl.sum(t, axis=1)))
        carry = add_block_rows(sums, values, carry, block, edges.order, 1, False, spec)
    finish_block_rows(sums, carry, spec)


def launch_staged_shifts(plan: Plan, problem: Problem, tile: Any, rows: Rows, chunk: Chunk) -> None:
    """Write the sums X of a chunk."""
    staged_shifts[(chunk.programs,)](
        problem, tile, rows, *chunk.arguments, plan.constants("staged_shifts"), **plan.options
    )
