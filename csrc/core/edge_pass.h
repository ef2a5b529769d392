// The edge pass over all tasks. The layer uses these two as well, so they are split into reserving
// memory, packing weights and running.
#pragma once

#include <limits>

#include "tasks.h"

namespace egnn {

// An option for which 0 means none: what float cannot hold must not become that.
template <class T>
T option(double value) {
  const T rounded = static_cast<T>(value);
  return rounded == 0 && value != 0 ? std::numeric_limits<T>::denorm_min() : rounded;
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
  p.pq_stride = 2 * a.hidden;
  p.x = in<T>(a.x);
  p.edge_attr = in<T>(a.edge_attr);
  p.edge_mask = in<T>(a.edge_mask);
  p.activation = a.activation;
  p.slope = static_cast<T>(a.negative_slope);
  p.norm = option<T>(a.norm);
  p.clamp = option<T>(a.clamp);
  p.tanh = a.tanh;
  p.attention = a.w_g != 0;
  p.head = a.w_x != 0;
  p.partial_size = round_up(p.hidden + p.dim, 64 / static_cast<int64_t>(sizeof(T)));
  const auto check = [&](const char* name, int64_t rows) {
    if (rows < 0 || rows == p.edges) return;
    throw std::invalid_argument(std::string(name) + ": expected a row for each of the " +
                                std::to_string(p.edges) + " edges, got " + std::to_string(rows));
  };
  check("edge_attr", a.attr_rows);
  check("edge_mask", a.mask_rows);
  return p;
}

template <class T>
void pack_edge_weights(const Args& a, Problem<T>& p, bool backward, bool products,
                       Packing<T>& packing) {
  const int h = p.hidden;
  p.w_r = packing.vector(in<T>(a.w_r), a.w_r_stride, h);
  p.b2 = packing.vector(in<T>(a.b2), 1, h);
  p.w_g = packing.vector(in<T>(a.w_g), 1, h);
  p.b3 = packing.vector(in<T>(a.b3), 1, h);
  p.w_x = packing.vector(in<T>(a.w_x), 1, h);
  p.b_g = p.attention ? *in<T>(a.b_g) : T(0);
  p.w_a = packing.columns(in<T>(a.w_a), a.w_a_stride, h, p.attrs);
  if (products) {
    p.w2_forward = packing.matrix(in<T>(a.w2), h, h, h, true);
    p.w3_forward = packing.matrix(in<T>(a.w3), h, h, h, true);
  }
  if (!backward) return;
  p.w2_backward = packing.matrix(in<T>(a.w2), h, h, h, false);
  p.w3_backward = packing.matrix(in<T>(a.w3), h, h, h, false);
}

// Adds the rows that tasks share, in the order of the tasks: those in slots [first, last).
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

template <class T>
class EdgeForward {
 public:
  EdgeForward(const KernelTable<T>& kernels, Problem<T>& p, int threads)
      : kernels_(kernels), p_(p), threads_(threads) {
    p.tasks = std::min(task_count(p.edges), kMaxForwardTasks);
    scratch_size_ = round_up(kernels.forward_scratch(p), kPage / sizeof(T));
  }

  void reserve(Workspace& ws) {
    p_.partials = ws.take<T>(2 * p_.tasks * p_.partial_size);
    p_.partial_rows = ws.take<PartialRows>(p_.tasks);
    scratch_ = ws.take<T>(threads_ * scratch_size_);
  }

  // Before the pass, in the last step.
  void also_prepare(Schedule& schedule) {
    also_zero(schedule, p_.m, p_.nodes * p_.hidden);
    if (p_.head) also_zero(schedule, p_.shift, p_.nodes * p_.dim);
  }

  void add_to(Schedule& schedule) {
    schedule.add(p_.tasks, [this](int64_t task, int worker) {
      kernels_.forward_task(p_, task, scratch_ + worker * scratch_size_);
    });
    schedule.add(1, [this](int64_t, int) {
      add_partials(p_, 0, p_.tasks, p_.m, p_.hidden, p_.head ? p_.shift : static_cast<T*>(nullptr));
    });
  }

