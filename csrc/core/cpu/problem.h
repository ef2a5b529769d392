// One call of the edge pass as the block kernels see it, and the table of these kernels.
#pragma once

#include <cstdint>

namespace egnn {

// Edges that go through the layer together, in cache. A multiple of every register tile's height.
constexpr int kBlockEdges = 48;
// Edges of a task are numbered in 16 bits when they are sorted by sender.
constexpr int64_t kMaxTaskEdges = 65535;

// A row of sums that a task shares with its neighbours: its row number, or -1.
struct PartialRows {
  int64_t row[2];  // [0] begun before the task, [1] going on after it
};

// Where each weight gradient lies in a task's accumulator, in elements.
struct WeightOffsets {
  int64_t w2, w3, b2, b3, w_x, w_g, w_r, w_a, b_g, size;
};

template <class T>
struct Problem {
  int64_t nodes, edges;
  int hidden, ld, vectors;  // H; H rounded up to a whole vector; that in vectors
  int dim, attrs;           // D, A

  const T *pq, *x, *edge_attr, *edge_mask;
  const int64_t* rowptr;
  const int32_t *senders, *perm, *first;

  // options
  int activation;
  T slope, norm, clamp;
  bool tanh, attention, head;

  // weights, padded to ld with zeros; matrices packed for gemm()
  T *w_r, *w_a, *b2, *w_g, *b3, *w_x;
  T *w2_forward, *w3_forward, *w2_backward, *w3_backward;
  T b_g;

  int64_t task_edges;
  // sums of rows shared between tasks: [tasks][2][partial_size], H then D elements
  T* partials;
  PartialRows* partial_rows;
  int64_t partial_size;

  // forward
  T *m, *shift;

  // backward
  const T *g_m, *g_shift;
  T *g_pq, *g_coords, *g_edge_attr, *g_edge_mask;
  bool needs_first;  // gradients before the first activation
  bool needs_weights, needs_first_weights, needs_w2, needs_w3, needs_w_x, needs_w_g;
  WeightOffsets at;
  // per task of the tasks in flight (a wave)
  int64_t wave_begin;  // first task of the wave
  T* weight_sums;      // [wave][at.size]
  T* g_z1;             // [wave][task_edges][ld]
  T* g_d;              // [wave][task_edges][D]
  T* g_coords_sent;    // [N, D]
  uint32_t* sender_keys;    // [wave][task_edges]: senders, ascending
  uint16_t* sender_places;  // [wave][task_edges]: the task's edges in that order
};

template <class T>
struct KernelTable {
  int width;  // elements of a vector
  // elements of scratch that a worker needs
  int64_t (*forward_scratch)(const Problem<T>&);
  int64_t (*backward_scratch)(const Problem<T>&);
  int64_t (*packed_size)(int hidden);  // elements of a packed matrix
  // packs w [H, H] (row-major, [out, in]) for gemm: a w^T (forward) or a w (backward)
  void (*pack)(const T* w, int hidden, bool transpose, T* out);
  void (*forward_task)(const Problem<T>&, int64_t task, T* scratch);
  void (*backward_task)(const Problem<T>&, int64_t task, T* scratch);
  // adds what the wave's `tasks` tasks found to senders in [begin, end)
  void (*sender_sums)(const Problem<T>&, int64_t tasks, int64_t begin, int64_t end);
  WeightOffsets (*weight_offsets)(const Problem<T>&);
};

namespace portable {
const KernelTable<float>& table_float();
const KernelTable<double>& table_double();
}  // namespace portable
namespace avx2 {
const KernelTable<float>& table_float();
const KernelTable<double>& table_double();
}  // namespace avx2
namespace avx512 {
const KernelTable<float>& table_float();
const KernelTable<double>& table_double();
}  // namespace avx512

}  // namespace egnn
