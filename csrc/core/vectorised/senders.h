// Sums to senders, against the receivers' order: a wave of tasks leaves its per-edge gradients in
// cache, and here each range of senders collects its own, in the order of the edges.
#pragma once

#include "block.h"

namespace egnn {
namespace EGNN_ISA {

template <class T>
EGNN_INLINE void prefetch_edge(const Problem<T>& p, const Wave<T>& wave, int64_t place,
                               int64_t sender) {
  if (p.g_pq == nullptr) return;
  const T* from = wave.g_z1 + place * p.ld;
  const T* to = p.g_pq + sender * p.pq_stride + p.pq_stride / 2;
  for (int c = 0; c < p.hidden; c += 64 / static_cast<int>(sizeof(T))) {
    __builtin_prefetch(from + c);
    __builtin_prefetch(to + c, 1);
  }
}

template <class T>
EGNN_INLINE void add_edge(const Problem<T>& p, const Wave<T>& wave, int64_t place, int64_t sender) {
  if (p.g_pq != nullptr) {
    T* out = p.g_pq + sender * p.pq_stride + p.pq_stride / 2;
    add_rows(wave.g_z1 + place * p.ld, p.ld, 0, 1, p.hidden, out);
  }
  if (p.g_coords_sent != nullptr) {
    T* out = p.g_coords_sent + sender * p.dim;
    const T* g_d = wave.g_d + place * p.dim;
    for (int c = 0; c < p.dim; ++c) out[c] -= g_d[c];
  }
}

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

// Complete components: the senders of a receiver are consecutive, so are the edges.
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
    if (low_node + degree < begin) continue;  // the component's last node is low_node + degree
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
