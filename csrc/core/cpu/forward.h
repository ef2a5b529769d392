// The edge pass of one task: distances, edge MLP, gate, coordinate head, sums to receivers.
#pragma once

#include "block.h"

namespace egnn {
namespace EGNN_ISA {

template <class T>
inline int64_t forward_scratch(const Problem<T>& p) {
  // two tiles, row sums (a vector a row), d and t, and the roundings of six pieces
  return 2 * static_cast<int64_t>(kBlockRows) * p.ld + kBlockRows * kWidth<T> +
         2 * kBlockRows * p.dim + 8 * kWidth<T>;
}

template <class T, int act>
inline void forward_task(const Problem<T>& p, int64_t task, T* scratch) {
  Carver<T> carve{scratch};
  T* a = carve.take(static_cast<int64_t>(kBlockRows) * p.ld);
  T* n = carve.take(static_cast<int64_t>(kBlockRows) * p.ld);
  auto* sums = reinterpret_cast<Vec<T>*>(carve.take(kBlockRows * kWidth<T>));
  T* d = carve.take(kBlockRows * p.dim);
  T* t = carve.take(kBlockRows * p.dim);
  Block<T> blk;

  const int64_t begin = task * p.task_edges;
  const int64_t end = begin + p.task_edges < p.edges ? begin + p.task_edges : p.edges;
  RowSink<T> sink(p, task, begin, end);
  int64_t row = find_row(p.rowptr, p.nodes, begin);
  for (int64_t e = begin; e < end; e += kBlockEdges) {
    const int count = static_cast<int>(end - e < kBlockEdges ? end - e : kBlockEdges);
    gather_block(p, e, count, row, blk, d);
    first_layer<T, act, false>(p, blk, a, static_cast<T*>(nullptr));

    clear_sums<T>(sums);
    const bool attention = p.attention;
    gemm<T>(a, p.ld, count, p.w2_forward, p.hidden, p.vectors, [&](int b, int v, Vec<T> z) {
      const int column = v * kWidth<T>;
      const Vec<T> value = activate<T, act>(z + load(p.b2 + column), p.slope);
      store(n + b * p.ld + column, value);
      if (attention) sums[b] += value * load(p.w_g + column);
    });
    gate_block(p, blk, sums);
    if (attention || p.edge_mask != nullptr) {
      for (int b = 0; b < count; ++b) {
        const T factor = blk.gate[b] * blk.mask[b];
        for (int v = 0; v < p.vectors; ++v) {
          T* place = n + b * p.ld + v * kWidth<T>;
          store(place, load(place) * factor);
        }
      }
    }
    sum_to_receivers(p, blk, n, p.m, p.hidden, sink);
    if (!p.head) continue;

    clear_sums<T>(sums);
    gemm<T>(n, p.ld, count, p.w3_forward, p.hidden, p.vectors, [&](int b, int v, Vec<T> z) {
      const int column = v * kWidth<T>;
      sums[b] += activate<T, act>(z + load(p.b3 + column), p.slope) * load(p.w_x + column);
    });
    for (int b = 0; b < count; ++b) {
      T s = horizontal_sum<T>(sums[b]);
      if (p.tanh) s = tanh_scalar(s);
      const T factor = s * blk.inverse_rho[b];
      for (int c = 0; c < p.dim; ++c) {
        t[b * p.dim + c] = blk.mask[b] * clamp_scalar(factor * d[b * p.dim + c], p.clamp);
      }
    }
    sum_coords(p, blk, t, p.shift, sink);
  }
}

}  // namespace EGNN_ISA
}  // namespace egnn
