// One task of the edge pass, forward: distances, phi_e, gate, phi_x, sums to receivers.
#pragma once

#include "receivers.h"

namespace egnn {
namespace EGNN_ISA {

// Elements of scratch that forward_task takes: two tiles, d and t, each rounded up to a vector.
template <class T>
inline int64_t forward_scratch(const Problem<T>& p) {
  return 2 * static_cast<int64_t>(kBlockRows) * p.ld + 2 * kBlockRows * p.dim + 4 * kWidth<T>;
}

// The gates g = sigmoid(w_g . n + b_g) of a block; `products` are the products w_g n.
template <class T>
inline void make_gates(const Problem<T>& p, Block<T>& blk, const RowVectors<T>& products) {
  products.sum(blk.count, blk.gate);
  for (int b = 0; b < blk.count; b += kWidth<T>) {
    store(blk.gate + b, reciprocal(1 + exp_minus(load(blk.gate + b) + p.b_g)));
  }
}

// m = g mask n; tiles, m may be n.
template <class T>
inline void scale_messages(const Problem<T>& p, const Block<T>& blk, const T* n, T* m) {
  for (int b = 0; b < blk.count; ++b) {
    const T factor = blk.gate[b] * blk.mask[b];
    for (int v = 0; v < p.vectors; ++v) {
      const int64_t at = b * p.ld + v * kWidth<T>;
      store(m + at, load(n + at) * factor);
    }
  }
}

// The messages m = mask g act(z2); tiles, m may be z2.
template <class T, Activation act>
inline void make_messages(const Problem<T>& p, Block<T>& blk, const T* z2, T* m) {
  RowVectors<T> logits;
  for (int b = 0; b < blk.count; ++b) {
    Vec<T> logit{};
    for (int v = 0; v < p.vectors; ++v) {
      const int64_t at = b * p.ld + v * kWidth<T>;
      const Vec<T> n = activate<T, act>(load(z2 + at), p.options.negative_slope);
      store(m + at, n);
      if (p.attention) logit += n * load(p.w_g + v * kWidth<T>);
    }
    if (p.attention) logits.row[b] = logit;
  }
  if (p.attention) make_gates(p, blk, logits);
  if (p.attention || p.edge_mask != nullptr) scale_messages(p, blk, m, m);
}

// The head's output s = w_x . act(z3), with tanh if the options say so; `products` are the products
// w_x act(z3).
template <class T>
inline void make_head_outputs(const Problem<T>& p, Block<T>& blk, const RowVectors<T>& products) {
  products.sum(blk.count, blk.s);
  if (!p.options.coord_tanh) return;
  for (int b = 0; b < blk.count; ++b) blk.s[b] = tanh_scalar(blk.s[b]);
}

// The shifts t = mask clamp(s u), u = d / rho, of a block. z3 is a tile; d and t are
// [D, kBlockRows].
template <class T, Activation act>
inline void make_shifts(const Problem<T>& p, Block<T>& blk, const T* z3, const T* d, T* t) {
  RowVectors<T> products;
  for (int b = 0; b < blk.count; ++b) {
    Vec<T> sum{};
    for (int v = 0; v < p.vectors; ++v) {
      const int column = v * kWidth<T>;
      sum += activate<T, act>(load(z3 + b * p.ld + column), p.options.negative_slope) *
             load(p.w_x + column);
    }
    products.row[b] = sum;
  }
  make_head_outputs(p, blk, products);
  for (int c = 0; c < p.dim; ++c) {
    for (int b = 0; b < blk.count; ++b) {
      const T su = blk.s[b] * blk.inverse_rho[b] * d[c * kBlockRows + b];
      t[c * kBlockRows + b] = blk.mask[b] * clamp_scalar(su, p.options.coord_clamp);
    }
  }
}

// Adds the messages and shifts of a task's edges to M and X.
template <class T, Activation act>
inline void forward_task(const Problem<T>& p, int64_t task, T* scratch) {
  Scratch<T> memory{scratch};
  T* a1 = memory.take(static_cast<int64_t>(kBlockRows) * p.ld);
  T* m = memory.take(static_cast<int64_t>(kBlockRows) * p.ld);
  T* d = memory.take(kBlockRows * p.dim);
  T* t = memory.take(kBlockRows * p.dim);
  Block<T> blk;

  const int64_t begin = p.task_begin(task), end = p.task_begin(task + 1);
  RowSink<T> sink(p, task, begin, end);
  int64_t row = find_row(p.rowptr, p.nodes, begin);
  for (int64_t e = begin; e < end; e += kBlockEdges) {
    const int count = static_cast<int>(end - e < kBlockEdges ? end - e : kBlockEdges);
    gather_block(p, e, count, row, blk, d);
    first_activation<T, act, false>(p, blk, a1, static_cast<T*>(nullptr));

    T* z2 = p.z2 != nullptr ? p.z2 + e * p.ld : m;
    gemm(a1, p.ld, count, p.w2_forward, p.hidden, p.vectors, Start::kBias, p.b2, z2, p.ld);
    make_messages<T, act>(p, blk, z2, m);
    sum_to_receivers(p, blk, m, p.m, p.hidden, sink);
    if (!p.head) continue;
    T* z3 = p.z3 != nullptr ? p.z3 + e * p.ld : a1;
    gemm(m, p.ld, count, p.w3_forward, p.hidden, p.vectors, Start::kBias, p.b3, z3, p.ld);
    make_shifts<T, act>(p, blk, z3, d, t);
    sum_coords(p, blk, t, p.shift, sink);
  }
}

}  // namespace EGNN_ISA
}  // namespace egnn
