#include "edge_pass.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "instruction_sets.h"
#include "parallel.h"
#include "workspace.h"

namespace egnn {
namespace {

// Tasks are ranges of edges whose bounds depend on the problem alone: so do the sums' orders, and
// with them the bits of the result, whatever the number of threads.
constexpr int64_t kTaskEdges = 480;
constexpr int64_t kMaxForwardTasks = 8192;
constexpr int64_t kTargetTasks = 16;  // a small problem is still split for several threads
// the tasks in flight in backward: bounded by the memory for their gradients
constexpr int64_t kWaveBytes = int64_t{24} << 20;
constexpr int64_t kWaveTasks = 32;

int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }
int64_t divide_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit; }

int64_t task_edges(int64_t edges) {
  const int64_t wanted = round_up(divide_up(edges, kTargetTasks), kBlockEdges);
  return std::clamp<int64_t>(wanted, kBlockEdges, kTaskEdges);
}

template <class T>
const T* in(uintptr_t address) {
  return reinterpret_cast<const T*>(address);
}

template <class T>
T* out(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void zero(void* memory, int64_t bytes, int threads) {
  if (memory == nullptr || bytes == 0) return;
  constexpr int64_t kPiece = int64_t{1} << 20;
  parallel_for(divide_up(bytes, kPiece), threads, [&](int64_t k, int) {
    std::memset(static_cast<char*>(memory) + k * kPiece, 0, std::min(kPiece, bytes - k * kPiece));
  });
}

template <class T>
Problem<T> describe(const Args& a, const KernelTable<T>& kernels) {
  Problem<T> p{};
  p.nodes = a.num_nodes;
  p.rowptr = in<int64_t>(a.rowptr);
  p.edges = p.rowptr[p.nodes];
  p.senders = in<int32_t>(a.senders);
  p.perm = in<int32_t>(a.perm);
  p.first = in<int32_t>(a.first);
  p.hidden = static_cast<int>(a.hidden);
  p.ld = static_cast<int>(round_up(a.hidden, kernels.width));
  p.vectors = p.ld / kernels.width;
  p.dim = static_cast<int>(a.coord_dim);
  p.attrs = static_cast<int>(a.attr_dim);
  p.pq = in<T>(a.pq);
  p.x = in<T>(a.x);
  p.edge_attr = in<T>(a.edge_attr);
  p.edge_mask = in<T>(a.edge_mask);
  p.activation = a.activation;
  p.slope = static_cast<T>(a.negative_slope);
  p.norm = static_cast<T>(a.norm);
  p.clamp = static_cast<T>(a.clamp);
  p.tanh = a.tanh;
  p.attention = a.w_g != 0;
  p.head = a.w_x != 0;
  p.partial_size = round_up(p.hidden + p.dim, 64 / static_cast<int64_t>(sizeof(T)));
  if (a.attr_rows >= 0 && a.attr_rows != p.edges) {
    throw std::invalid_argument("edge_attr: expected a row for each of the " +
                                std::to_string(p.edges) + " edges, got " +
                                std::to_string(a.attr_rows));
  }
  if (a.mask_rows >= 0 && a.mask_rows != p.edges) {
    throw std::invalid_argument("edge_mask: expected a row for each of the " +
                                std::to_string(p.edges) + " edges, got " +
                                std::to_string(a.mask_rows));
  }
  return p;
}

// Room for the weights, padded and packed; filled by pack_weights.
template <class T>
void reserve_weights(Problem<T>& p, const KernelTable<T>& kernels, bool backward, Workspace& ws) {
  for (T** vector : {&p.w_r, &p.b2, &p.w_g, &p.b3, &p.w_x}) *vector = ws.take<T>(p.ld);
  p.w_a = ws.take<T>(static_cast<int64_t>(p.attrs) * p.ld);
  const int64_t packed = kernels.packed_size(p.hidden);
  p.w2_forward = ws.take<T>(packed);
  p.w3_forward = ws.take<T>(packed);
  if (!backward) return;
  p.w2_backward = ws.take<T>(packed);
  p.w3_backward = ws.take<T>(packed);
}

template <class T>
void pad(const Problem<T>& p, uintptr_t from, int64_t stride, T* to) {
  const T* values = in<T>(from);
  for (int k = 0; k < p.ld; ++k) to[k] = values != nullptr && k < p.hidden ? values[k * stride] : T(0);
}

template <class T>
void pack_weights(const Args& a, Problem<T>& p, const KernelTable<T>& kernels, bool backward) {
  pad(p, a.w_r, a.w_r_stride, p.w_r);
  pad(p, a.b2, 1, p.b2);
  pad(p, a.w_g, 1, p.w_g);
  pad(p, a.b3, 1, p.b3);
  pad(p, a.w_x, 1, p.w_x);
  for (int k = 0; k < p.attrs; ++k) {
    pad(p, a.w_a + k * sizeof(T), a.w_a_stride, p.w_a + static_cast<int64_t>(k) * p.ld);
  }
  p.b_g = p.attention ? *in<T>(a.b_g) : T(0);
  kernels.pack(in<T>(a.w2), p.hidden, true, p.w2_forward);
  if (p.head) kernels.pack(in<T>(a.w3), p.hidden, true, p.w3_forward);
  if (!backward) return;
  kernels.pack(in<T>(a.w2), p.hidden, false, p.w2_backward);
  if (p.head) kernels.pack(in<T>(a.w3), p.hidden, false, p.w3_backward);
}

// Adds the rows that tasks share, in the order of the tasks.
template <class T>
void add_partials(const Problem<T>& p, int64_t tasks, T* features, int64_t stride, T* coords) {
  for (int64_t slot = 0; slot < tasks; ++slot) {
    for (int k = 0; k < 2; ++k) {
      const int64_t row = p.partial_rows[slot].row[k];
      if (row < 0) continue;
      const T* partial = p.partials + (2 * slot + k) * p.partial_size;
      if (features != nullptr) {
        for (int c = 0; c < p.hidden; ++c) features[row * stride + c] += partial[c];
      }
      if (coords != nullptr) {
        for (int c = 0; c < p.dim; ++c) coords[row * p.dim + c] += partial[p.hidden + c];
      }
    }
  }
}

template <class T>
void run_forward(const Args& a) {
  const KernelTable<T>& kernels = kernel_table<T>();
  Problem<T> p = describe<T>(a, kernels);
  p.m = out<T>(a.m);
  p.shift = out<T>(a.shift);
  p.task_edges = std::max(task_edges(p.edges),
                          round_up(divide_up(p.edges, kMaxForwardTasks), kBlockEdges));
  const int64_t tasks = divide_up(p.edges, p.task_edges);
  const int threads = std::max(1, a.threads);
  const int64_t scratch_size = round_up(kernels.forward_scratch(p), 16);

  zero(p.m, p.nodes * p.hidden * static_cast<int64_t>(sizeof(T)), threads);
  if (p.head) zero(p.shift, p.nodes * p.dim * static_cast<int64_t>(sizeof(T)), threads);
  if (tasks == 0) return;

  Workspace ws;
  T* scratch = nullptr;
  for (int round = 0; round < 2; ++round) {
    reserve_weights(p, kernels, false, ws);
    p.partials = ws.take<T>(2 * tasks * p.partial_size);
    p.partial_rows = ws.take<PartialRows>(tasks);
    scratch = ws.take<T>(threads * scratch_size);
    if (round == 0) ws.allocate();
  }
  pack_weights(a, p, kernels, false);
  parallel_for(tasks, threads, [&](int64_t task, int worker) {
    kernels.forward_task(p, task, scratch + worker * scratch_size);
  });
  add_partials(p, tasks, p.m, p.hidden, p.head ? p.shift : static_cast<T*>(nullptr));
}

// Writes a padded weight gradient to where the caller wants it; absent: nobody asked.
template <class T>
void deliver(const double* sums, int64_t rows, int64_t columns, int64_t ld, uintptr_t to) {
  T* place = out<T>(to);
  if (place == nullptr) return;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) place[r * columns + c] = static_cast<T>(sums[r * ld + c]);
  }
}

