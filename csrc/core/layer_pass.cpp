// A whole layer as one call: P and Q, the edge pass, phi_h, phi_v and the new coordinates. What
// costs a small graph most, PyTorch's own operations around the edge pass, disappears.
#include "edge_pass.h"
#include "api.h"

namespace egnn {
namespace {

// w_r and w_a are columns of w1.
template <class T>
Args edge_args(const LayerArgs& a) {
  Args edge = a;
  const int64_t width = 2 * a.in_features + 1 + a.attr_dim;
  edge.w_r = a.w1 + 2 * a.in_features * sizeof(T);
  edge.w_a = edge.w_r + sizeof(T);
  edge.w_r_stride = edge.w_a_stride = width;
  return edge;
}

template <class T>
NodeProblem<T> describe_nodes(const LayerArgs& a, const KernelTable<T>& kernels) {
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
  n.activation = a.activation;
  n.slope = static_cast<T>(a.negative_slope);
  n.residual = a.residual;
  n.velocity = a.vel_b2 != 0;  // of its weights the one that is never empty
  n.shifts = a.w_x != 0;
  n.h = in<T>(a.h);
  n.x = in<T>(a.x);
  n.v = in<T>(a.v);
  n.node_attr = in<T>(a.node_attr);
  n.coord_weight = in<T>(a.coord_weight);
  n.coord_scale = static_cast<T>(a.coord_scale);
  n.vel_b2 = n.velocity ? *in<T>(a.vel_b2) : T(0);
  n.m = out<T>(a.m);
  n.shift = out<T>(a.shift);
  n.h_out = out<T>(a.h_out);
  n.x_out = out<T>(a.x_out);
  n.v_out = out<T>(a.v_out);
  return n;
}

template <class T>
void pack_forward(const LayerArgs& a, NodeProblem<T>& n, bool products, Packing<T>& packing) {
  const int64_t width1 = 2 * a.in_features + 1 + a.attr_dim;
  const int64_t node_width = a.in_features + a.hidden + a.node_attr_dim;
  const T* w1 = in<T>(a.w1);
  const T* node_w1 = in<T>(a.node_w1);
  n.b1 = packing.vector(in<T>(a.b1), 1, n.hidden);
  n.node_b1 = packing.vector(in<T>(a.node_b1), 1, n.hidden);
  n.node_b2 = packing.vector(in<T>(a.node_b2), 1, n.out);
  n.vel_b1 = packing.vector(in<T>(a.vel_b1), 1, n.hidden);
  n.vel_w2 = packing.vector(in<T>(a.vel_w2), 1, n.hidden);
  if (!products) return;
  n.w_i = packing.matrix(w1, width1, n.hidden, n.in, true);
  n.w_j = packing.matrix(w1 + n.in, width1, n.hidden, n.in, true);
  n.w_h = packing.matrix(node_w1, node_width, n.hidden, n.in, true);
  n.w_m = packing.matrix(node_w1 + n.in, node_width, n.hidden, n.hidden, true);
  n.w_b = packing.matrix(node_w1 + n.in + n.hidden, node_width, n.hidden, n.attrs, true);
  n.w_out = packing.matrix(in<T>(a.node_w2), n.hidden, n.out, n.hidden, true);
  n.w_v = packing.matrix(in<T>(a.vel_w1), n.in, n.hidden, n.in, true);
}

template <class T>
void pack_backward(const LayerArgs& a, NodeProblem<T>& n, Packing<T>& packing) {
  const int64_t width1 = 2 * a.in_features + 1 + a.attr_dim;
  const int64_t node_width = a.in_features + a.hidden + a.node_attr_dim;
  const T* w1 = in<T>(a.w1);
  const T* node_w1 = in<T>(a.node_w1);
  n.w_i_back = packing.matrix(w1, width1, n.hidden, n.in, false);
  n.w_j_back = packing.matrix(w1 + n.in, width1, n.hidden, n.in, false);
  n.w_h_back = packing.matrix(node_w1, node_width, n.hidden, n.in, false);
  n.w_m_back = packing.matrix(node_w1 + n.in, node_width, n.hidden, n.hidden, false);
  n.w_b_back = packing.matrix(node_w1 + n.in + n.hidden, node_width, n.hidden, n.attrs, false);
  n.w_out_back = packing.matrix(in<T>(a.node_w2), n.hidden, n.out, n.hidden, false);
  n.w_v_back = packing.matrix(in<T>(a.vel_w1), n.in, n.hidden, n.in, false);
}

// The nodes of a task among `tasks`, in whole blocks.
inline int64_t node_begin(int64_t nodes, int64_t tasks, int64_t task) {
  return std::min(nodes, divide_up(nodes, kBlockEdges) * task / tasks * kBlockEdges);
}

template <class Body>
void for_node_blocks(int64_t nodes, int64_t tasks, int64_t task, const Body& body) {
  const int64_t last = node_begin(nodes, tasks, task + 1);
  for (int64_t begin = node_begin(nodes, tasks, task); begin < last; begin += kBlockEdges) {
    body(begin, std::min<int64_t>(begin + kBlockEdges, last));
  }
}

// A step that runs body(begin, end, worker) over blocks of nodes.
template <class Body>
void add_node_blocks(Schedule& schedule, int64_t nodes, const Body& body) {
  const int64_t tasks = task_count(nodes);
  schedule.add(tasks, [=](int64_t task, int worker) {
    for_node_blocks(nodes, tasks, task,
                    [&](int64_t begin, int64_t end) { body(begin, end, worker); });
  });
}

// Accumulators are large beside a block of nodes: fewer tasks than for edges.
inline int64_t node_tasks(int64_t nodes) {
  const int64_t blocks = divide_up(nodes, kBlockEdges);
  return std::max(divide_up(blocks, kTaskEdges / kBlockEdges), std::min(blocks, kSplit / 2));
}

// The same with a weight accumulator a task, body(begin, end, worker, accumulator, fresh): steps
// for each wave of tasks. What the last wave leaves is collected by also_collect_nodes, in a later
// step. `sums` must outlive the schedule.
template <class T, class Body>
void add_node_sums(Schedule& schedule, const KernelTable<T>& kernels, int64_t nodes, int64_t wave,
                   WeightSums<T>& sums, const Body& body) {
  const int64_t tasks = node_tasks(nodes);
  for (int64_t first = 0; first < tasks; first += wave) {
    const int64_t count = std::min(wave, tasks - first);
    schedule.add(count, [=, &sums](int64_t k, int worker) {
      T* accumulator = sums.accumulator(k);
      bool fresh = sums.complete;
      for_node_blocks(nodes, tasks, first + k, [&](int64_t begin, int64_t end) {
        body(begin, end, worker, accumulator, fresh);
        fresh = false;
      });
    });
    if (first + count == tasks) return;
    schedule.add(0, nullptr);
    sums.also_add(schedule, kernels, 0, count, first == 0, false);
  }
}

template <class T>
void also_collect_nodes(Schedule& schedule, const KernelTable<T>& kernels, int64_t nodes,
                        int64_t wave, WeightSums<T>& sums) {
  const int64_t tasks = node_tasks(nodes);
  if (tasks == 0) return sums.also_zeros(schedule, kernels);
  const int64_t first = (tasks - 1) / wave * wave;
  sums.also_add(schedule, kernels, 0, tasks - first, first == 0, true);
}

// The kept buffer: which kernels wrote it; P and Q; the outputs of phi_h's, phi_v's, phi_e's and
// phi_x's linears that an activation follows. Rows have the widths of the kernels; spare rows
// follow each part.
template <class T>
struct Kept {
  int64_t pq, z_h, z_v, z2, z3, size;

