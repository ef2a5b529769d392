// Runs the steps of a pass on the OpenMP threads that the process already has; links no runtime.
#pragma once

#include <cstdint>
#include <functional>
#include <utility>
#include <vector>

namespace egnn {

// Steps that run one after the other. The tasks of a step run in any order on any thread, and
// results must not depend on either.
//
// All steps share one parallel region. A step waits for the tasks of the step before it, not for
// threads: a thread that the system has suspended delays the others only if it holds a task. Each
// thread starts with the same share of the tasks in every step and call, because what it wrote
// before is in its own cache; then it takes tasks from the shares of others.
class Schedule {
 public:
  // Called with the task, 0 to count - 1, and the worker, 0 to threads - 1.
  using Body = std::function<void(int64_t task, int worker)>;

  void add_step() { steps_.emplace_back(); }

  void add_step(int64_t count, Body body) {
    add_step();
    add_tasks(count, std::move(body));
  }

  // Adds tasks to the last step.
  void add_tasks(int64_t count, Body body) {
    if (count <= 0) return;
    if (steps_.empty()) add_step();
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
    int64_t count = 0;  // tasks, over all parts
    std::vector<Part> parts;
  };
  friend struct Region;
  std::vector<Step> steps_;
};

// Where threads come from, for tests: "OpenMP of the process" or "std::thread".
const char* thread_source();

}  // namespace egnn
