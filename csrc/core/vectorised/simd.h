// Vectors as wide as the registers of the instruction set that is compiled for.
//
// The code in this folder lies in a namespace per instruction set (EGNN_ISA), and uses no templates
// of the standard library: the linker would keep one copy of their code for all sets, and another
// set's might run on a machine that lacks it.
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
constexpr int kPanelVectors = 4;  // width of a register tile, in vectors
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
  typedef uint32_t Bits __attribute__((vector_size(kVectorBytes)));
  typedef float Unaligned __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
};

template <>
struct Simd<double> {
  typedef double V __attribute__((vector_size(kVectorBytes)));
  typedef int64_t I __attribute__((vector_size(kVectorBytes)));
  typedef uint64_t Bits __attribute__((vector_size(kVectorBytes)));
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
  return value - Vec<T>{};  // compiles to a broadcast, because x - 0 is x
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

// 1 / v for normal v > 0. With AVX-512 an estimate, refined by Newton steps.
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

// min(bound, v) and max(bound, v). NaN in v passes through.
template <class T>
EGNN_INLINE Vec<T> at_most(T bound, Vec<T> v) {
  return v > bound ? splat(bound) : v;
}

template <class T>
EGNN_INLINE Vec<T> at_least(T bound, Vec<T> v) {
  return v < bound ? splat(bound) : v;
}

#if defined(__AVX512F__)
template <>
EGNN_INLINE Vec<float> at_most<float>(float bound, Vec<float> v) {
  return (Vec<float>)_mm512_min_ps(_mm512_set1_ps(bound), (__m512)v);
}
template <>
EGNN_INLINE Vec<double> at_most<double>(double bound, Vec<double> v) {
  return (Vec<double>)_mm512_min_pd(_mm512_set1_pd(bound), (__m512d)v);
}
#elif defined(__AVX2__)
template <>
EGNN_INLINE Vec<float> at_most<float>(float bound, Vec<float> v) {
  return (Vec<float>)_mm256_min_ps(_mm256_set1_ps(bound), (__m256)v);
}
template <>
EGNN_INLINE Vec<float> at_least<float>(float bound, Vec<float> v) {
  return (Vec<float>)_mm256_max_ps(_mm256_set1_ps(bound), (__m256)v);
}
template <>
EGNN_INLINE Vec<double> at_most<double>(double bound, Vec<double> v) {
  return (Vec<double>)_mm256_min_pd(_mm256_set1_pd(bound), (__m256d)v);
}
template <>
EGNN_INLINE Vec<double> at_least<double>(double bound, Vec<double> v) {
  return (Vec<double>)_mm256_max_pd(_mm256_set1_pd(bound), (__m256d)v);
}
#endif

// e^-v. For v below -87 (float) or -708 (double) it is the value there, so that 1 + e^-v and its
// reciprocal are normal numbers.
#if defined(__AVX512F__)

// 2^f for 0 <= f < 1, relative error 8e-8 (minimax).
EGNN_INLINE Vec<float> exp2_fraction(Vec<float> f) {
  Vec<float> p = splat(1.8775767e-3f);
  p = p * f + 8.9893401e-3f;
  p = p * f + 5.5826318e-2f;
  p = p * f + 2.4015362e-1f;
  p = p * f + 6.9315307e-1f;
  return p * f + 9.9999993e-1f;
}

// The same with relative error 1e-17.
EGNN_INLINE Vec<double> exp2_fraction(Vec<double> f) {
  Vec<double> p = splat(6.3014781174337789e-10);
  p = p * f + 6.5386085534992547e-9;
  p = p * f + 1.0258188854184174e-7;
  p = p * f + 1.3207697492090331e-6;
  p = p * f + 1.5253231141364263e-5;
  p = p * f + 0.00015403509283703691;
  p = p * f + 0.0013333558734919515;
  p = p * f + 0.0096181290972450296;
  p = p * f + 0.055504108665901198;
  p = p * f + 0.24022650695904278;
  p = p * f + 0.69314718055994653;
  return p * f + 1.0;
}

EGNN_INLINE Vec<float> exp_minus(Vec<float> v) {
  const __m512 t = (__m512)at_most(126.0f, v * -1.44269504f);
  // t - floor(t); scalef multiplies by 2^floor(t)
  const Vec<float> p = exp2_fraction((Vec<float>)_mm512_reduce_ps(t, 0x9));
  return (Vec<float>)_mm512_scalef_ps((__m512)p, t);
}

EGNN_INLINE Vec<double> exp_minus(Vec<double> v) {
  const __m512d t = (__m512d)at_most(1022.0, v * -1.4426950408889634);
  const Vec<double> p = exp2_fraction((Vec<double>)_mm512_reduce_pd(t, 0x9));
  return (Vec<double>)_mm512_scalef_pd((__m512d)p, t);
}
#else

// 2^f for -1/2 <= f <= 1/2, relative error 8e-8.
EGNN_INLINE Vec<float> exp2_centred(Vec<float> f) {
  Vec<float> p = splat(1.3276472e-3f);
  p = p * f + 9.6755413e-3f;
  p = p * f + 5.5507133e-2f;
  p = p * f + 2.4022120e-1f;
  p = p * f + 6.9314697e-1f;
  return p * f + 1.00000007f;
}

// The same with relative error 1e-17.
EGNN_INLINE Vec<double> exp2_centred(Vec<double> f) {
  Vec<double> p = splat(4.4558179083360645e-10);
  p = p * f + 7.074194297288521e-9;
  p = p * f + 1.0178057087733941e-7;
  p = p * f + 1.3215432535912376e-6;
  p = p * f + 1.5252733841556773e-5;
  p = p * f + 0.00015403530463724354;
  p = p * f + 0.0013333558146406471;
  p = p * f + 0.0096181291075872567;
  p = p * f + 0.055504108664821627;
  p = p * f + 0.2402265069591016;
  p = p * f + 0.69314718055994531;
  return p * f + 1.0;
}

EGNN_INLINE Vec<float> exp_minus(Vec<float> v) {
  v = at_most(87.0f, at_least(-87.0f, v));
  // adding 1.5 * 2^23 rounds to the nearest integer n, in the low bits; adding 127 too makes them
  // the exponent of 2^n
  constexpr float kMagic = 12582912.0f + 127.0f;
  const Vec<float> magic = v * -1.44269504f + kMagic;
  const Vec<float> f = v * -1.44269504f - (magic - kMagic);
  // multiplied by 2^n rather than n added to the exponent, so that NaN stays NaN
  return exp2_centred(f) * (Vec<float>)((typename Simd<float>::Bits)magic << 23);
}

EGNN_INLINE Vec<double> exp_minus(Vec<double> v) {
  v = at_most(708.0, at_least(-708.0, v));
  constexpr double kMagic = 6755399441055744.0 + 1023.0;
  const Vec<double> magic = v * -1.4426950408889634 + kMagic;
  const Vec<double> f = v * -1.4426950408889634 - (magic - kMagic);
  return exp2_centred(f) * (Vec<double>)((typename Simd<double>::Bits)magic << 52);
}
#endif

}  // namespace EGNN_ISA
}  // namespace egnn
