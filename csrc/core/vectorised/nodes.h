// The node-level parts of a layer for one block of nodes, forward and backward.
//
// P and Q before the edge pass; phi_h, phi_v and the new coordinates after it.
#pragma once

#include "block.h"

namespace egnn {
namespace EGNN_ISA {

// Elements of scratch that the tiles take.
template <class T>
inline int64_t node_scratch(const NodeProblem<T>& p) {
  return static_cast<int64_t>(kBlockRows) *
             (2 * p.ld_in + 5 * p.ld_hidden + 2 * p.ld_out + 2 * p.ld_attrs) +
         11 * kWidth<T>;
}

// Copies rows [begin, begin + rows) of an array [N, columns] to a tile, padded with zeros to ld.
// Rows without padding are copied too: tiles avoid the 4K aliasing that memory.h describes.
template <class T>
inline void read_rows(const T* from, int64_t begin, int rows, int columns, int ld, T* tile) {
  if (columns == 0) return;  // an empty array has no address
  for (int b = 0; b < rows; ++b) {
    memcpy(tile + b * ld, from + (begin + b) * columns, columns * sizeof(T));
    for (int c = columns; c < ld; ++c) tile[b * ld + c] = 0;
  }
}

// Copies a tile without its padding to rows [begin, begin + rows) of an array [N, columns].
template <class T>
inline void write_rows(const T* tile, int ld, int64_t begin, int rows, int columns, T* to) {
  if (columns == 0) return;
  for (int b = 0; b < rows; ++b) {
    memcpy(to + (begin + b) * columns, tile + b * ld, columns * sizeof(T));
  }
}

// a = act(z) for `count` elements; a may be z.
template <class T, Activation act>
inline void activate_rows(const T* z, T* a, int64_t count, T slope) {
  for (int64_t k = 0; k < count; k += kWidth<T>) store(a + k, activate<T, act>(load(z + k), slope));
}

// a = act(z), derivative = act'(z); a may be z.
template <class T, Activation act>
inline void activate_rows(const T* z, T* a, T* derivative, int64_t count, T slope) {
  for (int64_t k = 0; k < count; k += kWidth<T>) {
    Vec<T> value, d;
    activate_both<T, act>(load(z + k), slope, value, d);
    store(a + k, value);
    store(derivative + k, d);
  }
}

// a *= b, element by element.
template <class T>
inline void multiply_rows(T* a, const T* b, int64_t count) {
  for (int64_t k = 0; k < count; k += kWidth<T>) store(a + k, load(a + k) * load(b + k));
}

// A worker's tiles [kBlockRows, ld_*]. z holds the result of phi_h's or phi_v's first linear, then
// its activation; d is act'(z); out is h_i'.
template <class T>
struct NodeTiles {
  T *h, *g_h;                // ld_in
  T *m, *z, *d, *g_z, *g_m;  // ld_hidden
  T *out, *g_out;            // ld_out
  T *attr, *g_attr;          // ld_attrs

