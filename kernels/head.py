"""The coordinate head of an edge: from s to the shift t that it adds to X, and its gradients."""

from __future__ import annotations

import triton
import triton.language as tl

from egnn_fast.kernels.device import rounded_product, tanh

_UNIT_NORM_EPS = tl.constexpr(1e-8)


@triton.jit
def _inverse_norm(r, numbers, spec):
    """``(1 / ρ, ‖d‖)`` of r ``[BLOCK]``."""
    norm = tl.sqrt_rn(r)
    if spec.NORM == 1:
        return tl.div_rn(1.0, norm + _UNIT_NORM_EPS), norm
    else:
        return tl.div_rn(1.0, norm + numbers.coord_norm), norm


@triton.jit
def _clamped(t, numbers):
    return tl.clamp(t, -numbers.coord_clamp, numbers.coord_clamp, tl.PropagateNan.ALL)


@triton.jit
def _unit_of(pairs, numbers, spec):
    """u = d / ρ ``[BLOCK, DP]``: the shift is s u, before its clamp and mask."""
    u = pairs.d
    if spec.NORM != 0:
        inverse, _ = _inverse_norm(pairs.r, numbers, spec)
        u *= inverse[:, None]
    return u


@triton.jit
def shift_of(pairs, s, numbers, spec):
    """clamp(s u) ``[BLOCK, DP]`` of s ``[BLOCK]``: the shift before its mask."""
    if spec.TANH:
        s = tanh(s)
    t = _unit_of(pairs, numbers, spec) * s[:, None]
    if spec.CLAMP:
        t = _clamped(t, numbers)
    return t


@triton.jit
def _unclamped(u, s, g_x, mask, numbers, spec):
    """g_t = mask · gX where the clamp let s u pass, else 0."""
    if spec.CLAMP:
        g_x = tl.where(tl.abs(u * s[:, None]) <= numbers.coord_clamp, g_x, 0.0)
    return g_x * mask[:, None]


@triton.jit
def head_gradient(pairs, s, g_x, mask, numbers, spec):
    """g_s = g_t · u ``[BLOCK]``, with tanh times 1 - s², of gX ``[BLOCK, DP]``.

    Without tanh and clamp the result does not depend on s, which then need not be known yet.
    """
    if spec.TANH:
        s = tanh(s)
    u = _unit_of(pairs, numbers, spec)
    g_s = tl.sum(rounded_product(_unclamped(u, s, g_x, mask, numbers, spec), u, spec), axis=1)
    if spec.TANH:
        g_s *= 1.0 - s * s
    return g_s


@triton.jit
def shift_gradients(pairs, s, g_x, mask, numbers, spec):
    """``(g_d [BLOCK, DP], g_mask [BLOCK])``: the shift's part of the gradients of d and the mask.

    g_u = s g_t and g_d = g_u / ρ - [ρ = ‖d‖ + k] d (d · g_u) / (‖d‖ ρ²).
    """
    if spec.TANH:
        s = tanh(s)
    u = _unit_of(pairs, numbers, spec)
    t = u * s[:, None]
    if spec.CLAMP:
        t = _clamped(t, numbers)
    g_mask = tl.sum(rounded_product(t, g_x, spec), axis=1)
    g_d = _unclamped(u, s, g_x, mask, numbers, spec) * s[:, None]
    if spec.NORM != 0:
        inverse, norm = _inverse_norm(pairs.r, numbers, spec)
        if spec.NORM == 2:
            along = tl.sum(rounded_product(pairs.d, g_d, spec), axis=1) * inverse * inverse
            along = tl.where(norm > 0, tl.div_rn(along, tl.where(norm > 0, norm, 1.0)), 0.0)
            g_d = g_d * inverse[:, None] - pairs.d * along[:, None]
        else:
            g_d *= inverse[:, None]
    return g_d, g_mask
