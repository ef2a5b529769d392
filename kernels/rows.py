"""Sums over the edges of a row, by the matrix units: a block's edges fall into windows of rows."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from egnn_fast.kernels.device import load_rows, rows_and_columns

# rows of a window, and the least columns: what the matrix units take at once
WINDOW = tl.constexpr(16)


class Sums(NamedTuple):
    """Where a program's sums over rows go.

    Attributes
    ----------
    wide : Rows [., H], or None
    narrow : Rows [., D], or None
    head_row : int32
        The program's first row, which earlier programs may share: it goes to its slot.
    """

    wide: Any
    narrow: Any
    head_row: Any


class EdgeValues(NamedTuple):
    """Values of a block's edges, to be summed into rows.

    Attributes
    ----------
    wide : [BLOCK, HP], float32, or None
    narrow : [BLOCK, DP], float32, or None
    wide_broken, narrow_broken : [BLOCK], bool
        Which edges have values that are not finite; None: such values may reach other rows.
    """

    wide: Any
    narrow: Any
    wide_broken: Any
    narrow_broken: Any


class Carry(NamedTuple):
    """The sums of a row that may go on in the next block.

    Attributes
    ----------
    row : int32
        The last row of the blocks so far; -1 before the first block.
    wide : [HP], float32
    narrow : [DP], float32
        Either is 0 where it is not summed: Triton 3.6 returns no None in a tuple.
    last : int32
        As ``row``, but the program's first row before the first block. One number for both would
        do; the compiled kernels then spill more.
    """

    row: Any
    wide: Any
    narrow: Any
    last: Any


@triton.jit
def no_carry(head_row, spec):
    """The Carry before a program's first block."""
    wide, narrow = tl.zeros((spec.HP,), tl.float32), tl.zeros((spec.DP,), tl.float32)
    return Carry(tl.full((), -1, tl.int32), wide, narrow, head_row)


@triton.jit
def _edges_of_rows(order, row, block, BLOCK: tl.constexpr):
    """``[BLOCK, WINDOW]``: which edges of a block belong to row, row + 1, ...

    Computed again for each use: the receivers would take registers from one use to the next.
    """
    rows = row + tl.arange(0, WINDOW)
    edge = tl.arange(0, BLOCK)
    if order.keys is None:
        inside = rows <= block.last
        low = tl.load(order.rowptr + rows, mask=inside, other=block.end) - block.begin
        high = tl.load(order.rowptr + rows + 1, mask=inside, other=block.begin)
        low = tl.maximum(low, 0).to(tl.int32)
        high = (tl.minimum(high, block.end) - block.begin).to(tl.int32)
        return (low[None, :] <= edge[:, None]) & (edge[:, None] < high[None, :])
    else:
        inside = block.begin + edge < block.end
        keys = tl.load(order.keys + block.begin + edge, mask=inside, other=-1)
        return rows[None, :] == keys[:, None]


@triton.jit
def _next_window(order, row, block, BLOCK: tl.constexpr):
    """The first row of the block at or beyond ``row + WINDOW`` that has an edge.

    Without such a row, a number beyond the block's last row.
    """
    row += WINDOW
    span = block.last - row
    if order.keys is None:
        if span > 0:
            # the last row that begins where this one does is the first that has edges
            edge = tl.load(order.rowptr + row)
            high = block.last
            while span > 0:
                middle = row + ((high - row + 1) >> 1)
                begun = tl.load(order.rowptr + middle) <= edge
                row = tl.where(begun, middle, row)
                high = tl.where(begun, high, middle - 1)
                span = span >> 1
        return row
    else:
        if span > 0:
            edge = block.begin + tl.arange(0, BLOCK)
            keys = tl.load(order.keys + edge, mask=edge < block.end, other=-1)
            row = tl.min(tl.where(keys >= row, keys, block.last + 1), axis=0)
        return row


