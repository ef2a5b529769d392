// The extension module egnn_fast._core: the core's functions for Python. Tensors arrive as
// addresses in an Args record; the GIL is released while a kernel runs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <atomic>

#include "core/parallel.h"
#include "core/passes.h"
#include "core/sorting.h"

namespace py = pybind11;

namespace {

// how often each kernel ran: tests assert that nothing quietly went another way
std::atomic<int64_t> forward_calls{0};
std::atomic<int64_t> backward_calls{0};

void forward(const egnn::Args& args) {
  egnn::forward(args);
  ++forward_calls;
}

void backward(const egnn::Args& args) {
  egnn::backward(args);
  ++backward_calls;
}

void layer_forward(const egnn::LayerArgs& args) {
  egnn::layer_forward(args);
  ++forward_calls;
}

void layer_backward(const egnn::LayerArgs& args) {
  egnn::layer_backward(args);
  ++backward_calls;
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
  using egnn::Args;
  module.doc() = "C++ kernels of egnn_fast; see csrc/core/args.h for the fields of Args.";
  py::class_<Args> args(module, "Args");
  args.def(py::init<>());
#define EGNN_FIELD(name) args.def_readwrite(#name, &Args::name)
  EGNN_FIELD(is_double);
  EGNN_FIELD(threads);
  EGNN_FIELD(num_nodes);
  EGNN_FIELD(hidden);
  EGNN_FIELD(coord_dim);
  EGNN_FIELD(attr_dim);
  EGNN_FIELD(attr_rows);
  EGNN_FIELD(mask_rows);
  EGNN_FIELD(w_r_stride);
  EGNN_FIELD(w_a_stride);
  EGNN_FIELD(pq);
  EGNN_FIELD(x);
  EGNN_FIELD(edge_attr);
  EGNN_FIELD(edge_mask);
  EGNN_FIELD(w_r);
  EGNN_FIELD(w_a);
  EGNN_FIELD(w2);
  EGNN_FIELD(b2);
  EGNN_FIELD(w_g);
  EGNN_FIELD(b_g);
  EGNN_FIELD(w3);
  EGNN_FIELD(b3);
  EGNN_FIELD(w_x);
  EGNN_FIELD(rowptr);
  EGNN_FIELD(senders);
  EGNN_FIELD(perm);
  EGNN_FIELD(first);
  EGNN_FIELD(activation);
  EGNN_FIELD(negative_slope);
  EGNN_FIELD(norm);
  EGNN_FIELD(tanh);
  EGNN_FIELD(clamp);
  EGNN_FIELD(m);
  EGNN_FIELD(shift);
  EGNN_FIELD(g_m);
  EGNN_FIELD(g_shift);
  EGNN_FIELD(g_pq);
  EGNN_FIELD(g_coords);
  EGNN_FIELD(g_edge_attr);
  EGNN_FIELD(g_edge_mask);
  EGNN_FIELD(g_w_r);
  EGNN_FIELD(g_w_a);
  EGNN_FIELD(g_w2);
  EGNN_FIELD(g_b2);
  EGNN_FIELD(g_w_g);
  EGNN_FIELD(g_b_g);
  EGNN_FIELD(g_w3);
  EGNN_FIELD(g_b3);
  EGNN_FIELD(g_w_x);
#undef EGNN_FIELD

  using egnn::LayerArgs;
  py::class_<LayerArgs, Args> layer(module, "LayerArgs");
  layer.def(py::init<>());
#define EGNN_FIELD(name) layer.def_readwrite(#name, &LayerArgs::name)
  EGNN_FIELD(in_features);
  EGNN_FIELD(out_features);
  EGNN_FIELD(node_attr_dim);
  EGNN_FIELD(residual);
  EGNN_FIELD(coord_scale);
  EGNN_FIELD(h);
  EGNN_FIELD(v);
  EGNN_FIELD(node_attr);
  EGNN_FIELD(coord_weight);
  EGNN_FIELD(w1);
  EGNN_FIELD(b1);
  EGNN_FIELD(node_w1);
  EGNN_FIELD(node_b1);
  EGNN_FIELD(node_w2);
  EGNN_FIELD(node_b2);
  EGNN_FIELD(vel_w1);
  EGNN_FIELD(vel_b1);
  EGNN_FIELD(vel_w2);
  EGNN_FIELD(vel_b2);
  EGNN_FIELD(h_out);
  EGNN_FIELD(x_out);
  EGNN_FIELD(v_out);
  EGNN_FIELD(g_h_out);
  EGNN_FIELD(g_x_out);
  EGNN_FIELD(g_v_out);
  EGNN_FIELD(g_h);
  EGNN_FIELD(g_v);
  EGNN_FIELD(g_node_attr);
  EGNN_FIELD(g_coord_weight);
  EGNN_FIELD(g_w1);
  EGNN_FIELD(g_b1);
  EGNN_FIELD(g_node_w1);
  EGNN_FIELD(g_node_b1);
  EGNN_FIELD(g_node_w2);
  EGNN_FIELD(g_node_b2);
  EGNN_FIELD(g_vel_w1);
  EGNN_FIELD(g_vel_b1);
  EGNN_FIELD(g_vel_w2);
  EGNN_FIELD(g_vel_b2);
#undef EGNN_FIELD

  const auto release = py::call_guard<py::gil_scoped_release>();
  module.def("forward", &forward, py::arg("args"), release);
  module.def("backward", &backward, py::arg("args"), release);
  module.def("layer_forward", &layer_forward, py::arg("args"), release);
  module.def("layer_backward", &layer_backward, py::arg("args"), release);
  module.def("sort_by_receiver", &sort_by_receiver, py::arg("edges"), py::arg("num_edges"),
             py::arg("num_nodes"), py::arg("rowptr"), py::arg("senders"), py::arg("perm"), release,
             "Stable counting sort by receiver; returns whether the edges were sorted already.");
  module.def(
      "calls", [] { return py::make_tuple(forward_calls.load(), backward_calls.load()); },
      "How often (forward, backward) ran in this process.");
  module.def("instruction_set", &egnn::instruction_set);
  module.def("supported_instruction_sets", &egnn::supported_instruction_sets);
  module.def("set_instruction_set", &egnn::set_instruction_set, py::arg("name"));
  module.def("thread_source", &egnn::thread_source);
}
