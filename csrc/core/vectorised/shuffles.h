// Sums over lanes and transposition, of as many vectors as a vector has lanes.
#pragma once

#include "simd.h"

namespace egnn {
namespace EGNN_ISA {

// picked[l] = a[index[l]], or b[index[l] - width] for an index of at least the width.
template <class T>
EGNN_INLINE Vec<T> pick(Vec<T> a, Vec<T> b, typename Simd<T>::I index) {
#if defined(__clang__)
  Vec<T> picked;
  for (int l = 0; l < kWidth<T>; ++l) {
    picked[l] = index[l] < kWidth<T> ? a[index[l]] : b[index[l] - kWidth<T>];
  }
  return picked;
#else
  return __builtin_shuffle(a, b, index);
#endif
}

alignas(64) constexpr int64_t kLanes64[8] = {0, 1, 2, 3, 4, 5, 6, 7};
alignas(64) constexpr int32_t kLanes32[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// The numbers of the lanes.
EGNN_INLINE Simd<float>::I lanes(float) {
  Simd<float>::I v;
  memcpy(&v, kLanes32, sizeof v);
  return v;
}
EGNN_INLINE Simd<double>::I lanes(double) {
  Simd<double>::I v;
  memcpy(&v, kLanes64, sizeof v);
  return v;
}

// out[k] = the sum of the lanes of rows[k].
template <class T>
EGNN_INLINE void lane_sums(const Vec<T>* rows, T* out) {
  constexpr int W = kWidth<T>;
  const auto lane = lanes(T());
  Vec<T> t[W];
#pragma GCC unroll 16
  for (int k = 0; k < W; ++k) t[k] = rows[k];
#pragma GCC unroll 4
  for (int h = 1; h < W; h *= 2) {
    // lanes whose bit h is 0 go on with the first row of a pair, the others with the second
    const auto other = (lane ^ h) + ((lane & h) != 0) * -W;
#pragma GCC unroll 8
    for (int k = 0; k < W / (2 * h); ++k) {
      const Vec<T> a = t[2 * k], b = t[2 * k + 1];
      t[k] = ((lane & h) != 0 ? b : a) + pick<T>(a, b, other);
    }
  }
  store(out, t[0]);
}

// rows[k][l] becomes rows[l][k].
template <class T>
EGNN_INLINE void transpose(Vec<T>* rows) {
  constexpr int W = kWidth<T>;
  const auto lane = lanes(T());
#pragma GCC unroll 4
  for (int h = 1; h < W; h *= 2) {
    const auto low = (lane & h) != 0 ? (lane ^ h) + W : lane;
    const auto high = (lane & h) != 0 ? lane + W : (lane ^ h);
#pragma GCC unroll 16
    for (int k = 0; k < W; ++k) {
      if ((k & h) != 0) continue;
      const Vec<T> a = rows[k], b = rows[k + h];
      rows[k] = pick<T>(a, b, low);
      rows[k + h] = pick<T>(a, b, high);
    }
  }
}

}  // namespace EGNN_ISA
}  // namespace egnn