  Kept(int64_t nodes, int64_t edges, int64_t ld, bool velocity, bool head) {
    const auto rows = [&](int64_t count, int64_t width) {
      return aligned_size((count + kSpareRows) * width * sizeof(T)) /
             static_cast<int64_t>(sizeof(T));
    };
    pq = aligned_size(sizeof(uintptr_t)) / static_cast<int64_t>(sizeof(T));
    z_h = pq + rows(nodes, 2 * ld);
    z_v = z_h + rows(nodes, ld);
    z2 = z_v + (velocity ? rows(nodes, ld) : 0);
    z3 = z2 + rows(edges, ld);
    size = z3 + (head ? rows(edges, ld) : 0);
  }
};

// Each instruction set has its own layout; the address of its table of kernels identifies it.
template <class T>
void sign_kept(const LayerArgs& a, const KernelTable<T>& kernels) {
  if (a.kept != 0) *reinterpret_cast<uintptr_t*>(a.kept) = reinterpret_cast<uintptr_t>(&kernels);
}

// Whether there is a kept buffer, and these kernels wrote it.
template <class T>
bool can_use_kept(const LayerArgs& a, const KernelTable<T>& kernels) {
  return a.kept != 0 &&
         *reinterpret_cast<const uintptr_t*>(a.kept) == reinterpret_cast<uintptr_t>(&kernels);
}

template <class T>
void use_kept(const LayerArgs& a, Problem<T>& p, NodeProblem<T>& n) {
  const Kept<T> at(n.nodes, p.edges, p.ld, n.velocity, p.head);
  T* kept = out<T>(a.kept);
  n.pq = kept + at.pq;
  n.z_h = kept + at.z_h;
  n.z_v = n.velocity ? kept + at.z_v : nullptr;
  p.z2 = kept + at.z2;
  p.z3 = p.head ? kept + at.z3 : nullptr;
}

template <class T>
void run_forward(const LayerArgs& a) {
  const KernelTable<T>& kernels = kernel_table<T>();
  const int threads = std::max(1, a.threads);
  const Args edge = edge_args<T>(a);
  Problem<T> p = describe<T>(edge, kernels);
  NodeProblem<T> n = describe_nodes<T>(a, kernels);
  p.pq_stride = 2 * static_cast<int64_t>(p.ld);
  p.pq_padded = true;
  EdgeForward<T> pass(kernels, p, threads);
  const int64_t scratch_size = round_up(kernels.node_scratch(n), kPage / sizeof(T));
  T* scratch = nullptr;
  Workspace ws;
  Schedule schedule;
  ws.plan([&](bool last) {
    Packing<T> packing(kernels, ws);
    pack_edge_weights(edge, p, false, true, packing);
    pack_forward(a, n, true, packing);
    n.pq = ws.take<T>(a.kept == 0 ? (n.nodes + kSpareRows) * p.pq_stride : 0);
    if (a.m == 0) {  // no backward follows: M and X are needed during this call alone
      n.m = ws.take<T>(n.nodes * n.hidden);
      n.shift = ws.take<T>(n.nodes * n.dim);
    }
    scratch = ws.take<T>(threads * scratch_size);
    pass.reserve(ws);
    if (last) packing.add_to(schedule);
  });
  if (a.kept != 0) use_kept(a, p, n);
  sign_kept(a, kernels);
  p.m = n.m;
  p.shift = n.shift;
  p.pq = n.pq;
  pass.also_prepare(schedule);
  add_node_blocks(schedule, n.nodes, [&](int64_t begin, int64_t end, int worker) {
    kernels.node_pq(n, begin, end, scratch + worker * scratch_size);
  });
  pass.add_to(schedule);
  add_node_blocks(schedule, n.nodes, [&](int64_t begin, int64_t end, int worker) {
    kernels.node_update(n, begin, end, scratch + worker * scratch_size);
  });
  schedule.run(threads);
}

template <class T>
void place_sums(const LayerArgs& a, const KernelTable<T>& kernels, NodeProblem<T>& n) {
  const auto matrix = [&](int64_t rows, int64_t ld) { return (rows + kernels.weight_rows) * ld; };
  auto& u = n.at_update;
  u.out = 0;
  u.out_bias = u.out + matrix(n.out, n.ld_hidden);
  u.h = u.out_bias + n.ld_out;
  u.m = u.h + matrix(n.hidden, n.ld_in);
  u.b = u.m + matrix(n.hidden, n.ld_hidden);
  u.bias = u.b + matrix(n.hidden, n.ld_attrs);
  u.v = u.bias + n.ld_hidden;
  u.vel_bias = u.v + (n.velocity ? matrix(n.hidden, n.ld_in) : 0);
  u.vel_w2 = u.vel_bias + n.ld_hidden;
  u.vel_b2 = u.vel_w2 + n.ld_hidden;
  u.size = u.vel_b2 + kernels.width;
  n.at_pq.i = 0;
  n.at_pq.j = n.at_pq.i + matrix(n.hidden, n.ld_in);
  n.at_pq.bias = n.at_pq.j + matrix(n.hidden, n.ld_in);
  n.at_pq.size = n.at_pq.bias + n.ld_hidden;
  n.needs_weights = a.g_node_w1 != 0 || a.g_node_b1 != 0 || a.g_node_w2 != 0 || a.g_node_b2 != 0 ||
                    a.g_vel_w1 != 0 || a.g_vel_b1 != 0 || a.g_vel_w2 != 0 || a.g_vel_b2 != 0;
}

template <class T>
void deliver_node_weights(const LayerArgs& a, const NodeProblem<T>& n, WeightSums<T>& update,
                          WeightSums<T>& first) {
  const auto& u = n.at_update;
  const int64_t f = n.in, h = n.hidden, o = n.out;
  const int64_t node_width = f + h + n.attrs, width1 = 2 * f + 1 + a.attr_dim;
  T* node_w1 = out<T>(a.g_node_w1);
  if (node_w1 != nullptr) {
    update.deliver(u.h, h, f, n.ld_in, node_w1, node_width);
    update.deliver(u.m, h, h, n.ld_hidden, node_w1 + f, node_width);
    update.deliver(u.b, h, n.attrs, n.ld_attrs, node_w1 + f + h, node_width);
  }
  update.deliver(u.bias, 1, h, h, out<T>(a.g_node_b1), h);
  update.deliver(u.out, o, h, n.ld_hidden, out<T>(a.g_node_w2), h);
  update.deliver(u.out_bias, 1, o, o, out<T>(a.g_node_b2), o);
  update.deliver(u.v, h, f, n.ld_in, out<T>(a.g_vel_w1), f);
  update.deliver(u.vel_bias, 1, h, h, out<T>(a.g_vel_b1), h);
  update.deliver(u.vel_w2, 1, h, h, out<T>(a.g_vel_w2), h);
  update.deliver(u.vel_b2, 1, 1, 1, out<T>(a.g_vel_b2), 1);
  if (T* w1 = out<T>(a.g_w1)) {
    first.deliver(n.at_pq.i, h, f, n.ld_in, w1, width1);
    first.deliver(n.at_pq.j, h, f, n.ld_in, w1 + f, width1);
  }
  first.deliver(n.at_pq.bias, 1, h, h, out<T>(a.g_b1), h);
}

template <class T>
void run_backward(const LayerArgs& a) {
  const KernelTable<T>& kernels = kernel_table<T>();
  const int threads = std::max(1, a.threads);
  const Args edge = edge_args<T>(a);
  Problem<T> p = describe<T>(edge, kernels);
  NodeProblem<T> n = describe_nodes<T>(a, kernels);
  n.g_h_out = in<T>(a.g_h_out);
  n.g_x_out = in<T>(a.g_x_out);
  n.g_v_out = in<T>(a.g_v_out);
  n.g_h = out<T>(a.g_h);
  n.g_v = out<T>(a.g_v);
  n.g_node_attr = out<T>(a.g_node_attr);
  n.g_coord_weight = out<T>(a.g_coord_weight);
  n.needs_h = n.g_h != nullptr;
  place_sums(a, kernels, n);
  const bool moves = n.g_x_out != nullptr || n.g_v_out != nullptr;
  const bool needs_first_weights = a.g_w1 != 0 || a.g_b1 != 0;
  const bool needs_pq = n.needs_h || needs_first_weights;

  p.pq_stride = 2 * static_cast<int64_t>(p.ld);
  p.pq_padded = true;
  // addresses come with the memory; whether there is one matters already
  T present{};
  p.g_m = n.g_h_out != nullptr ? &present : nullptr;
  p.g_shift = n.shifts && moves ? &present : nullptr;
  p.g_pq = needs_pq ? &present : nullptr;
  want_gradients(edge, a.g_w1 != 0, p);
  EdgeBackward<T> pass(kernels, p, threads);

  const bool has_pq = can_use_kept(a, kernels);
  WeightSums<T> update, first;
  update.size = n.needs_weights ? n.at_update.size : 0;
  first.size = needs_first_weights ? n.at_pq.size : 0;
  update.complete = n.g_h_out != nullptr && (moves || !n.velocity);
  const int64_t node_wave =
      std::min(node_tasks(n.nodes), std::max(2 * kWaveTasks, int64_t{4} * threads));
  const int64_t node_waves = divide_up(node_tasks(n.nodes), std::max<int64_t>(node_wave, 1));
  const int64_t scratch_size = round_up(kernels.node_scratch(n), kPage / sizeof(T));
  T *scratch = nullptr, *g_m = nullptr, *g_shift = nullptr;
  Workspace ws;
  Schedule schedule;
  ws.plan([&](bool last) {
    Packing<T> packing(kernels, ws);
    pack_edge_weights(edge, p, true, !has_pq, packing);
    pack_forward(a, n, !has_pq, packing);
    pack_backward(a, n, packing);
    n.pq = ws.take<T>(has_pq ? 0 : (n.nodes + kSpareRows) * p.pq_stride);
    n.g_pq = ws.take<T>((n.nodes + kSpareRows) * p.pq_stride);
    g_m = ws.take<T>(n.nodes * n.hidden);
    g_shift = ws.take<T>(n.nodes * n.dim);
    scratch = ws.take<T>(threads * scratch_size);
    update.reserve(ws, node_wave, node_waves);
    first.reserve(ws, node_wave, node_waves);
    pass.reserve(ws);
    if (last) packing.add_to(schedule);
  });
  if (has_pq) use_kept(a, p, n);
  n.g_m = g_m;
  n.g_shift = g_shift;
  p.pq = n.pq;
  p.g_m = p.g_m != nullptr ? g_m : nullptr;
  p.g_shift = p.g_shift != nullptr ? g_shift : nullptr;
  p.g_pq = p.g_pq != nullptr ? n.g_pq : nullptr;

  deliver_edge_weights(edge, p, pass.sums);
  deliver_node_weights(a, n, update, first);
  if (T* w1 = out<T>(a.g_w1)) {
    const int64_t width1 = 2 * a.in_features + 1 + a.attr_dim;
    T* w_r = w1 + 2 * a.in_features;
    deliver_first_columns(p, pass.sums, w_r, width1, w_r + 1, width1);
  }
  pass.also_prepare(schedule);
  add_node_sums(schedule, kernels, n.nodes, node_wave, update,
                [&](int64_t begin, int64_t end, int worker, T* sums, bool fresh) {
                  T* own = scratch + worker * scratch_size;
                  if (!has_pq) kernels.node_pq(n, begin, end, own);
                  kernels.node_update_back(n, begin, end, own, sums, fresh);
                });
  pass.add_to(schedule, [&] { also_collect_nodes(schedule, kernels, n.nodes, node_wave, update); });
  if (needs_pq) {
    add_node_sums(schedule, kernels, n.nodes, node_wave, first,
                  [&](int64_t begin, int64_t end, int worker, T* sums, bool fresh) {
                    kernels.node_pq_back(n, begin, end, scratch + worker * scratch_size, sums,
                                         fresh);
                  });
    schedule.add(0, nullptr);
    also_collect_nodes(schedule, kernels, n.nodes, node_wave, first);
  }
  if (p.g_coords != nullptr && n.g_x_out != nullptr) {
    schedule.add(1, [&](int64_t, int) {
      for (int64_t k = 0; k < n.nodes * n.dim; ++k) p.g_coords[k] += n.g_x_out[k];
    });
  }
  schedule.run(threads);
}

}  // namespace

int64_t layer_kept_size(const LayerArgs& a) {
  const int64_t num_edges = in<int64_t>(a.rowptr)[a.num_nodes];
  if (num_edges == 0) return 0;
  const auto size = [&](const auto& kernels, auto zero) {
    using T = decltype(zero);
    const int64_t ld = round_up(a.hidden, kernels.width);
    return Kept<T>(a.num_nodes, num_edges, ld, a.vel_b2 != 0, a.w_x != 0).size;
  };
  return a.is_double ? size(kernel_table<double>(), 0.0) : size(kernel_table<float>(), 0.0f);
}

void layer_forward(const LayerArgs& args) {
  args.is_double ? run_forward<double>(args) : run_forward<float>(args);
}

void layer_backward(const LayerArgs& args) {
  args.is_double ? run_backward<double>(args) : run_backward<float>(args);
}

}  // namespace egnn
