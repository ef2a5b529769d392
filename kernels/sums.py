"""What follows the kernels over edges: sums that more than one program has a part in."""

from __future__ import annotations

import triton
import triton.language as tl

from egnn_fast.kernels.device import add_block_rows, finish_block_rows, load_rows, run_of_blocks

_TILE = tl.constexpr(16)


@triton.jit
def _finish(rows, slot_rows, slot, num_slots, row, stride, width, W: tl.constexpr):
    columns = tl.arange(0, W)
    inside = columns < width
    place = rows.out + row.to(tl.int64) * stride + columns
    total = tl.load(place, mask=inside, other=0.0)
    begin = slot
    more = slot >= 0
    while more:
        slots = begin + tl.arange(0, _TILE)
        mine = tl.load(slot_rows + slots, mask=slots < num_slots, other=-1) == row
        part = rows.slots + slots.to(tl.int64)[:, None] * width + columns[None, :]
        total += tl.sum(tl.load(part, mask=mine[:, None] & inside[None, :], other=0.0), axis=0)
        more = tl.min(mine.to(tl.int32), axis=0) > 0
        begin += _TILE
    tl.store(place, total, mask=inside)


@triton.jit(do_not_specialize=("num_slots",))
def finish_rows(
    slot_rows, num_slots, a, a_stride, a_width, b, b_stride, b_width,
    A: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Add the programs' first and last rows to the rows that they belong to, of one or two sums.

    ``slot_rows [slots]`` ascends. The program of a row's first slot adds them all, in order.
    """
    slot = tl.program_id(0)
    row = tl.load(slot_rows + slot)
    before = tl.load(slot_rows + slot - 1, mask=slot > 0, other=-1)
    if before != row:
        if a is not None:
            _finish(a, slot_rows, slot, num_slots, row, a_stride, a_width, A)
        if b is not None:
            _finish(b, slot_rows, slot, num_slots, row, b_stride, b_width, B)


@triton.jit
def _sum_rows(
    values, rows, place, live, key, first, last, carry, carry_row, head_row, stride,
    width: tl.constexpr, W: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    found = load_rows(values, place, live, width, width, W)
    return add_block_rows(
        rows, stride, width, found, key, first, last, carry, carry_row, head_row, None,
        tl.float32, EXACT, True,
    )  # fmt: skip


@triton.jit(do_not_specialize=("num_edges", "num_blocks"))
def sender_sums(
    order, keys, block_rows, num_edges, num_blocks, messages, q_rows, q_stride, shifts, x_rows,
    H: tl.constexpr, D: tl.constexpr, HP: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """Add ``messages [E, H]`` and ``shifts [E, D]`` to their senders' rows, in the order of edges.

    ``order`` sorts the edges by sender, ``keys`` are the senders so sorted; ``block_rows`` holds
    those of each block's first and last edge.
    """
    begin, end = run_of_blocks(num_blocks)
    head_row = tl.load(block_rows + 2 * begin)
    carry_row = tl.full((), -1, tl.int32)
    carry_q = tl.zeros((HP,), tl.float32)
    carry_x = tl.zeros((DP,), tl.float32)
    last = head_row
    for block in range(begin, end):
        e = block * BLOCK + tl.arange(0, BLOCK)
        live = e < num_edges
        place = tl.load(order + e, mask=live, other=0)
        key = tl.load(keys + e, mask=live, other=-1)
        first = tl.load(block_rows + 2 * block)
        last = tl.load(block_rows + 2 * block + 1)
        if messages is not None:
            carry_q = _sum_rows(
                messages, q_rows, place, live, key, first, last, carry_q, carry_row, head_row,
                q_stride, H, HP, EXACT,
            )  # fmt: skip
        if shifts is not None:
            carry_x = _sum_rows(
                shifts, x_rows, place, live, key, first, last, carry_x, carry_row, head_row, D, D,
                DP, EXACT,
            )  # fmt: skip
        carry_row = last
    if messages is not None:
        finish_block_rows(q_rows, H, carry_q, last, head_row)
    if shifts is not None:
        finish_block_rows(x_rows, D, carry_x, last, head_row)
