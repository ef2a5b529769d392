// Sums of tasks' accumulators of weight gradients, in double precision.
#pragma once

#include "kernel_table.h"
#include "simd.h"

namespace egnn {
namespace EGNN_ISA {

// As many floats as a vector of doubles has elements.
typedef float Half __attribute__((vector_size(kVectorBytes / 2), aligned(4), may_alias));

// A vector of doubles, converted from T or rounded to it.
EGNN_INLINE Vec<double> load_doubles(const float* p) {
  return __builtin_convertvector(*reinterpret_cast<const Half*>(p), Vec<double>);
}
EGNN_INLINE Vec<double> load_doubles(const double* p) { return load(p); }

EGNN_INLINE void store_rounded(float* p, Vec<double> v) {
  *reinterpret_cast<Half*>(p) = __builtin_convertvector(v, Half);
}
EGNN_INLINE void store_rounded(double* p, Vec<double> v) { store(p, v); }

// NV vectors of add_sums.
template <class T, int NV>
EGNN_INLINE void add_sums_piece(const T* sums, int64_t stride, int64_t tasks, bool overwrite,
                                double* total) {
  Vec<double> acc[NV];
  for (int n = 0; n < NV; ++n) {
    acc[n] = overwrite ? Vec<double>{} : load(total + n * kWidth<double>);
  }
  for (int64_t task = 0; task < tasks; ++task) {
    for (int n = 0; n < NV; ++n) {
      acc[n] += load_doubles(sums + task * stride + n * kWidth<double>);
    }
  }
  for (int n = 0; n < NV; ++n) store(total + n * kWidth<double>, acc[n]);
}

// See KernelTable::add_sums; begin and end are multiples of a vector.
template <class T>
void add_sums(const T* sums, int64_t stride, int64_t tasks, int64_t begin, int64_t end,
              bool overwrite, double* total) {
  int64_t at = begin;
  for (; at + 8 * kWidth<double> <= end; at += 8 * kWidth<double>) {
    add_sums_piece<T, 8>(sums + at, stride, tasks, overwrite, total + at);
  }
  for (; at < end; at += kWidth<double>) {
    add_sums_piece<T, 1>(sums + at, stride, tasks, overwrite, total + at);
  }
}

// NV vectors of a row: the sum over tasks, rounded.
template <int NV, class T, class Sum>
EGNN_INLINE void write_vectors(const Sum* from, int64_t stride, int64_t tasks, T* to) {
  Vec<double> acc[NV] = {};
  for (int64_t task = 0; task < tasks; ++task) {
#pragma GCC unroll 8
    for (int n = 0; n < NV; ++n) {
      acc[n] += load_doubles(from + task * stride + n * kWidth<double>);
    }
  }
#pragma GCC unroll 8
  for (int n = 0; n < NV; ++n) store_rounded(to + n * kWidth<double>, acc[n]);
}

// See KernelTable::write_sums; in double precision, whether the sums are T or double.
template <class T, class Sum>
EGNN_INLINE void write_rows_of_sums(const Sum* sums, int64_t stride, int64_t tasks,
                                    const GradientRows<T>& to) {
  constexpr int W = kWidth<double>;
  for (int64_t r = 0; r < to.rows; ++r) {
    const Sum* from = sums + to.at + r * to.ld;
    T* row = to.gradient + r * to.stride;
    int64_t c = 0;
    for (; c + 8 * W <= to.columns; c += 8 * W) {
      write_vectors<8>(from + c, stride, tasks, row + c);
    }
    for (; c + W <= to.columns; c += W) write_vectors<1>(from + c, stride, tasks, row + c);
    for (; c < to.columns; ++c) {
      double sum = 0;
      for (int64_t task = 0; task < tasks; ++task) sum += from[task * stride + c];
      row[c] = static_cast<T>(sum);
    }
  }
}

template <class T>
void write_sums(const T* sums, int64_t stride, int64_t tasks, const GradientRows<T>& to) {
  write_rows_of_sums<T>(sums, stride, tasks, to);
}

template <class T>
void write_total(const double* total, const GradientRows<T>& to) {
  write_rows_of_sums<T>(total, 0, 1, to);
}

}  // namespace EGNN_ISA
}  // namespace egnn
