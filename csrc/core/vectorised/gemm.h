// Products of a block of edges (rows) with the weights, in register tiles.
//
// A block is row-major [rows, ld] with ld a multiple of the vector width; columns beyond H are
// zero. Rows are rounded up to the tile's height: a block has kSpareRows rows to spare.
#pragma once

#include "problem.h"
#include "shuffles.h"

namespace egnn {
namespace EGNN_ISA {

// rows of a register tile that is NV vectors wide: as many as the registers hold
template <int NV>
constexpr int tile_rows() {
#if defined(__AVX512F__)
  return NV == 4 ? 6 : NV == 3 ? 8 : 12;
#else
  return NV == 2 ? 6 : 8;
#endif
}

constexpr int kWeightRows = 6;  // tile of the weight gradients

// Packed layout of a [K, columns] right operand: panels of up to kPanelVectors vectors, each
// [K][panel width]; columns are rounded up to a whole vector. Element (k, c) is read at
// w[k * k_stride + c * column_stride].
template <class T>
inline void pack_panels(const T* w, int64_t k_stride, int64_t column_stride, int k_count,
                        int columns, T* out) {
  constexpr int W = kWidth<T>;
  const int vectors = (columns + kWidth<T> - 1) / kWidth<T>;
  for (int v0 = 0; v0 < vectors; v0 += kPanelVectors) {
    const int nv = vectors - v0 < kPanelVectors ? vectors - v0 : kPanelVectors;
    const int width = nv * W;
    // squares of W x W elements where the rows of a column-major operand are whole
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
    const int done = squares == 0 ? 0 : columns / W * W - v0 * W;  // columns of the panel
    for (int k = 0; k < k_count; ++k) {
      for (int c = k < squares ? done : 0; c < width; ++c) {
        const int column = v0 * W + c;
        out[k * width + c] = column < columns ? w[k * k_stride + column * column_stride] : T(0);
      }
    }
    out += static_cast<int64_t>(k_count) * width;
  }
}

template <int value_>
struct Width {
  static constexpr int value = value_;
};

// Calls body with the width of a panel, from 1 to kPanelVectors vectors, as a constant.
template <class Body>
EGNN_INLINE void for_width(int vectors, const Body& body) {
  if (vectors == kPanelVectors) {
    body(Width<kPanelVectors>{});
  } else if (kPanelVectors > 3 && vectors == 3) {
    body(Width<(kPanelVectors > 3 ? 3 : 1)>{});
  } else if (kPanelVectors > 2 && vectors == 2) {
    body(Width<(kPanelVectors > 2 ? 2 : 1)>{});
  } else {
    body(Width<1>{});
  }
}

// What a product starts from.
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

// c [rows, vectors] (row stride ldc) = start + a [rows, k_count] (row stride lda) x packed b.
// Rows beyond `rows`, up to the tile's height, are read and written as well.
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
EGNN_INLINE void weight_tile(const T* g, int64_t ldg, const T* a, int64_t lda, int rows, bool fresh,
                             T* c, int64_t ldc) {
  Vec<T> acc[MR][NV];
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) {
      acc[m][n] = fresh ? Vec<T>{} : load(c + m * ldc + n * kWidth<T>);
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

// c [outputs, vectors] (row stride ldc) = (fresh) or += g^T a over `rows` rows. The last tile reads
// columns of g beyond `outputs` (the row's padding or the next row) into the kWeightRows rows that
// c has to spare.
template <class T>
inline __attribute__((noinline)) void weight_gemm(const T* g, int64_t ldg, const T* a, int64_t lda,
                                                  int rows, int outputs, int vectors, bool fresh,
                                                  T* c, int64_t ldc) {
  const auto panel = [&](auto width) {
    constexpr int NV = decltype(width)::value;
    for (int o = 0; o < outputs; o += kWeightRows) {
      weight_tile<T, kWeightRows, NV>(g + o, ldg, a, lda, rows, fresh, c + o * ldc, ldc);
    }
  };
  for (int v0 = 0; v0 < vectors; v0 += kPanelVectors) {
    const int nv = vectors - v0 < kPanelVectors ? vectors - v0 : kPanelVectors;
    for_width(nv, panel);
    a += nv * kWidth<T>;
    c += nv * kWidth<T>;
  }
}

}  // namespace EGNN_ISA
}  // namespace egnn
