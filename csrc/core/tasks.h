// How a pass is divided into tasks: ranges of edges or nodes.
//
// The bounds of tasks depend on the problem alone, never on the number of threads. So does the
// order of sums, and the result has the same bits on any number of threads.
#pragma once

#include <algorithm>
#include <cstring>

#include "schedule.h"
#include "vectorised/problem.h"

namespace egnn {

constexpr int64_t kTaskEdges = 480;  // edges (or nodes) of a task, where there are many
constexpr int64_t kMinTasks = 16;    // a small problem is still divided among threads
constexpr int64_t kMaxForwardTasks = 8192;
// The backward runs tasks in waves, whose size is bounded by the memory for per-edge gradients.
constexpr int64_t kWaveTasks = 16;
constexpr int64_t kWaveBytes = int64_t{12} << 20;

inline int64_t divide_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit; }
inline int64_t round_up(int64_t value, int64_t unit) { return divide_up(value, unit) * unit; }

// The number of tasks, each a run of whole blocks, for `count` edges or nodes.
inline int64_t task_count(int64_t count, int64_t min_tasks = kMinTasks) {
  const int64_t blocks = divide_up(count, kBlockEdges);
  return std::max(divide_up(blocks, kTaskEdges / kBlockEdges), std::min(blocks, min_tasks));
}

// Tasks of nodes that have an accumulator of weight gradients: fewer, since an accumulator is large
// beside a block of nodes.
inline int64_t accumulating_task_count(int64_t nodes) { return task_count(nodes, kMinTasks / 2); }

// The first node of a task.
inline int64_t node_begin(int64_t nodes, int64_t tasks, int64_t task) {
  return std::min(nodes, divide_up(nodes, kBlockEdges) * task / tasks * kBlockEdges);
}

// Calls body(begin, end) for each block of a task's nodes.
template <class Body>
void for_node_blocks(int64_t nodes, int64_t tasks, int64_t task, const Body& body) {
  const int64_t last = node_begin(nodes, tasks, task + 1);
  for (int64_t begin = node_begin(nodes, tasks, task); begin < last; begin += kBlockEdges) {
    body(begin, std::min<int64_t>(begin + kBlockEdges, last));
  }
}

// Adds a step that calls body(begin, end, worker) for each block of nodes.
template <class Body>
void add_node_step(Schedule& schedule, int64_t nodes, const Body& body) {
  const int64_t tasks = task_count(nodes);
  schedule.add_step(tasks, [=](int64_t task, int worker) {
    for_node_blocks(nodes, tasks, task,
                    [&](int64_t begin, int64_t end) { body(begin, end, worker); });
  });
}

// Adds to the last step tasks that fill memory with zeros; none if it is null.
template <class T>
void add_zeroing(Schedule& schedule, T* memory, int64_t count) {
  if (memory == nullptr) return;
  constexpr int64_t kPiece = int64_t{1} << 14;
  schedule.add_tasks(divide_up(count, kPiece), [=](int64_t k, int) {
    std::memset(memory + k * kPiece, 0, std::min(kPiece, count - k * kPiece) * sizeof(T));
  });
}

}  // namespace egnn
