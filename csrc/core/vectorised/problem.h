// One call of the edge pass as the block kernels see it, and the table of these kernels.
#pragma once

#include <cstdint>

namespace egnn {

// Edges (or nodes) that go through the layer together, in cache: a multiple of every register
// tile's height.
constexpr int kBlockEdges = 48;
// Rows that a register tile may take too many at the end of an array.
constexpr int kSpareRows = 16;
// Edges of a task are numbered in 16 bits when they are sorted by sender.
constexpr int64_t kMaxTaskEdges = 65535;
// Ranges of senders, each collected by one thread.
constexpr int kMaxSenderRanges = 256;

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
  int64_t pq_stride;        // row of pq and g_pq: P, then Q at half of it
  bool pq_padded;           // P and Q are rounded up to ld, with zeros

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

  // Tasks are runs of whole blocks, as even as that allows.
  int64_t tasks;
  int64_t task_begin(int64_t task) const {
    const int64_t blocks = (edges + kBlockEdges - 1) / kBlockEdges;
    const int64_t begin = blocks * task / tasks * kBlockEdges;
    return begin < edges ? begin : edges;
  }
  // second and third linear's outputs, [E + spare, ld]: written forward, read backward; or null
  T *z2, *z3;
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
  T* g_coords_sent;  // [N, D]
  // senders j >> sender_shift are a range
  int sender_shift, sender_ranges;
};

// Memory for the tasks in flight backward, a wave of consecutive ones; edges count from its first.
template <class T>
struct Wave {
  int64_t first_task, tasks;
  int64_t slots;  // the wave's place in Problem::partials
  T* g_z1;        // [edges, ld]
  T* g_d;         // [edges, D]
  // each task's edges by range of senders: [tasks][ranges + 1] and [edges], counted in the task
  uint16_t *range_starts, *range_edges;
};

// The rest of a layer around the edge pass: P and Q before it, the updates of nodes after it.
// Widths F (in), H, O (out), B (node attributes); ld_* are rounded up to a whole vector.
template <class T>
struct NodeProblem {
  int64_t nodes;
  int in, hidden, out, attrs, dim;
  int ld_in, ld_hidden, ld_out, ld_attrs;
  int activation;
  T slope;
  bool residual, velocity, shifts;

  const T *h, *x, *v, *node_attr;
  const T* coord_weight;  // [N] or null: 1
  T coord_scale;

  // biases and w_v2 padded; matrices packed for gemm(): [in -> out] forward, [out -> in] backward
  T *b1, *node_b1, *node_b2, *vel_b1, *vel_w2;
  T vel_b2;
  T *w_i, *w_j, *w_h, *w_m, *w_b, *w_out, *w_v;
  T *w_i_back, *w_j_back, *w_h_back, *w_m_back, *w_b_back, *w_out_back, *w_v_back;

  T* pq;  // [N + spare, 2 ld_hidden]
  // the first linears' outputs of phi_h and phi_v, [N + spare, ld_hidden]: as Problem::z2; or null
  T *z_h, *z_v;
  T *m, *shift;  // the edge pass's sums [N, H], [N, D]
  T *h_out, *x_out, *v_out;

  const T *g_h_out, *g_x_out, *g_v_out;
  T *g_m, *g_shift, *g_pq;  // cotangents of the edge pass; g_pq is laid out as pq
  T *g_h, *g_v, *g_node_attr, *g_coord_weight;
  bool needs_weights, needs_h;
  struct {
    int64_t out, out_bias, h, m, b, bias, v, vel_bias, vel_w2, vel_b2, size;
  } at_update;
  struct {
    int64_t i, j, bias, size;
  } at_pq;
};

// A matrix within an accumulator, from element `at`, and where it is wanted, rows `stride` apart.
template <class T>
struct Piece {
  int64_t at, rows, columns, ld;
  T* to;
  int64_t stride;
};

template <class T>
struct KernelTable {
  int width;  // elements of a vector
  // elements of scratch that a worker needs
  int64_t (*forward_scratch)(const Problem<T>&);
  int64_t (*backward_scratch)(const Problem<T>&);
  int64_t (*node_scratch)(const NodeProblem<T>&);
  // packs a [k_count, columns] operand, (k, c) at w[k * k_stride + c * column_stride]
  void (*pack)(const T* w, int64_t k_stride, int64_t column_stride, int k_count, int columns,
               T* out);
  void (*forward_task)(const Problem<T>&, int64_t task, T* scratch);
  void (*backward_task)(const Problem<T>&, const Wave<T>&, int64_t task, T* sums, T* scratch);
  // adds what the wave's tasks found to the senders of a range
  void (*sender_sums)(const Problem<T>&, const Wave<T>&, int64_t range);
  WeightOffsets (*weight_offsets)(const Problem<T>&);
  int weight_rows;  // rows that a weight gradient's accumulator has to spare
  // total [begin, end) = (fresh) or += the tasks' sums, `stride` apart, in their order
  void (*add_sums)(const T* sums, int64_t stride, int64_t tasks, int64_t begin, int64_t end,
                   bool fresh, double* total);
  // the same sum of a piece, rounded and written to where it is wanted; no tasks: zeros
  void (*deliver)(const T* sums, int64_t stride, int64_t tasks, const Piece<T>& piece);
  void (*deliver_total)(const double* total, const Piece<T>& piece);
  // nodes [begin, end), at most kBlockEdges of them; `sums` is the task's accumulator, which a
  // `fresh` call writes rather than adds to
  void (*node_pq)(const NodeProblem<T>&, int64_t begin, int64_t end, T* scratch);
  void (*node_update)(const NodeProblem<T>&, int64_t begin, int64_t end, T* scratch);
  void (*node_update_back)(const NodeProblem<T>&, int64_t begin, int64_t end, T* scratch, T* sums,
                           bool fresh);
  void (*node_pq_back)(const NodeProblem<T>&, int64_t begin, int64_t end, T* scratch, T* sums,
                       bool fresh);
  void (*silu)(const T* from, T* to, int64_t count);
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
