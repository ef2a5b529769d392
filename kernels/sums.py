"""What follows the kernels over edges: sums that more than one program has a part in."""

from __future__ import annotations

import triton
import triton.language as tl

from egnn_fast.kernels.device import load_rows, run_of_blocks
from egnn_fast.kernels.rows import add_block_rows, finish_block_rows

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


@triton.jit(do_not_specialize=("num_slots", "a_stride", "a_width", "b_stride", "b_width"))
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


@triton.jit(do_not_specialize=("num_edges", "num_blocks"))
def sender_sums(
    places, order, block_rows, num_edges, num_blocks, messages, q_rows, q_stride, shifts, x_rows,
    H: tl.constexpr, D: tl.constexpr, HP: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr,
    PART: tl.constexpr,
):  # fmt: skip
    """Add ``messages [E, H]`` and ``shifts [E, D]`` to their senders' rows, in the order of edges.

    ``places`` sorts the edges by sender, ``order`` holds the senders so sorted,
    ``block_rows`` those of each block's first and last edge.
    """
    begin, end = run_of_blocks(num_blocks)
    head_row = tl.load(block_rows + 2 * begin)
    carry_row = tl.full((), -1, tl.int32)
    carry_q = tl.zeros((HP,), tl.float32)
    carry_x = tl.zeros((DP,), tl.float32)
    last = head_row
    for block in range(begin, end):
        start = block * BLOCK
        stop = tl.minimum(start + BLOCK, num_edges)
        e = start + tl.arange(0, BLOCK)
        live = e < stop
        place = tl.load(places + e, mask=live, other=0)
        first = tl.load(block_rows + 2 * block)
        last = tl.load(block_rows + 2 * block + 1)
        message, shift = None, None
        if messages is not None:
            message = load_rows(messages, place, live, H, H, HP)
        if shifts is not None:
            shift = load_rows(shifts, place, live, D, D, DP)
        carry_q, carry_x = add_block_rows(
            q_rows, q_stride, H, message, carry_q, None, x_rows, D, shift, carry_x, None,
            order, start, stop, first, last, carry_row, head_row, tl.float32, PART, True,
        )  # fmt: skip
        carry_row = last
    if messages is not None:
        finish_block_rows(q_rows, H, carry_q, last, head_row)
    if shifts is not None:
        finish_block_rows(x_rows, D, carry_x, last, head_row)