@triton.jit
def _upper(values):
    """Float32 values truncated to their first 8 bits: what bfloat16 holds exactly."""
    bits = values.to(tl.int32, bitcast=True)
    return (bits & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _parts(values, PART: tl.constexpr):
    """Float32 values as three parts of 8 bits, ``(low, middle, high)``.

    Products of these with 0 and 1 are exact, at twice the rate of tf32, which holds 11 bits.
    """
    values = values.to(tl.float32)  # the interpreter's numbers of Python may be wider
    high = _upper(values)
    values -= high
    middle = _upper(values)
    return (values - middle).to(PART), middle.to(PART), high.to(PART)


@triton.jit
def take_block_rows(base, total, order, block, spec):
    """Add to ``total [BLOCK, HP]`` each edge's row of a float32 matrix ``[N, H]``, exactly.

    The reverse of :func:`add_block_rows`, for rows by rowptr. Products with 0 and 1: a window of
    rows takes fewer registers and loads than a row for each edge. A value that is not finite
    reaches the other rows of its window.
    """
    row = block.first
    while row <= block.last:
        chosen = _edges_of_rows(order, row, block, total.shape[0]).to(spec.PART)
        rows = row + tl.arange(0, WINDOW)
        # a row without edges may hold anything
        inside = rows <= block.last
        begun = tl.load(order.rowptr + rows, mask=inside, other=0)
        inside &= tl.load(order.rowptr + rows + 1, mask=inside, other=0) > begun
        values = load_rows(base, rows, inside, spec.H, spec.H, total.shape[1])
        low, middle, high = _parts(values, spec.PART)
        total = tl.dot(chosen, low, total)
        total = tl.dot(chosen, middle, total)
        total = tl.dot(chosen, high, total)
        row = _next_window(order, row, block, total.shape[0])
    return total


@triton.jit
def _sum_wide(chosen, values, SUM: tl.constexpr, PART: tl.constexpr):
    """``chosenᵀ @ values [BLOCK, HP]``: of values rounded to SUM, or exact if that is float32.

    The values are on the left: on Hopper that side has 64 rows at least, and the window has 16.
    """
    if SUM != tl.float32:  # noqa: SIM300
        sums = tl.dot(tl.trans(values.to(SUM)), chosen.to(SUM))
    else:
        chosen = chosen.to(PART)
        low, middle, high = _parts(values, PART)
        sums = tl.dot(tl.trans(low), chosen)
        sums = tl.dot(tl.trans(middle), chosen, sums)
        sums = tl.dot(tl.trans(high), chosen, sums)
    return tl.trans(sums)


@triton.jit
def _sum_narrow(chosen, values, PART: tl.constexpr):
    """``chosenᵀ @ values [BLOCK, DP]``, exact: the parts of 8 bits side by side."""
    BLOCK: tl.constexpr = values.shape[0]
    D: tl.constexpr = values.shape[1]
    low, middle, high = _parts(values, PART)
    parts = tl.join(tl.join(high, low), tl.join(middle, tl.zeros_like(low)))
    parts = tl.reshape(parts, (BLOCK, 4 * D))
    if D <= 2:
        parts = tl.reshape(tl.join(parts, tl.zeros_like(parts)), (BLOCK, 8 * D))
    if D == 1:
        parts = tl.reshape(tl.join(parts, tl.zeros_like(parts)), (BLOCK, 16 * D))
    sums = tl.dot(tl.trans(chosen.to(PART)), parts)
    return tl.sum(tl.reshape(sums, (WINDOW, D, parts.shape[1] // D)), axis=2)


@triton.jit
def _without(values, broken):
    return tl.where(broken[:, None], 0.0, values)


@triton.jit
def _lost(sums, order, row, block, broken):
    """``sums [WINDOW, W]`` with NaN in the rows that have a broken edge."""
    # the barrier keeps these rare loads from being shared with others, which would take registers
    tl.debug_barrier()
    chosen = _edges_of_rows(order, row, block, broken.shape[0])
    lost = tl.max((chosen & broken[:, None]).to(tl.int32), axis=0) > 0
    return tl.where(lost[:, None], float("nan"), sums)


@triton.jit
def _store_vector(base, row, values, stride, width: tl.constexpr, wanted, ADD: tl.constexpr):
    """Write a row ``[W]`` if it is wanted, or add it to the one in memory."""
    columns = tl.arange(0, values.shape[0])
    address = base + row.to(tl.int64) * stride + columns
    inside = wanted & (columns < width)
    if ADD:
        values += tl.load(address, mask=inside, other=0.0)
    tl.store(address, values, mask=inside)


@triton.jit
def _carry_on(
    rows, total, row, block, head_row, stride, width: tl.constexpr, ADD: tl.constexpr
):  # fmt: skip
    """The carried ``total [W]`` of a row if the block goes on with that row; else write it: 0."""
    ended = (row != block.first) & (row >= 0)
    slot = 2 * tl.program_id(0)
    _store_vector(rows.slots, slot, total, width, width, ended & (row == head_row), False)
    _store_vector(rows.out, row, total, stride, width, ended & (row != head_row), ADD)
    return tl.where(row == block.first, total, 0.0)


@triton.jit
def _write_window(
    rows, totals, row, block, carried, head_row, stride, width: tl.constexpr, ADD: tl.constexpr
):  # fmt: skip
    """Write the sums ``totals [WINDOW, W]`` of the rows from ``row`` on.

    The block's last row is not written: its sum ``[W]`` is returned. ``carried`` is added to the
    first row.
    """
    columns = tl.arange(0, totals.shape[1])
    slot = 2 * tl.program_id(0)
    window = row + tl.arange(0, WINDOW)
    totals += tl.where((window == block.first)[:, None], carried[None, :], 0.0)
    carry = tl.sum(tl.where((window == block.last)[:, None], totals, 0.0), axis=0)
    ended = window < block.last
    in_slot = rows_and_columns(ended & (window == head_row), width, totals.shape[1])
    slot_address = tl.zeros_like(window)[:, None] + slot * width + columns[None, :]
    tl.store(rows.slots + slot_address, totals, mask=in_slot)
    whole = rows_and_columns(ended & (window != head_row), width, totals.shape[1])
    address = rows.out + window.to(tl.int64)[:, None] * stride + columns[None, :]
    if ADD:
        totals += tl.load(address, mask=whole, other=0.0)
    tl.store(address, totals, mask=whole)
    return carry


@triton.jit
def add_block_rows(
    sums, values, carry, block, order, STRIDE: tl.constexpr, ADD: tl.constexpr, spec
):  # fmt: skip
    """Sum the EdgeValues of an EdgeBlock into their rows, as Sums says; returns the next Carry.

    A row that may go on in the next block is carried there. ``order`` says which edges are a row's.
    STRIDE is that of the wide rows. With ADD, sums are added to the rows in memory.
    Wide values are rounded to ``spec.OPERAND``; float32 ones and the narrow ones are summed exactly
    in parts of type ``spec.PART``.

    The matrix units multiply by 0 the edges of other rows, so a NaN or infinity would reach all
    rows of a window: broken edges are left out, and their rows become NaN.
    """
    wide, narrow = values.wide, values.narrow
    total, shift_total = carry.wide, carry.narrow
    some = False
    if values.wide_broken is not None or values.narrow_broken is not None:
        either = tl.zeros((spec.BLOCK,), tl.int1)
        if values.wide_broken is not None:
            either |= values.wide_broken
        if values.narrow_broken is not None:
            either |= values.narrow_broken
        some = tl.max(either.to(tl.int32), axis=0) > 0
    if sums.wide is not None:
        carried = _carry_on(sums.wide, total, carry.row, block, sums.head_row, STRIDE, spec.H, ADD)
        total = tl.zeros_like(total)
        if values.wide_broken is not None:  # noqa: SIM102
            if some:
                wide = _without(wide, values.wide_broken)
    if sums.narrow is not None:
        shift_carried = _carry_on(
            sums.narrow, shift_total, carry.row, block, sums.head_row, spec.D, spec.D, ADD
        )
        shift_total = tl.zeros_like(shift_total)
        if values.narrow_broken is not None:  # noqa: SIM102
            if some:
                narrow = _without(narrow, values.narrow_broken)
    row = block.first
    while row <= block.last:
        chosen = _edges_of_rows(order, row, block, spec.BLOCK)
        if sums.wide is not None:
            rows = _sum_wide(chosen, wide, spec.OPERAND, spec.PART)
            if values.wide_broken is not None:  # noqa: SIM102
                if some:
                    rows = _lost(rows, order, row, block, values.wide_broken)
            total += _write_window(
                sums.wide, rows, row, block, carried, sums.head_row, STRIDE, spec.H, ADD
            )
        if sums.narrow is not None:
            rows = _sum_narrow(chosen, narrow, spec.PART)
            if values.narrow_broken is not None:  # noqa: SIM102
                if some:
                    rows = _lost(rows, order, row, block, values.narrow_broken)
            shift_total += _write_window(
                sums.narrow, rows, row, block, shift_carried, sums.head_row, spec.D, spec.D, ADD
            )
        row = _next_window(order, row, block, spec.BLOCK)
    return Carry(block.last, total, shift_total, block.last)


@triton.jit
def finish_block_rows(sums, carry, spec):
    """After a program's last block: write the carried row to the program's last slot.

    The first slot is set to 0 if no other row was written there.
    """
    if sums.wide is not None:
        _finish(sums.wide, spec.H, carry.wide, carry.last, sums.head_row)
    if sums.narrow is not None:
        _finish(sums.narrow, spec.D, carry.narrow, carry.last, sums.head_row)


@triton.jit
def _finish(rows, width: tl.constexpr, total, last, head_row):
    slot = 2 * tl.program_id(0)
    _store_vector(rows.slots, slot + 1, total, width, width, last >= 0, False)
    nothing = tl.zeros_like(total)
    _store_vector(rows.slots, slot, nothing, width, width, last == head_row, False)
