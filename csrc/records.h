// Makes the records of csrc/core/args.h from tensors: None if these do not fit each other.
//
// Every call is checked here: dtypes, devices, shapes and strides. A record holds addresses only:
// the caller keeps the tensors alive.
#pragma once

#include "core/args.h"
#include "tensors.h"

namespace egnn {

// Positions of an operator's tensors: its inputs, then the graph's tensors.
#define EGNN_ENUMERATOR(name, ...) name,
namespace messages {
enum Position : size_t { EGNN_MESSAGES_INPUTS(EGNN_ENUMERATOR) EGNN_GRAPH(EGNN_ENUMERATOR) kCount };
}
namespace layer {
enum Position : size_t { EGNN_LAYER_INPUTS(EGNN_ENUMERATOR) EGNN_GRAPH(EGNN_ENUMERATOR) kCount };
}
#undef EGNN_ENUMERATOR

#define EGNN_PRESENCE(name, presence, ...) Presence::presence,
constexpr Presence kMessagesPresence[] = {EGNN_MESSAGES_INPUTS(EGNN_PRESENCE)};
constexpr Presence kLayerPresence[] = {EGNN_LAYER_INPUTS(EGNN_PRESENCE)};
#undef EGNN_PRESENCE

inline DType dtype_of(const CommonArgs& a) {
  return a.is_double ? DType::kFloat64 : DType::kFloat32;
}

// Reads options from a tuple in the order of their list.
class OptionReader {
 public:
  OptionReader(const py::tuple& values, size_t count) : values_(values) {
    if (values.size() != count) {
      throw std::invalid_argument("expected " + std::to_string(count) + " options, got " +
                                  std::to_string(values.size()));
    }
  }

  void read(double& option) { option = next().cast<double>(); }
  void read(bool& option) { option = next().cast<bool>(); }
  void read(Activation& option) { option = static_cast<Activation>(next().cast<int>()); }

 private:
  py::handle next() { return PyTuple_GET_ITEM(values_.ptr(), position_++); }

