// Packs weights for the kernels: matrices into the panels that products read, vectors with padding.
#pragma once

#include <vector>

#include "instruction_set.h"
#include "tasks.h"
#include "workspace.h"

namespace egnn {

// Collects the weights of a call, then packs them in parallel. Every function returns where the
// packed weight will be; null in the workspace's first round (Workspace::plan).
template <class T>
class Packing {
 public:
  Packing(const KernelTable<T>& kernels, Workspace& workspace)
      : kernels_(kernels), workspace_(workspace) {}

  // The right operand of a product with w^T, for w [outputs, inputs] with rows `stride` apart.
  T* transposed(const T* w, int64_t stride, int outputs, int inputs) {
    return add_matrix({w, 1, stride, inputs, outputs, nullptr});
  }

  // That of a product with w.
  T* matrix(const T* w, int64_t stride, int outputs, int inputs) {
    return add_matrix({w, stride, 1, outputs, inputs, nullptr});
  }

  // `count` elements, `stride` apart, padded with zeros to whole vectors; all zeros if absent.
  T* vector(const T* values, int64_t stride, int count) {
    T* to = workspace_.take<T>(round_up(count, kernels_.width));
    jobs_.push_back({values, stride, 0, 0, count, to});
    return to;
  }

  // The columns of w [count, columns], rows `stride` apart, as padded vectors: [columns, ld].
  T* columns(const T* w, int64_t stride, int count, int columns) {
    const int64_t ld = round_up(count, kernels_.width);
    T* to = workspace_.take<T>(columns * ld);
    if (to == nullptr) return nullptr;
    for (int k = 0; k < columns; ++k) jobs_.push_back({w + k, stride, 0, 0, count, to + k * ld});
    return to;
  }

  // Adds to the schedule the step that packs the matrices.
  void add_step(Schedule& schedule) const {
    const KernelTable<T>& kernels = kernels_;
    schedule.add_step(static_cast<int64_t>(jobs_.size()), [&kernels, jobs = jobs_](int64_t k, int) {
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
  // An operand [k_count, columns] with element (k, c) at from[k * k_stride + c * column_stride];
  // or, where k_count is 0, a vector of `columns` elements, k_stride apart.
  struct Job {
    const T* from;
    int64_t k_stride, column_stride;
    int k_count, columns;
    T* to;
  };

  T* add_matrix(Job job) {
    if (job.from == nullptr || job.k_count == 0 || job.columns == 0) return nullptr;
    job.to = workspace_.take<T>(job.k_count * round_up(job.columns, kernels_.width));
    jobs_.push_back(job);
    return job.to;
  }

  const KernelTable<T>& kernels_;
  Workspace& workspace_;
  std::vector<Job> jobs_;
};

}  // namespace egnn