 private:
  const KernelTable<T>& kernels_;
  Problem<T>& p_;
  int threads_;
  int64_t scratch_size_;
  T* scratch_ = nullptr;
};

// The caller has set the cotangents and the gradients wanted; weight gradients stay in `sums`.
//
// Tasks go in waves, for the memory of their per-edge gradients. There are two such memories: while
// the tasks of a wave run, what the wave before left is collected, so that few threads wait.
template <class T>
class EdgeBackward {
 public:
  EdgeBackward(const KernelTable<T>& kernels, Problem<T>& p, int threads)
      : kernels_(kernels), p_(p), threads_(threads) {
    p.tasks = task_count(p.edges);
    p.at = kernels.weight_offsets(p);
    sums.size = p.needs_weights ? p.at.size : 0;
    sums.complete = p.needs_w2 && p.needs_first_weights && (p.needs_w_g || !p.attention) &&
                    ((p.needs_w3 && p.needs_w_x) || !p.head);
    // without a cotangent all gradients are zero
    nothing_ = p.edges == 0 || (p.g_m == nullptr && p.g_shift == nullptr);
    scratch_size_ = round_up(kernels.backward_scratch(p), kPage / sizeof(T));
    const int64_t bytes_per_task =
        static_cast<int64_t>(sizeof(T)) * (p.at.size + kTaskEdges * (p.ld + p.dim));
    const int64_t fitting = std::max<int64_t>(kWaveBytes / bytes_per_task, threads);
    wave_ = std::min({p.tasks, fitting, std::max(kWaveTasks, int64_t{4} * threads)});
    wave_ = std::max<int64_t>(wave_, 1);
    slots_ = std::min(p.tasks, 2 * wave_);
    choose_ranges();
  }

  void reserve(Workspace& ws) {
    const int64_t edges = slots_ > wave_ ? slots_ * kTaskEdges : p_.edges;
    p_.partials = ws.take<T>(2 * slots_ * p_.partial_size);
    p_.partial_rows = ws.take<PartialRows>(slots_);
    sums.reserve(ws, slots_, divide_up(p_.tasks, wave_));
    g_z1_ = ws.take<T>(edges * p_.ld);
    g_d_ = ws.take<T>(edges * p_.dim);
    range_starts_ = ws.take<uint16_t>(slots_ * (p_.sender_ranges + 1));
    range_edges_ = ws.take<uint16_t>(edges);
    T* sent = ws.take<T>(p_.g_coords != nullptr ? p_.nodes * p_.dim : 0);
    p_.g_coords_sent = p_.g_coords != nullptr ? sent : nullptr;
    scratch_ = ws.take<T>(threads_ * scratch_size_);
  }

  // Before the pass, in the last step.
  void also_prepare(Schedule& schedule) {
    also_zero(schedule, p_.g_pq, p_.nodes * p_.pq_stride);
    also_zero(schedule, p_.g_coords, p_.nodes * p_.dim);
    also_zero(schedule, p_.g_coords_sent, p_.nodes * p_.dim);
    if (!nothing_) return;
    sums.also_zeros(schedule, kernels_);
    also_zero(schedule, p_.g_edge_attr, p_.edges * p_.attrs);
    also_zero(schedule, p_.g_edge_mask, p_.edges);
  }

  // The first step takes more tasks from `also`, called once.
  template <class Also>
  void add_to(Schedule& schedule, const Also& also) {
    schedule.add(0, nullptr);
    if (nothing_) return also();
    int64_t before = 0;
    for (int64_t begin = 0; begin < p_.tasks; begin += wave_) {
      if (begin > 0) schedule.add(0, nullptr);
      also_wave(schedule, begin, begin - before);
      if (begin == 0) also();
      before = begin;
    }
    schedule.add(0, nullptr);
    also_wave(schedule, p_.tasks, p_.tasks - before);
    if (p_.g_coords == nullptr) return;
    constexpr int64_t kPiece = 1 << 14;
    const int64_t count = p_.nodes * p_.dim;
    schedule.add(divide_up(count, kPiece), [this, count](int64_t piece, int) {
      const int64_t end = std::min(count, (piece + 1) * kPiece);
      for (int64_t k = piece * kPiece; k < end; ++k) p_.g_coords[k] += p_.g_coords_sent[k];
    });
  }

  WeightSums<T> sums;

 private:
  // Ranges of senders of a power of two, a few for each thread.
  void choose_ranges() {
    const int64_t wanted = std::min<int64_t>(kMaxSenderRanges, int64_t{16} * threads_);
    const int64_t last = std::max<int64_t>(p_.nodes, 1) - 1;
    p_.sender_shift = 0;
    while ((last >> p_.sender_shift) >= wanted) ++p_.sender_shift;
    p_.sender_ranges = static_cast<int>(last >> p_.sender_shift) + 1;
  }

