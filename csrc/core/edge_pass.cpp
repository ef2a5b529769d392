#include "edge_pass.h"
#include "api.h"

namespace egnn {
namespace {

template <class T>
void run_forward(const Args& a) {
  const KernelTable<T>& kernels = kernel_table<T>();
  const int threads = std::max(1, a.threads);
  Problem<T> p = describe<T>(a, kernels);
  p.m = out<T>(a.m);
  p.shift = out<T>(a.shift);
  EdgeForward<T> pass(kernels, p, threads);
  Workspace ws;
  Schedule schedule;
  ws.plan([&](bool last) {
    Packing<T> packing(kernels, ws);
    pack_edge_weights(a, p, false, true, packing);
    pass.reserve(ws);
    if (last) packing.add_to(schedule);
  });
  pass.also_prepare(schedule);
  pass.add_to(schedule);
  schedule.run(threads);
}

template <class T>
void run_backward(const Args& a) {
  const KernelTable<T>& kernels = kernel_table<T>();
  const int threads = std::max(1, a.threads);
  Problem<T> p = describe<T>(a, kernels);
  p.g_m = in<T>(a.g_m);
  p.g_shift = p.head ? in<T>(a.g_shift) : nullptr;
  p.g_pq = out<T>(a.g_pq);
  want_gradients(a, a.g_w_r != 0 || a.g_w_a != 0, p);
  EdgeBackward<T> pass(kernels, p, threads);
  Workspace ws;
  Schedule schedule;
  ws.plan([&](bool last) {
    Packing<T> packing(kernels, ws);
    pack_edge_weights(a, p, true, true, packing);
    pass.reserve(ws);
    if (last) packing.add_to(schedule);
  });
  deliver_edge_weights(a, p, pass.sums);
  deliver_first_columns(p, pass.sums, out<T>(a.g_w_r), 1, out<T>(a.g_w_a), a.attr_dim);
  pass.also_prepare(schedule);
  pass.add_to(schedule, [] {});
  schedule.run(threads);
}

}  // namespace

void forward(const Args& args) {
  args.is_double ? run_forward<double>(args) : run_forward<float>(args);
}

void backward(const Args& args) {
  args.is_double ? run_backward<double>(args) : run_backward<float>(args);
}

void silu(uintptr_t from, uintptr_t to, int64_t count, bool is_double, int threads, int repeats) {
  const auto run = [&](const auto& kernels, auto zero) {
    using T = decltype(zero);
    Schedule schedule;
    schedule.add(threads, [&](int64_t k, int) {
      const int64_t begin = count * k / threads, end = count * (k + 1) / threads;
      for (int r = 0; r < repeats; ++r) {
        kernels.silu(in<T>(from) + begin, out<T>(to) + begin, end - begin);
      }
    });
    schedule.run(threads);
  };
  is_double ? run(kernel_table<double>(), 0.0) : run(kernel_table<float>(), 0.0f);
}

}  // namespace egnn
