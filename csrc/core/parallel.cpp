#include "parallel.h"

#include <dlfcn.h>
#include <pthread.h>
#include <sched.h>

#include <atomic>
#include <cstring>
#include <string>
#include <system_error>
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
int collect_openmp(dl_phdr_info* info, size_t, void* found) {
  const char* name = info->dlpi_name;
  if (name == nullptr) return 0;
  if (std::strstr(name, "libgomp") || std::strstr(name, "libiomp5") ||
      std::strstr(name, "libomp")) {
    static_cast<std::vector<std::string>*>(found)->emplace_back(name);
  }
  return 0;
}
#endif

GompParallel find_gomp_parallel() {
  void* symbol = dlsym(RTLD_DEFAULT, "GOMP_parallel");
#if defined(__linux__)
  std::vector<std::string> names;
  // the loader holds a lock while it calls: no dlopen in there
  if (symbol == nullptr) dl_iterate_phdr(collect_openmp, &names);
  for (const std::string& name : names) {
    if (symbol != nullptr) break;
    // NOLOAD: the library is in the process; this only gives a handle to it
    void* handle = dlopen(name.c_str(), RTLD_LAZY | RTLD_NOLOAD);
    if (handle == nullptr) continue;
    symbol = dlsym(handle, "GOMP_parallel");
    dlclose(handle);
  }
#endif
  return reinterpret_cast<GompParallel>(symbol);
}

GompParallel gomp_parallel() {
  static const GompParallel found = find_gomp_parallel();
  return found;
}

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Waits until `done` has reached `count`; leaves the core to others if that takes long.
void wait_for(const std::atomic<int64_t>& done, int64_t count) {
  constexpr int kSpins = 2000;
  for (int spins = 0; done.load(std::memory_order_acquire) < count; ++spins) {
    if (spins < kSpins) {
      relax();
    } else {
      sched_yield();
    }
  }
}

}  // namespace

struct Region {
  // on cache lines of their own: all threads write to them
  struct alignas(64) Counters {
    std::atomic<int64_t> next{0}, done{0};
  };

  explicit Region(const std::vector<Schedule::Step>& steps_)
      : steps(steps_), counters(steps_.size()) {}

  const std::vector<Schedule::Step>& steps;
  std::vector<Counters> counters;
  std::atomic<int> workers{0};

  static void work(void* data) {
    auto& region = *static_cast<Region*>(data);
    const int worker = region.workers.fetch_add(1, std::memory_order_relaxed);
    for (size_t k = 0; k < region.steps.size(); ++k) {
      const Schedule::Step& step = region.steps[k];
      Counters& counters = region.counters[k];
      for (;;) {
        const int64_t task = counters.next.fetch_add(1, std::memory_order_relaxed);
        if (task >= step.count) break;
        step.run(task, worker);
        counters.done.fetch_add(1, std::memory_order_release);
      }
      wait_for(counters.done, step.count);
    }
  }
};

void Schedule::run(int threads) const {
  int64_t most = 0;
  for (const Step& step : steps_) most = step.count > most ? step.count : most;
  if (threads > most) threads = static_cast<int>(most);
  if (threads <= 1 || in_forked_child.load(std::memory_order_relaxed)) {
    for (const Step& step : steps_) {
      for (int64_t task = 0; task < step.count; ++task) step.run(task, 0);
    }
    return;
  }
  const GompParallel gomp = gomp_parallel();
  Region region(steps_);
  if (gomp != nullptr) {
    gomp(Region::work, &region, static_cast<unsigned>(threads), 0);
    return;
  }
  std::vector<std::thread> pool;
  pool.reserve(threads - 1);
  try {
    for (int k = 1; k < threads; ++k) pool.emplace_back(Region::work, &region);
  } catch (const std::system_error&) {
    // no more threads to be had: those there are do it
  }
  Region::work(&region);
  for (auto& thread : pool) thread.join();
}

const char* thread_source() {
  return gomp_parallel() != nullptr ? "OpenMP of the process" : "std::thread";
}

}  // namespace egnn