  Wave<T> wave_at(int64_t task) const {
    const int64_t half = task / wave_ % 2;
    const int64_t edges = half * wave_ * kTaskEdges;
    Wave<T> w;
    w.first_task = task;
    w.tasks = std::min(wave_, p_.tasks - task);
    w.slots = half * wave_;
    w.g_z1 = g_z1_ + edges * p_.ld;
    w.g_d = g_d_ + edges * p_.dim;
    w.range_starts = range_starts_ + w.slots * (p_.sender_ranges + 1);
    w.range_edges = range_edges_ + edges;
    return w;
  }

  // In the last step: runs the wave that begins with task `begin` (none: p.tasks) and collects the
  // one before it, of `collected` tasks.
  void also_wave(Schedule& schedule, int64_t begin, int64_t collected) {
    if (begin < p_.tasks) {
      const Wave<T> wave = wave_at(begin);
      schedule.also(wave.tasks, [this, wave](int64_t k, int worker) {
        kernels_.backward_task(p_, wave, wave.first_task + k, sums.accumulator(wave.slots + k),
                               scratch_ + worker * scratch_size_);
      });
    }
    if (collected == 0) return;
    const Wave<T> wave = wave_at(begin - collected);
    if (p_.g_pq != nullptr || p_.g_coords != nullptr) {
      schedule.also(p_.sender_ranges,
                    [this, wave](int64_t k, int) { kernels_.sender_sums(p_, wave, k); });
    }
    schedule.also(1, [this, wave](int64_t, int) {
      add_partials(p_, wave.slots, wave.slots + wave.tasks, p_.g_pq, p_.pq_stride, p_.g_coords);
    });
    sums.also_add(schedule, kernels_, wave.slots, wave.tasks, wave.first_task == 0,
                  begin == p_.tasks);
  }

  const KernelTable<T>& kernels_;
  Problem<T>& p_;
  int threads_;
  bool nothing_;
  int64_t wave_, slots_, scratch_size_;
  T *scratch_ = nullptr, *g_z1_ = nullptr, *g_d_ = nullptr;
  uint16_t *range_starts_ = nullptr, *range_edges_ = nullptr;
};

// Which gradients an edge pass is to find; the caller sets g_m, g_shift and g_pq.
template <class T>
void want_gradients(const Args& a, bool first_weights, Problem<T>& p) {
  p.g_coords = out<T>(a.g_coords);
  p.g_edge_attr = out<T>(a.g_edge_attr);
  p.g_edge_mask = out<T>(a.g_edge_mask);
  p.needs_w2 = a.g_w2 != 0 || a.g_b2 != 0;
  p.needs_w3 = p.g_shift != nullptr && (a.g_w3 != 0 || a.g_b3 != 0);
  p.needs_w_x = p.g_shift != nullptr && a.g_w_x != 0;
  p.needs_w_g = p.attention && (a.g_w_g != 0 || a.g_b_g != 0);
  p.needs_first_weights = first_weights;
  p.needs_first =
      first_weights || p.g_pq != nullptr || p.g_coords != nullptr || p.g_edge_attr != nullptr;
  p.needs_weights = first_weights || p.needs_w2 || p.needs_w3 || p.needs_w_x || p.needs_w_g;
}

// All weight gradients but those of the first linear.
template <class T>
void deliver_edge_weights(const Args& a, const Problem<T>& p, WeightSums<T>& sums) {
  const int64_t h = p.hidden;
  sums.deliver(p.at.w2, h, h, p.ld, out<T>(a.g_w2), h);
  sums.deliver(p.at.w3, h, h, p.ld, out<T>(a.g_w3), h);
  sums.deliver(p.at.b2, 1, h, p.ld, out<T>(a.g_b2), h);
  sums.deliver(p.at.b3, 1, h, p.ld, out<T>(a.g_b3), h);
  sums.deliver(p.at.w_x, 1, h, p.ld, out<T>(a.g_w_x), h);
  sums.deliver(p.at.w_g, 1, h, p.ld, out<T>(a.g_w_g), h);
  sums.deliver(p.at.b_g, 1, 1, 1, out<T>(a.g_b_g), 1);
}

// The distance's and the attributes' columns of the first linear, `stride` apart; w_a may be null.
template <class T>
void deliver_first_columns(const Problem<T>& p, WeightSums<T>& sums, T* w_r, int64_t r_stride,
                           T* w_a, int64_t a_stride) {
  sums.deliver(p.at.w_r, p.hidden, 1, 1, w_r, r_stride);
  for (int k = 0; k < p.attrs && w_a != nullptr; ++k) {
    sums.deliver(p.at.w_a + static_cast<int64_t>(k) * p.ld, p.hidden, 1, 1, w_a + k, a_stride);
  }
}

}  // namespace egnn
