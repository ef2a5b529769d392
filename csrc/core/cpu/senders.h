// Sums to senders, against the receivers' order: a wave of tasks leaves its per-edge gradients in
// cache, and here each range of senders collects its own, in the order of the edges.
#pragma once

#include "block.h"

namespace egnn {
namespace EGNN_ISA {

template <class T>
EGNN_INLINE void add_edge(const Problem<T>& p, int64_t place, int64_t sender) {
  if (p.g_pq != nullptr) {
    T* out = p.g_pq + sender * p.pq_stride + p.pq_stride / 2;
    add_rows(p.g_z1 + place * p.ld, p.ld, 0, 1, p.hidden, out);
  }
  if (p.g_coords_sent != nullptr) {
    T* out = p.g_coords_sent + sender * p.dim;
    const T* g_d = p.g_d + place * p.dim;
    for (int c = 0; c < p.dim; ++c) out[c] -= g_d[c];
  }
}

template <class T>
inline void sorted_sums(const Problem<T>& p, int64_t wave_begin, int64_t tasks, int64_t begin,
                        int64_t end) {
  for (int64_t slot = 0; slot < tasks; ++slot) {
    const int64_t first = (wave_begin + slot) * p.task_edges;
    const int64_t count = first + p.task_edges < p.edges ? p.task_edges : p.edges - first;
    const uint32_t* keys = p.sender_keys + slot * 2 * p.task_edges;
    const uint16_t* places = p.sender_places + slot * 2 * p.task_edges;
    int64_t low = 0, high = count;  // the first key that is not below begin
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (keys[middle] < begin) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    for (int64_t k = low; k < count && keys[k] < end; ++k) {
      add_edge(p, slot * p.task_edges + places[k], keys[k]);
    }
  }
}

// Complete components: the senders of a receiver are consecutive, so are the edges.
template <class T>
inline void complete_sums(const Problem<T>& p, int64_t wave_begin, int64_t tasks, int64_t begin,
                          int64_t end) {
  const int64_t first = wave_begin * p.task_edges;
  int64_t last = first + tasks * p.task_edges;
  if (last > p.edges) last = p.edges;
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
      if (edge >= first && edge < last) add_edge(p, edge - first, sender);
    }
  }
}

template <class T>
inline void sender_sums(const Problem<T>& p, int64_t wave_begin, int64_t tasks, int64_t begin,
                        int64_t end) {
  if (p.senders != nullptr) {
    sorted_sums(p, wave_begin, tasks, begin, end);
  } else {
    complete_sums(p, wave_begin, tasks, begin, end);
  }
}

}  // namespace EGNN_ISA
}  // namespace egnn
