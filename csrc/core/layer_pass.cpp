// The operator `layer`: P and Q, the edge pass, phi_h, phi_v and the new coordinates in one call.
//
// For small graphs the operations of PyTorch around an edge pass take most of the time: here there
// are none.
#include "api.h"
#include "node_pass.h"
#include "stored_activations.h"

namespace egnn {
namespace {

// A layer's tensors under their names in the edge pass, without pq, w_r and w_a.
MessagesInputs edge_tensors(const LayerInputs& layer) {
  MessagesInputs edge;
  edge.x = layer.x;
  edge.edge_attr = layer.edge_attr;
  edge.edge_mask = layer.edge_mask;
  edge.w2 = layer.edge_w2;
  edge.b2 = layer.edge_b2;
  edge.w_g = layer.att_w;
  edge.b_g = layer.att_b;
  edge.w3 = layer.coord_w1;
  edge.b3 = layer.coord_b1;
  edge.w_x = layer.coord_w2;
  return edge;
}

// The record of a layer's edge pass, without pq, outputs and cotangents. w_r and w_a are columns of
// edge_w1.
template <class T>
MessagesArgs edge_args(const LayerArgs& a) {
  MessagesArgs edge;
  static_cast<CommonArgs&>(edge) = a;
  edge.options = a.options;
  edge.inputs = edge_tensors(a.inputs);
  edge.gradients = edge_tensors(a.gradients);
  edge.inputs.w_r = a.inputs.edge_w1 + 2 * a.in_features * sizeof(T);
  edge.inputs.w_a = edge.inputs.w_r + sizeof(T);
  edge.w_r_stride = edge.w_a_stride = edge_w1_width(a);
  return edge;
}

template <class T>
void run_forward(const LayerArgs& a) {
  const KernelTable<T>& kernels = kernel_table<T>();
  const int threads = std::max(1, a.threads);
  const MessagesArgs edge = edge_args<T>(a);
  Problem<T> p = make_problem<T>(edge, kernels);
  NodeProblem<T> n = make_node_problem<T>(a, kernels);
  p.pq_stride = 2 * static_cast<int64_t>(p.ld);
  p.pq_padded = true;
  EdgeForward<T> pass(kernels, p, threads);
  const bool stores = a.constants.activations != 0;
  const int64_t scratch_size = round_up(kernels.node_scratch(n), kPage / sizeof(T));
  T* scratch = nullptr;
  Workspace workspace;
  Schedule schedule;
  workspace.plan([&](bool is_last) {
    Packing<T> packing(kernels, workspace);
    pack_edge_weights(edge, p, false, true, packing);
    pack_node_weights(a, n, true, packing);
    n.pq = workspace.take<T>(stores ? 0 : (n.nodes + kSpareRows) * p.pq_stride);
    if (a.constants.m == 0) {  // no backward follows: M and X are needed during this call only
      n.m = workspace.take<T>(n.nodes * n.hidden);
      n.shift = workspace.take<T>(n.nodes * n.dim);
    }
    scratch = workspace.take<T>(threads * scratch_size);
    pass.reserve(workspace);
    if (is_last) packing.add_step(schedule);
  });
  if (stores) use_activations(a, p, n);
  mark_activations(a, kernels);
  p.m = n.m;
  p.shift = n.shift;
  p.pq = n.pq;
  pass.add_zeroing(schedule);
  add_node_step(schedule, n.nodes, [&](int64_t begin, int64_t end, int worker) {
    kernels.node_pq(n, begin, end, scratch + worker * scratch_size);
  });
  pass.add_steps(schedule);
  add_node_step(schedule, n.nodes, [&](int64_t begin, int64_t end, int worker) {
    kernels.node_update(n, begin, end, scratch + worker * scratch_size);
  });
  schedule.run(threads);
}

template <class T>
void run_backward(const LayerArgs& a) {
  const KernelTable<T>& kernels = kernel_table<T>();
  const int threads = std::max(1, a.threads);
  const MessagesArgs edge = edge_args<T>(a);
  Problem<T> p = make_problem<T>(edge, kernels);
  NodeProblem<T> n = make_node_problem<T>(a, kernels);
  n.g_h_out = input<T>(a.cotangents.h);
  n.g_x_out = input<T>(a.cotangents.x);
  n.g_v_out = input<T>(a.cotangents.v);
  n.g_h = output<T>(a.gradients.h);
  n.g_v = output<T>(a.gradients.v);
  n.g_node_attr = output<T>(a.gradients.node_attr);
  n.g_coord_weight = output<T>(a.gradients.coord_weight);
  set_node_offsets(kernels, n);
  const bool moves = n.g_x_out != nullptr || n.g_v_out != nullptr;
  const bool needs_pq_weights = a.gradients.edge_w1 != 0 || a.gradients.edge_b1 != 0;
  const bool needs_pq = n.g_h != nullptr || needs_pq_weights;

  p.pq_stride = 2 * static_cast<int64_t>(p.ld);
  p.pq_padded = true;
  // whether these are null matters before their memory is reserved
  T present{};
  p.g_m = n.g_h_out != nullptr ? &present : nullptr;
  p.g_shift = n.head && moves ? &present : nullptr;
  p.g_pq = needs_pq ? &present : nullptr;
  set_wanted(edge.gradients, a.gradients.edge_w1 != 0, p);
  EdgeBackward<T> pass(kernels, p, threads);

  const bool stored = has_activations(a, kernels);
  WeightSums<T> update_sums, pq_sums;
  update_sums.size = wants_update_weights(a.gradients) ? n.update_offsets.size : 0;
  update_sums.tasks_write_all = n.g_h_out != nullptr && (moves || !n.velocity);
  pq_sums.size = needs_pq_weights ? n.pq_offsets.size : 0;
  const int64_t node_tasks = accumulating_task_count(n.nodes);
  const int64_t node_wave = std::min(node_tasks, std::max(2 * kWaveTasks, int64_t{4} * threads));
  const int64_t node_waves = divide_up(node_tasks, std::max<int64_t>(node_wave, 1));
  const int64_t scratch_size = round_up(kernels.node_scratch(n), kPage / sizeof(T));
  T *scratch = nullptr, *g_m = nullptr, *g_shift = nullptr;
  Workspace workspace;
  Schedule schedule;
  workspace.plan([&](bool is_last) {
    Packing<T> packing(kernels, workspace);
    pack_edge_weights(edge, p, true, !stored, packing);
    pack_node_weights(a, n, !stored, packing);
    pack_node_weights_backward(a, n, packing);
    n.pq = workspace.take<T>(stored ? 0 : (n.nodes + kSpareRows) * p.pq_stride);
    n.g_pq = workspace.take<T>((n.nodes + kSpareRows) * p.pq_stride);
    g_m = workspace.take<T>(n.nodes * n.hidden);
    g_shift = workspace.take<T>(n.nodes * n.dim);
    scratch = workspace.take<T>(threads * scratch_size);
    update_sums.reserve(workspace, node_wave, node_waves);
    pq_sums.reserve(workspace, node_wave, node_waves);
    pass.reserve(workspace);
    if (is_last) packing.add_step(schedule);
  });
  if (stored) use_activations(a, p, n);
  n.g_m = g_m;
  n.g_shift = g_shift;
  p.pq = n.pq;
  p.g_m = p.g_m != nullptr ? g_m : nullptr;
  p.g_shift = p.g_shift != nullptr ? g_shift : nullptr;
  p.g_pq = p.g_pq != nullptr ? n.g_pq : nullptr;

  set_edge_gradients(edge.gradients, p, pass.sums);
  set_node_gradients(a, n, update_sums, pq_sums);
  if (T* edge_w1 = output<T>(a.gradients.edge_w1)) {
    T* w_r = edge_w1 + 2 * a.in_features;
    set_first_gradients(p, w_r, edge_w1_width(a), w_r + 1, edge_w1_width(a), pass.sums);
  }
  pass.add_zeroing(schedule);
  add_accumulating_steps(schedule, kernels, n.nodes, node_wave, update_sums,
                         [&](int64_t begin, int64_t end, int worker, T* sums, bool overwrite) {
                           T* memory = scratch + worker * scratch_size;
                           if (!stored) kernels.node_pq(n, begin, end, memory);
                           kernels.node_update_backward(n, begin, end, memory, sums, overwrite);
                         });
  pass.add_steps(schedule,
                 [&] { add_node_sums(schedule, kernels, n.nodes, node_wave, update_sums); });
  if (needs_pq) {
    add_accumulating_steps(schedule, kernels, n.nodes, node_wave, pq_sums,
                           [&](int64_t begin, int64_t end, int worker, T* sums, bool overwrite) {
                             kernels.node_pq_backward(
                                 n, begin, end, scratch + worker * scratch_size, sums, overwrite);
                           });
    schedule.add_step();
    add_node_sums(schedule, kernels, n.nodes, node_wave, pq_sums);
  }
  if (p.g_x != nullptr && n.g_x_out != nullptr) {
    schedule.add_step(1, [&](int64_t, int) {
      for (int64_t k = 0; k < n.nodes * n.dim; ++k) p.g_x[k] += n.g_x_out[k];
    });
  }
  schedule.run(threads);
}

}  // namespace

int64_t layer_stored_elements(const LayerArgs& a) {
  const int64_t num_edges = input<int64_t>(a.graph.rowptr)[a.num_nodes];
  if (num_edges == 0) return 0;
  const bool velocity = a.inputs.vel_b2 != 0, head = a.inputs.coord_w2 != 0;
  const auto elements = [&](const auto& kernels, auto zero) {
    const int64_t ld = round_up(a.hidden, kernels.width);
    return ActivationOffsets<decltype(zero)>(a.num_nodes, num_edges, ld, velocity, head).size;
  };
  return a.is_double ? elements(kernel_table<double>(), 0.0)
                     : elements(kernel_table<float>(), 0.0f);
}

void layer_forward(const LayerArgs& args) {
  args.is_double ? run_forward<double>(args) : run_forward<float>(args);
}

void layer_backward(const LayerArgs& args) {
  args.is_double ? run_backward<double>(args) : run_backward<float>(args);
}

}  // namespace egnn
