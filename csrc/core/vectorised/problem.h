// One call as the kernels see it: the edge pass, a wave of its tasks, and a layer's nodes.
#pragma once

#include "core/args.h"

namespace egnn {

// Edges (or nodes) that go through the layer together and stay in cache. A multiple of the height
// of every register tile.
constexpr int kBlockEdges = 48;
// Rows beyond the end of an array that a register tile may read and write.
constexpr int kSpareRows = 16;
// The most ranges of senders; the sums to a range are one task.
constexpr int kMaxSenderRanges = 256;

// Receivers whose edges do not all lie in one task: the numbers of the rows, or -1.
struct PartialRows {
  int64_t row[2];  // [0] has edges before the task, [1] after it
};

// Where each weight gradient lies in a task's accumulator, in elements.
struct WeightOffsets {
  int64_t w2, w3, b2, b3, w_x, w_g, w_r, w_a, b_g, size;
};

// The edge pass. Names and shapes are those of core/args.h, MessagesInputs; shift [N, D] is X.
template <class T>
struct Problem {
  int64_t nodes, edges;
  int hidden, ld, vectors;  // H; H rounded up to whole vectors; their number
  int dim, attrs;           // D, A
  int64_t pq_stride;        // of rows of pq and g_pq: P, then Q in the second half
  bool pq_padded;           // P and Q are padded to ld with zeros

  const T *pq, *x, *edge_attr, *edge_mask;
  const int64_t* rowptr;
  const int32_t *senders, *perm, *first;

  EdgeOptions<T> options;
  bool attention, head;  // whether the layer has a gate and a coordinate head

  // weights: vectors padded to ld with zeros, w_a as [A, ld], matrices packed for gemm()
  T *w_r, *w_a, *b2, *w_g, *b3, *w_x;
  T *w2_forward, *w3_forward, *w2_backward, *w3_backward;
  T b_g;

  // Tasks are runs of whole blocks, of nearly equal size.
  int64_t tasks;
  // The first edge of a task. Always inlined, because instruction sets must not share a copy.
  __attribute__((always_inline)) int64_t task_begin(int64_t task) const {
    const int64_t blocks = (edges + kBlockEdges - 1) / kBlockEdges;
    const int64_t begin = blocks * task / tasks * kBlockEdges;
    return begin < edges ? begin : edges;
  }
  // z2 = W2 a1 + b2 and z3 = W3 m + b3, [E + kSpareRows, ld]: written by the forward, read by the
  // backward; null: not stored
  T *z2, *z3;
  // sums of rows that tasks share: [slots, 2, partial_size], H elements, then D
  T* partials;
  PartialRows* partial_rows;  // [slots]
  int64_t partial_size;

  // outputs of the forward, M and X
  T *m, *shift;

  // cotangents and gradients of the backward; null: zero, or not wanted
  const T *g_m, *g_shift;
  T *g_pq, *g_x, *g_edge_attr, *g_edge_mask;
  bool needs_z1;       // a gradient beyond the first activation is wanted
  bool needs_weights;  // some weight's is
  // those of w_r and w_a; w2 and b2; w3 and b3; w_x; w_g and b_g
  bool needs_w_r, needs_w2, needs_w3, needs_w_x, needs_w_g;
  WeightOffsets offsets;
  T* g_x_senders;  // [N, D]: what nodes get as senders, added to g_x in the end
  // sender j is in range j >> sender_shift
  int sender_shift, sender_ranges;
};

// Consecutive tasks of the backward that run together, and the memory for their per-edge gradients.
// Edges are counted from the first one of the wave.
template <class T>
struct Wave {
  int64_t first_task, tasks;
  int64_t first_slot;  // in Problem::partials
  T* g_z1;             // [edges, ld]
  T* g_d;              // [edges, D]
  // each task's edges, grouped by ranges of senders: where each group begins, [tasks, ranges + 1],
  // and the edges, [edges]; both counted from the task's first edge
  uint16_t *range_starts, *range_edges;
};

// The node-level parts of a layer: P and Q before the edge pass, phi_h, phi_v and the new
// coordinates after it. Names and shapes are those of core/args.h, LayerInputs; ld_* are F, H, O
// and B rounded up to whole vectors.
template <class T>
struct NodeProblem {
  int64_t nodes;
  int in, hidden, out, attrs, dim;  // F, H, O, B, D
  int ld_in, ld_hidden, ld_out, ld_attrs;
  LayerOptions<T> options;
  bool velocity, head;  // whether the layer has phi_v and a coordinate head

  const T *h, *x, *v, *node_attr;
  const T* coord_weight;  // null: 1

  // vectors padded with zeros
  T *edge_b1, *node_b1, *node_b2, *vel_b1, *vel_w2;
  T vel_b2;
  // matrices packed for gemm(): w_i and w_j are the columns of edge_w1 for h_i and h_j; w_h, w_m
  // and w_b those of node_w1 for h, M and node_attr
  T *w_i, *w_j, *w_h, *w_m, *w_b, *node_w2, *vel_w1;
  T *w_i_backward, *w_j_backward, *w_h_backward, *w_m_backward, *w_b_backward, *node_w2_backward,
      *vel_w1_backward;

  T* pq;  // [N + kSpareRows, 2 ld_hidden]
  // the results of the first linears of phi_h and phi_v, [N + kSpareRows, ld_hidden]: written by
  // the forward, read by the backward; null: not stored
  T *z_h, *z_v;
  T *m, *shift;  // the sums M and X of the edge pass
  T *h_out, *x_out, *v_out;

  // cotangents and gradients; null: zero, or not wanted
  const T *g_h_out, *g_x_out, *g_v_out;
  T *g_m, *g_shift;  // cotangents of the edge pass
  T* g_pq;           // its gradient, laid out like pq
  T *g_h, *g_v, *g_node_attr, *g_coord_weight;

  // where each weight gradient lies in the accumulators of node_update_backward and
  // node_pq_backward
  struct {
    int64_t node_w2, node_b2, w_h, w_m, w_b, node_b1, vel_w1, vel_b1, vel_w2, vel_b2, size;
  } update_offsets;
  struct {
    int64_t w_i, w_j, edge_b1, size;
  } pq_offsets;
};

}  // namespace egnn
