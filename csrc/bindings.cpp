// The extension module egnn_fast._core. A kernel is called with a record of its inputs (records.h)
// and with its outputs, all passed at once: a small graph's layer takes some tens of microseconds,
// and each Python call is a noticeable part of it. The GIL is released while a kernel runs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <atomic>
#include <memory>

#include "core/memory.h"
#include "core/schedule.h"
#include "core/api.h"
#include "core/sorting.h"
#include "records.h"

namespace py = pybind11;

namespace {

using egnn::Args;
using egnn::LayerArgs;
using egnn::TensorList;

// how often each kernel ran: tests assert that nothing quietly went another way
std::atomic<int64_t> forward_calls{0};
std::atomic<int64_t> backward_calls{0};

// Sets the addresses of tensors that egnn_fast/backends/cpu.py allocated for this call, so that shapes need
// no check; 0 for None and for tensors without elements.
template <size_t n, class Record>
void assign(Record& record, uintptr_t Record::* const (&fields)[n], const py::handle& tensors) {
  const TensorList<n> list(tensors);
  if (!list.valid()) {
    throw std::invalid_argument("outputs and gradients: expected None or dense tensors on the CPU");
  }
  for (size_t k = 0; k < n; ++k) {
    record.*fields[k] = list.has(k) ? reinterpret_cast<uintptr_t>(list[k].data) : 0;
  }
}

void forward(Args& a, const py::handle& outputs) {
  static constexpr uintptr_t Args::* kOutputs[] = {&Args::m, &Args::shift};
  assign(a, kOutputs, outputs);
  const py::gil_scoped_release release;
  egnn::forward(a);
  ++forward_calls;
}

bool backward(Args& a, const py::handle& cotangents, const py::handle& gradients) {
  static constexpr uintptr_t Args::* kGradients[] = {
      &Args::g_pq,  &Args::g_coords, &Args::g_edge_attr, &Args::g_edge_mask, &Args::g_w_r,
      &Args::g_w_a, &Args::g_w2,     &Args::g_b2,        &Args::g_w_g,       &Args::g_b_g,
      &Args::g_w3,  &Args::g_b3,     &Args::g_w_x};
  TensorList<2> given(cotangents);
  a.g_m = given.dense(0, egnn::dtype_of(a), a.num_nodes, a.hidden);
  a.g_shift = given.dense(1, egnn::dtype_of(a), a.num_nodes, a.coord_dim);
  if (!given.valid()) return false;
  assign(a, kGradients, gradients);
  const py::gil_scoped_release release;
  egnn::backward(a);
  ++backward_calls;
  return true;
}

void layer_forward(LayerArgs& a, const py::handle& outputs) {
  using L = LayerArgs;
  static constexpr uintptr_t L::* kOutputs[] = {&L::h_out, &L::x_out, &L::v_out,
                                                &L::m,     &L::shift, &L::kept};
  assign(a, kOutputs, outputs);
  const py::gil_scoped_release release;
  egnn::layer_forward(a);
  ++forward_calls;
}

bool layer_backward(LayerArgs& a, const py::handle& cotangents, uintptr_t kept, int64_t kept_bytes,
                    const py::handle& gradients) {
  using L = LayerArgs;
  static constexpr uintptr_t L::* kGradients[] = {
      &L::g_h,         &L::g_coords,       &L::g_v,       &L::g_edge_attr, &L::g_edge_mask,
      &L::g_node_attr, &L::g_coord_weight, &L::g_w1,      &L::g_b1,        &L::g_w2,
      &L::g_b2,        &L::g_node_w1,      &L::g_node_b1, &L::g_node_w2,   &L::g_node_b2,
      &L::g_w_g,       &L::g_b_g,          &L::g_w3,      &L::g_b3,        &L::g_w_x,
      &L::g_vel_w1,    &L::g_vel_b1,       &L::g_vel_w2,  &L::g_vel_b2};
  TensorList<5> given(cotangents);
  const auto dtype = egnn::dtype_of(a);
  a.g_h_out = given.dense(0, dtype, a.num_nodes, a.out_features);
  a.g_x_out = given.dense(1, dtype, a.num_nodes, a.coord_dim);
  a.g_v_out = given.dense(2, dtype, a.num_nodes, a.coord_dim);
  a.m = given.dense(3, dtype, a.num_nodes, a.hidden);
  a.shift = given.dense(4, dtype, a.num_nodes, a.coord_dim);
  // without nodes they have no elements, and None is passed
  given.require(a.num_nodes == 0 || (given.has(3) && given.has(4) == (a.w_x != 0)));
  if (!given.valid()) return false;
  // memory of another size is not what the forward kept: the kernel computes the activations again
  const int64_t size = egnn::layer_kept_size(a) * (a.is_double ? 8 : 4);
  a.kept = kept_bytes == size ? kept : 0;
  assign(a, kGradients, gradients);
  const py::gil_scoped_release release;
  egnn::layer_backward(a);
  ++backward_calls;
  return true;
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
  module.def("set_tensor_classes", &egnn::set_tensor_classes, py::arg("tensor"),
             py::arg("parameter"),
             "Tell the module PyTorch's classes, before anything else is called.");
  module.def("are_plain", &egnn::are_plain, py::arg("tensors"),
             "Whether all are None or plain tensors on the CPU, of PyTorch's own classes.");
  py::class_<Args>(module, "Args").def_readonly("hidden", &Args::hidden);
  py::class_<LayerArgs>(module, "LayerArgs")
      .def_readonly("hidden", &LayerArgs::hidden)
      .def_readonly("out_features", &LayerArgs::out_features);
  module.def("messages_record", &egnn::messages_record, py::arg("tensors"), py::arg("threads"),
             py::arg("scalars"), "An edge pass's record; None if the tensors do not fit.");
  module.def("layer_record", &egnn::layer_record, py::arg("tensors"), py::arg("threads"),
             py::arg("scalars"), py::arg("coord_scale"), py::arg("residual"),
             "A layer's record; None if the tensors do not fit.");

  module.def("forward", &forward, py::arg("args"), py::arg("outputs"));
  module.def("backward", &backward, py::arg("args"), py::arg("cotangents"), py::arg("gradients"),
             "False, without writing anything, if the cotangents do not fit.");
  module.def("layer_forward", &layer_forward, py::arg("args"), py::arg("outputs"));
  module.def("layer_backward", &layer_backward, py::arg("args"), py::arg("cotangents"),
             py::arg("kept"), py::arg("kept_bytes"), py::arg("gradients"),
             "False, without writing anything, if the cotangents do not fit.");
  module.def("layer_kept_size", &egnn::layer_kept_size, py::arg("args"),
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
