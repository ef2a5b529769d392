// The extension module egnn_fast._core: the core's functions for Python. Tensors arrive as
// addresses (0: absent), in the order of the lists below; the GIL is released while a kernel runs.
// The records are filled by a few calls rather than field by field: a small graph's layer takes
// some tens of microseconds, and each Python call is a noticeable part of one.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <atomic>
#include <memory>

#include "core/memory.h"
#include "core/parallel.h"
#include "core/passes.h"
#include "core/sorting.h"
#include "dlpack.h"

namespace py = pybind11;

namespace {

using egnn::Args;
using egnn::LayerArgs;

template <size_t n>
using Addresses = std::array<uintptr_t, n>;
using Scalars = std::tuple<bool, int, double, double, bool, double>;

// how often each kernel ran: tests assert that nothing quietly went another way
std::atomic<int64_t> forward_calls{0};
std::atomic<int64_t> backward_calls{0};

template <size_t n, class Record>
void assign(Record& record, uintptr_t Record::* const (&fields)[n], const Addresses<n>& values) {
  for (size_t k = 0; k < n; ++k) record.*fields[k] = values[k];
}

void set_scalars(Args& a, const Scalars& scalars) {
  std::tie(a.is_double, a.activation, a.negative_slope, a.norm, a.tanh, a.clamp) = scalars;
}

Args make_args(const Addresses<17>& tensors, const std::array<int64_t, 9>& sizes,
               const Scalars& scalars) {
  static constexpr uintptr_t Args::* kTensors[] = {
      &Args::pq,  &Args::x,      &Args::edge_attr, &Args::edge_mask, &Args::w_r,  &Args::w_a,
      &Args::w2,  &Args::b2,     &Args::w_g,       &Args::b_g,       &Args::w3,   &Args::b3,
      &Args::w_x, &Args::rowptr, &Args::senders,   &Args::perm,      &Args::first};
  Args a;
  assign(a, kTensors, tensors);
  a.threads = static_cast<int>(sizes[0]);
  a.num_nodes = sizes[1];
  a.hidden = sizes[2];
  a.coord_dim = sizes[3];
  a.attr_dim = sizes[4];
  a.attr_rows = sizes[5];
  a.mask_rows = sizes[6];
  a.w_r_stride = sizes[7];
  a.w_a_stride = sizes[8];
  set_scalars(a, scalars);
  return a;
}

LayerArgs make_layer_args(const Addresses<28>& tensors, const std::array<int64_t, 10>& sizes,
                          const Scalars& scalars, double coord_scale, bool residual) {
  using L = LayerArgs;
  static constexpr uintptr_t L::* kTensors[] = {&L::h,
                                                &L::x,
                                                &L::v,
                                                &L::edge_attr,
                                                &L::edge_mask,
                                                &L::node_attr,
                                                &L::coord_weight,
                                                &L::w1,
                                                &L::b1,
                                                &L::w2,
                                                &L::b2,
                                                &L::node_w1,
                                                &L::node_b1,
                                                &L::node_w2,
                                                &L::node_b2,
                                                &L::w_g,
                                                &L::b_g,
                                                &L::w3,
                                                &L::b3,
                                                &L::w_x,
                                                &L::vel_w1,
                                                &L::vel_b1,
                                                &L::vel_w2,
                                                &L::vel_b2,
                                                &L::rowptr,
                                                &L::senders,
                                                &L::perm,
                                                &L::first};
  LayerArgs a;
  assign(a, kTensors, tensors);
  a.threads = static_cast<int>(sizes[0]);
  a.num_nodes = sizes[1];
  a.in_features = sizes[2];
  a.hidden = sizes[3];
  a.out_features = sizes[4];
  a.coord_dim = sizes[5];
  a.attr_dim = sizes[6];
  a.node_attr_dim = sizes[7];
  a.attr_rows = sizes[8];
  a.mask_rows = sizes[9];
  set_scalars(a, scalars);
  a.coord_scale = coord_scale;
  a.residual = residual;
  return a;
}

void forward(Args& a, const Addresses<2>& outputs) {
  static constexpr uintptr_t Args::* kOutputs[] = {&Args::m, &Args::shift};
  assign(a, kOutputs, outputs);
  const py::gil_scoped_release release;
  egnn::forward(a);
  ++forward_calls;
}

void backward(Args& a, const Addresses<2>& cotangents, const Addresses<13>& gradients) {
  static constexpr uintptr_t Args::* kCotangents[] = {&Args::g_m, &Args::g_shift};
  static constexpr uintptr_t Args::* kGradients[] = {
      &Args::g_pq,  &Args::g_coords, &Args::g_edge_attr, &Args::g_edge_mask, &Args::g_w_r,
      &Args::g_w_a, &Args::g_w2,     &Args::g_b2,        &Args::g_w_g,       &Args::g_b_g,
      &Args::g_w3,  &Args::g_b3,     &Args::g_w_x};
  assign(a, kCotangents, cotangents);
  assign(a, kGradients, gradients);
  const py::gil_scoped_release release;
  egnn::backward(a);
  ++backward_calls;
}

void layer_forward(LayerArgs& a, const Addresses<6>& outputs) {
  using L = LayerArgs;
  static constexpr uintptr_t L::* kOutputs[] = {&L::h_out, &L::x_out, &L::v_out,
                                                &L::m,     &L::shift, &L::kept};
  assign(a, kOutputs, outputs);
  const py::gil_scoped_release release;
  egnn::layer_forward(a);
  ++forward_calls;
}

void layer_backward(LayerArgs& a, const Addresses<6>& cotangents, const Addresses<24>& gradients) {
  using L = LayerArgs;
  static constexpr uintptr_t L::* kCotangents[] = {&L::g_h_out, &L::g_x_out, &L::g_v_out,
                                                   &L::m,       &L::shift,   &L::kept};
  static constexpr uintptr_t L::* kGradients[] = {
      &L::g_h,         &L::g_coords,       &L::g_v,       &L::g_edge_attr, &L::g_edge_mask,
      &L::g_node_attr, &L::g_coord_weight, &L::g_w1,      &L::g_b1,        &L::g_w2,
      &L::g_b2,        &L::g_node_w1,      &L::g_node_b1, &L::g_node_w2,   &L::g_node_b2,
      &L::g_w_g,       &L::g_b_g,          &L::g_w3,      &L::g_b3,        &L::g_w_x,
      &L::g_vel_w1,    &L::g_vel_b1,       &L::g_vel_w2,  &L::g_vel_b2};
  assign(a, kCotangents, cotangents);
  assign(a, kGradients, gradients);
  const py::gil_scoped_release release;
  egnn::layer_backward(a);
  ++backward_calls;
}

// A buffer of the pool as a DLPack tensor; it goes back when the tensor dies.
struct BufferTensor {
  DLManagedTensor tensor;
  int64_t count;
};

py::capsule buffer(int64_t count, bool is_double) {
  const int64_t size = is_double ? 8 : 4;
  auto owner = std::make_unique<BufferTensor>();
  owner->count = count;
  DLTensor& t = owner->tensor.dl_tensor;
  t = {egnn::take_buffer(count * size),
       {1, 0},
       1,
       {2, static_cast<uint8_t>(8 * size), 1},
       &owner->count,
       nullptr,
       0};
  owner->tensor.manager_ctx = owner.get();
  owner->tensor.deleter = [](DLManagedTensor* self) {
    const DLTensor& dead = self->dl_tensor;
    egnn::return_buffer(static_cast<char*>(dead.data), dead.shape[0] * dead.dtype.bits / 8);
    delete static_cast<BufferTensor*>(self->manager_ctx);
  };
  PyObject* capsule = PyCapsule_New(&owner->tensor, "dltensor", [](PyObject* self) {
    // one that was taken over has another name
    if (!PyCapsule_IsValid(self, "dltensor")) return;
    auto* unused = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(self, "dltensor"));
    unused->deleter(unused);
  });
  if (capsule == nullptr) {
    egnn::return_buffer(static_cast<char*>(t.data), count * size);
    throw py::error_already_set();
  }
  owner.release();
  return py::reinterpret_steal<py::capsule>(capsule);
}

