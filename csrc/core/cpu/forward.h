// The edge pass of one task: distances, edge MLP, gate, coordinate head, sums to receivers.
#pragma once

#include "block.h"

namespace egnn {
namespace EGNN_ISA {

template <class T>
inline int64_t forward_scratch(const Problem<T>& p) {
  // two tiles, d and t, and the roundings of four pieces
  return 2 * static_cast<int64_t>(kBlockRows) * p.ld + 2 * kBlockRows * p.dim + 4 * kWidth<T>;
}

// Second linear's output z becomes the message m = mask * gate * act(z).
template <class T, int act>
inline void make_messages(const Problem<T>& p, const Block<T>& blk, T* z) {
  const T* w_g = p.w_g;
  const T slope = p.slope;
  const int vectors = p.vectors;
  const bool scaled = p.attention || p.edge_mask != nullptr;
  for (int b = 0; b < blk.count; ++b) {
    T* row = z + b * p.ld;
    Vec<T> logit{};
    for (int v = 0; v < vectors; ++v) {
      const Vec<T> n = activate<T, act>(load(row + v * kWidth<T>), slope);
      store(row + v * kWidth<T>, n);
      if (scaled) logit += n * load(w_g + v * kWidth<T>);
    }
    if (!scaled) continue;
    const T gate = p.attention ? sigmoid_scalar(horizontal_sum<T>(logit) + p.b_g) : T(1);
    const T factor = gate * blk.mask[b];
    for (int v = 0; v < vectors; ++v) {
      store(row + v * kWidth<T>, load(row + v * kWidth<T>) * factor);
    }
  }
}

// The head's first linear's output z becomes t = mask * clamp(s u), s = w_x . act(z).
template <class T, int act>
inline void make_shifts(const Problem<T>& p, const Block<T>& blk, const T* z, const T* d, T* t) {
  const T* w_x = p.w_x;
  const T slope = p.slope;
  const int vectors = p.vectors;
  for (int b = 0; b < blk.count; ++b) {
    Vec<T> sum{};
    for (int v = 0; v < vectors; ++v) {
      const int column = v * kWidth<T>;
      sum += activate<T, act>(load(z + b * p.ld + column), slope) * load(w_x + column);
    }
    T s = horizontal_sum<T>(sum);
    if (p.tanh) s = tanh_scalar(s);
    const T factor = s * blk.inverse_rho[b];
    for (int c = 0; c < p.dim; ++c) {
      t[b * p.dim + c] = blk.mask[b] * clamp_scalar(factor * d[b * p.dim + c], p.clamp);
    }
  }
}

template <class T, int act>
inline void forward_task(const Problem<T>& p, int64_t task, T* scratch) {
  Carver<T> carve{scratch};
  T* a = carve.take(static_cast<int64_t>(kBlockRows) * p.ld);
  T* n = carve.take(static_cast<int64_t>(kBlockRows) * p.ld);
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

    gemm(a, p.ld, count, p.w2_forward, p.hidden, p.vectors, Start::kBias, p.b2, n, p.ld);
    make_messages<T, act>(p, blk, n);
    sum_to_receivers(p, blk, n, p.m, p.hidden, sink);
    if (!p.head) continue;
    gemm(n, p.ld, count, p.w3_forward, p.hidden, p.vectors, Start::kBias, p.b3, a, p.ld);
    make_shifts<T, act>(p, blk, a, d, t);
    sum_coords(p, blk, t, p.shift, sink);
  }
}

}  // namespace EGNN_ISA
}  // namespace egnn
