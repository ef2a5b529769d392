// What forward and backward share: the edges of a block, their geometry, and sums over receivers.
#pragma once

#include "activations.h"
#include "gemm.h"
#include "problem.h"

namespace egnn {
namespace EGNN_ISA {

constexpr int kBlockRows = kBlockEdges + kSpareRows;

// A block of edges. Beyond count only the indices are set (to the first edge's), for the rows that
// a register tile takes too many.
template <class T>
struct Block {
  int count;
  int32_t receiver[kBlockRows], sender[kBlockRows];
  int64_t edge[kBlockRows];  // the user's number
  T r[kBlockRows];           // squared distance
  T inverse_rho[kBlockRows];
  T mask[kBlockRows];
  T gate[kBlockRows];
  T s[kBlockRows];  // the coordinate head
  const T* attr[kBlockRows];
};

// Coordinates of a block lie by component: component c of row b at c * kBlockRows + b.

// Hands out scratch memory in pieces aligned to a vector.
template <class T>
struct Carver {
  T* next;
  T* take(int64_t count) {
    T* piece = next;
    const int64_t unit = kWidth<T>;
    next += (count + unit - 1) / unit * unit;
    return piece;
  }
};

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

// Rows of Q come from anywhere in memory: they are asked for this many edges ahead.
constexpr int kAhead = 8;

template <class T>
EGNN_INLINE void prefetch_sender(const Problem<T>& p, const Block<T>& blk, int b) {
  const T* row = p.pq + blk.sender[b] * p.pq_stride + p.pq_stride / 2;
  for (int c = 0; c < p.hidden; c += 64 / static_cast<int>(sizeof(T))) __builtin_prefetch(row + c);
}

// Fills indices, mask and geometry of edges [begin, begin + count); `row` walks along.
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
    } else {
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
  if (p.norm != 0) {
    const T eps = p.norm < 0 ? T(1e-8) : p.norm;
    for (int b = 0; b < count; ++b) blk.inverse_rho[b] = 1 / (sqrt_scalar(blk.r[b]) + eps);
  }
}

// First linear and activation: a = act(P_i + Q_j + w_r r + W_a a_ij), and its derivative if wanted.
template <class T, int act, bool both>
inline void first_layer(const Problem<T>& p, const Block<T>& blk, T* a, T* derivative) {
  const int full = p.pq_padded ? p.vectors : p.hidden / kWidth<T>;
  const int rest = p.pq_padded ? 0 : p.hidden - full * kWidth<T>;
  for (int b = 0; b < blk.count; ++b) {
    if (b + kAhead < blk.count) prefetch_sender(p, blk, b + kAhead);
    const T* pi = p.pq + blk.receiver[b] * p.pq_stride;
    const T* qj = p.pq + blk.sender[b] * p.pq_stride + p.pq_stride / 2;
    const T* attr = blk.attr[b];
    const T r = blk.r[b];
    const auto finish = [&](int v, Vec<T> z) {
      const int column = v * kWidth<T>;
      z += r * load(p.w_r + column);
      for (int k = 0; k < p.attrs; ++k) z += attr[k] * load(p.w_a + k * p.ld + column);
      if (both) {
        Vec<T> value, slope;
        activate_both<T, act>(z, p.slope, value, slope);
        store(a + b * p.ld + column, value);
        store(derivative + b * p.ld + column, slope);
      } else {
        store(a + b * p.ld + column, activate<T, act>(z, p.slope));
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
constexpr const T* kNone = nullptr;

template <class T>
EGNN_INLINE T dot(const T* a, const T* b, int vectors) {
  Vec<T> sum{};
  for (int v = 0; v < vectors; ++v) sum += load(a + v * kWidth<T>) * load(b + v * kWidth<T>);
  return horizontal_sum<T>(sum);
}

// A vector for each row of a block, to be summed over its lanes.
template <class T>
struct RowParts {
  Vec<T> row[kBlockRows];

  // out [count rounded up to a vector]
  EGNN_INLINE void sum(int count, T* out) const {
    for (int b = 0; b < count; b += kWidth<T>) lane_sums<T>(row + b, out + b);
  }
};

// out [columns] = (fresh) or += acc
template <class T>
EGNN_INLINE void add_to_sums(T* out, bool fresh, Vec<T> acc) {
  store(out, fresh ? acc : load(out) + acc);
}

// out = (fresh) or += the sum over `rows` rows of factor[row] * tile[row]; factor null: 1
template <class T>
inline void add_columns(const T* tile, int64_t ld, const T* factor, int rows, int vectors,
                        bool fresh, T* out) {
  for (int v = 0; v < vectors; ++v) {
    const int column = v * kWidth<T>;
    Vec<T> acc{};  // of this block alone: fewer roundings than one running sum
    for (int b = 0; b < rows; ++b) {
      const Vec<T> value = load(tile + b * ld + column);
      acc += factor != nullptr ? value * factor[b] : value;
    }
    add_to_sums(out + column, fresh, acc);
  }
}

template <class T>
EGNN_INLINE T clamp_scalar(T v, T bound) {
  if (bound == 0) return v;
  return v > bound ? bound : v < -bound ? -bound : v;
}

// Where the sums of a row go: into the output, or aside if another task has edges of the row too.
template <class T>
struct RowSink {
  const int64_t* rowptr;
  int64_t begin, end;  // the task's edges
  T* partials;         // [2][size]
  PartialRows* rows;
  int64_t size;

  RowSink(const Problem<T>& p, int64_t slot, int64_t begin_, int64_t end_)
      : rowptr(p.rowptr),
        begin(begin_),
        end(end_),
        partials(p.partials + 2 * slot * p.partial_size),
        rows(p.partial_rows + slot),
        size(p.partial_size) {
    rows->row[0] = rows->row[1] = -1;
    for (int64_t k = 0; k < 2 * size; ++k) partials[k] = 0;
  }

  // the place of `offset` within a partial row, or null: the row is this task's alone
  T* aside(int64_t row, int64_t offset) {
    const bool before = rowptr[row] < begin;
    if (!before && rowptr[row + 1] <= end) return nullptr;
    const int k = before ? 0 : 1;
    rows->row[k] = row;
    return partials + k * size + offset;
  }
};

// Calls visit(row, first, last) for each run of edges with one receiver.
template <class T, class Visit>
EGNN_INLINE void for_each_run(const Block<T>& blk, Visit visit) {
  for (int b = 0; b < blk.count;) {
    int end = b + 1;
    while (end < blk.count && blk.receiver[end] == blk.receiver[b]) ++end;
    visit(static_cast<int64_t>(blk.receiver[b]), b, end);
    b = end;
  }
}

// out [H] += the sum of rows [b, end) of tile
template <class T>
EGNN_INLINE void add_rows(const T* tile, int ld, int b, int end, int hidden, T* out) {
  const int full = hidden / kWidth<T>;
  const int rest = hidden - full * kWidth<T>;
  for (int v = 0; v < full; ++v) {
    Vec<T> acc = load(out + v * kWidth<T>);
    for (int k = b; k < end; ++k) acc += load(tile + k * ld + v * kWidth<T>);
    store(out + v * kWidth<T>, acc);
  }
  if (rest != 0) {
    const int column = full * kWidth<T>;
    Vec<T> acc = load_part(out + column, rest);
    for (int k = b; k < end; ++k) acc += load(tile + k * ld + column);
    store_part(out + column, acc, rest);
  }
}

// Sums the tile's rows into their receivers' rows of out (row stride `stride`).
template <class T>
inline void sum_to_receivers(const Problem<T>& p, const Block<T>& blk, const T* tile, T* out,
                             int64_t stride, RowSink<T>& sink) {
  for_each_run(blk, [&](int64_t row, int b, int end) {
    T* aside = sink.aside(row, 0);
    add_rows(tile, p.ld, b, end, p.hidden, aside != nullptr ? aside : out + row * stride);
  });
}

// The same for coordinates, by component.
template <class T>
inline void sum_coords(const Problem<T>& p, const Block<T>& blk, const T* t, T* out,
                       RowSink<T>& sink) {
  for_each_run(blk, [&](int64_t row, int b, int end) {
    T* aside = sink.aside(row, p.hidden);
    T* place = aside != nullptr ? aside : out + row * p.dim;
    for (int c = 0; c < p.dim; ++c) {
      T sum = 0;
      for (int k = b; k < end; ++k) sum += t[c * kBlockRows + k];
      place[c] += sum;
    }
  });
}

}  // namespace EGNN_ISA
}  // namespace egnn
