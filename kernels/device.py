"""What the kernels share: activations, products, rows read and written."""

from __future__ import annotations

import triton
import triton.language as tl

# an exponential below 2^62: the product of two of them is still a float32
_MAX_EXP2 = tl.constexpr(62.0)
_LOG2_E = tl.constexpr(1.4426950408889634)


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
def _special(t, INSTRUCTION: tl.constexpr):
    """An instruction of the special function units, for each number of a tile."""
    return tl.inline_asm_elementwise(
        INSTRUCTION, "=f,f", [t], dtype=tl.float32, is_pure=False, pack=1
    )


@triton.jit
def _exp2(t, PTX: tl.constexpr):
    """2^t, 0 where that is below the normal numbers."""
    if PTX:
        return _special(t, "ex2.approx.ftz.f32 $0, $1;")
    else:
        return tl.exp2(t)


@triton.jit
def _reciprocal(t, PTX: tl.constexpr):
    """1 / t, 0 where t is above 2^126."""
    if PTX:
        return _special(t, "rcp.approx.ftz.f32 $0, $1;")
    else:
        return 1.0 / t


@triton.jit
def _sigmoid_tile(z, PTX: tl.constexpr, PAIRED: tl.constexpr):
    """The sigmoid of a tile; PAIRED: one reciprocal for two neighbours, at the cost of products."""
    if PAIRED:
        above = 1.0 + _exp2(tl.minimum(z * -_LOG2_E, _MAX_EXP2), PTX)
        rows: tl.constexpr = z.shape[0]
        columns: tl.constexpr = z.shape[1]
        left, right = tl.split(tl.reshape(above, (rows, columns // 2, 2)))
        inverse = _reciprocal(left * right, PTX)
        return tl.reshape(tl.join(inverse * right, inverse * left), (rows, columns))
    else:
        return _reciprocal(1.0 + _exp2(z * -_LOG2_E, PTX), PTX)


@triton.jit
def _approximate_sigmoid(z, PTX: tl.constexpr):
    """The sigmoid by the special units' tanh of 11 bits: one instruction, no exponential."""
    half = 0.5 * z
    if PTX:
        t = _special(half, "tanh.approx.f32 $0, $1;")
    else:
        t = tanh(half)
    return 0.5 * t + 0.5


@triton.jit
def _silu_sigmoid(z, spec):
    if spec.APPROX:
        return _approximate_sigmoid(z, spec.PTX)
    else:
        return _sigmoid_tile(z, spec.PTX, spec.PAIRED)


@triton.jit
def activation(z, numbers, spec):
    """act(z) of a tile."""
    if spec.ACT == 0:
        return z * _silu_sigmoid(z, spec)
    elif spec.ACT == 1:
        return tl.where(z < 0, 0.0, z)  # NaN stays
    else:
        return tl.where(z < 0, z * numbers.negative_slope, z)


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
        return tl.where(z < 0, z * numbers.negative_slope, z), tl.where(
            z > 0, 1.0, numbers.negative_slope
        )


@triton.jit
def stored_slope(slope, spec):
    """act'(z) in the type that holds it until its use: fp16, with tf32's digits; float32 if exact.

    :func:`loaded_slope` is the inverse.
    """
    if spec.EXACT:
        return slope
    elif spec.ACT == 2:
        return (slope == 1.0).to(tl.float16)
    else:
        return slope.to(tl.float16)


@triton.jit
def loaded_slope(stored, numbers, spec):
    """act'(z), float32, of what :func:`stored_slope` returned."""
    if spec.EXACT:
        return stored
    elif spec.ACT == 2:
        return tl.where(stored > 0, 1.0, numbers.negative_slope)
    else:
        return stored.to(tl.float32)


@triton.jit
def shared_slope(slope, layer: tl.constexpr, spec):
    """:func:`stored_slope` for a layer (from 0) whose slope may wait in shared memory.

    The right operand of a product lies there from when it is known; :func:`slope_from_shared` makes
    that product. It adds up edges, so a NaN is replaced here.
    """
    stored = stored_slope(slope, spec)
    if layer >= spec.SHARED_SLOPES or spec.ACT != 0:
        return stored
    # SiLU's is within -0.1 and 1.1; where it is not finite the products that follow are not either
    elif spec.PTX:
        return tl.inline_asm_elementwise(
            """
            { .reg .b32 two; mov.b32 two, 0x40004000; min.f16x2 $0, $1, two;
              mov.b32 two, 0xC000C000; max.f16x2 $0, $0, two; }
            """,
            "=r,r", [stored], dtype=tl.float16, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        return tl.where(tl.abs(stored) < 2.0, stored, 2.0).to(tl.float16)


@triton.jit
def slope_from_shared(stored, layer: tl.constexpr, numbers, spec):
    """act'(z), float32, of what :func:`shared_slope` returned: its product with the identity."""
    if layer < spec.SHARED_SLOPES:
        edge = tl.arange(0, spec.BLOCK)
        identity = (edge[:, None] == edge[None, :]).to(tl.float16)
        stored = tl.dot(identity, stored)
    return loaded_slope(stored, numbers, spec)


@triton.jit
def operand(t, spec):
    """t in the type of the products' operands, rounded to nearest, not truncated."""
    t = t.to(spec.OPERAND)
    if spec.ROUND:
        # Veltkamp's split, to the nearest number of 13 digits fewer but for 1 of 8,000, just below
        # powers of 2; NaN stays, infinity becomes NaN
        t = tl.fma(t, -8192.0, t * 8193.0)
    return t


@triton.jit
def rounded_product(a, b, spec):
    """``a * b`` of narrow tiles, rounded before the sum over columns that follows.

    Merged with that sum (fma), it would be rounded otherwise in each of the threads that share a
    row, and which thread's sum is then taken would be a race.
    """
    if spec.PTX:
        return tl.inline_asm_elementwise(
            "mul.rn.f32 $0, $1, $2;", "=f,f,f", [a, b], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return a * b


@triton.jit
def product(a, b, spec):
    """``a @ b`` of operands by the matrix units, summed in float32."""
    return tl.dot(a, b, input_precision=spec.DOT)


@triton.jit
def run_of_blocks(num_blocks):
    """``(begin, end)``: the blocks of this program, an equal run of them all."""
    program = tl.program_id(0)
    each = num_blocks // tl.num_programs(0)
    over = num_blocks % tl.num_programs(0)
    begin = program * each + tl.minimum(program, over)
    return begin, begin + each + (program < over).to(tl.int32)


@triton.jit
def gate_of(n, weights, spec):
    """The gates g = σ(w_g · n + b_g) ``[BLOCK]`` of messages n ``[BLOCK, H]``."""
    b_g = tl.load(weights.b_g).to(tl.float32)
    return sigmoid(tl.sum(n * load_vector(weights.w_g, spec)[None, :], axis=1) + b_g)


@triton.jit
def not_finite(values):
    """True where values are NaN or infinite."""
    return (tl.abs(values) < float("inf")) == 0


@triton.jit
def rows_and_columns(rows, width: tl.constexpr, padded: tl.constexpr):
    """Which elements of a tile exist, given which rows do; no test if no column is padding."""
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

    Loaded again for each block: held over the loop, they would take a third of the registers.
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
    address = base + offset[:, None] + columns[None, :]
    inside = rows_and_columns(live, width, values.shape[1])
    tl.store(address, values.to(base.dtype.element_ty), mask=inside)


@triton.jit
def add_rows_at(base, index, live, values, stride, width: tl.constexpr):
    """Add rows ``[BLOCK, W]`` to those at ``index``, where live; in no particular order."""
    columns = tl.arange(0, values.shape[1])
    offset = index.to(tl.int64) * stride
    address = base + offset[:, None] + columns[None, :]
    inside = rows_and_columns(live, width, values.shape[1])
    tl.atomic_add(address, values, mask=inside, sem="relaxed")
