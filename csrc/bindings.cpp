// The extension module egnn_fast._core: the operators' passes, sorting, memory, instruction sets.
//
// A pass takes a record of its inputs (records.h) and all of its outputs at once: the layer of a
// small graph takes some tens of microseconds, of which each Python call is a noticeable part.
// The GIL is released while a kernel runs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <atomic>
#include <iterator>
#include <memory>
#include <vector>

#include "core/api.h"
#include "core/checksum.h"
#include "core/memory.h"
#include "core/schedule.h"
#include "core/sorting.h"
#include "records.h"

namespace py = pybind11;

namespace {

using egnn::LayerArgs;
using egnn::MessagesArgs;
using egnn::TensorList;

// How often kernels ran, for tests that a call did not quietly run elsewhere.
std::atomic<int64_t> forward_calls{0};
std::atomic<int64_t> backward_calls{0};

#define EGNN_NAME(name, ...) #name,
#define EGNN_COTANGENT(name) "g_" #name,
#define EGNN_SHAPE(name, presence, ...) #__VA_ARGS__,

// The names of each operator's arguments in order, and the shapes of its inputs:
// egnn_fast/backends/cpu.py compares them with operators/signature.py.
py::dict signatures() {
  using Names = std::vector<const char*>;
  using py::literals::operator""_a;
  const Names graph{EGNN_GRAPH(EGNN_NAME)}, activations{EGNN_ACTIVATIONS(EGNN_NAME)};
  const py::dict messages("inputs"_a = Names{EGNN_MESSAGES_INPUTS(EGNN_NAME)},
                          "shapes"_a = Names{EGNN_MESSAGES_INPUTS(EGNN_SHAPE)}, "graph"_a = graph,
                          "options"_a = Names{EGNN_EDGE_OPTIONS(EGNN_NAME)},
                          "outputs"_a = Names{EGNN_MESSAGES_OUTPUTS(EGNN_NAME)},
                          "cotangents"_a = Names{EGNN_MESSAGES_OUTPUTS(EGNN_COTANGENT)},
                          "constants"_a = Names{}, "activations"_a = activations);
  const py::dict layer(
      "inputs"_a = Names{EGNN_LAYER_INPUTS(EGNN_NAME)},
      "shapes"_a = Names{EGNN_LAYER_INPUTS(EGNN_SHAPE)}, "graph"_a = graph,
      "options"_a = Names{EGNN_EDGE_OPTIONS(EGNN_NAME) EGNN_NODE_OPTIONS(EGNN_NAME)},
      "outputs"_a = Names{EGNN_LAYER_OUTPUTS(EGNN_NAME)},
      "cotangents"_a = Names{EGNN_LAYER_OUTPUTS(EGNN_COTANGENT)},
      "constants"_a = Names{EGNN_LAYER_CONSTANTS(EGNN_NAME)}, "activations"_a = activations);
  return py::dict("messages"_a = messages, "layer"_a = layer);
}

#undef EGNN_SHAPE
#undef EGNN_COTANGENT
#undef EGNN_NAME

template <class Addresses>
constexpr size_t kSize = std::size(Addresses::kMembers);

// Outputs and gradients, which egnn_fast/backends/cpu.py allocates for each call: their shapes need
// no check.
template <size_t count>
TensorList<count> output_list(const py::handle& tensors) {
  const TensorList<count> list(tensors);
  if (!list.valid()) {
    throw std::invalid_argument("outputs and gradients: expected None or dense tensors on the CPU");
  }
  return list;
}

// Sets addresses to those of the list's tensors from `first` on; 0 for None and for tensors without
// elements.
template <class Addresses, size_t count>
void assign(Addresses& addresses, const TensorList<count>& list, size_t first = 0) {
  size_t k = first;
  for (const auto member : Addresses::kMembers) {
    addresses.*member = list.has(k) ? reinterpret_cast<uintptr_t>(list[k].data) : 0;
    ++k;
  }
}

// Positions in the lists below.
#define EGNN_COTANGENT(name) g_##name,
#define EGNN_CONSTANT(name) name,

void messages_forward(MessagesArgs& a, const py::handle& outputs) {
  assign(a.outputs, output_list<kSize<egnn::MessagesOutputs>>(outputs));
  const py::gil_scoped_release release;
  egnn::messages_forward(a);
  ++forward_calls;
}

bool messages_backward(MessagesArgs& a, const py::handle& cotangents, const py::handle& gradients) {
  enum : size_t { EGNN_MESSAGES_OUTPUTS(EGNN_COTANGENT) kCotangents };
  TensorList<kCotangents> list(cotangents);
  const auto dtype = egnn::dtype_of(a);
  a.cotangents.m = list.dense(g_m, dtype, a.num_nodes, a.hidden);
  a.cotangents.x = list.dense(g_x, dtype, a.num_nodes, a.coord_dim);
  if (!list.valid()) return false;
  assign(a.gradients, output_list<kSize<egnn::MessagesInputs>>(gradients));
  const py::gil_scoped_release release;
  egnn::messages_backward(a);
  ++backward_calls;
  return true;
}

// `outputs` are those of the operator, then its constants.
void layer_forward(LayerArgs& a, const py::handle& outputs) {
  constexpr size_t kOutputs = kSize<egnn::LayerOutputs>;
  const auto list = output_list<kOutputs + kSize<egnn::LayerConstants>>(outputs);
  assign(a.outputs, list);
  assign(a.constants, list, kOutputs);
  const py::gil_scoped_release release;
  egnn::layer_forward(a);
  ++forward_calls;
}

// `tensors` are the cotangents, then the constants without activations, which come by address: the
// tensor that owns them has no elements.
bool layer_backward(LayerArgs& a, const py::handle& tensors, uintptr_t activation_address,
                    int64_t activation_bytes, const py::handle& gradients) {
  enum : size_t { EGNN_LAYER_OUTPUTS(EGNN_COTANGENT) EGNN_LAYER_CONSTANTS(EGNN_CONSTANT) };
  TensorList<activations> list(tensors);  // as many as stand before them
  const auto dtype = egnn::dtype_of(a);
  a.cotangents.h = list.dense(g_h, dtype, a.num_nodes, a.out_features);
  a.cotangents.x = list.dense(g_x, dtype, a.num_nodes, a.coord_dim);
  a.cotangents.v = list.dense(g_v, dtype, a.num_nodes, a.coord_dim);
  a.constants.m = list.dense(m, dtype, a.num_nodes, a.hidden);
  a.constants.shift = list.dense(shift, dtype, a.num_nodes, a.coord_dim);
  // without nodes they have no elements, and None is passed
  const bool has_head = a.inputs.coord_w2 != 0;
  list.require(a.num_nodes == 0 || (list.has(m) && list.has(shift) == has_head));
  if (!list.valid()) return false;
  // memory of another size is not what the forward stored: the kernel computes them again
  const int64_t expected_bytes = egnn::layer_stored_elements(a) * (a.is_double ? 8 : 4);
  a.constants.activations = activation_bytes == expected_bytes ? activation_address : 0;
  assign(a.gradients, output_list<kSize<egnn::LayerInputs>>(gradients));
  const py::gil_scoped_release release;
  egnn::layer_backward(a);
  ++backward_calls;
  return true;
}

#undef EGNN_CONSTANT
#undef EGNN_COTANGENT

// A buffer of the pool as a DLPack tensor; it returns to the pool when the tensor is destroyed.
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
    const DLTensor& t = self->dl_tensor;
    egnn::return_buffer(static_cast<char*>(t.data), t.shape[0] * t.dtype.bits / 8);
    delete static_cast<BufferTensor*>(self->manager_ctx);
  };
  PyObject* capsule = PyCapsule_New(&owner->tensor, "dltensor", [](PyObject* self) {
    // a consumer that took the tensor has renamed the capsule
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
             "Tells the module PyTorch's classes; must be called before tensors are read.");
  module.def("are_plain", &egnn::are_plain, py::arg("tensors"),
             "Whether all are None or plain tensors on the CPU, of PyTorch's own classes.");
  module.def("signatures", &signatures,
             "The names of each operator's arguments in order, and the shapes of its inputs.");
  py::class_<MessagesArgs>(module, "MessagesArgs").def_readonly("hidden", &MessagesArgs::hidden);
  py::class_<LayerArgs>(module, "LayerArgs")
      .def_readonly("hidden", &LayerArgs::hidden)
      .def_readonly("out_features", &LayerArgs::out_features);
  module.def("messages_record", &egnn::messages_record, py::arg("tensors"), py::arg("threads"),
             py::arg("options"), "The record of an edge pass; None if the tensors do not fit.");
  module.def("layer_record", &egnn::layer_record, py::arg("tensors"), py::arg("threads"),
             py::arg("options"), "The record of a layer; None if the tensors do not fit.");

  module.def("messages_forward", &messages_forward, py::arg("args"), py::arg("outputs"));
  module.def("messages_backward", &messages_backward, py::arg("args"), py::arg("cotangents"),
             py::arg("gradients"), "False, with nothing written, if the cotangents do not fit.");
  module.def("layer_forward", &layer_forward, py::arg("args"), py::arg("outputs"));
  module.def("layer_backward", &layer_backward, py::arg("args"), py::arg("tensors"),
             py::arg("activation_address"), py::arg("activation_bytes"), py::arg("gradients"),
             "False, with nothing written, if the cotangents or constants do not fit.");
  module.def("layer_stored_elements", &egnn::layer_stored_elements, py::arg("args"),
             "Elements in which a layer's forward can store its activations for the backward.");

  module.def("buffer", &buffer, py::arg("count"), py::arg("is_double"),
             "A DLPack capsule of `count` uninitialised numbers, from memory that is reused.");

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
      "dst = silu(src), computed `repeats` times: benchmarks measure the kernel's rate by it.");
  module.def(
      "calls", [] { return py::make_tuple(forward_calls.load(), backward_calls.load()); },
      "How often (forward, backward) ran in this process.");
  module.def("instruction_set", &egnn::instruction_set);
  module.def("supported_instruction_sets", &egnn::supported_instruction_sets);
  module.def("set_instruction_set", &egnn::set_instruction_set, py::arg("name"));
  module.def("thread_source", &egnn::thread_source);
}
