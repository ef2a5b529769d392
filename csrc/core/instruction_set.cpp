// Chooses the instruction set at run time.
#include <atomic>
#include <cstdlib>
#include <stdexcept>

#include "api.h"
#include "instruction_set.h"

namespace egnn {
namespace {

enum InstructionSet : int { kUnset = -1, kPortable = 0, kAvx2 = 1, kAvx512 = 2 };
constexpr const char* kNames[] = {"portable", "avx2", "avx512"};

bool supported(int set) {
  if (set == kPortable) return true;
#if defined(EGNN_FAST_HAVE_AVX2)
  if (set == kAvx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
#if defined(EGNN_FAST_HAVE_AVX512)
  if (set == kAvx512) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("fma");
  }
#endif
  return false;
}

int parse(const std::string& name, const char* source) {
  for (int set : {kPortable, kAvx2, kAvx512}) {
    if (name != kNames[set]) continue;
    if (supported(set)) return set;
    throw std::invalid_argument(std::string(source) + ": this machine cannot run " + name);
  }
  throw std::invalid_argument(std::string(source) +
                              ": expected 'portable', 'avx2' or 'avx512', got '" + name + "'");
}

std::atomic<int> chosen{kUnset};

int choose() {
  const char* name = std::getenv("EGNN_FAST_CPU_ISA");
  if (name != nullptr && *name != '\0') return parse(name, "EGNN_FAST_CPU_ISA");
  for (int set : {kAvx512, kAvx2}) {
    if (supported(set)) return set;
  }
  return kPortable;
}

int current() {
  int set = chosen.load(std::memory_order_relaxed);
  if (set == kUnset) {
    set = choose();
    chosen.store(set, std::memory_order_relaxed);
  }
  return set;
}

}  // namespace

std::vector<std::string> supported_instruction_sets() {
  std::vector<std::string> names;
  for (int set : {kPortable, kAvx2, kAvx512}) {
    if (supported(set)) names.emplace_back(kNames[set]);
  }
  return names;
}

std::string instruction_set() { return kNames[current()]; }

void set_instruction_set(const std::string& name) { chosen = parse(name, "instruction set"); }

template <>
const KernelTable<float>& kernel_table<float>() {
#if defined(EGNN_FAST_HAVE_AVX512)
  if (current() == kAvx512) return avx512::table_float();
#endif
#if defined(EGNN_FAST_HAVE_AVX2)
  if (current() == kAvx2) return avx2::table_float();
#endif
  return portable::table_float();
}

template <>
const KernelTable<double>& kernel_table<double>() {
#if defined(EGNN_FAST_HAVE_AVX512)
  if (current() == kAvx512) return avx512::table_double();
#endif
#if defined(EGNN_FAST_HAVE_AVX2)
  if (current() == kAvx2) return avx2::table_double();
#endif
  return portable::table_double();
}

}  // namespace egnn
