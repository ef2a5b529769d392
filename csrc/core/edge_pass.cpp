// The operator `messages`: the edge pass alone.
#include "edge_pass.h"

#include "api.h"

namespace egnn {
namespace {

template <class T>
void run_forward(const MessagesArgs& a) {
  const KernelTable<T>& kernels = kernel_table<T>();
  const int threads = std::max(1, a.threads);
  Problem<T> p = make_problem<T>(a, kernels);
  p.m = output<T>(a.outputs.m);
  p.shift = output<T>(a.outputs.x);
  EdgeForward<T> pass(kernels, p, threads);
  Workspace workspace;
  Schedule schedule;
  workspace.plan([&](bool is_last) {
    Packing<T> packing(kernels, workspace);
    pack_edge_weights(a, p, false, true, packing);
    pass.reserve(workspace);
    if (is_last) packing.add_step(schedule);
  });
  pass.add_zeroing(schedule);
  pass.add_steps(schedule);
  schedule.run(threads);
}

template <class T>
void run_backward(const MessagesArgs& a) {
  const KernelTable<T>& kernels = kernel_table<T>();
  const int threads = std::max(1, a.threads);
  const MessagesInputs& gradients = a.gradients;
  Problem<T> p = make_problem<T>(a, kernels);
  p.g_m = input<T>(a.cotangents.m);
  p.g_shift = p.head ? input<T>(a.cotangents.x) : nullptr;
  p.g_pq = output<T>(gradients.pq);
  set_wanted(gradients, gradients.w_r != 0 || gradients.w_a != 0, p);
  EdgeBackward<T> pass(kernels, p, threads);
  Workspace workspace;
  Schedule schedule;
  workspace.plan([&](bool is_last) {
    Packing<T> packing(kernels, workspace);
    pack_edge_weights(a, p, true, true, packing);
    pass.reserve(workspace);
    if (is_last) packing.add_step(schedule);
  });
  set_edge_gradients(gradients, p, pass.sums);
  set_first_gradients(p, output<T>(gradients.w_r), 1, output<T>(gradients.w_a), a.attr_dim,
                      pass.sums);
  pass.add_zeroing(schedule);
  pass.add_steps(schedule, [] {});
  schedule.run(threads);
}

}  // namespace

void messages_forward(const MessagesArgs& args) {
  args.is_double ? run_forward<double>(args) : run_forward<float>(args);
}

void messages_backward(const MessagesArgs& args) {
  args.is_double ? run_backward<double>(args) : run_backward<float>(args);
}

void silu(uintptr_t from, uintptr_t to, int64_t count, bool is_double, int threads, int repeats) {
  const auto run = [&](const auto& kernels, auto zero) {
    using T = decltype(zero);
    Schedule schedule;
    schedule.add_step(threads, [&](int64_t k, int) {
      const int64_t begin = count * k / threads, end = count * (k + 1) / threads;
      for (int r = 0; r < repeats; ++r) {
        kernels.silu(input<T>(from) + begin, output<T>(to) + begin, end - begin);
      }
    });
    schedule.run(threads);
  };
  is_double ? run(kernel_table<double>(), 0.0) : run(kernel_table<float>(), 0.0f);
}

}  // namespace egnn
