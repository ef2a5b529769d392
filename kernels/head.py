"""The coordinate head of an edge: from a number s to the shift it adds, and back."""

from __future__ import annotations

import triton
import triton.language as tl

from egnn_fast.kernels.device import tanh

_UNIT_NORM_EPS = tl.constexpr(1e-8)


@triton.jit
def _inverse_norm(r, numbers, spec):
    """1 / ρ, and ‖d‖ where its derivative is wanted."""
    norm = tl.sqrt_rn(r)
    if spec.NORM == 1:
        return tl.div_rn(1.0, norm + _UNIT_NORM_EPS), norm
    else:
        return tl.div_rn(1.0, norm + numbers.norm), norm


@triton.jit
def _clamped(t, numbers):
    return tl.clamp(t, -numbers.clamp, numbers.clamp, tl.PropagateNan.ALL)


@triton.jit
def _unit_of(d, r, numbers, spec):
    """u = d / ρ ``[BLOCK, D]``: the shift is s times it, before its clamp and mask."""
    if spec.NORM != 0:
        inverse, _ = _inverse_norm(r, numbers, spec)
        d *= inverse[:, None]
    return d


@triton.jit
def shift_of(d, r, s, numbers, spec):
    """The shift ``[BLOCK, D]`` of each edge, before its mask."""
    if spec.TANH:
        s = tanh(s)
    t = _unit_of(d, r, numbers, spec) * s[:, None]
    if spec.CLAMP:
        t = _clamped(t, numbers)
    return t


@triton.jit
def _unclamped(u, s, g_x, mask, numbers, spec):
    """The gradient of s u, from that of the receiver's sum."""
    if spec.CLAMP:
        g_x = tl.where(tl.abs(u * s[:, None]) <= numbers.clamp, g_x, 0.0)
    return g_x * mask[:, None]


@triton.jit
def head_gradient(d, r, s, g_x, mask, numbers, spec):
    """The gradient of s, from those of the receivers' sums.

    Without tanh and clamp s plays no part in it and may be anything: it need not be known yet.
    """
    if spec.TANH:
        s = tanh(s)
    u = _unit_of(d, r, numbers, spec)
    g_s = tl.sum(_unclamped(u, s, g_x, mask, numbers, spec) * u, axis=1)
    if spec.TANH:
        g_s *= 1.0 - s * s
    return g_s


@triton.jit
def shift_gradients(d, r, s, g_x, mask, numbers, spec):
    """``(g_d, g_mask)``: of d and the mask, from the gradients of the receivers' sums."""
    if spec.TANH:
        s = tanh(s)
    u = _unit_of(d, r, numbers, spec)
    t = u * s[:, None]
    if spec.CLAMP:
        t = _clamped(t, numbers)
    g_mask = tl.sum(t * g_x, axis=1)
    # the gradient of u, then of d by it
    g_d = _unclamped(u, s, g_x, mask, numbers, spec) * s[:, None]
    if spec.NORM != 0:
        inverse, norm = _inverse_norm(r, numbers, spec)
        if spec.NORM == 2:
            along = tl.sum(d * g_d, axis=1) * inverse * inverse
            along = tl.where(norm > 0, tl.div_rn(along, tl.where(norm > 0, norm, 1.0)), 0.0)
            g_d = g_d * inverse[:, None] - d * along[:, None]
        else:
            g_d *= inverse[:, None]
    return g_d, g_mask
