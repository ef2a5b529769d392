"""What the kernels share: activations, an edge's geometry, sums over rows of edges."""

from __future__ import annotations

import triton
import triton.language as tl

# an exponential below 2^62: the product of two of them is still a float32
_MAX_EXP2 = tl.constexpr(62.0)
_LOG2_E = tl.constexpr(1.4426950408889634)
_UNIT_NORM_EPS = tl.constexpr(1e-8)
# rows of a window: what the matrix units take at once
WINDOW = tl.constexpr(16)


@triton.jit
def sigmoid(z):
    """1 / (1 + exp(-z)), NaN where z is."""
    return 1.0 / (1.0 + tl.exp(-z))


@triton.jit
def tanh(z):
    """tanh(z), to float32's last digits near 0 too."""
    t = tl.exp(-2.0 * tl.abs(z))
    far = (1.0 - t) / (1.0 + t)
    q = z * z
    near = 1.0 + q * (-1.0 / 3 + q * (2.0 / 15 + q * (-17.0 / 315 + q * (62.0 / 2835))))
    return tl.where(tl.abs(z) < 0.25, z * near, tl.where(z < 0, -far, far))


@triton.jit
def _exp2(t, PTX: tl.constexpr):
    """2^t, 0 where that is below the normal numbers."""
    if PTX:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [t], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.exp2(t)


@triton.jit
def _reciprocal(t, PTX: tl.constexpr):
    """1 / t of normal numbers below 2^126."""
    if PTX:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [t], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / t


