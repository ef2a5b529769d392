// Sums weight gradients over tasks: in double precision, in the order of tasks, rounded once.
#pragma once

#include <cstring>
#include <type_traits>
#include <vector>

#include "instruction_set.h"
#include "tasks.h"
#include "workspace.h"

namespace egnn {

// Each task of a wave has an accumulator [size]. After a wave, its accumulators are added to a
// total; after the last one the sums are written to the gradients.
template <class T>
class WeightSums {
 public:
  int64_t size = 0;             // elements of an accumulator; 0: no gradient is wanted
  bool tasks_write_all = true;  // else some elements stay as they are, and must be zero

  // Memory for `slots` accumulators, which `waves` waves use in turn.
  void reserve(Workspace& workspace, int64_t slots, int64_t waves) {
    accumulators_ = workspace.take<T>(slots * size);
    // a single wave needs no total
    total_ = workspace.take<double>(waves > 1 ? size : 0);
    waves_ = waves;
  }

  // The accumulator of the task that uses a slot; null if no gradient is wanted.
  T* accumulator(int64_t slot) const {
    if (size == 0) return nullptr;
    T* sums = accumulators_ + slot * size;
    if (!tasks_write_all) std::memset(sums, 0, size * sizeof(T));
    return sums;
  }

  // The gradient that a padded [rows, ld] matrix at element `at` of the accumulators is written to:
  // [rows, columns], rows `stride` apart. Null: it is not wanted.
  void set_gradient(int64_t at, int64_t rows, int64_t columns, int64_t ld, T* gradient,
                    int64_t stride) {
    constexpr int64_t kRows = 16;  // what a task writes
    for (int64_t r = 0; r < rows && gradient != nullptr; r += kRows) {
      gradients_.push_back(
          {at + r * ld, std::min(kRows, rows - r), columns, ld, gradient + r * stride, stride});
    }
  }

  // Adds to the last step: the sum of a wave's accumulators, in slots from `slot` on. After the
  // last wave the gradients are written, in this step or in one of their own.
  void add_wave(Schedule& schedule, const KernelTable<T>& kernels, int64_t slot, int64_t tasks,
                bool is_first, bool is_last) {
    if (size == 0) {
      if (is_last) add_zeroing(schedule, kernels);
      return;
    }
    if (waves_ == 1) {
      add_writing(schedule, kernels, accumulators_ + slot * size, tasks);
      return;
    }
    constexpr int64_t kPiece = 2048;
    schedule.add_tasks(divide_up(size, kPiece),
                       [this, &kernels, slot, tasks, is_first](int64_t k, int) {
                         kernels.add_sums(accumulators_ + slot * size, size, tasks, k * kPiece,
                                          std::min((k + 1) * kPiece, size), is_first, total_);
                       });
    if (!is_last) return;
    schedule.add_step();
    add_writing(schedule, kernels, total_, 1);
  }

  // Adds to the last step: zeros for all gradients, where there are no tasks.
  void add_zeroing(Schedule& schedule, const KernelTable<T>& kernels) const {
    add_writing(schedule, kernels, static_cast<const T*>(nullptr), 0);
  }

 private:
  template <class Sum>
  void add_writing(Schedule& schedule, const KernelTable<T>& kernels, const Sum* sums,
                   int64_t tasks) const {
    schedule.add_tasks(static_cast<int64_t>(gradients_.size()),
                       [this, &kernels, sums, tasks](int64_t k, int) {
                         if constexpr (std::is_same_v<Sum, double> && !std::is_same_v<T, double>) {
                           kernels.write_total(sums, gradients_[k]);
                         } else {
                           kernels.write_sums(sums, size, tasks, gradients_[k]);
                         }
                       });
  }

  int64_t waves_ = 0;
  T* accumulators_ = nullptr;  // [slots, size]
  double* total_ = nullptr;    // [size]
  std::vector<GradientRows<T>> gradients_;
};

}  // namespace egnn
