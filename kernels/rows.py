"""Sums over the edges of a row, by the matrix units: a block's edges fall into windows of rows."""

from __future__ import annotations

import triton
import triton.language as tl

from egnn_fast.kernels.device import load_rows, rows_and_columns

# rows of a window, and the least columns: what the matrix units take at once
WINDOW = tl.constexpr(16)


@triton.jit
def _edges_of_rows(order, row, last, begin, end, BLOCK: tl.constexpr):
    """``[BLOCK, WINDOW]``: which edges of a block belong to row, row + 1, ...

    Found anew where it is wanted: receivers held for it would take registers all the while.
    """
    rows = row + tl.arange(0, WINDOW)
    place = tl.arange(0, BLOCK)
    if order.keys is None:
        inside = rows <= last
        low = tl.load(order.rowptr + rows, mask=inside, other=end) - begin
        high = tl.load(order.rowptr + rows + 1, mask=inside, other=begin)
        low = tl.maximum(low, 0).to(tl.int32)
        high = (tl.minimum(high, end) - begin).to(tl.int32)
        return (low[None, :] <= place[:, None]) & (place[:, None] < high[None, :])
    else:
        keys = tl.load(order.keys + begin + place, mask=begin + place < end, other=-1)
        return rows[None, :] == keys[:, None]


@triton.jit
def _next_window(order, row, last, begin, end, BLOCK: tl.constexpr):
    """The first row at or beyond ``row + WINDOW`` that has an edge; beyond ``last``: none."""
    row += WINDOW
    span = last - row
    if order.keys is None:
        if span > 0:
            # the last row that begins where this one does is the first that has edges
            edge = tl.load(order.rowptr + row)
            high = last
            while span > 0:
                middle = row + ((high - row + 1) >> 1)
                begun = tl.load(order.rowptr + middle) <= edge
                row = tl.where(begun, middle, row)
                high = tl.where(begun, high, middle - 1)
                span = span >> 1
        return row
    else:
        if span > 0:
            place = begin + tl.arange(0, BLOCK)
            keys = tl.load(order.keys + place, mask=place < end, other=-1)
            row = tl.min(tl.where(keys >= row, keys, last + 1), axis=0)
        return row


