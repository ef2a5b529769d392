// The activations and their derivatives, on vectors.
#pragma once

#include "simd.h"

namespace egnn {
namespace EGNN_ISA {

enum Activation : int { kSilu = 0, kRelu = 1, kLeakyRelu = 2 };

template <class T, int kind>
EGNN_INLINE Vec<T> activate(Vec<T> z, T slope) {
  if (kind == kSilu) return z * reciprocal(1 + exp_minus(z));
  // the comparisons are written so that NaN passes through
  if (kind == kRelu) return z < 0 ? splat(T(0)) : z;
  return z > 0 ? z : z * slope;
}

// value = act(z), slope_out = act'(z)
template <class T, int kind>
EGNN_INLINE void activate_both(Vec<T> z, T slope, Vec<T>& value, Vec<T>& derivative) {
  if (kind == kSilu) {
    const Vec<T> gate = reciprocal(1 + exp_minus(z));
    value = z * gate;
    derivative = gate + value * (1 - gate);
  } else if (kind == kRelu) {
    value = z < 0 ? splat(T(0)) : z;
    derivative = z <= 0 ? splat(T(0)) : splat(T(1));
  } else {
    value = z > 0 ? z : z * slope;
    derivative = z > 0 ? splat(T(1)) : splat(slope);
  }
}

EGNN_INLINE float exp_scalar(float v) { return __builtin_expf(v); }
EGNN_INLINE double exp_scalar(double v) { return __builtin_exp(v); }
EGNN_INLINE float tanh_scalar(float v) { return __builtin_tanhf(v); }
EGNN_INLINE double tanh_scalar(double v) { return __builtin_tanh(v); }
EGNN_INLINE float sqrt_scalar(float v) { return __builtin_sqrtf(v); }
EGNN_INLINE double sqrt_scalar(double v) { return __builtin_sqrt(v); }

template <class T>
EGNN_INLINE T sigmoid_scalar(T v) {
  return T(1) / (T(1) + exp_scalar(-v));
}

}  // namespace EGNN_ISA
}  // namespace egnn
