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
    step.parts.push_back({step.count, std::move(body)});
  }

  void run(int threads) const;

 private:
  struct Part {
    int64_t end;  // of its tasks among the step's
    Body body;
  };
  struct Step {
    int64_t count = 0;
    std::vector<Part> parts;

    void run(int64_t task, int worker) const {
      int64_t begin = 0;
      for (const Part& part : parts) {
        if (task < part.end) return part.body(task - begin, worker);
        begin = part.end;
      }
    }
  };
  friend struct Region;
  std::vector<Step> steps_;
};

// The runtime that threads come from: "OpenMP of the process" or "std::thread".
const char* thread_source();

}  // namespace egnn
