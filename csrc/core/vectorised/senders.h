// Sums to senders. Edges are in receiver order, so those of a sender are scattered.
//
// A wave of tasks leaves its per-edge gradients in cache. Then each range of senders adds up those
// of its own edges, in the order of the edges: no two threads write to one row.
#pragma once

#include "block.h"

namespace egnn {
namespace EGNN_ISA {

// Writes a task's edges [count] to `edges`, grouped by ranges of senders and in order within each;
// range r begins at starts[r]. A counting sort. `begin` is the task's first edge.
template <class T>
inline void group_by_senders(const Problem<T>& p, int64_t begin, int count, uint16_t* starts,
                             uint16_t* edges) {
  const int32_t* senders = p.senders + begin;
  uint16_t next[kMaxSenderRanges + 1] = {};
  for (int k = 0; k < count; ++k) ++next[(senders[k] >> p.sender_shift) + 1];
  for (int r = 0; r < p.sender_ranges; ++r) {
    next[r + 1] = static_cast<uint16_t>(next[r + 1] + next[r]);
    starts[r] = next[r];
  }
  starts[p.sender_ranges] = static_cast<uint16_t>(count);
  for (int k = 0; k < count; ++k) {
    edges[next[senders[k] >> p.sender_shift]++] = static_cast<uint16_t>(k);
  }
}

template <class T>
EGNN_INLINE void prefetch_edge(const Problem<T>& p, const Wave<T>& wave, int64_t edge,
                               int64_t sender) {
  if (p.g_pq == nullptr) return;
  const T* from = wave.g_z1 + edge * p.ld;
  const T* to = p.g_pq + sender * p.pq_stride + p.pq_stride / 2;
  for (int c = 0; c < p.hidden; c += 64 / static_cast<int>(sizeof(T))) {
    __builtin_prefetch(from + c);
    __builtin_prefetch(to + c, 1);
  }
}

// Adds the gradients of an edge, counted in the wave, to its sender: g_z1 to Q_j, -g_d to x_j.
template <class T>
EGNN_INLINE void add_edge(const Problem<T>& p, const Wave<T>& wave, int64_t edge, int64_t sender) {
  if (p.g_pq != nullptr) {
    T* out = p.g_pq + sender * p.pq_stride + p.pq_stride / 2;
    add_rows(wave.g_z1 + edge * p.ld, p.ld, 0, 1, p.hidden, out);
  }
  if (p.g_x_senders != nullptr) {
    T* out = p.g_x_senders + sender * p.dim;
    const T* g_d = wave.g_d + edge * p.dim;
    for (int c = 0; c < p.dim; ++c) out[c] -= g_d[c];
  }
}

// The sums of a range from edges that group_by_senders has grouped.
template <class T>
inline void grouped_sums(const Problem<T>& p, const Wave<T>& wave, int64_t range) {
  const int64_t first = p.task_begin(wave.first_task);
  for (int64_t slot = 0; slot < wave.tasks; ++slot) {
    const int64_t begin = p.task_begin(wave.first_task + slot), offset = begin - first;
    const uint16_t* starts = wave.range_starts + slot * (p.sender_ranges + 1);
    const uint16_t* edges = wave.range_edges + offset;
    const int from = starts[range], to = starts[range + 1];
    const int32_t* senders = p.senders + begin;
    for (int k = from; k < to; ++k) {
      if (k + kAhead < to) {
        const int ahead = edges[k + kAhead];
        prefetch_edge(p, wave, offset + ahead, senders[ahead]);
      }
      add_edge(p, wave, offset + edges[k], senders[edges[k]]);
    }
  }
}

// The sums of a range in complete components: the edges of a receiver have consecutive senders, so
// its edges with senders in the range are found without a list.
template <class T>
inline void complete_sums(const Problem<T>& p, const Wave<T>& wave, int64_t range) {
  const int64_t begin = range << p.sender_shift;
  const int64_t end =
      p.nodes < (range + 1) << p.sender_shift ? p.nodes : (range + 1) << p.sender_shift;
  const int64_t first = p.task_begin(wave.first_task);
  const int64_t last = p.task_begin(wave.first_task + wave.tasks);
  for (int64_t row = find_row(p.rowptr, p.nodes, first); row < p.nodes && p.rowptr[row] < last;
       ++row) {
    const int64_t low_node = p.first[row];
    const int64_t degree = p.rowptr[row + 1] - p.rowptr[row];
    if (low_node + degree < begin) continue;  // the last node is low_node + degree
    if (low_node >= end) break;
    const int64_t from = begin > low_node ? begin : low_node;
    const int64_t to = end < low_node + degree + 1 ? end : low_node + degree + 1;
    for (int64_t sender = from; sender < to; ++sender) {
      if (sender == row) continue;
      const int64_t edge = p.rowptr[row] + (sender - low_node) - (sender > row);
      if (edge >= first && edge < last) add_edge(p, wave, edge - first, sender);
    }
  }
}

// See KernelTable::sender_sums.
template <class T>
inline void sender_sums(const Problem<T>& p, const Wave<T>& wave, int64_t range) {
  if (p.senders != nullptr) {
    grouped_sums(p, wave, range);
  } else {
    complete_sums(p, wave, range);
  }
}

}  // namespace EGNN_ISA
}  // namespace egnn