@triton.jit
def _upper(values):
    """The first 8 digits of float32 values, cut off: what bfloat16 holds exactly."""
    bits = values.to(tl.int32, bitcast=True)
    return (bits & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _parts(values, PART: tl.constexpr):
    """Float32 values as three parts of 8 digits, ``(low, middle, high)``.

    Products of these with 0 and 1 are exact, at a rate twice that of tf32, which holds 11 digits.
    """
    values = values.to(tl.float32)  # the interpreter's numbers of Python may be wider
    high = _upper(values)
    values -= high
    middle = _upper(values)
    return (values - middle).to(PART), middle.to(PART), high.to(PART)


@triton.jit
def take_block_rows(base, stride, H: tl.constexpr, total, order, begin, end, first, last, spec):
    """Add to ``total [BLOCK, H]`` each edge's row of a float32 matrix, exactly.

    The reverse of :func:`add_block_rows`, of rows by rowptr. By products, as a window of rows takes
    fewer registers and loads than a row for each edge; what is not finite reaches the other rows of
    its window.
    """
    row = first
    while row <= last:
        chosen = _edges_of_rows(order, row, last, begin, end, total.shape[0]).to(spec.PART)
        rows = row + tl.arange(0, WINDOW)
        # a row without edges may hold anything
        inside = rows <= last
        begun = tl.load(order.rowptr + rows, mask=inside, other=0)
        inside &= tl.load(order.rowptr + rows + 1, mask=inside, other=0) > begun
        values = load_rows(base, rows, inside, stride, H, total.shape[1])
        low, middle, high = _parts(values, spec.PART)
        total = tl.dot(chosen, low, total)
        total = tl.dot(chosen, middle, total)
        total = tl.dot(chosen, high, total)
        row = _next_window(order, row, last, begin, end, total.shape[0])
    return total


@triton.jit
def _sum_wide(chosen, values, SUM: tl.constexpr, PART: tl.constexpr):
    """``chosenᵀ @ values``: of values rounded to SUM, or exact products if that is float32.

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
    """``chosenᵀ @ values [BLOCK, D]`` with exact products: the parts of 8 digits side by side."""
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
def _lost(sums, order, row, last, begin, end, broken):
    """NaN for the rows that have a broken edge."""
    # what is rare holds no registers for the rest: the barrier keeps the loads from being shared
    tl.debug_barrier()
    chosen = _edges_of_rows(order, row, last, begin, end, broken.shape[0])
    lost = tl.max((chosen & broken[:, None]).to(tl.int32), axis=0) > 0
    return tl.where(lost[:, None], float("nan"), sums)


@triton.jit
def _store_vector(base, row, values, stride, width: tl.constexpr, wanted, ADD: tl.constexpr):
    """Write a row ``[W]``, or add it to what is there, if it is wanted."""
    columns = tl.arange(0, values.shape[0])
    place = base + row.to(tl.int64) * stride + columns
    inside = wanted & (columns < width)
    if ADD:
        values += tl.load(place, mask=inside, other=0.0)
    tl.store(place, values, mask=inside)


@triton.jit
def _carry_on(
    rows, stride, width: tl.constexpr, carry, carry_row, first, head_row, ADD: tl.constexpr
):  # fmt: skip
    """Write the carried row if this block does not go on with it; else give back its sum, or 0."""
    ended = (carry_row != first) & (carry_row >= 0)
    slot = 2 * tl.program_id(0)
    _store_vector(rows.slots, slot, carry, width, width, ended & (carry_row == head_row), False)
    _store_vector(rows.out, carry_row, carry, stride, width, ended & (carry_row != head_row), ADD)
    return tl.where(carry_row == first, carry, 0.0)


@triton.jit
def _place(
    rows, stride, width: tl.constexpr, sums, row, first, last, head_row, carried, ADD: tl.constexpr
):  # fmt: skip
    """Write a window's rows but the block's last one, whose sum is given back."""
    columns = tl.arange(0, sums.shape[1])
    slot = 2 * tl.program_id(0)
    window = row + tl.arange(0, WINDOW)
    sums += tl.where((window == first)[:, None], carried[None, :], 0.0)
    carry = tl.sum(tl.where((window == last)[:, None], sums, 0.0), axis=0)
    in_slot = rows_and_columns((window < last) & (window == head_row), width, sums.shape[1])
    slot_place = tl.zeros_like(window)[:, None] + slot * width + columns[None, :]
    tl.store(rows.slots + slot_place, sums, mask=in_slot)
    whole = rows_and_columns((window < last) & (window != head_row), width, sums.shape[1])
    place = rows.out + window.to(tl.int64)[:, None] * stride + columns[None, :]
    if ADD:
        sums += tl.load(place, mask=whole, other=0.0)
    tl.store(place, sums, mask=whole)
    return carry


@triton.jit
def add_block_rows(
    wide, stride, H: tl.constexpr, values, carry, broken,
    narrow, D: tl.constexpr, shifts, shift_carry, shift_broken,
    order, begin, end, first, last, carry_row, head_row,
    SUM: tl.constexpr, PART: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """Sum values ``[BLOCK, H]`` and shifts ``[BLOCK, D]`` of a block of edges into their rows.

    The block are the edges from ``begin`` to ``end``, of the rows from ``first`` to ``last``. One
    of ``wide`` and ``narrow``, where the sums go, may be None.

    A row that may go on in the next block is carried there: ``carry`` is the sum of the row
    ``carry_row`` up to this block, the result (for both) that of the row ``last``. The program's
    first row, ``head_row``, goes to its slot. With ADD, rows are added to what is there.

    The matrix units multiply by 0 what is not a row's, so a NaN or infinity would reach all rows of
    a window: ``broken [BLOCK]`` tells which edges have one, if not None, and makes NaN of their
    rows alone. Values are rounded to SUM; PART is the type of a float32's parts.
    """
    BLOCK: tl.constexpr = values.shape[0] if wide is not None else shifts.shape[0]
    some = False
    if broken is not None or shift_broken is not None:
        either = tl.zeros((BLOCK,), tl.int1)
        if broken is not None:
            either |= broken
        if shift_broken is not None:
            either |= shift_broken
        some = tl.max(either.to(tl.int32), axis=0) > 0
    if wide is not None:
        carried = _carry_on(wide, stride, H, carry, carry_row, first, head_row, ADD)
        carry = tl.zeros_like(carry)
        if broken is not None:  # noqa: SIM102
            if some:
                values = _without(values, broken)
    if narrow is not None:
        shift_carried = _carry_on(narrow, D, D, shift_carry, carry_row, first, head_row, ADD)
        shift_carry = tl.zeros_like(shift_carry)
        if shift_broken is not None:  # noqa: SIM102
            if some:
                shifts = _without(shifts, shift_broken)
    row = first
    while row <= last:
        chosen = _edges_of_rows(order, row, last, begin, end, BLOCK)
        if wide is not None:
            sums = _sum_wide(chosen, values, SUM, PART)
            if broken is not None:  # noqa: SIM102
                if some:
                    sums = _lost(sums, order, row, last, begin, end, broken)
            carry += _place(wide, stride, H, sums, row, first, last, head_row, carried, ADD)
        if narrow is not None:
            sums = _sum_narrow(chosen, shifts, PART)
            if shift_broken is not None:  # noqa: SIM102
                if some:
                    sums = _lost(sums, order, row, last, begin, end, shift_broken)
            shift_carry += _place(
                narrow, D, D, sums, row, first, last, head_row, shift_carried, ADD
            )
        row = _next_window(order, row, last, begin, end, BLOCK)
    return carry, shift_carry


@triton.jit
def finish_block_rows(rows, width: tl.constexpr, carry, last, head_row):
    """After a program's last block: its last row goes to its slot; without a first one, 0 does."""
    slot = 2 * tl.program_id(0)
    _store_vector(rows.slots, slot + 1, carry, width, width, last >= 0, False)
    nothing = tl.zeros_like(carry)
    _store_vector(rows.slots, slot, nothing, width, width, last == head_row, False)
