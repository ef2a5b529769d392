// What runs the block kernels over a problem: partition into tasks, memory, order of the sums.
#pragma once

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "args.h"
#include "instruction_set.h"
#include "schedule.h"
#include "workspace.h"

namespace egnn {

// Tasks are ranges of edges (or nodes) whose bounds depend on the problem alone: so do the orders
// of the sums, and with them the bits of the result, whatever the number of threads.
constexpr int64_t kTaskEdges = 480;
constexpr int64_t kSplit = 16;  // a small problem is still split for several threads
constexpr int64_t kMaxForwardTasks = 8192;
// tasks in flight backward: bounded by the memory for their gradients
constexpr int64_t kWaveTasks = 16;
constexpr int64_t kWaveBytes = int64_t{12} << 20;

inline int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }
inline int64_t divide_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit; }

// Tasks for so many edges (or nodes): each a run of whole blocks.
inline int64_t task_count(int64_t count) {
  const int64_t blocks = divide_up(count, kBlockEdges);
  return std::max(divide_up(blocks, kTaskEdges / kBlockEdges), std::min(blocks, kSplit));
}

template <class T>
const T* in(uintptr_t address) {
  return reinterpret_cast<const T*>(address);
}

template <class T>
T* out(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Zeros, in the last step of the schedule.
template <class T>
void also_zero(Schedule& schedule, T* memory, int64_t count) {
  if (memory == nullptr) return;
  constexpr int64_t kPiece = int64_t{1} << 14;
  schedule.also(divide_up(count, kPiece), [=](int64_t k, int) {
    std::memset(memory + k * kPiece, 0, std::min(kPiece, count - k * kPiece) * sizeof(T));
  });
}

// Weights to be packed, together and in parallel.
template <class T>
class Packing {
 public:
  Packing(const KernelTable<T>& kernels, Workspace& ws) : kernels_(kernels), ws_(ws) {}

  // w [outputs, inputs] with rows `stride` apart. Forward: a w^T; backward: a w.
  T* matrix(const T* w, int64_t stride, int outputs, int inputs, bool forward) {
    if (w == nullptr || outputs == 0 || inputs == 0) return nullptr;
    const int k_count = forward ? inputs : outputs, columns = forward ? outputs : inputs;
    T* to = ws_.take<T>(k_count * round_up(columns, kernels_.width));
    jobs_.push_back(forward ? Job{w, 1, stride, k_count, columns, to}
                            : Job{w, stride, 1, k_count, columns, to});
    return to;
  }

  // A vector padded with zeros; absent: all zeros.
  T* vector(const T* values, int64_t stride, int count) {
    T* to = ws_.take<T>(round_up(count, kernels_.width));
    jobs_.push_back(Job{values, stride, 0, 0, count, to});
    return to;
  }

  // `rows` vectors, each of them a column of w (rows `stride` apart), as a padded [rows, ld].
  T* columns(const T* w, int64_t stride, int count, int rows) {
    const int64_t ld = round_up(count, kernels_.width);
    T* to = ws_.take<T>(rows * ld);
    if (to == nullptr) return nullptr;
    for (int k = 0; k < rows; ++k) jobs_.push_back(Job{w + k, stride, 0, 0, count, to + k * ld});
    return to;
  }

  void add_to(Schedule& schedule) const {
    const KernelTable<T>& kernels = kernels_;
    schedule.add(static_cast<int64_t>(jobs_.size()), [&kernels, jobs = jobs_](int64_t k, int) {
      const Job& job = jobs[k];
      if (job.k_count != 0) {
        kernels.pack(job.from, job.k_stride, job.column_stride, job.k_count, job.columns, job.to);
        return;
      }
      const int64_t padded = round_up(job.columns, kernels.width);
      for (int64_t c = 0; c < padded; ++c) {
        job.to[c] = job.from != nullptr && c < job.columns ? job.from[c * job.k_stride] : T(0);
      }
    });
  }

 private:
  struct Job {
    const T* from;
    int64_t k_stride, column_stride;
    int k_count, columns;  // k_count 0: a vector
    T* to;
  };
  const KernelTable<T>& kernels_;
  Workspace& ws_;
  std::vector<Job> jobs_;
};

// Sums of weight gradients over tasks, each of which has an accumulator: added in double precision,
// in the order of tasks, rounded once.
template <class T>
class WeightSums {
 public:
  int64_t size = 0;      // 0: nobody asked
  bool complete = true;  // whether the tasks write each element, or leave some that mean 0

  // `slots` accumulators at a time; `waves` says how often they are used.
  void reserve(Workspace& ws, int64_t slots, int64_t waves) {
    per_task_ = ws.take<T>(slots * size);
    // what one wave leaves needs no total
    total_ = ws.take<double>(waves > 1 ? size : 0);
    waves_ = waves;
  }

  T* accumulator(int64_t slot) const {
    if (size == 0) return nullptr;
    T* sums = per_task_ + slot * size;
    if (!complete) std::memset(sums, 0, size * sizeof(T));
    return sums;
  }

  // In the last step: adds up the accumulators of a wave's tasks, from `slot` on. After the last
  // wave the sums are delivered, then or in a step of their own (also_deliver).
  void also_add(Schedule& schedule, const KernelTable<T>& kernels, int64_t slot, int64_t tasks,
                bool first, bool last) {
    if (size == 0) {
      if (last) also_zeros(schedule, kernels);
      return;
    }
    if (waves_ == 1) {
      also_deliver(schedule, kernels, per_task_ + slot * size, tasks);
      return;
    }
    constexpr int64_t kSlice = 2048;
    schedule.also(divide_up(size, kSlice), [this, &kernels, slot, tasks, first](int64_t k, int) {
      kernels.add_sums(per_task_ + slot * size, size, tasks, k * kSlice,
                       std::min((k + 1) * kSlice, size), first, total_);
    });
    if (!last) return;
    schedule.add(0, nullptr);
    also_deliver(schedule, kernels, total_, 1);
  }

  // In the last step: zeros for everything, where there are no tasks.
  void also_zeros(Schedule& schedule, const KernelTable<T>& kernels) const {
    also_deliver(schedule, kernels, static_cast<const T*>(nullptr), 0);
  }

  // Where a padded [rows, ld] piece is wanted in the end (rows `stride` apart); null: nowhere.
  void deliver(int64_t at, int64_t rows, int64_t columns, int64_t ld, T* to, int64_t stride) {
    constexpr int64_t kRows = 16;
    for (int64_t r = 0; r < rows && to != nullptr; r += kRows) {
      deliveries_.push_back(
          {at + r * ld, std::min(kRows, rows - r), columns, ld, to + r * stride, stride});
    }
  }

 private:
  template <class Sum>
  void also_deliver(Schedule& schedule, const KernelTable<T>& kernels, const Sum* sums,
                    int64_t tasks) const {
    schedule.also(static_cast<int64_t>(deliveries_.size()),
                  [this, &kernels, sums, tasks](int64_t k, int) {
                    const Piece<T>& piece = deliveries_[k];
                    if constexpr (std::is_same_v<Sum, double> && !std::is_same_v<T, double>) {
                      kernels.deliver_total(sums, piece);
                    } else {
                      kernels.deliver(sums, size, tasks, piece);
                    }
                  });
  }

  int64_t waves_ = 0;
  T* per_task_ = nullptr;  // [slots][size]
  double* total_ = nullptr;
  std::vector<Piece<T>> deliveries_;
};

}  // namespace egnn
