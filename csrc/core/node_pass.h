// The node-level parts of a layer over all blocks of nodes: P and Q, phi_h, phi_v, coordinates.
#pragma once

#include "edge_pass.h"

namespace egnn {

// The node-level problem of a record, without cotangents, gradients and packed weights.
template <class T>
NodeProblem<T> make_node_problem(const LayerArgs& a, const KernelTable<T>& kernels) {
  NodeProblem<T> n{};
  const auto padded = [&](int64_t count) {
    return static_cast<int>(round_up(count, kernels.width));
  };
  n.nodes = a.num_nodes;
  n.in = static_cast<int>(a.in_features);
  n.hidden = static_cast<int>(a.hidden);
  n.out = static_cast<int>(a.out_features);
  n.attrs = static_cast<int>(a.node_attr_dim);
  n.dim = static_cast<int>(a.coord_dim);
  n.ld_in = padded(n.in);
  n.ld_hidden = padded(n.hidden);
  n.ld_out = padded(n.out);
  n.ld_attrs = padded(n.attrs);
  n.options = options_in_precision<T>(a.options);
  n.velocity = a.inputs.vel_b2 != 0;  // the only one of its weights that always has elements
  n.head = a.inputs.coord_w2 != 0;
  n.h = input<T>(a.inputs.h);
  n.x = input<T>(a.inputs.x);
  n.v = input<T>(a.inputs.v);
  n.node_attr = input<T>(a.inputs.node_attr);
  n.coord_weight = input<T>(a.inputs.coord_weight);
  n.vel_b2 = n.velocity ? *input<T>(a.inputs.vel_b2) : T(0);
  n.m = output<T>(a.constants.m);
  n.shift = output<T>(a.constants.shift);
  n.h_out = output<T>(a.outputs.h);
  n.x_out = output<T>(a.outputs.x);
  n.v_out = output<T>(a.outputs.v);
  return n;
}

// Widths of edge_w1 and node_w1, whose columns are the parts of [h_i ; h_j ; r ; a] and
// [h ; M ; node_attr].
inline int64_t edge_w1_width(const LayerArgs& a) { return 2 * a.in_features + 1 + a.attr_dim; }
inline int64_t node_w1_width(const LayerArgs& a) {
  return a.in_features + a.hidden + a.node_attr_dim;
}

// Packs the weights of the forward. `products`: with the matrices, which a backward does not need
// where the results are stored.
template <class T>
void pack_node_weights(const LayerArgs& a, NodeProblem<T>& n, bool products, Packing<T>& packing) {
  const LayerInputs& weights = a.inputs;
  const int64_t edge_width = edge_w1_width(a), node_width = node_w1_width(a);
  const T *edge_w1 = input<T>(weights.edge_w1), *node_w1 = input<T>(weights.node_w1);
  n.edge_b1 = packing.vector(input<T>(weights.edge_b1), 1, n.hidden);
  n.node_b1 = packing.vector(input<T>(weights.node_b1), 1, n.hidden);
  n.node_b2 = packing.vector(input<T>(weights.node_b2), 1, n.out);
  n.vel_b1 = packing.vector(input<T>(weights.vel_b1), 1, n.hidden);
  n.vel_w2 = packing.vector(input<T>(weights.vel_w2), 1, n.hidden);
  if (!products) return;
  n.w_i = packing.transposed(edge_w1, edge_width, n.hidden, n.in);
  n.w_j = packing.transposed(edge_w1 + n.in, edge_width, n.hidden, n.in);
  n.w_h = packing.transposed(node_w1, node_width, n.hidden, n.in);
  n.w_m = packing.transposed(node_w1 + n.in, node_width, n.hidden, n.hidden);
  n.w_b = packing.transposed(node_w1 + n.in + n.hidden, node_width, n.hidden, n.attrs);
  n.node_w2 = packing.transposed(input<T>(weights.node_w2), n.hidden, n.out, n.hidden);
  n.vel_w1 = packing.transposed(input<T>(weights.vel_w1), n.in, n.hidden, n.in);
}

// Packs the matrices of the backward.
template <class T>
void pack_node_weights_backward(const LayerArgs& a, NodeProblem<T>& n, Packing<T>& packing) {
  const LayerInputs& weights = a.inputs;
  const int64_t edge_width = edge_w1_width(a), node_width = node_w1_width(a);
  const T *edge_w1 = input<T>(weights.edge_w1), *node_w1 = input<T>(weights.node_w1);
  n.w_i_backward = packing.matrix(edge_w1, edge_width, n.hidden, n.in);
  n.w_j_backward = packing.matrix(edge_w1 + n.in, edge_width, n.hidden, n.in);
  n.w_h_backward = packing.matrix(node_w1, node_width, n.hidden, n.in);
  n.w_m_backward = packing.matrix(node_w1 + n.in, node_width, n.hidden, n.hidden);
  n.w_b_backward = packing.matrix(node_w1 + n.in + n.hidden, node_width, n.hidden, n.attrs);
  n.node_w2_backward = packing.matrix(input<T>(weights.node_w2), n.hidden, n.out, n.hidden);
  n.vel_w1_backward = packing.matrix(input<T>(weights.vel_w1), n.in, n.hidden, n.in);
}

// Sets where each weight gradient lies in the accumulators of node_update and node_pq.
template <class T>
void set_node_offsets(const KernelTable<T>& kernels, NodeProblem<T>& n) {
  const auto matrix = [&](int64_t rows, int64_t ld) { return (rows + kernels.weight_rows) * ld; };
  auto& u = n.update_offsets;
  u.node_w2 = 0;
  u.node_b2 = u.node_w2 + matrix(n.out, n.ld_hidden);
  u.w_h = u.node_b2 + n.ld_out;
  u.w_m = u.w_h + matrix(n.hidden, n.ld_in);
  u.w_b = u.w_m + matrix(n.hidden, n.ld_hidden);
  u.node_b1 = u.w_b + matrix(n.hidden, n.ld_attrs);
  u.vel_w1 = u.node_b1 + n.ld_hidden;
  u.vel_b1 = u.vel_w1 + (n.velocity ? matrix(n.hidden, n.ld_in) : 0);
  u.vel_w2 = u.vel_b1 + n.ld_hidden;
  u.vel_b2 = u.vel_w2 + n.ld_hidden;
  u.size = u.vel_b2 + kernels.width;
  auto& pq = n.pq_offsets;
  pq.w_i = 0;
  pq.w_j = pq.w_i + matrix(n.hidden, n.ld_in);
  pq.edge_b1 = pq.w_j + matrix(n.hidden, n.ld_in);
  pq.size = pq.edge_b1 + n.ld_hidden;
}

// Whether a gradient of phi_h's or phi_v's weights is wanted.
inline bool wants_update_weights(const LayerInputs& gradients) {
  const LayerInputs& g = gradients;
  return g.node_w1 != 0 || g.node_b1 != 0 || g.node_w2 != 0 || g.node_b2 != 0 || g.vel_w1 != 0 ||
         g.vel_b1 != 0 || g.vel_w2 != 0 || g.vel_b2 != 0;
}

// Where the gradients go: of phi_h's and phi_v's weights, and of what P and Q take of edge_w1 and
// edge_b1.
template <class T>
void set_node_gradients(const LayerArgs& a, const NodeProblem<T>& n, WeightSums<T>& update,
                        WeightSums<T>& pq) {
  const LayerInputs& g = a.gradients;
  const auto& u = n.update_offsets;
  const int64_t f = n.in, h = n.hidden, o = n.out;
  if (T* node_w1 = output<T>(g.node_w1)) {
    const int64_t width = node_w1_width(a);
    update.set_gradient(u.w_h, h, f, n.ld_in, node_w1, width);
    update.set_gradient(u.w_m, h, h, n.ld_hidden, node_w1 + f, width);
    update.set_gradient(u.w_b, h, n.attrs, n.ld_attrs, node_w1 + f + h, width);
  }
  update.set_gradient(u.node_b1, 1, h, h, output<T>(g.node_b1), h);
  update.set_gradient(u.node_w2, o, h, n.ld_hidden, output<T>(g.node_w2), h);
  update.set_gradient(u.node_b2, 1, o, o, output<T>(g.node_b2), o);
  update.set_gradient(u.vel_w1, h, f, n.ld_in, output<T>(g.vel_w1), f);
  update.set_gradient(u.vel_b1, 1, h, h, output<T>(g.vel_b1), h);
  update.set_gradient(u.vel_w2, 1, h, h, output<T>(g.vel_w2), h);
  update.set_gradient(u.vel_b2, 1, 1, 1, output<T>(g.vel_b2), 1);
  if (T* edge_w1 = output<T>(g.edge_w1)) {
    const int64_t width = edge_w1_width(a);
    pq.set_gradient(n.pq_offsets.w_i, h, f, n.ld_in, edge_w1, width);
    pq.set_gradient(n.pq_offsets.w_j, h, f, n.ld_in, edge_w1 + f, width);
  }
  pq.set_gradient(n.pq_offsets.edge_b1, 1, h, h, output<T>(g.edge_b1), h);
}

// Adds the steps that call body(begin, end, worker, accumulator, overwrite) for each block of
// nodes, a task at a time: the task's first block overwrites its accumulator. Tasks run in waves of
// at most `wave`. The sums of the last wave are left to add_node_sums, in a later step. `sums`
// must outlive the schedule.
template <class T, class Body>
void add_accumulating_steps(Schedule& schedule, const KernelTable<T>& kernels, int64_t nodes,
                            int64_t wave, WeightSums<T>& sums, const Body& body) {
  const int64_t tasks = accumulating_task_count(nodes);
  for (int64_t first = 0; first < tasks; first += wave) {
    const int64_t count = std::min(wave, tasks - first);
    schedule.add_step(count, [=, &sums](int64_t k, int worker) {
      T* accumulator = sums.accumulator(k);
      bool overwrite = sums.tasks_write_all;
      for_node_blocks(nodes, tasks, first + k, [&](int64_t begin, int64_t end) {
        body(begin, end, worker, accumulator, overwrite);
        overwrite = false;
      });
    });
    if (first + count == tasks) return;
    schedule.add_step();
    sums.add_wave(schedule, kernels, 0, count, first == 0, false);
  }
}

// Adds to the last step: the sums of the last wave's accumulators, and the gradients.
template <class T>
void add_node_sums(Schedule& schedule, const KernelTable<T>& kernels, int64_t nodes, int64_t wave,
                   WeightSums<T>& sums) {
  const int64_t tasks = accumulating_task_count(nodes);
  if (tasks == 0) return sums.add_zeroing(schedule, kernels);
  const int64_t first = (tasks - 1) / wave * wave;
  sums.add_wave(schedule, kernels, 0, tasks - first, first == 0, true);
}

}  // namespace egnn
