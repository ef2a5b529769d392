// Makes the records of csrc/core/args.h from tensors, none if these do not fit each other: the
// shapes, dtypes, devices and strides of each call are checked here.
#pragma once

#include <pybind11/stl.h>

#include "core/args.h"
#include "tensors.h"

namespace egnn {

using Scalars = std::tuple<int, double, double, bool, double>;

inline void set_scalars(Args& a, const Scalars& scalars) {
  std::tie(a.activation, a.negative_slope, a.norm, a.tanh, a.clamp) = scalars;
}

inline DType dtype_of(const Args& a) { return a.is_double ? DType::kFloat64 : DType::kFloat32; }

// The graph's tensors rowptr, senders, perm and first, from the k-th on. Of their values only the
// last of rowptr is checked, against the number of edges: Graph has checked the rest.
template <size_t count>
void take_graph(TensorList<count>& list, size_t k, Args& a) {
  a.rowptr = list.dense(k, DType::kInt64, a.num_nodes + 1);
  list.require(list.has(k));
  if (!list.valid()) return;
  const int64_t edges = reinterpret_cast<const int64_t*>(a.rowptr)[a.num_nodes];
  list.require(edges >= 0);
  a.senders = list.dense(k + 1, DType::kInt32, edges);
  a.perm = list.dense(k + 2, DType::kInt32, edges);
  a.first = list.dense(k + 3, DType::kInt32, a.num_nodes);
  list.require(list.has(k + 1) || list.has(k + 3));
}

// edge_attr and edge_mask. The core compares their rows with the number of edges, and names the
// wrong one.
template <size_t count>
void take_edge_inputs(TensorList<count>& list, size_t edge_attr, size_t edge_mask, Args& a) {
  const DType dtype = dtype_of(a);
  a.edge_attr = list.dense(edge_attr, dtype, kAnySize, a.attr_dim);
  a.edge_mask = list.dense(edge_mask, dtype, kAnySize);
  list.require(list.has(edge_attr) || a.attr_dim == 0);
  if (!list.valid()) return;
  if (list.has(edge_attr)) a.attr_rows = list[edge_attr].shape[0];
  if (list.has(edge_mask)) a.mask_rows = list[edge_mask].shape[0];
}

// The record of an edge pass, or None unless the tensors (in the order of _MESSAGES in
// egnn_fast/backends/cpu.py, then the graph's) fit each other. It holds addresses only: the caller keeps
// the tensors alive.
inline py::object messages_record(const py::handle& tensors, int threads, const Scalars& scalars) {
  enum : size_t { kPQ, kX, kAttr, kMask, kWr, kWa, kW2, kB2, kWg, kBg, kW3, kB3, kWx, kGraph };
  TensorList<kGraph + 4> list(tensors);
  if (!list.has_dims(kPQ, 2) || !list.has_dims(kX, 2)) return py::none();
  Args a;
  const DType dtype = dtype_of(list[kPQ]);
  a.is_double = dtype == DType::kFloat64;
  list.require(dtype == dtype_of(a));
  a.threads = threads;
  a.num_nodes = list[kPQ].shape[0];
  const int64_t h = a.hidden = list[kPQ].shape[1] / 2;
  a.coord_dim = list[kX].shape[1];
  if (list.has(kWa)) {
    if (!list.has_dims(kWa, 2)) return py::none();
    a.attr_dim = list[kWa].shape[1];
  }
  a.pq = list.dense(kPQ, dtype, a.num_nodes, 2 * h);
  a.x = list.dense(kX, dtype, a.num_nodes, a.coord_dim);
  take_edge_inputs(list, kAttr, kMask, a);
  a.w_r = list.strided(kWr, dtype, h);
  a.w_a = list.strided(kWa, dtype, h, a.attr_dim);
  a.w2 = list.dense(kW2, dtype, h, h);
  a.b2 = list.dense(kB2, dtype, h);
  a.w_g = list.dense(kWg, dtype, h);
  a.b_g = list.dense(kBg, dtype, 1);
  a.w3 = list.dense(kW3, dtype, h, h);
  a.b3 = list.dense(kB3, dtype, h);
  a.w_x = list.dense(kWx, dtype, h);
  list.require(h > 0 && a.coord_dim > 0 && list.has(kWr) && list.has(kW2) && list.has(kB2));
  list.require_all_or_none({kWg, kBg});
  list.require_all_or_none({kW3, kB3, kWx});
  take_graph(list, kGraph, a);
  if (!list.valid()) return py::none();
  a.w_r_stride = list[kWr].strides[0];
  a.w_a_stride = list.has(kWa) ? list[kWa].strides[0] : 0;
  set_scalars(a, scalars);
  return py::cast(a);
}

// The same of a whole layer, in the order of _LAYER.
inline py::object layer_record(const py::handle& tensors, int threads, const Scalars& scalars,
                               double coord_scale, bool residual) {
  // clang-format off
  enum : size_t {
    // inputs of nodes and edges
    kH, kX, kV, kAttr, kMask, kNodeAttr, kCoordWeight,
    // phi_e and phi_h
    kW1, kB1, kW2, kB2, kNodeW1, kNodeB1, kNodeW2, kNodeB2,
    // gate, phi_x and phi_v
    kWg, kBg, kW3, kB3, kWx, kVelW1, kVelB1, kVelW2, kVelB2,
    // the graph's tensors
    kGraph,
  };
  // clang-format on
  TensorList<kGraph + 4> list(tensors);
  for (size_t k : {kH, kX, kW1, kNodeW2}) {
    if (!list.has_dims(k, 2)) return py::none();
  }
  LayerArgs a;
  const DType dtype = dtype_of(list[kH]);
  a.is_double = dtype == DType::kFloat64;
  list.require(dtype == dtype_of(a));
  a.threads = threads;
  const int64_t n = a.num_nodes = list[kH].shape[0];
  const int64_t f = a.in_features = list[kH].shape[1];
  const int64_t h = a.hidden = list[kW1].shape[0];
  const int64_t width = list[kW1].shape[1];
  const int64_t o = a.out_features = list[kNodeW2].shape[0];
  a.coord_dim = list[kX].shape[1];
  a.attr_dim = width - 2 * f - 1;
  if (list.has(kNodeAttr)) {
    if (!list.has_dims(kNodeAttr, 2)) return py::none();
    a.node_attr_dim = list[kNodeAttr].shape[1];
  }
  list.require(h > 0 && a.coord_dim > 0 && a.attr_dim >= 0 && (!residual || f == o));
  a.h = list.dense(kH, dtype, n, f);
  a.x = list.dense(kX, dtype, n, a.coord_dim);
  a.v = list.dense(kV, dtype, n, a.coord_dim);
  take_edge_inputs(list, kAttr, kMask, a);
  a.node_attr = list.dense(kNodeAttr, dtype, n, a.node_attr_dim);
  a.coord_weight = list.dense(kCoordWeight, dtype, n);
  a.w1 = list.dense(kW1, dtype, h, width);
  a.b1 = list.dense(kB1, dtype, h);
  a.w2 = list.dense(kW2, dtype, h, h);
  a.b2 = list.dense(kB2, dtype, h);
  a.node_w1 = list.dense(kNodeW1, dtype, h, f + h + a.node_attr_dim);
  a.node_b1 = list.dense(kNodeB1, dtype, h);
  a.node_w2 = list.dense(kNodeW2, dtype, o, h);
  a.node_b2 = list.dense(kNodeB2, dtype, o);
  a.w_g = list.dense(kWg, dtype, 1, h);
  a.b_g = list.dense(kBg, dtype, 1);
  a.w3 = list.dense(kW3, dtype, h, h);
  a.b3 = list.dense(kB3, dtype, h);
  a.w_x = list.dense(kWx, dtype, 1, h);
  a.vel_w1 = list.dense(kVelW1, dtype, h, f);
  a.vel_b1 = list.dense(kVelB1, dtype, h);
  a.vel_w2 = list.dense(kVelW2, dtype, 1, h);
  a.vel_b2 = list.dense(kVelB2, dtype, 1);
  for (size_t k : {kB1, kW2, kB2, kNodeW1, kNodeB1, kNodeB2}) list.require(list.has(k));
  list.require_all_or_none({kWg, kBg});
  list.require_all_or_none({kW3, kB3, kWx});
  list.require_all_or_none({kV, kVelW1, kVelB1, kVelW2, kVelB2});
  take_graph(list, kGraph, a);
  if (!list.valid()) return py::none();
  set_scalars(a, scalars);
  a.coord_scale = coord_scale;
  a.residual = residual;
  return py::cast(a);
}

}  // namespace egnn