bool sort_by_receiver(uintptr_t edges, int64_t num_edges, int64_t num_nodes, uintptr_t rowptr,
                      uintptr_t senders, uintptr_t perm) {
  return egnn::sort_by_receiver(reinterpret_cast<const int64_t*>(edges), num_edges, num_nodes,
                                reinterpret_cast<int64_t*>(rowptr),
                                reinterpret_cast<int32_t*>(senders),
                                reinterpret_cast<int32_t*>(perm));
}

}  // namespace

PYBIND11_MODULE(_core, module) {
  module.doc() = "C++ kernels of egnn_fast; see csrc/core/args.h for the fields of the records.";
  py::class_<Args>(module, "Args")
      .def(py::init(&make_args), py::arg("tensors"), py::arg("sizes"), py::arg("scalars"));
  py::class_<LayerArgs>(module, "LayerArgs")
      .def(py::init(&make_layer_args), py::arg("tensors"), py::arg("sizes"), py::arg("scalars"),
           py::arg("coord_scale"), py::arg("residual"));

  module.def("forward", &forward, py::arg("args"), py::arg("outputs"));
  module.def("backward", &backward, py::arg("args"), py::arg("cotangents"), py::arg("gradients"));
  module.def("layer_forward", &layer_forward, py::arg("args"), py::arg("outputs"));
  module.def("layer_backward", &layer_backward, py::arg("args"), py::arg("cotangents"),
             py::arg("gradients"));
  module.def("layer_kept_size", &egnn::layer_kept_size, py::arg("args"), py::arg("num_edges"),
             "Elements of the buffer in which a layer's forward can keep for its backward.");

  module.def("buffer", &buffer, py::arg("count"), py::arg("is_double"),
             "A DLPack capsule of `count` uninitialised numbers, from memory that is used again.");

  const auto release = py::call_guard<py::gil_scoped_release>();
  module.def("sort_by_receiver", &sort_by_receiver, py::arg("edges"), py::arg("num_edges"),
             py::arg("num_nodes"), py::arg("rowptr"), py::arg("senders"), py::arg("perm"), release,
             "Stable counting sort by receiver; returns whether the edges were sorted already.");
  module.def(
      "index_range",
      [](uintptr_t indices, int64_t count) {
        return egnn::index_range(reinterpret_cast<const int64_t*>(indices), count);
      },
      py::arg("indices"), py::arg("count"), release,
      "The smallest and the largest of count > 0 indices.");
  module.def(
      "checksum",
      [](uintptr_t data, int64_t bytes, int threads) {
        return egnn::checksum(reinterpret_cast<const void*>(data), bytes, threads);
      },
      py::arg("data"), py::arg("bytes"), py::arg("threads"), release,
      "A 64-bit checksum of memory, the same on any number of threads.");
  module.def(
      "silu",
      [](uintptr_t from, uintptr_t to, int64_t count, bool is_double, int threads, int repeats) {
        egnn::silu(from, to, count, is_double, threads, repeats);
      },
      py::arg("src"), py::arg("dst"), py::arg("count"), py::arg("is_double"), py::arg("threads"),
      py::arg("repeats"), release,
      "dst = silu(src), each thread's share `repeats` times over: the rate that benchmarks use.");
  module.def(
      "calls", [] { return py::make_tuple(forward_calls.load(), backward_calls.load()); },
      "How often (forward, backward) ran in this process.");
  module.def("instruction_set", &egnn::instruction_set);
  module.def("supported_instruction_sets", &egnn::supported_instruction_sets);
  module.def("set_instruction_set", &egnn::set_instruction_set, py::arg("name"));
  module.def("thread_source", &egnn::thread_source);
}
