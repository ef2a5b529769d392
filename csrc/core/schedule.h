// Runs steps of work on the OpenMP threads that the process has already, without linking a runtime.
#pragma once

#include <cstdint>
#include <functional>
#include <utility>
#include <vector>

namespace egnn {

// Steps one after the other, the tasks of a step in any order on any thread: results must not
// depend on it. One parallel region serves all steps, and a step waits for tasks, not for threads:
// a thread that the system keeps from running holds nothing up unless it has taken a task.
//
// Each thread begins with a share of its own, the same in all steps and calls, and then helps the
// others: what a thread has written is in its own cache, and far from the others'.
class Schedule {
 public:
  // (task from 0 to count - 1, worker from 0 to threads - 1)
  using Body = std::function<void(int64_t task, int worker)>;

  void add(int64_t count, Body body) {
    steps_.emplace_back();
    also(count, std::move(body));
  }

  // More tasks for the last step.
  void also(int64_t count, Body body) {
    if (count <= 0) return;
    if (steps_.empty()) steps_.emplace_back();
    Step& step = steps_.back();
    step.count += count;
    step.parts.push_back({count, std::move(body)});
  }

  void run(int threads) const;

 private:
  struct Part {
    int64_t count;
    Body body;
  };
  struct Step {
    int64_t count = 0;  // of all parts
    std::vector<Part> parts;
  };
  friend struct Region;
  std::vector<Step> steps_;
};

// The runtime that threads come from: "OpenMP of the process" or "std::thread".
const char* thread_source();

}  // namespace egnn