  NodeTiles(const NodeProblem<T>& p, T* scratch) {
    Scratch<T> memory{scratch};
    T** const in[] = {&h, &g_h};
    for (T** tile : in) *tile = memory.take(static_cast<int64_t>(kBlockRows) * p.ld_in);
    T** const hidden[] = {&m, &z, &d, &g_z, &g_m};
    for (T** tile : hidden) *tile = memory.take(static_cast<int64_t>(kBlockRows) * p.ld_hidden);
    T** const outs[] = {&out, &g_out};
    for (T** tile : outs) *tile = memory.take(static_cast<int64_t>(kBlockRows) * p.ld_out);
    T** const attrs[] = {&attr, &g_attr};
    for (T** tile : attrs) *tile = memory.take(static_cast<int64_t>(kBlockRows) * p.ld_attrs);
  }
};

// P = W_i h + b1 and Q = W_j h, side by side in the padded rows of pq.
template <class T>
inline void node_pq(const NodeProblem<T>& p, int64_t begin, int64_t end, T* scratch) {
  NodeTiles<T> t(p, scratch);
  const int rows = static_cast<int>(end - begin), vectors = p.ld_hidden / kWidth<T>;
  const int64_t stride = 2 * static_cast<int64_t>(p.ld_hidden);
  read_rows(p.h, begin, rows, p.in, p.ld_in, t.h);
  T* pq = p.pq + begin * stride;
  gemm(t.h, p.ld_in, rows, p.w_i, p.in, vectors, Start::kBias, p.edge_b1, pq, stride);
  gemm(t.h, p.ld_in, rows, p.w_j, p.in, vectors, Start::kZero, kNone<T>, pq + p.ld_hidden, stride);
}

// Copies the rows of phi_h's inputs h, M and node_attr to their tiles.
template <class T>
inline void read_inputs(const NodeProblem<T>& p, int64_t begin, int rows, NodeTiles<T>& t) {
  read_rows(p.h, begin, rows, p.in, p.ld_in, t.h);
  read_rows(p.m, begin, rows, p.hidden, p.ld_hidden, t.m);
  read_rows(p.node_attr, begin, rows, p.attrs, p.ld_attrs, t.attr);
}

// z = W [h ; M ; node_attr] + b, the first linear of phi_h.
template <class T>
inline void node_first(const NodeProblem<T>& p, int rows, const NodeTiles<T>& t, T* z) {
  const int vectors = p.ld_hidden / kWidth<T>;
  gemm(t.h, p.ld_in, rows, p.w_h, p.in, vectors, Start::kBias, p.node_b1, z, p.ld_hidden);
  gemm(t.m, p.ld_hidden, rows, p.w_m, p.hidden, vectors, Start::kResult, kNone<T>, z, p.ld_hidden);
  if (p.attrs == 0) return;
  gemm(t.attr, p.ld_attrs, rows, p.w_b, p.attrs, vectors, Start::kResult, kNone<T>, z, p.ld_hidden);
}

// The factor of X in the new coordinates: c, times the factor of the mean.
template <class T>
inline T shift_factor(const NodeProblem<T>& p, int64_t node) {
  return p.coord_weight != nullptr ? p.options.coord_scale * p.coord_weight[node]
                                   : p.options.coord_scale;
}

// h' = phi_h([h ; M ; node_attr]) (+ h), v' = phi_v(h) v + factor X and x' = x + v'.
template <class T, Activation act>
inline void node_update(const NodeProblem<T>& p, int64_t begin, int64_t end, T* scratch) {
  NodeTiles<T> t(p, scratch);
  const int rows = static_cast<int>(end - begin), vectors = p.ld_hidden / kWidth<T>;
  const int64_t count = static_cast<int64_t>(rows) * p.ld_hidden;
  read_inputs(p, begin, rows, t);
  T* z = p.z_h != nullptr ? p.z_h + begin * p.ld_hidden : t.z;
  node_first(p, rows, t, z);
  activate_rows<T, act>(z, t.z, count, p.options.negative_slope);
  gemm(t.z, p.ld_hidden, rows, p.node_w2, p.hidden, p.ld_out / kWidth<T>, Start::kBias, p.node_b2,
       t.out, p.ld_out);
  if (p.options.residual) {
    for (int b = 0; b < rows; ++b) {
      for (int c = 0; c < p.out; ++c) t.out[b * p.ld_out + c] += t.h[b * p.ld_in + c];
    }
  }
  write_rows(t.out, p.ld_out, begin, rows, p.out, p.h_out);
  if (p.x_out == nullptr) return;

  if (p.velocity) {
    z = p.z_v != nullptr ? p.z_v + begin * p.ld_hidden : t.z;
    gemm(t.h, p.ld_in, rows, p.vel_w1, p.in, vectors, Start::kBias, p.vel_b1, z, p.ld_hidden);
    activate_rows<T, act>(z, t.z, count, p.options.negative_slope);
  }
  for (int b = 0; b < rows; ++b) {
    const int64_t at = (begin + b) * p.dim;
    const T speed = p.velocity ? dot(t.z + b * p.ld_hidden, p.vel_w2, vectors) + p.vel_b2 : T(0);
    const T factor = p.head ? shift_factor(p, begin + b) : T(0);
    for (int c = 0; c < p.dim; ++c) {
      T step = 0;
      if (p.velocity) step += speed * p.v[at + c];
      if (p.head) step += factor * p.shift[at + c];
      p.x_out[at + c] = p.x[at + c] + step;
      if (p.options.carry_velocity) p.v_out[at + c] = step;
    }
  }
}

// The gradients of phi_h: of M and node_attr into their arrays, of h into t.g_h, of weights into
// `sums`, unless that is null.
template <class T, Activation act>
inline void phi_h_backward(const NodeProblem<T>& p, int64_t begin, int rows, NodeTiles<T>& t,
                           T* sums, bool overwrite) {
  const int vectors = p.ld_hidden / kWidth<T>, ld = p.ld_hidden;
  read_inputs(p, begin, rows, t);
  const T* z = p.z_h != nullptr ? p.z_h + begin * ld : t.z;
  if (p.z_h == nullptr) node_first(p, rows, t, t.z);
  activate_rows<T, act>(z, t.z, t.d, static_cast<int64_t>(rows) * ld, p.options.negative_slope);
  read_rows(p.g_h_out, begin, rows, p.out, p.ld_out, t.g_out);
  gemm(t.g_out, p.ld_out, rows, p.node_w2_backward, p.out, vectors, Start::kZero, kNone<T>, t.g_z,
       ld);
  multiply_rows(t.g_z, t.d, static_cast<int64_t>(rows) * ld);
  if (sums != nullptr) {
    const auto& at = p.update_offsets;
    weight_gemm(t.g_out, p.ld_out, t.z, ld, rows, p.out, vectors, overwrite, sums + at.node_w2, ld);
    add_columns(t.g_out, p.ld_out, kNone<T>, rows, p.ld_out / kWidth<T>, overwrite,
                sums + at.node_b2);
    weight_gemm(t.g_z, ld, t.h, p.ld_in, rows, p.hidden, p.ld_in / kWidth<T>, overwrite,
                sums + at.w_h, p.ld_in);
    weight_gemm(t.g_z, ld, t.m, ld, rows, p.hidden, vectors, overwrite, sums + at.w_m, ld);
    if (p.attrs != 0) {
      weight_gemm(t.g_z, ld, t.attr, p.ld_attrs, rows, p.hidden, p.ld_attrs / kWidth<T>, overwrite,
                  sums + at.w_b, p.ld_attrs);
    }
    add_columns(t.g_z, ld, kNone<T>, rows, vectors, overwrite, sums + at.node_b1);
  }
  gemm(t.g_z, ld, rows, p.w_h_backward, p.hidden, p.ld_in / kWidth<T>, Start::kZero, kNone<T>,
       t.g_h, p.ld_in);
  gemm(t.g_z, ld, rows, p.w_m_backward, p.hidden, vectors, Start::kZero, kNone<T>, t.g_m, ld);
  write_rows(t.g_m, ld, begin, rows, p.hidden, p.g_m);
  if (p.options.residual) {
    for (int b = 0; b < rows; ++b) {
      for (int c = 0; c < p.out; ++c) t.g_h[b * p.ld_in + c] += t.g_out[b * p.ld_out + c];
    }
  }
  if (p.g_node_attr == nullptr) return;
  gemm(t.g_z, ld, rows, p.w_b_backward, p.hidden, p.ld_attrs / kWidth<T>, Start::kZero, kNone<T>,
       t.g_attr, p.ld_attrs);
  write_rows(t.g_attr, p.ld_attrs, begin, rows, p.attrs, p.g_node_attr);
}

// The gradient of a component of v', which both x' and v' depend on.
template <class T>
EGNN_INLINE T step_gradient(const NodeProblem<T>& p, int64_t at) {
  const T g = p.g_x_out != nullptr ? p.g_x_out[at] : T(0);
  return p.g_v_out != nullptr ? g + p.g_v_out[at] : g;
}

// The gradients of phi_v(h) v: of h added to t.g_h, of v into its array, of weights into `sums`.
template <class T, Activation act>
inline void phi_v_backward(const NodeProblem<T>& p, int64_t begin, int rows, NodeTiles<T>& t,
                           T* sums, bool overwrite) {
  const int vectors = p.ld_hidden / kWidth<T>, ld = p.ld_hidden;
  const T* z = p.z_v != nullptr ? p.z_v + begin * ld : t.z;
  if (p.z_v == nullptr) {
    gemm(t.h, p.ld_in, rows, p.vel_w1, p.in, vectors, Start::kBias, p.vel_b1, t.z, ld);
  }
  activate_rows<T, act>(z, t.z, t.d, static_cast<int64_t>(rows) * ld, p.options.negative_slope);
  T g_speed[kBlockRows];
  for (int b = 0; b < rows; ++b) {
    const int64_t at = (begin + b) * p.dim;
    const T speed = dot(t.z + b * ld, p.vel_w2, vectors) + p.vel_b2;
    g_speed[b] = 0;
    for (int c = 0; c < p.dim; ++c) {
      const T g = step_gradient(p, at + c);
      g_speed[b] += g * p.v[at + c];
      if (p.g_v != nullptr) p.g_v[at + c] = speed * g;
    }
    for (int v = 0; v < vectors; ++v) {
      const int column = v * kWidth<T>;
      store(t.g_z + b * ld + column,
            load(t.d + b * ld + column) * load(p.vel_w2 + column) * g_speed[b]);
    }
  }
  if (sums != nullptr) {
    const auto& at = p.update_offsets;
    add_columns(t.z, ld, static_cast<const T*>(g_speed), rows, vectors, overwrite,
                sums + at.vel_w2);
    T bias = overwrite ? T(0) : sums[at.vel_b2];
    for (int b = 0; b < rows; ++b) bias += g_speed[b];
    sums[at.vel_b2] = bias;
    weight_gemm(t.g_z, ld, t.h, p.ld_in, rows, p.hidden, p.ld_in / kWidth<T>, overwrite,
                sums + at.vel_w1, p.ld_in);
    add_columns(t.g_z, ld, kNone<T>, rows, vectors, overwrite, sums + at.vel_b1);
  }
  gemm(t.g_z, ld, rows, p.vel_w1_backward, p.hidden, p.ld_in / kWidth<T>, Start::kResult, kNone<T>,
       t.g_h, p.ld_in);
}

// The gradients of node_update. Those of M and X are the cotangents of the edge pass.
template <class T, Activation act>
inline void node_update_backward(const NodeProblem<T>& p, int64_t begin, int64_t end, T* scratch,
                                 T* sums, bool overwrite) {
  NodeTiles<T> t(p, scratch);
  const int rows = static_cast<int>(end - begin);
  const bool moves = p.g_x_out != nullptr || p.g_v_out != nullptr;
  if (p.g_h_out != nullptr) {
    phi_h_backward<T, act>(p, begin, rows, t, sums, overwrite);
  } else {
    read_rows(p.h, begin, rows, p.in, p.ld_in, t.h);
    memset(t.g_h, 0, static_cast<size_t>(rows) * p.ld_in * sizeof(T));
  }
  if (moves && p.velocity) phi_v_backward<T, act>(p, begin, rows, t, sums, overwrite);
  if (p.g_h != nullptr) write_rows(t.g_h, p.ld_in, begin, rows, p.in, p.g_h);
  if (!moves || !p.head) return;
  for (int64_t node = begin; node < end; ++node) {
    const T factor = shift_factor(p, node);
    T g_dot_shift = 0;
    for (int c = 0; c < p.dim; ++c) {
      const T g = step_gradient(p, node * p.dim + c);
      p.g_shift[node * p.dim + c] = factor * g;
      g_dot_shift += g * p.shift[node * p.dim + c];
    }
    if (p.g_coord_weight != nullptr) p.g_coord_weight[node] = p.options.coord_scale * g_dot_shift;
  }
}

// The gradients of node_pq: of h added to g_h, of weights into `sums`.
template <class T>
inline void node_pq_backward(const NodeProblem<T>& p, int64_t begin, int64_t end, T* scratch,
                             T* sums, bool overwrite) {
  NodeTiles<T> t(p, scratch);
  const int rows = static_cast<int>(end - begin), vectors = p.ld_in / kWidth<T>;
  const int64_t stride = 2 * static_cast<int64_t>(p.ld_hidden);
  const T* g_p = p.g_pq + begin * stride;
  const T* g_q = g_p + p.ld_hidden;
  if (sums != nullptr) {
    read_rows(p.h, begin, rows, p.in, p.ld_in, t.h);
    weight_gemm(g_p, stride, t.h, p.ld_in, rows, p.hidden, vectors, overwrite,
                sums + p.pq_offsets.w_i, p.ld_in);
    weight_gemm(g_q, stride, t.h, p.ld_in, rows, p.hidden, vectors, overwrite,
                sums + p.pq_offsets.w_j, p.ld_in);
    add_columns(g_p, stride, kNone<T>, rows, p.ld_hidden / kWidth<T>, overwrite,
                sums + p.pq_offsets.edge_b1);
  }
  if (p.g_h == nullptr) return;
  gemm(g_p, stride, rows, p.w_i_backward, p.hidden, vectors, Start::kZero, kNone<T>, t.g_h,
       p.ld_in);
  gemm(g_q, stride, rows, p.w_j_backward, p.hidden, vectors, Start::kResult, kNone<T>, t.g_h,
       p.ld_in);
  for (int b = 0; b < rows; ++b) {
    T* g_h = p.g_h + (begin + b) * p.in;
    for (int c = 0; c < p.in; ++c) g_h[c] += t.g_h[b * p.ld_in + c];
  }
}

}  // namespace EGNN_ISA
}  // namespace egnn
