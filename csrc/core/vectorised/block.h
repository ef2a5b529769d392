// A block of edges: its indices and geometry, and its first linear and activation.
#pragma once

#include "activations.h"
#include "gemm.h"
#include "problem.h"

namespace egnn {
namespace EGNN_ISA {

constexpr int kBlockRows = kBlockEdges + kSpareRows;

// Rows from `count` on have valid indices, those of the first edge, because a register tile may
// read them; nothing else of them is set.
template <class T>
struct Block {
  int count;
  int32_t receiver[kBlockRows], sender[kBlockRows];
  int64_t edge[kBlockRows];   // the user's number
  T r[kBlockRows];            // squared distance
  T inverse_rho[kBlockRows];  // 1 / rho
  T mask[kBlockRows];
  T gate[kBlockRows];  // g; 1 without attention
  T s[kBlockRows];     // the coordinate head's output
  const T* attr[kBlockRows];
};

// Coordinates of a block are arrays [D, kBlockRows]: component c of row b is at c * kBlockRows + b.
// Its features are tiles [kBlockRows, ld].

// Divides a worker's scratch memory into arrays aligned to a vector.
template <class T>
struct Scratch {
  T* next;
  T* take(int64_t count) {
    T* array = next;
    const int64_t unit = kWidth<T>;
    next += (count + unit - 1) / unit * unit;
    return array;
  }
};

// The receiver of an edge: the row with rowptr[row] <= edge < rowptr[row + 1].
inline int64_t find_row(const int64_t* rowptr, int64_t nodes, int64_t edge) {
  int64_t low = 0, high = nodes;  // rowptr[low] <= edge < rowptr[high]
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    if (rowptr[middle] <= edge) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// Rows of Q are at random addresses: they are prefetched this many edges ahead.
constexpr int kAhead = 8;

template <class T>
EGNN_INLINE void prefetch_sender(const Problem<T>& p, const Block<T>& blk, int b) {
  const T* row = p.pq + blk.sender[b] * p.pq_stride + p.pq_stride / 2;
  for (int c = 0; c < p.hidden; c += 64 / static_cast<int>(sizeof(T))) __builtin_prefetch(row + c);
}

// The block of edges [begin, begin + count): indices, mask, r = |d|^2, 1 / rho, and d = x_i - x_j
// into d [D, kBlockRows]. `row` is at most the first edge's receiver, and becomes the last one's.
template <class T>
inline void gather_block(const Problem<T>& p, int64_t begin, int count, int64_t& row, Block<T>& blk,
                         T* d) {
  blk.count = count;
  for (int b = 0; b < count; ++b) {
    const int64_t e = begin + b;
    while (e >= p.rowptr[row + 1]) ++row;
    blk.receiver[b] = static_cast<int32_t>(row);
    if (p.senders != nullptr) {
      blk.sender[b] = p.senders[e];
    } else {  // all nodes of the component but the receiver
      const int64_t j = p.first[row] + (e - p.rowptr[row]);
      blk.sender[b] = static_cast<int32_t>(j + (j >= row));
    }
    blk.edge[b] = p.perm != nullptr ? p.perm[e] : e;
    if (b < kAhead) prefetch_sender(p, blk, b);
  }
  for (int b = count; b < kBlockRows; ++b) {
    blk.receiver[b] = blk.receiver[0];
    blk.sender[b] = blk.sender[0];
    blk.edge[b] = blk.edge[0];
  }
  for (int b = 0; b < count; ++b) {
    const T* xi = p.x + static_cast<int64_t>(blk.receiver[b]) * p.dim;
    const T* xj = p.x + static_cast<int64_t>(blk.sender[b]) * p.dim;
    T r = 0;
    for (int c = 0; c < p.dim; ++c) {
      const T diff = xi[c] - xj[c];
      d[c * kBlockRows + b] = diff;
      r += diff * diff;
    }
    blk.r[b] = r;
    blk.mask[b] = p.edge_mask != nullptr ? p.edge_mask[blk.edge[b]] : T(1);
    blk.attr[b] = p.edge_attr != nullptr ? p.edge_attr + blk.edge[b] * p.attrs : nullptr;
    blk.gate[b] = 1;
    blk.inverse_rho[b] = 1;
  }
  const T norm = p.options.coord_norm;
  if (norm != 0) {
    const T eps = norm < 0 ? T(1e-8) : norm;
    for (int b = 0; b < count; ++b) blk.inverse_rho[b] = 1 / (sqrt_scalar(blk.r[b]) + eps);
  }
}

// a1 = act(z1) for z1 = P_i + Q_j + w_r r + W_a a_ij, and with `both` also derivative = act'(z1);
// tiles [kBlockRows, ld].
template <class T, Activation act, bool both>
inline void first_activation(const Problem<T>& p, const Block<T>& blk, T* a1, T* derivative) {
  const int full = p.pq_padded ? p.vectors : p.hidden / kWidth<T>;
  const int rest = p.pq_padded ? 0 : p.hidden - full * kWidth<T>;
  const T negative_slope = p.options.negative_slope;
  for (int b = 0; b < blk.count; ++b) {
    if (b + kAhead < blk.count) prefetch_sender(p, blk, b + kAhead);
    const T* pi = p.pq + blk.receiver[b] * p.pq_stride;
    const T* qj = p.pq + blk.sender[b] * p.pq_stride + p.pq_stride / 2;
    const T* attr = blk.attr[b];
    const T r = blk.r[b];
    const auto finish = [&](int v, Vec<T> z1) {
      const int column = v * kWidth<T>;
      z1 += r * load(p.w_r + column);
      for (int k = 0; k < p.attrs; ++k) z1 += attr[k] * load(p.w_a + k * p.ld + column);
      if (both) {
        Vec<T> value, slope;
        activate_both<T, act>(z1, negative_slope, value, slope);
        store(a1 + b * p.ld + column, value);
        store(derivative + b * p.ld + column, slope);
      } else {
        store(a1 + b * p.ld + column, activate<T, act>(z1, negative_slope));
      }
    };
    for (int v = 0; v < full; ++v) finish(v, load(pi + v * kWidth<T>) + load(qj + v * kWidth<T>));
    if (rest != 0) {
      const int column = full * kWidth<T>;
      finish(full, load_part(pi + column, rest) + load_part(qj + column, rest));
    }
  }
}

template <class T>
EGNN_INLINE T dot(const T* a, const T* b, int vectors) {
  Vec<T> sum{};
  for (int v = 0; v < vectors; ++v) sum += load(a + v * kWidth<T>) * load(b + v * kWidth<T>);
  return horizontal_sum<T>(sum);
}

// A vector for each row of a block, whose lanes are to be summed.
template <class T>
struct RowVectors {
  Vec<T> row[kBlockRows];

  // out[b] = the sum of the lanes of row[b]; out has room for `count` rounded up to whole vectors
  EGNN_INLINE void sum(int count, T* out) const {
    for (int b = 0; b < count; b += kWidth<T>) lane_sums<T>(row + b, out + b);
  }
};

}  // namespace EGNN_ISA
}  // namespace egnn