@triton.jit
def _sigmoid_tile(z, PTX: tl.constexpr):
    """The sigmoid of a tile: one reciprocal for two neighbours, as the special units are scarce."""
    above = 1.0 + _exp2(tl.minimum(z * -_LOG2_E, _MAX_EXP2), PTX)
    rows: tl.constexpr = z.shape[0]
    columns: tl.constexpr = z.shape[1]
    left, right = tl.split(tl.reshape(above, (rows, columns // 2, 2)))
    inverse = _reciprocal(left * right, PTX)
    return tl.reshape(tl.join(inverse * right, inverse * left), (rows, columns))


@triton.jit
def _approximate_sigmoid(z, PTX: tl.constexpr):
    """The sigmoid by the special units' tanh, which has 11 bits: one operation, no exponential."""
    half = 0.5 * z
    if PTX:
        t = tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [half], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        t = tanh(half)
    return 0.5 * t + 0.5


@triton.jit
def _silu_sigmoid(z, spec):
    if spec.APPROX:
        return _approximate_sigmoid(z, spec.PTX)
    else:
        return _sigmoid_tile(z, spec.PTX)


@triton.jit
def activation(z, numbers, spec):
    """act(z) of a tile."""
    if spec.ACT == 0:
        return z * _silu_sigmoid(z, spec)
    elif spec.ACT == 1:
        return tl.where(z < 0, 0.0, z)  # NaN stays
    else:
        return tl.where(z < 0, z * numbers.slope, z)


@triton.jit
def activation_and_slope(z, numbers, spec):
    """act(z) and act'(z) of a tile; 0 is on the lower side, as in PyTorch."""
    if spec.ACT == 0:
        sig = _silu_sigmoid(z, spec)
        a = z * sig
        return a, sig + a * (1.0 - sig)
    elif spec.ACT == 1:
        return tl.where(z < 0, 0.0, z), tl.where(z > 0, 1.0, 0.0)
    else:
        return tl.where(z < 0, z * numbers.slope, z), tl.where(z > 0, 1.0, numbers.slope)


@triton.jit
def product(a, b, spec):
    """``a @ b`` by the matrix units, in the operands' type, summed in float32."""
    return tl.dot(a.to(spec.OPERAND), b.to(spec.OPERAND), input_precision=spec.DOT)


@triton.jit
def run_of_blocks(num_blocks):
    """``(begin, end)``: the blocks of this program, an equal run of them all."""
    program = tl.program_id(0)
    each = num_blocks // tl.num_programs(0)
    over = num_blocks % tl.num_programs(0)
    begin = program * each + tl.minimum(program, over)
    return begin, begin + each + (program < over).to(tl.int32)


@triton.jit
def block_of_edges(edges, begin_edge, end_edge, block, spec):
    """``(e, live, i, j, first, last)``: a block's edges, which exist, their nodes; its rows.

    ``i`` is -1 where there is no edge.
    """
    e = begin_edge + block * spec.BLOCK + tl.arange(0, spec.BLOCK)
    live = e < end_edge
    first = tl.load(edges.block_rows + 2 * block)
    last = tl.load(edges.block_rows + 2 * block + 1)
    # the last row that begins at or before e
    low = tl.zeros_like(e) + first
    high = tl.zeros_like(e) + last
    span = last - first
    while span > 0:
        middle = (low + high + 1) >> 1
        begun = tl.load(edges.rowptr + middle) <= e
        low = tl.where(begun, middle, low)
        high = tl.where(begun, high, middle - 1)
        span = span >> 1
    if edges.senders is not None:
        j = tl.load(edges.senders + e, mask=live, other=0)
    else:
        place = e - tl.load(edges.rowptr + low).to(tl.int32)
        j = tl.load(edges.first + low) + place
        j = tl.where(live, j + (j >= low).to(tl.int32), 0)
    return e, live, tl.where(live, low, -1), j, first, last


@triton.jit
def rows_and_columns(rows, width: tl.constexpr, padded: tl.constexpr):
    """Which elements of a tile exist, given which rows do; no test where no column is padding."""
    if width == padded:
        return rows[:, None]
    else:
        return rows[:, None] & (tl.arange(0, padded) < width)[None, :]


@triton.jit
def load_rows(base, index, live, stride, width: tl.constexpr, padded: tl.constexpr):
    """Rows of ``index`` of a row-major matrix, as float32; 0 where not live."""
    columns = tl.arange(0, padded)
    offset = index.to(tl.int64) * stride
    inside = rows_and_columns(live, width, padded)
    return tl.load(base + offset[:, None] + columns[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def load_vector(base, spec):
    """A vector of weights ``[H]`` as float32, 0 beyond its end.

    Read anew for each block: kept over the loop, these would take a third of the registers.
    """
    columns = tl.arange(0, spec.HP)
    if spec.H == spec.HP:
        return tl.load(base + columns).to(tl.float32)
    else:
        return tl.load(base + columns, mask=columns < spec.H, other=0.0).to(tl.float32)


@triton.jit
def load_weights(base, spec):
    """A matrix of weights ``[H, H]``."""
    return load_matrix(base, spec.H, spec.H, spec.HP, spec.HP)


@triton.jit
def load_matrix(
    base, rows: tl.constexpr, columns: tl.constexpr, row_pad: tl.constexpr, column_pad: tl.constexpr
):
    """A row-major matrix of weights, 0 beyond its ends."""
    r = tl.arange(0, row_pad)
    c = tl.arange(0, column_pad)
    at = base + r[:, None] * columns + c[None, :]
    if rows == row_pad and columns == column_pad:
        return tl.load(at)
    else:
        return tl.load(at, mask=(r < rows)[:, None] & (c < columns)[None, :], other=0.0)


@triton.jit
def store_rows(base, index, live, values, stride, width: tl.constexpr):
    """Write rows ``[BLOCK, W]`` at ``index`` of a row-major matrix, where live."""
    columns = tl.arange(0, values.shape[1])
    offset = index.to(tl.int64) * stride
    place = base + offset[:, None] + columns[None, :]
    inside = rows_and_columns(live, width, values.shape[1])
    tl.store(place, values.to(base.dtype.element_ty), mask=inside)


@triton.jit
def add_rows_at(base, index, live, values, stride, width: tl.constexpr):
    """Add rows ``[BLOCK, W]`` to those at ``index``, where live; in no particular order."""
    columns = tl.arange(0, values.shape[1])
    offset = index.to(tl.int64) * stride
    place = base + offset[:, None] + columns[None, :]
    inside = rows_and_columns(live, width, values.shape[1])
    tl.atomic_add(place, values, mask=inside, sem="relaxed")


@triton.jit
def inverse_norm(r, numbers, spec):
    """1 / ρ, and ‖d‖ where its derivative is wanted."""
    norm = tl.sqrt_rn(r)
    if spec.NORM == 1:
        return tl.div_rn(1.0, norm + _UNIT_NORM_EPS), norm
    else:
        return tl.div_rn(1.0, norm + numbers.norm), norm


@triton.jit
def window_sums(values, index, row, broken, SUM_TYPE: tl.constexpr, EXACT: tl.constexpr):
    """Sums ``[WINDOW, W]`` of the values whose index is row, row + 1, ...

    The matrix units multiply by 0 what is not chosen, so a NaN or infinity among the values would
    reach all rows: ``broken`` tells which edges have any, if not None, and makes NaN of their rows.
    """
    rows = row + tl.arange(0, WINDOW)
    chosen = rows[:, None] == index[None, :]
    if values.shape[1] <= 4:
        sums = tl.sum(tl.where(chosen[:, :, None], values[None, :, :], 0.0), axis=1)
    elif broken is None:
        sums = tl.dot(chosen.to(SUM_TYPE), values.to(SUM_TYPE), input_precision=EXACT)
    else:
        some = tl.max(broken, axis=0) > 0
        if some:
            values = tl.where(broken[:, None] > 0, 0.0, values)
        sums = tl.dot(chosen.to(SUM_TYPE), values.to(SUM_TYPE), input_precision=EXACT)
        if some:
            lost = tl.max(tl.where(chosen, broken[None, :], 0), axis=1) > 0
            sums = tl.where(lost[:, None], float("nan"), sums)
    return sums


@triton.jit
def next_window(index, row, last):
    """The first row at or beyond ``row + WINDOW`` that has an edge; last + 1: none."""
    return tl.min(tl.where(index >= row + WINDOW, index, last + 1), axis=0)


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
def add_block_rows(
    rows, stride, width: tl.constexpr, values, index, first, last, carry, carry_row, head_row,
    broken, SUM_TYPE: tl.constexpr, EXACT: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """Sum a block's values ``[BLOCK, W]`` into rows; ``index`` ascends.

    A row that may go on in the next block is carried there: ``carry`` is the sum of the row
    ``carry_row`` up to this block, the result that of the row ``last``. The program's first row,
    ``head_row``, goes to its slot. With ADD, rows are added to what is there. ``broken``: see
    window_sums.
    """
    columns = tl.arange(0, values.shape[1])
    slot = 2 * tl.program_id(0)
    ended = (carry_row != first) & (carry_row >= 0)
    is_head = carry_row == head_row
    _store_vector(rows.slots, slot, carry, width, width, ended & is_head, False)
    _store_vector(rows.out, carry_row, carry, stride, width, ended & (carry_row != head_row), ADD)
    carried = tl.where(carry_row == first, carry, 0.0)
    carry = tl.zeros_like(carry)
    row = first
    while row <= last:
        window = row + tl.arange(0, WINDOW)
        sums = window_sums(values, index, row, broken, SUM_TYPE, EXACT)
        sums += tl.where((window == first)[:, None], carried[None, :], 0.0)
        carry += tl.sum(tl.where((window == last)[:, None], sums, 0.0), axis=0)
        in_slot = rows_and_columns((window < last) & (window == head_row), width, values.shape[1])
        slot_place = tl.zeros_like(window)[:, None] + slot * width + columns[None, :]
        tl.store(rows.slots + slot_place, sums, mask=in_slot)
        whole = rows_and_columns((window < last) & (window != head_row), width, values.shape[1])
        place = rows.out + window.to(tl.int64)[:, None] * stride + columns[None, :]
        if ADD:
            sums += tl.load(place, mask=whole, other=0.0)
        tl.store(place, sums, mask=whole)
        row = next_window(index, row, last)
    return carry


@triton.jit
def finish_block_rows(rows, width: tl.constexpr, carry, last, head_row):
    """After a program's last block: its last row goes to its slot; without a first one, 0 does."""
    slot = 2 * tl.program_id(0)
    _store_vector(rows.slots, slot + 1, carry, width, width, last >= 0, False)
    nothing = tl.zeros_like(carry)
    _store_vector(rows.slots, slot, nothing, width, width, last == head_row, False)
