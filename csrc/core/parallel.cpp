#include "parallel.h"

#include <dlfcn.h>
#include <pthread.h>

#include <atomic>
#include <cstring>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <link.h>
#endif

namespace egnn {
namespace {

// every OpenMP runtime in use with PyTorch (GNU, LLVM, Intel) exports the GNU entry point
using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

std::atomic<bool> in_forked_child{false};

// libgomp's threads do not survive a fork, and waiting for them would hang. Watched from the start:
// PyTorch may have started them before the first call comes here.
[[maybe_unused]] const int watches_forks =
    pthread_atfork(nullptr, nullptr, [] { in_forked_child = true; });

#if defined(__linux__)
int find_openmp(dl_phdr_info* info, size_t, void* found) {
  const char* name = info->dlpi_name;
  if (name == nullptr) return 0;
  if (!std::strstr(name, "libgomp") && !std::strstr(name, "libiomp5") &&
      !std::strstr(name, "libomp")) {
    return 0;
  }
  // NOLOAD: the library is in the process; this only gives a handle to it
  void* handle = dlopen(name, RTLD_LAZY | RTLD_NOLOAD);
  if (handle == nullptr) return 0;
  void* symbol = dlsym(handle, "GOMP_parallel");
  dlclose(handle);
  if (symbol == nullptr) return 0;
  *static_cast<void**>(found) = symbol;
  return 1;
}
#endif

GompParallel find_gomp_parallel() {
  void* symbol = dlsym(RTLD_DEFAULT, "GOMP_parallel");
#if defined(__linux__)
  if (symbol == nullptr) dl_iterate_phdr(find_openmp, &symbol);
#endif
  return reinterpret_cast<GompParallel>(symbol);
}

GompParallel gomp_parallel() {
  static const GompParallel found = find_gomp_parallel();
  return found;
}

struct Region {
  int64_t count;
  TaskFn fn;
  void* context;
  std::atomic<int64_t> next{0};
  std::atomic<int> workers{0};
};

void run_worker(void* data) {
  auto& region = *static_cast<Region*>(data);
  const int worker = region.workers.fetch_add(1, std::memory_order_relaxed);
  for (;;) {
    const int64_t task = region.next.fetch_add(1, std::memory_order_relaxed);
    if (task >= region.count) return;
    region.fn(region.context, task, worker);
  }
}

}  // namespace

void parallel_for(int64_t count, int threads, TaskFn fn, void* context) {
  if (count <= 0) return;
  const GompParallel gomp = gomp_parallel();
  if (threads > count) threads = static_cast<int>(count);
  if (threads <= 1 || in_forked_child.load(std::memory_order_relaxed)) {
    for (int64_t task = 0; task < count; ++task) fn(context, task, 0);
    return;
  }
  Region region{count, fn, context};
  if (gomp != nullptr) {
    gomp(run_worker, &region, static_cast<unsigned>(threads), 0);
    return;
  }
  std::vector<std::thread> pool;
  pool.reserve(threads - 1);
  for (int k = 1; k < threads; ++k) pool.emplace_back(run_worker, &region);
  run_worker(&region);
  for (auto& thread : pool) thread.join();
}

const char* thread_source() {
  return gomp_parallel() != nullptr ? "OpenMP of the process" : "std::thread";
}

}  // namespace egnn
