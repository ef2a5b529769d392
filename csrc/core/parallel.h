// Splits work over the OpenMP threads that the process has already, without linking a runtime.
#pragma once

#include <cstdint>
#include <type_traits>

namespace egnn {

using TaskFn = void (*)(void* context, int64_t task, int worker);

// Runs tasks 0 .. count-1, each once, on at most `threads` workers (numbered from 0). Which worker
// takes which task is left to chance: results must not depend on it.
void parallel_for(int64_t count, int threads, TaskFn fn, void* context);

template <class F>
void parallel_for(int64_t count, int threads, F&& body) {
  parallel_for(
      count, threads,
      [](void* context, int64_t task, int worker) {
        (*static_cast<typename std::remove_reference<F>::type*>(context))(task, worker);
      },
      const_cast<void*>(static_cast<const void*>(&body)));
}

// The runtime that threads come from: "OpenMP of the process" or "std::thread".
const char* thread_source();

}  // namespace egnn
