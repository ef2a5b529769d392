// The edge pass over all of its tasks, forward and backward.
//
// Both operators use it, so reserving memory, packing weights and running are separate steps.
#pragma once

#include <limits>
#include <stdexcept>
#include <string>

#include "args.h"
#include "packing.h"
#include "weight_sums.h"

namespace egnn {

// An option in the kernels' precision. 0 may mean "none", so other values do not round to it.
template <class T>
T in_precision(double value) {
  const T rounded = static_cast<T>(value);
  return rounded == 0 && value != 0 ? std::numeric_limits<T>::denorm_min() : rounded;
}
template <class T>
bool in_precision(bool value) {
  return value;
}
template <class T>
Activation in_precision(Activation value) {
  return value;
}

#define EGNN_CONVERT(name, type) to.name = in_precision<T>(from.name);
template <class T>
EdgeOptions<T> options_in_precision(const EdgeOptions<double>& from) {
  EdgeOptions<T> to;
  EGNN_EDGE_OPTIONS(EGNN_CONVERT)
  return to;
}
template <class T>
LayerOptions<T> options_in_precision(const LayerOptions<double>& from) {
  LayerOptions<T> to;
  EGNN_EDGE_OPTIONS(EGNN_CONVERT)
  EGNN_NODE_OPTIONS(EGNN_CONVERT)
  return to;
}
#undef EGNN_CONVERT

// The problem of a record, without outputs, cotangents, gradients and packed weights. Throws
// std::invalid_argument if edge_attr or edge_mask has not a row for each edge.
template <class T>
Problem<T> make_problem(const MessagesArgs& a, const KernelTable<T>& kernels) {
  Problem<T> p{};
  p.nodes = a.num_nodes;
  p.rowptr = input<int64_t>(a.graph.rowptr);
  p.edges = p.rowptr[p.nodes];
  p.senders = input<int32_t>(a.graph.senders);
  p.perm = input<int32_t>(a.graph.perm);
  p.first = input<int32_t>(a.graph.first);
  p.hidden = static_cast<int>(a.hidden);
  p.ld = static_cast<int>(round_up(a.hidden, kernels.width));
  p.vectors = p.ld / kernels.width;
  p.dim = static_cast<int>(a.coord_dim);
  p.attrs = static_cast<int>(a.attr_dim);
  p.pq = input<T>(a.inputs.pq);
  p.pq_stride = 2 * a.hidden;
  p.x = input<T>(a.inputs.x);
  p.edge_attr = input<T>(a.inputs.edge_attr);
  p.edge_mask = input<T>(a.inputs.edge_mask);
  p.options = options_in_precision<T>(a.options);
  p.attention = a.inputs.w_g != 0;
  p.head = a.inputs.w_x != 0;
  p.partial_size = round_up(p.hidden + p.dim, 64 / static_cast<int64_t>(sizeof(T)));
  const auto check = [&](const char* name, int64_t rows) {
    if (rows < 0 || rows == p.edges) return;
    throw std::invalid_argument(std::string(name) + ": expected a row for each of the " +
                                std::to_string(p.edges) + " edges, got " + std::to_string(rows));
  };
  check("edge_attr", a.edge_attr_rows);
  check("edge_mask", a.edge_mask_rows);
  return p;
}

// Packs the weights of the edge pass. `products`: with the matrices of the forward's products,
// which a backward does not need where their results are stored.
template <class T>
void pack_edge_weights(const MessagesArgs& a, Problem<T>& p, bool backward, bool products,
                       Packing<T>& packing) {
  const MessagesInputs& weights = a.inputs;
  const int h = p.hidden;
  const T *w2 = input<T>(weights.w2), *w3 = input<T>(weights.w3);
  p.w_r = packing.vector(input<T>(weights.w_r), a.w_r_stride, h);
  p.b2 = packing.vector(input<T>(weights.b2), 1, h);
  p.w_g = packing.vector(input<T>(weights.w_g), 1, h);
  p.b3 = packing.vector(input<T>(weights.b3), 1, h);
  p.w_x = packing.vector(input<T>(weights.w_x), 1, h);
  p.b_g = p.attention ? *input<T>(weights.b_g) : T(0);
  p.w_a = packing.columns(input<T>(weights.w_a), a.w_a_stride, h, p.attrs);
  if (products) {
    p.w2_forward = packing.transposed(w2, h, h, h);
    p.w3_forward = packing.transposed(w3, h, h, h);
  }
  if (!backward) return;
  p.w2_backward = packing.matrix(w2, h, h, h);
  p.w3_backward = packing.matrix(w3, h, h, h);
}

// Adds the partial rows in slots [first, last) to the rows of features [N, H] (`stride` apart) and
// coords [N, D], in the order of tasks. Either may be null.
template <class T>
void add_partials(const Problem<T>& p, int64_t first, int64_t last, T* features, int64_t stride,
                  T* coords) {
  for (int64_t slot = first; slot < last; ++slot) {
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

// The forward: M and X from the problem's inputs.
template <class T>
class EdgeForward {
 public:
  EdgeForward(const KernelTable<T>& kernels, Problem<T>& p, int threads)
      : kernels_(kernels), p_(p), threads_(threads) {
    p.tasks = std::min(task_count(p.edges), kMaxForwardTasks);
    scratch_size_ = round_up(kernels.forward_scratch(p), kPage / sizeof(T));
  }

  void reserve(Workspace& workspace) {
    p_.partials = workspace.take<T>(2 * p_.tasks * p_.partial_size);
    p_.partial_rows = workspace.take<PartialRows>(p_.tasks);
    scratch_ = workspace.take<T>(threads_ * scratch_size_);
  }

  // Adds to the last step: zeros for the outputs.
  void add_zeroing(Schedule& schedule) {
    egnn::add_zeroing(schedule, p_.m, p_.nodes * p_.hidden);
    if (p_.head) egnn::add_zeroing(schedule, p_.shift, p_.nodes * p_.dim);
  }

  void add_steps(Schedule& schedule) {
    schedule.add_step(p_.tasks, [this](int64_t task, int worker) {
      kernels_.forward_task(p_, task, scratch_ + worker * scratch_size_);
    });
    schedule.add_step(1, [this](int64_t, int) {
      T* shift = p_.head ? p_.shift : nullptr;
      add_partials(p_, 0, p_.tasks, p_.m, p_.hidden, shift);
    });
  }

 private:
  const KernelTable<T>& kernels_;
  Problem<T>& p_;
  int threads_;
  int64_t scratch_size_;
  T* scratch_ = nullptr;
};

// The backward. The problem has its cotangents and the gradients that are wanted; those of weights
// go to `sums`.
//
// Tasks run in waves, because the memory for their per-edge gradients is bounded. There are two
// such memories: while the tasks of a wave run, the gradients that the wave before left are summed,
// so that threads seldom wait.
template <class T>
class EdgeBackward {
 public:
  EdgeBackward(const KernelTable<T>& kernels, Problem<T>& p, int threads)
      : kernels_(kernels), p_(p), threads_(threads) {
    p.tasks = task_count(p.edges);
    p.offsets = kernels.weight_offsets(p);
    sums.size = p.needs_weights ? p.offsets.size : 0;
    sums.tasks_write_all = p.needs_w2 && p.needs_w_r && (p.needs_w_g || !p.attention) &&
                           ((p.needs_w3 && p.needs_w_x) || !p.head);
    all_zero_ = p.edges == 0 || (p.g_m == nullptr && p.g_shift == nullptr);
    scratch_size_ = round_up(kernels.backward_scratch(p), kPage / sizeof(T));
    const int64_t bytes_per_task =
        static_cast<int64_t>(sizeof(T)) * (p.offsets.size + kTaskEdges * (p.ld + p.dim));
    const int64_t fitting = std::max<int64_t>(kWaveBytes / bytes_per_task, threads);
    wave_ = std::min({p.tasks, fitting, std::max(kWaveTasks, int64_t{4} * threads)});
    wave_ = std::max<int64_t>(wave_, 1);
    slots_ = std::min(p.tasks, 2 * wave_);
    choose_sender_ranges();
  }

  void reserve(Workspace& workspace) {
    const int64_t edges = slots_ > wave_ ? slots_ * kTaskEdges : p_.edges;
    p_.partials = workspace.take<T>(2 * slots_ * p_.partial_size);
    p_.partial_rows = workspace.take<PartialRows>(slots_);
    sums.reserve(workspace, slots_, divide_up(p_.tasks, wave_));
    g_z1_ = workspace.take<T>(edges * p_.ld);
    g_d_ = workspace.take<T>(edges * p_.dim);
    range_starts_ = workspace.take<uint16_t>(slots_ * (p_.sender_ranges + 1));
    range_edges_ = workspace.take<uint16_t>(edges);
    T* g_x_senders = workspace.take<T>(p_.g_x != nullptr ? p_.nodes * p_.dim : 0);
    p_.g_x_senders = p_.g_x != nullptr ? g_x_senders : nullptr;
    scratch_ = workspace.take<T>(threads_ * scratch_size_);
  }

  // Adds to the last step: writes zeros to the gradients that tasks add to. Where there is no edge
  // or no cotangent, no task writes any gradient, so all are set to zero.
  void add_zeroing(Schedule& schedule) {
    egnn::add_zeroing(schedule, p_.g_pq, p_.nodes * p_.pq_stride);
    egnn::add_zeroing(schedule, p_.g_x, p_.nodes * p_.dim);
    egnn::add_zeroing(schedule, p_.g_x_senders, p_.nodes * p_.dim);
    if (!all_zero_) return;
    sums.add_zeroing(schedule, kernels_);
    egnn::add_zeroing(schedule, p_.g_edge_attr, p_.edges * p_.attrs);
    egnn::add_zeroing(schedule, p_.g_edge_mask, p_.edges);
  }

  // add_other_tasks() is called once, when the first step is the last one: its tasks run beside the
  // first wave's.
  template <class AddOtherTasks>
  void add_steps(Schedule& schedule, const AddOtherTasks& add_other_tasks) {
    schedule.add_step();
    if (all_zero_) return add_other_tasks();
    int64_t previous = 0;
    for (int64_t begin = 0; begin < p_.tasks; begin += wave_) {
      if (begin > 0) schedule.add_step();
      add_wave(schedule, begin, begin - previous);
      if (begin == 0) add_other_tasks();
      previous = begin;
    }
    schedule.add_step();
    add_wave(schedule, p_.tasks, p_.tasks - previous);
    if (p_.g_x == nullptr) return;
    constexpr int64_t kPiece = 1 << 14;
    const int64_t count = p_.nodes * p_.dim;
    schedule.add_step(divide_up(count, kPiece), [this, count](int64_t piece, int) {
      const int64_t end = std::min(count, (piece + 1) * kPiece);
      for (int64_t k = piece * kPiece; k < end; ++k) p_.g_x[k] += p_.g_x_senders[k];
    });
  }

  WeightSums<T> sums;

 private:
  // Ranges of senders whose sizes are a power of two: a few for each thread.
  void choose_sender_ranges() {
    const int64_t wanted = std::min<int64_t>(kMaxSenderRanges, int64_t{16} * threads_);
    const int64_t last = std::max<int64_t>(p_.nodes, 1) - 1;
    p_.sender_shift = 0;
    while ((last >> p_.sender_shift) >= wanted) ++p_.sender_shift;
    p_.sender_ranges = static_cast<int>(last >> p_.sender_shift) + 1;
  }

  // The wave that begins with a task; waves use the two memories in turn.
  Wave<T> wave_at(int64_t task) const {
    const int64_t half = task / wave_ % 2;
    const int64_t edges = half * wave_ * kTaskEdges;
    Wave<T> wave;
    wave.first_task = task;
    wave.tasks = std::min(wave_, p_.tasks - task);
    wave.first_slot = half * wave_;
    wave.g_z1 = g_z1_ + edges * p_.ld;
    wave.g_d = g_d_ + edges * p_.dim;
    wave.range_starts = range_starts_ + wave.first_slot * (p_.sender_ranges + 1);
    wave.range_edges = range_edges_ + edges;
    return wave;
  }

  // Adds to the last step: the tasks of the wave that begins with `begin` (none if that is
  // p.tasks), and the sums of the `previous_tasks` of the wave before it.
  void add_wave(Schedule& schedule, int64_t begin, int64_t previous_tasks) {
    if (begin < p_.tasks) {
      const Wave<T> wave = wave_at(begin);
      schedule.add_tasks(wave.tasks, [this, wave](int64_t k, int worker) {
        kernels_.backward_task(p_, wave, wave.first_task + k, sums.accumulator(wave.first_slot + k),
                               scratch_ + worker * scratch_size_);
      });
    }
    if (previous_tasks == 0) return;
    const Wave<T> wave = wave_at(begin - previous_tasks);
    if (p_.g_pq != nullptr || p_.g_x != nullptr) {
      schedule.add_tasks(p_.sender_ranges, [this, wave](int64_t range, int) {
        kernels_.sender_sums(p_, wave, range);
      });
    }
    schedule.add_tasks(1, [this, wave](int64_t, int) {
      add_partials(p_, wave.first_slot, wave.first_slot + wave.tasks, p_.g_pq, p_.pq_stride,
                   p_.g_x);
    });
    sums.add_wave(schedule, kernels_, wave.first_slot, wave.tasks, wave.first_task == 0,
                  begin == p_.tasks);
  }

  const KernelTable<T>& kernels_;
  Problem<T>& p_;
  int threads_;
  bool all_zero_;                        // there is no edge or no cotangent
  int64_t wave_, slots_, scratch_size_;  // tasks of a wave; of both memories
  T *scratch_ = nullptr, *g_z1_ = nullptr, *g_d_ = nullptr;
  uint16_t *range_starts_ = nullptr, *range_edges_ = nullptr;
};

// Sets which gradients are computed, after the caller has set g_m, g_shift and g_pq. `w_r`: whether
// those of w_r and w_a are.
template <class T>
void set_wanted(const MessagesInputs& gradients, bool w_r, Problem<T>& p) {
  const MessagesInputs& g = gradients;
  p.g_x = output<T>(g.x);
  p.g_edge_attr = output<T>(g.edge_attr);
  p.g_edge_mask = output<T>(g.edge_mask);
  p.needs_w2 = g.w2 != 0 || g.b2 != 0;
  p.needs_w3 = p.g_shift != nullptr && (g.w3 != 0 || g.b3 != 0);
  p.needs_w_x = p.g_shift != nullptr && g.w_x != 0;
  p.needs_w_g = p.attention && (g.w_g != 0 || g.b_g != 0);
  p.needs_w_r = w_r;
  p.needs_z1 = w_r || p.g_pq != nullptr || p.g_x != nullptr || p.g_edge_attr != nullptr;
  p.needs_weights = w_r || p.needs_w2 || p.needs_w3 || p.needs_w_x || p.needs_w_g;
}

// Where the weight gradients go, without those of w_r and w_a.
template <class T>
void set_edge_gradients(const MessagesInputs& gradients, const Problem<T>& p, WeightSums<T>& sums) {
  const MessagesInputs& g = gradients;
  const int64_t h = p.hidden;
  sums.set_gradient(p.offsets.w2, h, h, p.ld, output<T>(g.w2), h);
  sums.set_gradient(p.offsets.w3, h, h, p.ld, output<T>(g.w3), h);
  sums.set_gradient(p.offsets.b2, 1, h, p.ld, output<T>(g.b2), h);
  sums.set_gradient(p.offsets.b3, 1, h, p.ld, output<T>(g.b3), h);
  sums.set_gradient(p.offsets.w_x, 1, h, p.ld, output<T>(g.w_x), h);
  sums.set_gradient(p.offsets.w_g, 1, h, p.ld, output<T>(g.w_g), h);
  sums.set_gradient(p.offsets.b_g, 1, 1, 1, output<T>(g.b_g), 1);
}

// Those of w_r [H] and w_a [H, A], elements or rows `stride` apart; w_a may be null.
template <class T>
void set_first_gradients(const Problem<T>& p, T* w_r, int64_t w_r_stride, T* w_a,
                         int64_t w_a_stride, WeightSums<T>& sums) {
  sums.set_gradient(p.offsets.w_r, p.hidden, 1, 1, w_r, w_r_stride);
  for (int k = 0; k < p.attrs && w_a != nullptr; ++k) {
    sums.set_gradient(p.offsets.w_a + static_cast<int64_t>(k) * p.ld, p.hidden, 1, 1, w_a + k,
                      w_a_stride);
  }
}

}  // namespace egnn
