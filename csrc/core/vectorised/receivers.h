// Sums to receivers. Edges are in receiver order, so a receiver's edges are consecutive rows.
#pragma once

#include "block.h"

namespace egnn {
namespace EGNN_ISA {

// Where the sums of a task go. A row whose edges all lie in the task is summed in the output. Two
// rows at most, the first and the last, have edges in other tasks too: these are summed in the
// task's partial rows, which are added to the output afterwards.
template <class T>
struct RowSink {
  const int64_t* rowptr;
  int64_t begin, end;  // the task's edges
  T* partials;         // [2, size]
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

  // Element `offset` of the row's partial sums; null if all its edges lie in the task.
  T* partial(int64_t row, int64_t offset) {
    const bool begins_before = rowptr[row] < begin;
    if (!begins_before && rowptr[row + 1] <= end) return nullptr;
    const int k = begins_before ? 0 : 1;
    rows->row[k] = row;
    return partials + k * size + offset;
  }
};

// Calls visit(row, begin, end) for each run of a block's edges with one receiver.
template <class T, class Visit>
EGNN_INLINE void for_each_run(const Block<T>& blk, Visit visit) {
  for (int b = 0; b < blk.count;) {
    int end = b + 1;
    while (end < blk.count && blk.receiver[end] == blk.receiver[b]) ++end;
    visit(static_cast<int64_t>(blk.receiver[b]), b, end);
    b = end;
  }
}

// out [H] += the sum of rows [begin, end) of a tile.
template <class T>
EGNN_INLINE void add_rows(const T* tile, int ld, int begin, int end, int hidden, T* out) {
  const int full = hidden / kWidth<T>;
  const int rest = hidden - full * kWidth<T>;
  for (int v = 0; v < full; ++v) {
    Vec<T> acc = load(out + v * kWidth<T>);
    for (int k = begin; k < end; ++k) acc += load(tile + k * ld + v * kWidth<T>);
    store(out + v * kWidth<T>, acc);
  }
  if (rest != 0) {
    const int column = full * kWidth<T>;
    Vec<T> acc = load_part(out + column, rest);
    for (int k = begin; k < end; ++k) acc += load(tile + k * ld + column);
    store_part(out + column, acc, rest);
  }
}

// Adds each row of a tile to its receiver's row of out [N, H], rows `stride` apart.
template <class T>
inline void sum_to_receivers(const Problem<T>& p, const Block<T>& blk, const T* tile, T* out,
                             int64_t stride, RowSink<T>& sink) {
  for_each_run(blk, [&](int64_t row, int begin, int end) {
    T* partial = sink.partial(row, 0);
    add_rows(tile, p.ld, begin, end, p.hidden, partial != nullptr ? partial : out + row * stride);
  });
}

// The same for coordinates: t [D, kBlockRows] into out [N, D].
template <class T>
inline void sum_coords(const Problem<T>& p, const Block<T>& blk, const T* t, T* out,
                       RowSink<T>& sink) {
  for_each_run(blk, [&](int64_t row, int begin, int end) {
    T* partial = sink.partial(row, p.hidden);
    T* sums = partial != nullptr ? partial : out + row * p.dim;
    for (int c = 0; c < p.dim; ++c) {
      T sum = 0;
      for (int k = begin; k < end; ++k) sum += t[c * kBlockRows + k];
      sums[c] += sum;
    }
  });
}

}  // namespace EGNN_ISA
}  // namespace egnn
