"""What follows the kernels over edges: sums to which more than one program contributes."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from egnn_fast.kernels.blocks import sender_block, sender_options
from egnn_fast.kernels.device import load_rows, run_of_blocks
from egnn_fast.kernels.edges import EdgeBlock
from egnn_fast.kernels.records import Chunk, Order, Plan, Rows
from egnn_fast.kernels.rows import EdgeValues, Sums, add_block_rows, finish_block_rows, no_carry

_TILE = tl.constexpr(16)


class SenderEdges(NamedTuple):
    """The edges of a chunk in the order of their senders.

    Attributes
    ----------
    positions : [edges], int32
        Their positions in the chunk.
    keys : [edges], int32
        Their senders, ascending.
    block_rows : [blocks, 2], int32
        Senders of each block's first and last edge.
    """

    positions: Any
    keys: Any
    block_rows: Any


@triton.jit
def _finish(rows, slot_rows, slot, num_slots, row, stride, width, W: tl.constexpr):
    """Add to ``row`` of Rows its slots, which begin with ``slot``."""
    columns = tl.arange(0, W)
    inside = columns < width
    address = rows.out + row.to(tl.int64) * stride + columns
    total = tl.load(address, mask=inside, other=0.0)
    begin = slot
    more = slot >= 0
    while more:
        slots = begin + tl.arange(0, _TILE)
        mine = tl.load(slot_rows + slots, mask=slots < num_slots, other=-1) == row
        part = rows.slots + slots.to(tl.int64)[:, None] * width + columns[None, :]
        total += tl.sum(tl.load(part, mask=mine[:, None] & inside[None, :], other=0.0), axis=0)
        more = tl.min(mine.to(tl.int32), axis=0) > 0
        begin += _TILE
    tl.store(address, total, mask=inside)


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


def launch_finish_rows(plan: Plan, slot_rows: Any, a: Rows | None, b: Rows | None) -> None:
    """Add the slots of one or two sums to their rows; ``slot_rows`` as in a Partition."""
    sizes = [(0, 0) if r is None else (r.out.stride(0), r.out.shape[1]) for r in (a, b)]
    slots = slot_rows.shape[0]
    finish_rows[(slots,)](
        slot_rows, slots, a, *sizes[0], b, *sizes[1],
        A=triton.next_power_of_2(sizes[0][1]), B=triton.next_power_of_2(sizes[1][1]),
        num_warps=1 if plan.spec.H.value <= 64 else 4,
    )  # fmt: skip


@triton.jit(do_not_specialize=("num_edges", "num_blocks"))
def sender_sums(senders, messages, shifts, q_rows, x_rows, num_edges, num_blocks, spec):
    """Add ``messages [E, H]`` and ``shifts [E, D]`` to their senders' rows, in the order of edges.

    ``senders`` are SenderEdges; the rows are Rows, those of ``q_rows`` beside P's: stride 2 H.
    """
    begin, end = run_of_blocks(num_blocks)
    head_row = tl.load(senders.block_rows + 2 * begin)
    order = Order(None, senders.keys)
    sums = Sums(q_rows, x_rows, head_row)
    carry = no_carry(head_row, spec)
    for number in range(begin, end):
        first_edge = number * spec.BLOCK
        end_edge = tl.minimum(first_edge + spec.BLOCK, num_edges)
        edge = first_edge + tl.arange(0, spec.BLOCK)
        live = edge < end_edge
        position = tl.load(senders.positions + edge, mask=live, other=0)
        first = tl.load(senders.block_rows + 2 * number)
        last = tl.load(senders.block_rows + 2 * number + 1)
        block = EdgeBlock(first_edge, end_edge, 0, edge, live, first, last)
        message, shift = None, None
        if messages is not None:
            message = load_rows(messages, position, live, spec.H, spec.H, spec.HP)
        if shifts is not None:
            shift = load_rows(shifts, position, live, spec.D, spec.D, spec.DP)
        values = EdgeValues(message, shift, None, None)
        carry = add_block_rows(sums, values, carry, block, order, 2 * spec.H, True, spec)
    finish_block_rows(sums, carry, spec)


def launch_sender_sums(
    plan: Plan, senders: SenderEdges, messages: Any, shifts: Any, q: Rows | None, x: Rows | None,
    chunk: Chunk,
) -> None:  # fmt: skip
    """Add up a chunk's messages, shifts or both for their senders; others are None."""
    spec = plan.spec._replace(
        BLOCK=tl.constexpr(sender_block(plan.spec.HP.value)), OPERAND=tl.constexpr(tl.float32)
    )
    sender_sums[(chunk.programs,)](
        senders, messages, shifts, q, x, chunk.end - chunk.begin, chunk.blocks,
        spec.read_by("sender_sums"), **sender_options(plan.nvidia),
    )  # fmt: skip
