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
    if (count > 0) steps_.push_back({count, std::move(body)});
  }

  void run(int threads) const;

 private:
  struct Step {
    int64_t count;
    Body body;
  };
  friend struct Region;
  std::vector<Step> steps_;
};

// The runtime that threads come from: "OpenMP of the process" or "std::thread".
const char* thread_source();

}  // namespace egnn
