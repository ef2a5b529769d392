// The activations and their derivatives on vectors, and functions of single numbers.
#pragma once

#include "core/args.h"
#include "simd.h"

namespace egnn {
namespace EGNN_ISA {

// act(z). The comparisons are written so that NaN passes through.
template <class T, Activation act>
EGNN_INLINE Vec<T> activate(Vec<T> z, T negative_slope) {
  if (act == Activation::silu) return z * reciprocal(1 + exp_minus(z));
  if (act == Activation::relu) return z < 0 ? splat(T(0)) : z;
  return z > 0 ? z : z * negative_slope;
}

// value = act(z), derivative = act'(z)
template <class T, Activation act>
EGNN_INLINE void activate_both(Vec<T> z, T negative_slope, Vec<T>& value, Vec<T>& derivative) {
  if (act == Activation::silu) {
    const Vec<T> sigmoid = reciprocal(1 + exp_minus(z));
    value = z * sigmoid;
    derivative = sigmoid + value * (1 - sigmoid);
  } else if (act == Activation::relu) {
    value = z < 0 ? splat(T(0)) : z;
    derivative = z <= 0 ? splat(T(0)) : splat(T(1));
  } else {
    value = z > 0 ? z : z * negative_slope;
    derivative = z > 0 ? splat(T(1)) : splat(negative_slope);
  }
}

EGNN_INLINE float tanh_scalar(float v) { return __builtin_tanhf(v); }
EGNN_INLINE double tanh_scalar(double v) { return __builtin_tanh(v); }
EGNN_INLINE float sqrt_scalar(float v) { return __builtin_sqrtf(v); }
EGNN_INLINE double sqrt_scalar(double v) { return __builtin_sqrt(v); }

// v within [-bound, bound]; bound 0: v itself
template <class T>
EGNN_INLINE T clamp_scalar(T v, T bound) {
  if (bound == 0) return v;
  return v > bound ? bound : v < -bound ? -bound : v;
}

}  // namespace EGNN_ISA
}  // namespace egnn
