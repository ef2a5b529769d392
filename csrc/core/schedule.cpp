// Runs a schedule on the threads of OpenMP, looked up at run time, or of std::thread.
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

// The entry points of OpenMP; all runtimes that PyTorch uses (GNU, LLVM, Intel) export the GNU one.
struct OpenMP {
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
  int (*thread_number)() = nullptr;
};

std::atomic<bool> in_forked_child{false};

// libgomp's threads do not survive a fork, and a forked child that waits for them hangs. The
// handler is registered when the library is loaded, because PyTorch may start threads before the
// first call.
[[maybe_unused]] const int fork_handler =
    pthread_atfork(nullptr, nullptr, [] { in_forked_child = true; });

#if defined(__linux__)
// A callback of dl_iterate_phdr: appends the names of OpenMP runtimes to the vector `names`.
int collect_openmp(dl_phdr_info* info, size_t, void* names) {
  const char* name = info->dlpi_name;
  if (name == nullptr) return 0;
  if (std::strstr(name, "libgomp") || std::strstr(name, "libiomp5") ||
      std::strstr(name, "libomp")) {
    static_cast<std::vector<std::string>*>(names)->emplace_back(name);
  }
  return 0;
}
#endif

OpenMP find_openmp() {
  void* symbol = dlsym(RTLD_DEFAULT, "GOMP_parallel");
  void* number = dlsym(RTLD_DEFAULT, "omp_get_thread_num");
#if defined(__linux__)
  std::vector<std::string> names;
  // the loader holds a lock during the callback, so dlopen is called after it
  if (symbol == nullptr) dl_iterate_phdr(collect_openmp, &names);
  for (const std::string& name : names) {
    if (symbol != nullptr) break;
    // RTLD_NOLOAD: a handle to the library that is loaded already
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
  static const OpenMP runtime = find_openmp();
  return runtime;
}

// Tells the processor that a loop spins.
inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Spins until `done` has reached `count`; after a while it yields the core in each turn.
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

// One run of a schedule, shared by its threads.
struct Region {
  // on a cache line of its own, because all threads write to it
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
  std::vector<Counter> done;   // finished tasks of each step
  std::vector<Counter> taken;  // tasks taken from each share: a part's tasks are shared by workers
  std::atomic<int> workers{0};

  // Runs the remaining tasks of a share.
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
    // OpenMP gives a thread the same number in each region
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
  int64_t most_tasks = 0;
  for (const Step& step : steps_) most_tasks = step.count > most_tasks ? step.count : most_tasks;
  if (threads > most_tasks) threads = static_cast<int>(most_tasks);
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
    // the threads that have started do all tasks
  }
  Region::work(&region);
  for (auto& thread : pool) thread.join();
}

const char* thread_source() {
  return openmp().parallel != nullptr ? "OpenMP of the process" : "std::thread";
}

}  // namespace egnn