template <class T>
void deliver_weights(const Args& a, const Problem<T>& p, const double* sums) {
  const int64_t h = p.hidden;
  deliver<T>(sums + p.at.w2, h, h, p.ld, a.g_w2);
  deliver<T>(sums + p.at.w3, h, h, p.ld, a.g_w3);
  deliver<T>(sums + p.at.b2, 1, h, p.ld, a.g_b2);
  deliver<T>(sums + p.at.b3, 1, h, p.ld, a.g_b3);
  deliver<T>(sums + p.at.w_x, 1, h, p.ld, a.g_w_x);
  deliver<T>(sums + p.at.w_g, 1, h, p.ld, a.g_w_g);
  deliver<T>(sums + p.at.w_r, 1, h, p.ld, a.g_w_r);
  deliver<T>(sums + p.at.b_g, 1, 1, 1, a.g_b_g);
  if (T* place = out<T>(a.g_w_a)) {
    for (int64_t c = 0; c < h; ++c) {
      for (int k = 0; k < p.attrs; ++k) {
        place[c * p.attrs + k] = static_cast<T>(sums[p.at.w_a + k * p.ld + c]);
      }
    }
  }
}

template <class T>
void set_gradients(const Args& a, Problem<T>& p) {
  p.g_m = in<T>(a.g_m);
  p.g_shift = p.head ? in<T>(a.g_shift) : nullptr;
  p.g_pq = out<T>(a.g_pq);
  p.g_coords = out<T>(a.g_coords);
  p.g_edge_attr = out<T>(a.g_edge_attr);
  p.g_edge_mask = out<T>(a.g_edge_mask);
  p.needs_w2 = a.g_w2 != 0 || a.g_b2 != 0;
  p.needs_w3 = p.g_shift != nullptr && (a.g_w3 != 0 || a.g_b3 != 0);
  p.needs_w_x = p.g_shift != nullptr && a.g_w_x != 0;
  p.needs_w_g = p.attention && (a.g_w_g != 0 || a.g_b_g != 0);
  const bool first_weights = a.g_w_r != 0 || a.g_w_a != 0;
  p.needs_first = first_weights || p.g_pq != nullptr || p.g_coords != nullptr ||
                  p.g_edge_attr != nullptr;
  p.needs_weights = first_weights || p.needs_w2 || p.needs_w3 || p.needs_w_x || p.needs_w_g;
  p.needs_first_weights = first_weights;
}

