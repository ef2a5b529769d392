// Vectors of the width that the including file was compiled for. Everything here and in the other
// headers of this folder lives in a namespace of its own per instruction set (EGNN_ISA), and uses
// no templates of the standard library: the linker would keep one copy of those for all sets.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#define EGNN_INLINE inline __attribute__((always_inline))

namespace egnn {
namespace EGNN_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kPanelVectors = 4;  // columns of a register tile, in vectors
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr int kPanelVectors = 2;
#else
constexpr int kVectorBytes = 16;  // SSE2 and NEON
constexpr int kPanelVectors = 2;
#endif

template <class T>
struct Simd;

template <>
struct Simd<float> {
  typedef float V __attribute__((vector_size(kVectorBytes)));
  typedef int32_t I __attribute__((vector_size(kVectorBytes)));
  typedef float Unaligned __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
};

template <>
struct Simd<double> {
  typedef double V __attribute__((vector_size(kVectorBytes)));
  typedef int64_t I __attribute__((vector_size(kVectorBytes)));
  typedef double Unaligned __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));
};

template <class T>
using Vec = typename Simd<T>::V;

template <class T>
constexpr int kWidth = kVectorBytes / static_cast<int>(sizeof(T));

template <class T>
EGNN_INLINE Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename Simd<T>::Unaligned*>(p);
}

template <class T>
EGNN_INLINE void store(T* p, Vec<T> v) {
  *reinterpret_cast<typename Simd<T>::Unaligned*>(p) = v;
}

// The first `count` elements; the others are zero.
template <class T>
EGNN_INLINE Vec<T> load_part(const T* p, int count) {
  alignas(kVectorBytes) T buffer[kWidth<T>] = {};
  for (int k = 0; k < count; ++k) buffer[k] = p[k];
  return load(buffer);
}

template <class T>
EGNN_INLINE void store_part(T* p, Vec<T> v, int count) {
  alignas(kVectorBytes) T buffer[kWidth<T>];
  store(buffer, v);
  for (int k = 0; k < count; ++k) p[k] = buffer[k];
}

template <class T>
EGNN_INLINE Vec<T> splat(T value) {
  return value - Vec<T>{};  // x - 0 is x, so this is a broadcast and no addition
}

template <class T>
EGNN_INLINE T horizontal_sum(Vec<T> v) {
  alignas(kVectorBytes) T lane[kWidth<T>];
  store(lane, v);
  for (int half = kWidth<T> / 2; half > 0; half /= 2) {
    for (int k = 0; k < half; ++k) lane[k] += lane[k + half];
  }
  return lane[0];
}

#if defined(__AVX512F__)
template <>
EGNN_INLINE float horizontal_sum<float>(Vec<float> v) {
  return _mm512_reduce_add_ps((__m512)v);
}
template <>
EGNN_INLINE double horizontal_sum<double>(Vec<double> v) {
  return _mm512_reduce_add_pd((__m512d)v);
}
#elif defined(__AVX2__)
template <>
EGNN_INLINE float horizontal_sum<float>(Vec<float> v) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
template <>
EGNN_INLINE double horizontal_sum<double>(Vec<double> v) {
  const __m128d half =
      _mm_add_pd(_mm256_castpd256_pd128((__m256d)v), _mm256_extractf128_pd((__m256d)v, 1));
  return _mm_cvtsd_f64(_mm_add_sd(half, _mm_unpackhi_pd(half, half)));
}
#endif

// 1 / v for finite, normal v > 0.
EGNN_INLINE Vec<float> reciprocal(Vec<float> v) {
#if defined(__AVX512F__)
  const Vec<float> y = (Vec<float>)_mm512_maskz_rcp14_ps(0xffff, (__m512)v);
  return y + y * (1.0f - v * y);
#else
  return 1.0f / v;
#endif
}

EGNN_INLINE Vec<double> reciprocal(Vec<double> v) {
#if defined(__AVX512F__)
  Vec<double> y = (Vec<double>)_mm512_maskz_rcp14_pd(0xff, (__m512d)v);
  y = y + y * (1.0 - v * y);
  return y + y * (1.0 - v * y);
#else
  return 1.0 / v;
#endif
}

// exp(v), v clamped to the range of normal results; NaN gives a finite number.
EGNN_INLINE Vec<float> exp_clamped(Vec<float> v) {
  using I = typename Simd<float>::I;
  v = v < -87.0f ? splat(-87.0f) : v;
  v = v > 87.0f ? splat(87.0f) : v;
  // adding 1.5 * 2^23 leaves the nearest integer in the low bits
  const Vec<float> magic = v * 1.44269504f + 12582912.0f;
  const Vec<float> n = magic - 12582912.0f;
  Vec<float> f = v - n * 0.693359375f;
  f = f + n * 2.12194440e-4f;
  Vec<float> p = splat(1.9875691500e-4f);
  p = p * f + 1.3981999507e-3f;
  p = p * f + 8.3334519073e-3f;
  p = p * f + 4.1665795894e-2f;
  p = p * f + 1.6666665459e-1f;
  p = p * f + 5.0000001201e-1f;
  p = p * (f * f) + f;
  p = p + 1.0f;
  const I bits = ((I)magic) << 23;
  return (Vec<float>)((I)p + bits);
}

EGNN_INLINE Vec<double> exp_clamped(Vec<double> v) {
  using I = typename Simd<double>::I;
  v = v < -708.0 ? splat(-708.0) : v;
  v = v > 708.0 ? splat(708.0) : v;
  const Vec<double> magic = v * 1.4426950408889634 + 6755399441055744.0;
  const Vec<double> n = magic - 6755399441055744.0;
  Vec<double> f = v - n * 6.93147180369123816490e-01;
  f = f - n * 1.90821492927058770002e-10;
  // Taylor to degree 13: below 1 ulp for |f| <= ln 2 / 2
  Vec<double> p = splat(1.0 / 6227020800.0);
  p = p * f + 1.0 / 479001600.0;
  p = p * f + 1.0 / 39916800.0;
  p = p * f + 1.0 / 3628800.0;
  p = p * f + 1.0 / 362880.0;
  p = p * f + 1.0 / 40320.0;
  p = p * f + 1.0 / 5040.0;
  p = p * f + 1.0 / 720.0;
  p = p * f + 1.0 / 120.0;
  p = p * f + 1.0 / 24.0;
  p = p * f + 1.0 / 6.0;
  p = p * f + 0.5;
  p = p * (f * f) + f;
  p = p + 1.0;
  const I bits = ((I)magic) << 52;
  return (Vec<double>)((I)p + bits);
}

}  // namespace EGNN_ISA
}  // namespace egnn
