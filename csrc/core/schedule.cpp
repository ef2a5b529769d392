#include "schedule.h"

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
struct OpenMP {
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
  int (*thread_number)() = nullptr;
};

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

OpenMP find_openmp() {
  void* symbol = dlsym(RTLD_DEFAULT, "GOMP_parallel");
  void* number = dlsym(RTLD_DEFAULT, "omp_get_thread_num");
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
    number = dlsym(handle, "omp_get_thread_num");
    dlclose(handle);
  }
#endif
  if (symbol == nullptr) return {};
  return {reinterpret_cast<decltype(OpenMP::parallel)>(symbol),
          reinterpret_cast<decltype(OpenMP::thread_number)>(number)};
}

const OpenMP& openmp() {
  static const OpenMP found = find_openmp();
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
  struct alignas(64) Counter {
    std::atomic<int64_t> value{0};
  };

  Region(const std::vector<Schedule::Step>& steps_, int threads_)
      : steps(steps_), threads(threads_), done(steps_.size()) {
    size_t parts = 0;
    for (const auto& step : steps) parts += step.parts.size();
    taken = std::vector<Counter>(parts * threads);
  }

  const std::vector<Schedule::Step>& steps;
  const int threads;
  std::vector<Counter> done;   // tasks of each step
  std::vector<Counter> taken;  // tasks of each share: a part's tasks for a worker
  std::atomic<int> workers{0};

  // Runs what is left of a share.
  void run_share(const Schedule::Part& part, Counter* shares, int share, int worker,
                 std::atomic<int64_t>& finished) {
    const int64_t begin = part.count * share / threads, end = part.count * (share + 1) / threads;
    for (;;) {
      const int64_t task = begin + shares[share].value.fetch_add(1, std::memory_order_relaxed);
      if (task >= end) return;
      part.body(task, worker);
      finished.fetch_add(1, std::memory_order_release);
    }
  }

  static void work(void* data) {
    auto& region = *static_cast<Region*>(data);
    // the same thread has the same number in each region
    const int arrival = region.workers.fetch_add(1, std::memory_order_relaxed);
    const int worker = openmp().thread_number != nullptr ? openmp().thread_number() : arrival;
    Counter* shares = region.taken.data();
    for (size_t k = 0; k < region.steps.size(); ++k) {
      const Schedule::Step& step = region.steps[k];
      std::atomic<int64_t>& finished = region.done[k].value;
      for (int help = 0; help < region.threads; ++help) {
        if (help > 0 && finished.load(std::memory_order_relaxed) == step.count) break;
        const int share = (worker + help) % region.threads;
        for (size_t part = 0; part < step.parts.size(); ++part) {
          region.run_share(step.parts[part], shares + part * region.threads, share, worker,
                           finished);
        }
      }
      shares += step.parts.size() * region.threads;
      wait_for(finished, step.count);
    }
  }
};

void Schedule::run(int threads) const {
  int64_t most = 0;
  for (const Step& step : steps_) most = step.count > most ? step.count : most;
  if (threads > most) threads = static_cast<int>(most);
  if (threads <= 1 || in_forked_child.load(std::memory_order_relaxed)) {
    for (const Step& step : steps_) {
      for (const Part& part : step.parts) {
        for (int64_t task = 0; task < part.count; ++task) part.body(task, 0);
      }
    }
    return;
  }
  Region region(steps_, threads);
  if (openmp().parallel != nullptr) {
    openmp().parallel(Region::work, &region, static_cast<unsigned>(threads), 0);
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
  return openmp().parallel != nullptr ? "OpenMP of the process" : "std::thread";
}

}  // namespace egnn
