// The records of csrc/core/args.h, filled from tensors. Whatever does not fit makes none: shapes,
// dtypes, devices and strides are checked here for every call, however it came.
#pragma once

#include <pybind11/stl.h>

#include "core/args.h"
#include "tensors.h"

namespace egnn {

using Scalars = std::tuple<int, double, double, bool, double>;

inline void set_scalars(Args& a, const Scalars& scalars) {
  std::tie(a.activation, a.negative_slope, a.norm, a.tanh, a.clamp) = scalars;
}

inline Kind kind_of(const Args& a) { return a.is_double ? Kind::kFloat64 : Kind::kFloat32; }

// The graph's four tensors, from the k-th on. That rowptr ends with the number of edges makes every
// other index of it fit: Graph checks them.
template <size_t count>
void take_graph(TensorList<count>& list, size_t k, Args& a) {
  a.rowptr = list.dense(k, Kind::kInt64, a.num_nodes + 1);
  if (!list.has(k) || !list.fit()) return list.require(false);
  const int64_t edges = reinterpret_cast<const int64_t*>(a.rowptr)[a.num_nodes];
  list.require(edges >= 0);
  a.senders = list.dense(k + 1, Kind::kInt32, edges);
  a.perm = list.dense(k + 2, Kind::kInt32, edges);
  a.first = list.dense(k + 3, Kind::kInt32, a.num_nodes);
  list.require(list.has(k + 1) || list.has(k + 3));
}

// Sizes of the edge pass that are read off its inputs; edge_attr and edge_mask are compared with
// the edges by the core, whose message names them.
template <size_t count>
void take_edge_rows(TensorList<count>& list, size_t edge_attr, size_t edge_mask, Args& a) {
  const Kind kind = kind_of(a);
  a.edge_attr = list.dense(edge_attr, kind, kAnyNumber, a.attr_dim);
  a.edge_mask = list.dense(edge_mask, kind, kAnyNumber);
  list.require(list.has(edge_attr) || a.attr_dim == 0);
  if (!list.fit()) return;
  if (list.has(edge_attr)) a.attr_rows = list[edge_attr].shape[0];
  if (list.has(edge_mask)) a.mask_rows = list[edge_mask].shape[0];
}

// The record of an edge pass; None unless the tensors (egnn_fast/_cpu.py names them) fit each
// other. It is valid as long as they are.
inline py::object messages_record(const py::handle& tensors, int threads, const Scalars& scalars) {
  enum : size_t { kPQ, kX, kAttr, kMask, kWr, kWa, kW2, kB2, kWg, kBg, kW3, kB3, kWx, kGraph };
  TensorList<kGraph + 4> list(tensors);
  if (!list.has_dims(kPQ, 2) || !list.has_dims(kX, 2)) return py::none();
  Args a;
  const Kind kind = kind_of(list[kPQ]);
  a.is_double = kind == Kind::kFloat64;
  list.require(kind == kind_of(a));
  a.threads = threads;
  a.num_nodes = list[kPQ].shape[0];
  const int64_t h = a.hidden = list[kPQ].shape[1] / 2;
  a.coord_dim = list[kX].shape[1];
  if (list.has(kWa)) {
    if (!list.has_dims(kWa, 2)) return py::none();
    a.attr_dim = list[kWa].shape[1];
  }
  a.pq = list.dense(kPQ, kind, a.num_nodes, 2 * h);
  a.x = list.dense(kX, kind, a.num_nodes, a.coord_dim);
  take_edge_rows(list, kAttr, kMask, a);
  a.w_r = list.strided(kWr, kind, h);
  a.w_a = list.strided(kWa, kind, h, a.attr_dim);
  a.w2 = list.dense(kW2, kind, h, h);
  a.b2 = list.dense(kB2, kind, h);
  a.w_g = list.dense(kWg, kind, h);
  a.b_g = list.dense(kBg, kind, 1);
  a.w3 = list.dense(kW3, kind, h, h);
  a.b3 = list.dense(kB3, kind, h);
  a.w_x = list.dense(kWx, kind, h);
  list.require(h > 0 && a.coord_dim > 0 && list.has(kWr) && list.has(kW2) && list.has(kB2));
  list.together({kWg, kBg});
  list.together({kW3, kB3, kWx});
  take_graph(list, kGraph, a);
  if (!list.fit()) return py::none();
  a.w_r_stride = list[kWr].strides[0];
  a.w_a_stride = list.has(kWa) ? list[kWa].strides[0] : 0;
  set_scalars(a, scalars);
  return py::cast(a);
}

// The same of a whole layer.
inline py::object layer_record(const py::handle& tensors, int threads, const Scalars& scalars,
                               double coord_scale, bool residual) {
  enum : size_t {
    kH,
    kX,
    kV,
    kAttr,
    kMask,
    kNodeAttr,
    kCoordWeight,  // inputs
    kW1,
    kB1,
    kW2,
    kB2,
    kNodeW1,
    kNodeB1,
    kNodeW2,
    kNodeB2,  // phi_e, phi_h
    kWg,
    kBg,
    kW3,
    kB3,
    kWx,
    kVelW1,
    kVelB1,
    kVelW2,
    kVelB2,
    kGraph,  // gate, phi_x, phi_v
  };
  TensorList<kGraph + 4> list(tensors);
  for (size_t k : {kH, kX, kW1, kNodeW2}) {
    if (!list.has_dims(k, 2)) return py::none();
  }
  LayerArgs a;
  const Kind kind = kind_of(list[kH]);
  a.is_double = kind == Kind::kFloat64;
  list.require(kind == kind_of(a));
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
  a.h = list.dense(kH, kind, n, f);
  a.x = list.dense(kX, kind, n, a.coord_dim);
  a.v = list.dense(kV, kind, n, a.coord_dim);
  take_edge_rows(list, kAttr, kMask, a);
  a.node_attr = list.dense(kNodeAttr, kind, n, a.node_attr_dim);
  a.coord_weight = list.dense(kCoordWeight, kind, n);
  a.w1 = list.dense(kW1, kind, h, width);
  a.b1 = list.dense(kB1, kind, h);
  a.w2 = list.dense(kW2, kind, h, h);
  a.b2 = list.dense(kB2, kind, h);
  a.node_w1 = list.dense(kNodeW1, kind, h, f + h + a.node_attr_dim);
  a.node_b1 = list.dense(kNodeB1, kind, h);
  a.node_w2 = list.dense(kNodeW2, kind, o, h);
  a.node_b2 = list.dense(kNodeB2, kind, o);
  a.w_g = list.dense(kWg, kind, 1, h);
  a.b_g = list.dense(kBg, kind, 1);
  a.w3 = list.dense(kW3, kind, h, h);
  a.b3 = list.dense(kB3, kind, h);
  a.w_x = list.dense(kWx, kind, 1, h);
  a.vel_w1 = list.dense(kVelW1, kind, h, f);
  a.vel_b1 = list.dense(kVelB1, kind, h);
  a.vel_w2 = list.dense(kVelW2, kind, 1, h);
  a.vel_b2 = list.dense(kVelB2, kind, 1);
  for (size_t k : {kB1, kW2, kB2, kNodeW1, kNodeB1, kNodeB2}) list.require(list.has(k));
  list.together({kWg, kBg});
  list.together({kW3, kB3, kWx});
  list.together({kV, kVelW1, kVelB1, kVelW2, kVelB2});
  take_graph(list, kGraph, a);
  if (!list.fit()) return py::none();
  set_scalars(a, scalars);
  a.coord_scale = coord_scale;
  a.residual = residual;
  return py::cast(a);
}

}  // namespace egnn
