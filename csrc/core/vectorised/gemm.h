// Matrix products of a block of rows with weights, in register tiles.
//
// A tile of rows is row-major [rows, ld], ld a multiple of the vector width; columns beyond its
// width are zero. The number of rows is rounded up to the height of a register tile: kSpareRows
// rows follow.
#pragma once

#include "problem.h"
#include "shuffles.h"

namespace egnn {
namespace EGNN_ISA {

// No bias, or factors that are all 1.
template <class T>
constexpr const T* kNone = nullptr;

// The height of a register tile NV vectors wide: as many rows as the registers hold.
template <int NV>
constexpr int tile_rows() {
#if defined(__AVX512F__)
  return NV == 4 ? 6 : NV == 3 ? 8 : 12;
#else
  return NV == 2 ? 6 : 8;
#endif
}

constexpr int kWeightRows = 6;  // height of the register tile of weight_gemm

// Packs a right operand [k_count, columns] into panels of up to kPanelVectors vectors, each
// [k_count, panel width]; columns are rounded up to whole vectors. Element (k, c) is read from
// w[k * k_stride + c * column_stride].
template <class T>
inline void pack_panels(const T* w, int64_t k_stride, int64_t column_stride, int k_count,
                        int columns, T* out) {
  constexpr int W = kWidth<T>;
  const int vectors = (columns + kWidth<T> - 1) / kWidth<T>;
  for (int v0 = 0; v0 < vectors; v0 += kPanelVectors) {
    const int nv = vectors - v0 < kPanelVectors ? vectors - v0 : kPanelVectors;
    const int width = nv * W;
    // squares of W x W elements are transposed in registers where columns are contiguous
    const int squares = k_stride == 1 ? k_count / W * W : 0;
    for (int n = 0; n < nv && squares != 0; ++n) {
      const int column = (v0 + n) * W;
      if (column + W > columns) continue;
      for (int k = 0; k < squares; k += W) {
        Vec<T> square[W];
        for (int c = 0; c < W; ++c) square[c] = load(w + k + (column + c) * column_stride);
        transpose<T>(square);
        for (int c = 0; c < W; ++c) store(out + (k + c) * width + n * W, square[c]);
      }
    }
    const int done = squares == 0 ? 0 : columns / W * W - v0 * W;  // the panel's columns in squares
    for (int k = 0; k < k_count; ++k) {
      for (int c = k < squares ? done : 0; c < width; ++c) {
        const int column = v0 * W + c;
        out[k * width + c] = column < columns ? w[k * k_stride + column * column_stride] : T(0);
      }
    }
    out += static_cast<int64_t>(k_count) * width;
  }
}

template <auto value_>
struct Constant {
  static constexpr auto value = value_;
};

// Calls body with the width of a panel, from 1 to kPanelVectors vectors, as a constant.
template <class Body>
EGNN_INLINE void for_width(int vectors, const Body& body) {
  if (vectors == kPanelVectors) {
    body(Constant<kPanelVectors>{});
  } else if (kPanelVectors > 3 && vectors == 3) {
    body(Constant<(kPanelVectors > 3 ? 3 : 1)>{});
  } else if (kPanelVectors > 2 && vectors == 2) {
    body(Constant<(kPanelVectors > 2 ? 2 : 1)>{});
  } else {
    body(Constant<1>{});
  }
}

// Calls body(first column, width) for the panels of a row. The width, in vectors, is a constant, so
// that a panel's sums over rows stay in registers.
template <class T, class Body>
EGNN_INLINE void for_panels(int vectors, const Body& body) {
  for (int v0 = 0; v0 < vectors; v0 += kPanelVectors) {
    const int nv = vectors - v0 < kPanelVectors ? vectors - v0 : kPanelVectors;
    for_width(nv, [&](auto width) { body(v0 * kWidth<T>, width); });
  }
}

// What a product is added to: zeros, the bias, or what the result holds.
enum class Start { kZero, kBias, kResult };

template <class T, int MR, int NV>
EGNN_INLINE void gemm_tile(const T* a, int64_t lda, const T* b, int k_count, Start start,
                           const T* bias, T* c, int64_t ldc) {
  Vec<T> acc[MR][NV];
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) {
      acc[m][n] = start == Start::kZero   ? Vec<T>{}
                  : start == Start::kBias ? load(bias + n * kWidth<T>)
                                          : load(c + m * ldc + n * kWidth<T>);
    }
  }
  for (int k = 0; k < k_count; ++k) {
    Vec<T> right[NV];
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) right[n] = load(b + n * kWidth<T>);
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m) {
      const Vec<T> left = splat(a[m * lda + k]);
#pragma GCC unroll 4
      for (int n = 0; n < NV; ++n) acc[m][n] += left * right[n];
    }
    b += NV * kWidth<T>;
  }
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) store(c + m * ldc + n * kWidth<T>, acc[m][n]);
  }
}