  const py::tuple& values_;
  Py_ssize_t position_ = 0;
};

#define EGNN_ONE(name, type) +1
#define EGNN_READ(name, type) reader.read(options.name);
inline void read_options(const py::tuple& values, EdgeOptions<double>& options) {
  OptionReader reader(values, EGNN_EDGE_OPTIONS(EGNN_ONE));
  EGNN_EDGE_OPTIONS(EGNN_READ)
}
inline void read_options(const py::tuple& values, LayerOptions<double>& options) {
  OptionReader reader(values, EGNN_EDGE_OPTIONS(EGNN_ONE) EGNN_NODE_OPTIONS(EGNN_ONE));
  EGNN_EDGE_OPTIONS(EGNN_READ)
  EGNN_NODE_OPTIONS(EGNN_READ)
}
#undef EGNN_READ
#undef EGNN_ONE

// Requires the inputs that every call has, and all or none of those of a part.
template <size_t inputs, size_t count>
void require_presence(TensorList<count>& list, const Presence (&presence)[inputs]) {
  bool decided[kPresences] = {}, present[kPresences] = {};
  const auto required = static_cast<int>(Presence::required);
  decided[required] = present[required] = true;
  for (size_t k = 0; k < inputs; ++k) {
    const auto kind = static_cast<int>(presence[k]);
    if (presence[k] == Presence::optional) continue;
    if (!decided[kind]) present[kind] = list.has(k);
    decided[kind] = true;
    list.require(list.has(k) == present[kind]);
  }
}

// The graph's tensors, at positions from `rowptr` on. Of their values only the last of rowptr is
// checked, against the number of edges: Graph has checked the rest.
template <size_t count>
void take_graph(TensorList<count>& list, size_t rowptr, CommonArgs& a) {
  const size_t senders = rowptr + 1, perm = rowptr + 2, first = rowptr + 3;
  a.graph.rowptr = list.dense(rowptr, DType::kInt64, a.num_nodes + 1);
  list.require(list.has(rowptr));
  if (!list.valid()) return;
  const int64_t edges = input<int64_t>(a.graph.rowptr)[a.num_nodes];
  list.require(edges >= 0);
  a.graph.senders = list.dense(senders, DType::kInt32, edges);
  a.graph.perm = list.dense(perm, DType::kInt32, edges);
  a.graph.first = list.dense(first, DType::kInt32, a.num_nodes);
  list.require(list.has(senders) || list.has(first));
}

// The number of rows of edge_attr and edge_mask. The core compares it with the number of edges, and
// names the tensor that is wrong.
template <size_t count>
void take_edge_rows(TensorList<count>& list, size_t edge_attr, size_t edge_mask, CommonArgs& a) {
  list.require(list.has(edge_attr) || a.attr_dim == 0);
  if (!list.valid()) return;
  if (list.has(edge_attr)) a.edge_attr_rows = list[edge_attr].shape[0];
  if (list.has(edge_mask)) a.edge_mask_rows = list[edge_mask].shape[0];
}

// The record of a call of `messages`, whose inputs and graph tensors are `tensors`.
inline py::object messages_record(const py::handle& tensors, int threads,
                                  const py::tuple& options) {
  using namespace messages;
  TensorList<kCount> list(tensors);
  if (!list.has_dims(pq, 2) || !list.has_dims(x, 2)) return py::none();
  if (list.has(w_a) && !list.has_dims(w_a, 2)) return py::none();
  MessagesArgs a;
  const DType dtype = dtype_of(list[pq]);
  a.is_double = dtype == DType::kFloat64;
  list.require(dtype == dtype_of(a));
  a.threads = threads;
  const int64_t N = a.num_nodes = list[pq].shape[0], E = kAnySize;
  const int64_t H = a.hidden = list[pq].shape[1] / 2;
  const int64_t D = a.coord_dim = list[x].shape[1];
  const int64_t A = a.attr_dim = list.has(w_a) ? list[w_a].shape[1] : 0;
  list.require(H > 0 && D > 0);
  const auto take = [&](size_t k, auto... shape) {
    // columns of a wider matrix are read in place
    return k == w_r || k == w_a ? list.strided(k, dtype, shape...) : list.dense(k, dtype, shape...);
  };
#define EGNN_TAKE(name, presence, ...) a.inputs.name = take(name, __VA_ARGS__);
  EGNN_MESSAGES_INPUTS(EGNN_TAKE)
#undef EGNN_TAKE
  require_presence(list, kMessagesPresence);
  take_edge_rows(list, edge_attr, edge_mask, a);
  take_graph(list, rowptr, a);
  if (!list.valid()) return py::none();
  a.w_r_stride = list[w_r].strides[0];
  a.w_a_stride = list.has(w_a) ? list[w_a].strides[0] : 0;
  read_options(options, a.options);
  return py::cast(a);
}

// The same of `layer`.
inline py::object layer_record(const py::handle& tensors, int threads, const py::tuple& options) {
  using namespace layer;
  TensorList<kCount> list(tensors);
  for (size_t k : {h, x, edge_w1, node_w2}) {
    if (!list.has_dims(k, 2)) return py::none();
  }
  if (list.has(node_attr) && !list.has_dims(node_attr, 2)) return py::none();
  LayerArgs a;
  read_options(options, a.options);
  const DType dtype = dtype_of(list[h]);
  a.is_double = dtype == DType::kFloat64;
  list.require(dtype == dtype_of(a));
  a.threads = threads;
  const int64_t N = a.num_nodes = list[h].shape[0], E = kAnySize;
  const int64_t F = a.in_features = list[h].shape[1];
  const int64_t O = a.out_features = list[node_w2].shape[0];
  const int64_t H = a.hidden = list[edge_w1].shape[0];
  const int64_t D = a.coord_dim = list[x].shape[1];
  const int64_t A = a.attr_dim = list[edge_w1].shape[1] - 2 * F - 1;
  const int64_t B = a.node_attr_dim = list.has(node_attr) ? list[node_attr].shape[1] : 0;
  list.require(H > 0 && D > 0 && A >= 0 && (!a.options.residual || F == O));
#define EGNN_TAKE(name, presence, ...) a.inputs.name = list.dense(name, dtype, __VA_ARGS__);
  EGNN_LAYER_INPUTS(EGNN_TAKE)
#undef EGNN_TAKE
  require_presence(list, kLayerPresence);
  take_edge_rows(list, edge_attr, edge_mask, a);
  take_graph(list, rowptr, a);
  return list.valid() ? py::cast(a) : py::none();
}

}  // namespace egnn
