// Products of a block of edges (rows) with the weights, in register tiles.
//
// A block is row-major [rows, ld] with ld a multiple of the vector width; columns beyond H are
// zero. Rows are rounded up to the tile's height: a block has kSpareRows rows to spare.
#pragma once

#include "simd.h"

namespace egnn {
namespace EGNN_ISA {

constexpr int kSpareRows = 16;

// rows of a register tile that is NV vectors wide: as many as the registers hold
template <int NV>
constexpr int tile_rows() {
#if defined(__AVX512F__)
  return NV == 4 ? 6 : NV == 3 ? 8 : 12;
#else
  return NV == 2 ? 6 : 8;
#endif
}

constexpr int kWeightRows = kPanelVectors == 4 ? 4 : 6;  // tile of the weight gradients

// Packed layout of a [K, columns] right operand: panels of up to kPanelVectors vectors, each
// [K][panel width]; columns are rounded up to a whole vector.
template <class T, class Get>
EGNN_INLINE void pack_panels(T* out, int k_count, int columns, int vectors, Get get) {
  for (int v0 = 0; v0 < vectors; v0 += kPanelVectors) {
    const int nv = vectors - v0 < kPanelVectors ? vectors - v0 : kPanelVectors;
    const int width = nv * kWidth<T>;
    for (int k = 0; k < k_count; ++k) {
      for (int c = 0; c < width; ++c) {
        const int column = v0 * kWidth<T> + c;
        out[c] = column < columns ? get(k, column) : T(0);
      }
      out += width;
    }
  }
}

template <class T, int MR, int NV>
EGNN_INLINE void gemm_tile(const T* a, int ld, const T* b, int k_count, const T* bias, T* c) {
  Vec<T> acc[MR][NV];
#pragma GCC unroll 4
  for (int n = 0; n < NV; ++n) {
    const Vec<T> start = bias != nullptr ? load(bias + n * kWidth<T>) : Vec<T>{};
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m) acc[m][n] = start;
  }
  for (int k = 0; k < k_count; ++k) {
    Vec<T> right[NV];
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) right[n] = load(b + n * kWidth<T>);
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m) {
      const Vec<T> left = splat(a[m * ld + k]);
#pragma GCC unroll 4
      for (int n = 0; n < NV; ++n) acc[m][n] += left * right[n];
    }
    b += NV * kWidth<T>;
  }
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) store(c + m * ld + n * kWidth<T>, acc[m][n]);
  }
}

template <class T, int NV>
EGNN_INLINE void gemm_panel(const T* a, int ld, int rows, const T* b, int k_count, const T* bias,
                            T* c) {
  constexpr int MR = tile_rows<NV>();
  for (int row = 0; row < rows; row += MR) {
    gemm_tile<T, MR, NV>(a + row * ld, ld, b, k_count, bias, c + row * ld);
  }
}

// c [rows, ld] = a [rows, k_count] x packed b (+ bias [ld], if not null). Rows of c beyond `rows`,
// up to the tile's height, are written as well.
template <class T>
inline __attribute__((noinline)) void gemm(const T* a, int ld, int rows, const T* b, int k_count,
                                           int vectors, const T* bias, T* c) {
  for (int v0 = 0; v0 < vectors; v0 += kPanelVectors) {
    const int nv = vectors - v0 < kPanelVectors ? vectors - v0 : kPanelVectors;
    if (nv == kPanelVectors) {
      gemm_panel<T, kPanelVectors>(a, ld, rows, b, k_count, bias, c);
    } else if (kPanelVectors > 3 && nv == 3) {
      gemm_panel<T, kPanelVectors - 1>(a, ld, rows, b, k_count, bias, c);
    } else if (kPanelVectors > 2 && nv == 2) {
      gemm_panel<T, 2>(a, ld, rows, b, k_count, bias, c);
    } else {
      gemm_panel<T, 1>(a, ld, rows, b, k_count, bias, c);
    }
    b += static_cast<int64_t>(k_count) * nv * kWidth<T>;
    c += nv * kWidth<T>;
    if (bias != nullptr) bias += nv * kWidth<T>;
  }
}

template <class T, int MR, int NV>
EGNN_INLINE void weight_tile(const T* g, const T* a, int ld, int rows, T* c) {
  Vec<T> acc[MR][NV];
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) acc[m][n] = load(c + m * ld + n * kWidth<T>);
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
    g += ld;
    a += ld;
  }
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) store(c + m * ld + n * kWidth<T>, acc[m][n]);
  }
}

template <class T, int NV>
EGNN_INLINE void weight_panel(const T* g, const T* a, int ld, int rows, int hidden, T* c) {
  // the last tile may read columns of g beyond ld, that is the next row's, into rows of c that
  // nobody reads
  for (int o = 0; o < hidden; o += kWeightRows) {
    weight_tile<T, kWeightRows, NV>(g + o, a, ld, rows, c + static_cast<int64_t>(o) * ld);
  }
}

// c [hidden, ld] += g^T a over `rows` edges; c has kWeightRows rows to spare.
template <class T>
inline __attribute__((noinline)) void weight_gemm(const T* g, const T* a, int ld, int rows, int hidden, int vectors,
                             T* c) {
  for (int v0 = 0; v0 < vectors; v0 += kPanelVectors) {
    const int nv = vectors - v0 < kPanelVectors ? vectors - v0 : kPanelVectors;
    const int column = v0 * kWidth<T>;
    if (nv == kPanelVectors) {
      weight_panel<T, kPanelVectors>(g, a + column, ld, rows, hidden, c + column);
    } else if (kPanelVectors > 3 && nv == 3) {
      weight_panel<T, kPanelVectors - 1>(g, a + column, ld, rows, hidden, c + column);
    } else if (kPanelVectors > 2 && nv == 2) {
      weight_panel<T, 2>(g, a + column, ld, rows, hidden, c + column);
    } else {
      weight_panel<T, 1>(g, a + column, ld, rows, hidden, c + column);
    }
  }
}

}  // namespace EGNN_ISA
}  // namespace egnn