// c [rows, columns] = start + a [rows, k_count] b [k_count, columns], for packed b and columns in
// whole vectors; rows of a and c are lda and ldc apart. Rows beyond `rows`, up to the height of a
// register tile, are read and written too.
template <class T>
inline __attribute__((noinline)) void gemm(const T* a, int64_t lda, int rows, const T* b,
                                           int k_count, int vectors, Start start, const T* bias,
                                           T* c, int64_t ldc) {
  const auto panel = [&](auto width) {
    constexpr int NV = decltype(width)::value;
    constexpr int MR = tile_rows<NV>();
    for (int row = 0; row < rows; row += MR) {
      gemm_tile<T, MR, NV>(a + row * lda, lda, b, k_count, start, bias, c + row * ldc, ldc);
    }
  };
  for (int v0 = 0; v0 < vectors; v0 += kPanelVectors) {
    const int nv = vectors - v0 < kPanelVectors ? vectors - v0 : kPanelVectors;
    for_width(nv, panel);
    b += static_cast<int64_t>(k_count) * nv * kWidth<T>;
    c += nv * kWidth<T>;
    if (start == Start::kBias) bias += nv * kWidth<T>;
  }
}

template <class T, int MR, int NV>
EGNN_INLINE void weight_tile(const T* g, int64_t ldg, const T* a, int64_t lda, int rows,
                             bool overwrite, T* c, int64_t ldc) {
  Vec<T> acc[MR][NV];
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) {
      acc[m][n] = overwrite ? Vec<T>{} : load(c + m * ldc + n * kWidth<T>);
    }
  }
  for (int row = 0; row < rows; ++row) {
    Vec<T> right[NV];
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) right[n] = load(a + n * kWidth<T>);
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
      const Vec<T> left = splat(g[m]);
#pragma GCC unroll 4
      for (int n = 0; n < NV; ++n) acc[m][n] += left * right[n];
    }
    g += ldg;
    a += lda;
  }
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) store(c + m * ldc + n * kWidth<T>, acc[m][n]);
  }
}

// c [outputs, columns] = (overwrite) or += g^T a, for g [rows, outputs] and a [rows, columns],
// columns in whole vectors: a weight's gradient. The last register tile also reads columns of g
// beyond `outputs` (padding, or the next row) and writes their products to the rows after c, of
// which there must be kWeightRows.
template <class T>
inline __attribute__((noinline)) void weight_gemm(const T* g, int64_t ldg, const T* a, int64_t lda,
                                                  int rows, int outputs, int vectors,
                                                  bool overwrite, T* c, int64_t ldc) {
  const auto panel = [&](auto width) {
    constexpr int NV = decltype(width)::value;
    for (int o = 0; o < outputs; o += kWeightRows) {
      weight_tile<T, kWeightRows, NV>(g + o, ldg, a, lda, rows, overwrite, c + o * ldc, ldc);
    }
  };
  for (int v0 = 0; v0 < vectors; v0 += kPanelVectors) {
    const int nv = vectors - v0 < kPanelVectors ? vectors - v0 : kPanelVectors;
    for_width(nv, panel);
    a += nv * kWidth<T>;
    c += nv * kWidth<T>;
  }
}

// out = (overwrite) or += acc; one vector of a weight gradient
template <class T>
EGNN_INLINE void add_to_sums(T* out, bool overwrite, Vec<T> acc) {
  store(out, overwrite ? acc : load(out) + acc);
}

// out [columns] = (overwrite) or += the sum over `rows` rows of factor[row] tile[row], columns in
// whole vectors; factor null: 1. The gradient of a bias, or of a weight with one row.
template <class T>
inline void add_columns(const T* tile, int64_t ld, const T* factor, int rows, int vectors,
                        bool overwrite, T* out) {
  for (int v = 0; v < vectors; ++v) {
    const int column = v * kWidth<T>;
    Vec<T> acc{};  // starts at 0 in each block, which rounds less than one running sum
    for (int b = 0; b < rows; ++b) {
      const Vec<T> value = load(tile + b * ld + column);
      acc += factor != nullptr ? value * factor[b] : value;
    }
    add_to_sums(out + column, overwrite, acc);
  }
}

}  // namespace EGNN_ISA
}  // namespace egnn
