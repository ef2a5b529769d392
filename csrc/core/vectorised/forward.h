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

// The gates of a block, g = sigmoid(w_g . n + b_g), given the products' parts.
template <class T>
inline void make_gates(const Problem<T>& p, Block<T>& blk, const RowParts<T>& logits) {
  logits.sum(blk.count, blk.gate);
  for (int b = 0; b < blk.count; b += kWidth<T>) {
    store(blk.gate + b, reciprocal(1 + exp_minus(load(blk.gate + b) + p.b_g)));
  }
}

// rows of out = factor * rows of n, factor = gate * mask
template <class T>
inline void scale_messages(const Problem<T>& p, const Block<T>& blk, const T* n, T* out) {
  for (int b = 0; b < blk.count; ++b) {
    const T factor = blk.gate[b] * blk.mask[b];
    for (int v = 0; v < p.vectors; ++v) {
      const int64_t at = b * p.ld + v * kWidth<T>;
      store(out + at, load(n + at) * factor);
    }
  }
}

// From the second linear's output z the message m = mask * gate * act(z); m may be z.
template <class T, int act>
inline void make_messages(const Problem<T>& p, Block<T>& blk, const T* z, T* m) {
  RowParts<T> logits;
  for (int b = 0; b < blk.count; ++b) {
    Vec<T> logit{};
    for (int v = 0; v < p.vectors; ++v) {
      const int64_t at = b * p.ld + v * kWidth<T>;
      const Vec<T> n = activate<T, act>(load(z + at), p.slope);
      store(m + at, n);
      if (p.attention) logit += n * load(p.w_g + v * kWidth<T>);
    }
    if (p.attention) logits.row[b] = logit;
  }
  if (p.attention) make_gates(p, blk, logits);
  if (p.attention || p.edge_mask != nullptr) scale_messages(p, blk, m, m);
}

// s = w_x . act(z), tanh if asked, given the products' parts.
template <class T>
inline void make_heads(const Problem<T>& p, Block<T>& blk, const RowParts<T>& parts) {
  parts.sum(blk.count, blk.s);
  if (!p.tanh) return;
  for (int b = 0; b < blk.count; ++b) blk.s[b] = tanh_scalar(blk.s[b]);
}

// From the head's first linear's output z: t = mask * clamp(s u).
template <class T, int act>
inline void make_shifts(const Problem<T>& p, Block<T>& blk, const T* z, const T* d, T* t) {
  RowParts<T> parts;
  for (int b = 0; b < blk.count; ++b) {
    Vec<T> sum{};
    for (int v = 0; v < p.vectors; ++v) {
      const int column = v * kWidth<T>;
      sum += activate<T, act>(load(z + b * p.ld + column), p.slope) * load(p.w_x + column);
    }
    parts.row[b] = sum;
  }
  make_heads(p, blk, parts);
  for (int c = 0; c < p.dim; ++c) {
    for (int b = 0; b < blk.count; ++b) {
      const T su = blk.s[b] * blk.inverse_rho[b] * d[c * kBlockRows + b];
      t[c * kBlockRows + b] = blk.mask[b] * clamp_scalar(su, p.clamp);
    }
  }
}

template <class T, int act>
inline void forward_task(const Problem<T>& p, int64_t task, T* scratch) {
  Carver<T> carve{scratch};
  T* a = carve.take(static_cast<int64_t>(kBlockRows) * p.ld);
  T* m = carve.take(static_cast<int64_t>(kBlockRows) * p.ld);
  T* d = carve.take(kBlockRows * p.dim);
  T* t = carve.take(kBlockRows * p.dim);
  Block<T> blk;

  const int64_t begin = p.task_begin(task), end = p.task_begin(task + 1);
  RowSink<T> sink(p, task, begin, end);
  int64_t row = find_row(p.rowptr, p.nodes, begin);
  for (int64_t e = begin; e < end; e += kBlockEdges) {
    const int count = static_cast<int>(end - e < kBlockEdges ? end - e : kBlockEdges);
    gather_block(p, e, count, row, blk, d);
    first_layer<T, act, false>(p, blk, a, static_cast<T*>(nullptr));

    T* z2 = p.z2 != nullptr ? p.z2 + e * p.ld : m;
    gemm(a, p.ld, count, p.w2_forward, p.hidden, p.vectors, Start::kBias, p.b2, z2, p.ld);
    make_messages<T, act>(p, blk, z2, m);
    sum_to_receivers(p, blk, m, p.m, p.hidden, sink);
    if (!p.head) continue;
    T* z3 = p.z3 != nullptr ? p.z3 + e * p.ld : a;
    gemm(m, p.ld, count, p.w3_forward, p.hidden, p.vectors, Start::kBias, p.b3, z3, p.ld);
    make_shifts<T, act>(p, blk, z3, d, t);
    sum_coords(p, blk, t, p.shift, sink);
  }
}

}  // namespace EGNN_ISA
}  // namespace egnn