template <class T>
void run_backward(const Args& a) {
  const KernelTable<T>& kernels = kernel_table<T>();
  Problem<T> p = describe<T>(a, kernels);
  set_gradients(a, p);
  p.task_edges = task_edges(p.edges);
  p.at = kernels.weight_offsets(p);
  const int64_t tasks = divide_up(p.edges, p.task_edges);
  const int threads = std::max(1, a.threads);
  const int64_t scratch_size = round_up(kernels.backward_scratch(p), 16);
  const int64_t bytes_per_task =
      static_cast<int64_t>(sizeof(T)) * (p.at.size + p.task_edges * (p.ld + p.dim));
  const int64_t fitting = std::max<int64_t>(kWaveBytes / bytes_per_task, 2 * threads);
  const int64_t wave = std::min({tasks, fitting, std::max<int64_t>(kWaveTasks, 2 * threads)});

  zero(p.g_pq, 2 * p.nodes * p.hidden * static_cast<int64_t>(sizeof(T)), threads);
  zero(p.g_coords, p.nodes * p.dim * static_cast<int64_t>(sizeof(T)), threads);

  Workspace ws;
  T* scratch = nullptr;
  double* sums = nullptr;
  for (int round = 0; round < 2; ++round) {
    reserve_weights(p, kernels, true, ws);
    p.partials = ws.take<T>(2 * wave * p.partial_size);
    p.partial_rows = ws.take<PartialRows>(wave);
    p.weight_sums = ws.take<T>(p.needs_weights ? wave * p.at.size : 0);
    p.g_z1 = ws.take<T>(wave * p.task_edges * p.ld);
    p.g_d = ws.take<T>(wave * p.task_edges * p.dim);
    p.sender_keys = ws.take<uint32_t>(2 * wave * p.task_edges);
    p.sender_places = ws.take<uint16_t>(2 * wave * p.task_edges);
    T* sent = ws.take<T>(p.g_coords != nullptr ? p.nodes * p.dim : 0);
    p.g_coords_sent = p.g_coords != nullptr ? sent : nullptr;
    sums = ws.take<double>(p.at.size);
    scratch = ws.take<T>(threads * scratch_size);
    if (round == 0) ws.allocate();
  }
  zero(p.g_coords_sent, p.nodes * p.dim * static_cast<int64_t>(sizeof(T)), threads);
  std::memset(sums, 0, p.at.size * sizeof(double));
  pack_weights(a, p, kernels, true);

  const bool senders = p.g_pq != nullptr || p.g_coords != nullptr;
  const int64_t ranges = senders ? std::min<int64_t>(p.nodes, 8 * threads) : 0;
  constexpr int64_t kSlice = 2048;  // of the weight gradients
  const int64_t slices = p.needs_weights ? divide_up(p.at.size, kSlice) : 0;
  for (int64_t begin = 0; begin < tasks; begin += wave) {
    const int64_t count = std::min(wave, tasks - begin);
    p.wave_begin = begin;
    parallel_for(count, threads, [&](int64_t k, int worker) {
      kernels.backward_task(p, begin + k, scratch + worker * scratch_size);
    });
    parallel_for(ranges + slices + 1, threads, [&](int64_t k, int) {
      if (k < ranges) {
        kernels.sender_sums(p, count, p.nodes * k / ranges, p.nodes * (k + 1) / ranges);
      } else if (k == ranges) {
        add_partials(p, count, p.g_pq, 2 * static_cast<int64_t>(p.hidden), p.g_coords);
      } else {
        const int64_t from = (k - ranges - 1) * kSlice;
        const int64_t to = std::min(from + kSlice, p.at.size);
        for (int64_t slot = 0; slot < count; ++slot) {
          const T* task_sums = p.weight_sums + slot * p.at.size;
          for (int64_t c = from; c < to; ++c) sums[c] += static_cast<double>(task_sums[c]);
        }
      }
    });
  }
  if (p.g_coords != nullptr) {
    for (int64_t k = 0; k < p.nodes * p.dim; ++k) p.g_coords[k] += p.g_coords_sent[k];
  }
  deliver_weights(a, p, sums);
}

}  // namespace

void forward(const Args& args) {
  if (args.is_double) {
    run_forward<double>(args);
  } else {
    run_forward<float>(args);
  }
}

void backward(const Args& args) {
  if (args.is_double) {
    run_backward<double>(args);
  } else {
    run_backward<float>(args);
  }
}

}  // namespace egnn
