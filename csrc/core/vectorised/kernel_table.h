// The table of kernels of one instruction set: all that the rest of the core calls.
#pragma once

#include "problem.h"

namespace egnn {

// Rows of a weight's gradient: the padded [rows, ld] matrix at element `at` of the accumulators is
// written to `gradient` [rows, columns], rows `stride` apart.
template <class T>
struct GradientRows {
  int64_t at, rows, columns, ld;
  T* gradient;
  int64_t stride;
};

template <class T>
struct KernelTable {
  int width;        // elements of a vector
  int weight_rows;  // spare rows that a weight gradient needs after it in an accumulator
  // elements of scratch memory that a worker needs
  int64_t (*forward_scratch)(const Problem<T>&);
  int64_t (*backward_scratch)(const Problem<T>&);
  int64_t (*node_scratch)(const NodeProblem<T>&);
  WeightOffsets (*weight_offsets)(const Problem<T>&);
  // packs an operand [k_count, columns] with element (k, c) at w[k * k_stride + c * column_stride]
  void (*pack)(const T* w, int64_t k_stride, int64_t column_stride, int k_count, int columns,
               T* out);

  // one task of the edge pass; `sums` is its accumulator
  void (*forward_task)(const Problem<T>&, int64_t task, T* scratch);
  void (*backward_task)(const Problem<T>&, const Wave<T>&, int64_t task, T* sums, T* scratch);
  // adds the per-edge gradients of a wave to the senders of a range
  void (*sender_sums)(const Problem<T>&, const Wave<T>&, int64_t range);

  // total [begin, end) = (overwrite) or += the sum over tasks of sums [tasks, stride]
  void (*add_sums)(const T* sums, int64_t stride, int64_t tasks, int64_t begin, int64_t end,
                   bool overwrite, double* total);
  // writes a gradient: the same sum, rounded; zeros if there are no tasks
  void (*write_sums)(const T* sums, int64_t stride, int64_t tasks, const GradientRows<T>&);
  void (*write_total)(const double* total, const GradientRows<T>&);

  // nodes [begin, end), at most kBlockEdges of them; `overwrite`: the accumulator `sums` is
  // written, else added to
  void (*node_pq)(const NodeProblem<T>&, int64_t begin, int64_t end, T* scratch);
  void (*node_update)(const NodeProblem<T>&, int64_t begin, int64_t end, T* scratch);
  void (*node_update_backward)(const NodeProblem<T>&, int64_t begin, int64_t end, T* scratch,
                               T* sums, bool overwrite);
  void (*node_pq_backward)(const NodeProblem<T>&, int64_t begin, int64_t end, T* scratch, T* sums,
                           bool overwrite);

  void (*silu)(const T* from, T* to, int64_t count);
};

namespace portable {
const KernelTable<float>& table_float();
const KernelTable<double>& table_double();
}  // namespace portable
namespace avx2 {
const KernelTable<float>& table_float();
const KernelTable<double>& table_double();
}  // namespace avx2
namespace avx512 {
const KernelTable<float>& table_float();
const KernelTable<double>& table_double();
}  // namespace avx512

}  // namespace egnn
