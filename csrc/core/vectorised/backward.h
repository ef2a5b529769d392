// One task of the edge pass, backward: each block is computed again, then differentiated.
//
// The names and formulas are those of CONTRIBUTING.md, "The algorithm": g_q is the gradient of q.
#pragma once

#include "forward.h"
#include "senders.h"

namespace egnn {
namespace EGNN_ISA {

// The layout of an accumulator of weight gradients.
template <class T>
inline WeightOffsets weight_offsets(const Problem<T>& p) {
  const int64_t matrix = static_cast<int64_t>(p.hidden + kWeightRows) * p.ld;
  WeightOffsets at;
  at.w2 = 0;
  at.w3 = at.w2 + matrix;
  at.b2 = at.w3 + (p.head ? matrix : 0);
  at.b3 = at.b2 + p.ld;
  at.w_x = at.b3 + p.ld;
  at.w_g = at.w_x + p.ld;
  at.w_r = at.w_g + p.ld;
  at.w_a = at.w_r + p.ld;
  at.b_g = at.w_a + static_cast<int64_t>(p.attrs) * p.ld;
  at.size = at.b_g + kWidth<T>;
  return at;
}

// Elements of scratch that the tiles take.
template <class T>
inline int64_t backward_scratch(const Problem<T>& p) {
  return 8 * static_cast<int64_t>(kBlockRows) * p.ld + 2 * kBlockRows * p.dim + 10 * kWidth<T>;
}

// A worker's tiles [kBlockRows, ld] and arrays of coordinates [D, kBlockRows].
template <class T>
struct Tiles {
  T *a1, *d1;    // act(z1), act'(z1)
  T *n, *d2;     // n = act(z2); act'(z2), later g_z2
  T* m;          // the message, unless it is n itself
  T *a3, *g_z3;  // act(z3); w_x act'(z3), later g_z3
  T* g_m;        // g_m, later W2^T g_z2
  T *d, *g_d;    // x_i - x_j and its gradient

  Tiles(const Problem<T>& p, T* scratch) {
    Scratch<T> memory{scratch};
    T** const tiles[] = {&a1, &d1, &n, &d2, &m, &a3, &g_z3, &g_m};
    for (T** tile : tiles) {
      *tile = memory.take(static_cast<int64_t>(kBlockRows) * p.ld);
    }
    d = memory.take(kBlockRows * p.dim);
    g_d = memory.take(kBlockRows * p.dim);
  }
};

// Computes the block's forward again, from stored z2 and z3 if there are any, and the derivatives
// of its activations. Returns the tile of messages. `edge` is the block's first edge.
template <class T, Activation act>
inline const T* recompute(const Problem<T>& p, int64_t edge, Block<T>& blk, Tiles<T>& t) {
  const int count = blk.count, ld = p.ld, vectors = p.vectors;
  const T slope = p.options.negative_slope;
  first_activation<T, act, true>(p, blk, t.a1, t.d1);
  const T* z2 = p.z2 != nullptr ? p.z2 + edge * ld : t.n;
  if (p.z2 == nullptr) {
    gemm(t.a1, ld, count, p.w2_forward, p.hidden, vectors, Start::kBias, p.b2, t.n, ld);
  }
  RowVectors<T> products;
  for (int b = 0; b < count; ++b) {
    Vec<T> logit{};
    for (int v = 0; v < vectors; ++v) {
      const int64_t at = b * ld + v * kWidth<T>;
      Vec<T> value, derivative;
      activate_both<T, act>(load(z2 + at), slope, value, derivative);
      store(t.n + at, value);
      store(t.d2 + at, derivative);
      if (p.attention) logit += value * load(p.w_g + v * kWidth<T>);
    }
    if (p.attention) products.row[b] = logit;
  }
  const bool scaled = p.attention || p.edge_mask != nullptr;
  if (p.attention) make_gates(p, blk, products);
  if (scaled) scale_messages(p, blk, t.n, t.m);
  const T* message = scaled ? t.m : t.n;
  if (p.g_shift == nullptr) return message;

  const T* z3 = p.z3 != nullptr ? p.z3 + edge * ld : t.a3;
  if (p.z3 == nullptr) {
    gemm(message, ld, count, p.w3_forward, p.hidden, vectors, Start::kBias, p.b3, t.a3, ld);
  }
  for (int b = 0; b < count; ++b) {
    Vec<T> sum{};
    for (int v = 0; v < vectors; ++v) {
      const int64_t at = b * ld + v * kWidth<T>;
      const Vec<T> w = load(p.w_x + v * kWidth<T>);
      Vec<T> value, derivative;
      activate_both<T, act>(load(z3 + at), slope, value, derivative);
      store(t.a3 + at, value);
      store(t.g_z3 + at, derivative * w);
      sum += value * w;
    }
    products.row[b] = sum;
  }
  make_head_outputs(p, blk, products);
  return message;
}

// From gX: g_s = g_t . u, times 1 - s^2 with tanh; g_d = g_u / rho, and where rho = |d| + k minus
// d (d . g_u) / (|d| rho^2); g_mask += gX . clamp(s u). g_s and g_mask are [count].
template <class T>
inline void shift_backward(const Problem<T>& p, const Block<T>& blk, Tiles<T>& t, T* g_s,
                           T* g_mask) {
  const int count = blk.count;
  const T clamp = p.options.coord_clamp;
  T d_dot_g_u[kBlockRows] = {};
  for (int b = 0; b < count; ++b) g_s[b] = 0;
  for (int c = 0; c < p.dim; ++c) {
    const T* d = t.d + c * kBlockRows;
    T* g_d = t.g_d + c * kBlockRows;
    T g_x[kBlockRows];
    for (int b = 0; b < count; ++b) {
      g_x[b] = p.g_shift[static_cast<int64_t>(blk.receiver[b]) * p.dim + c];
    }
    for (int b = 0; b < count; ++b) {
      const T u = d[b] * blk.inverse_rho[b];
      const T su = blk.s[b] * u;
      // like torch.clamp, whose gradient is 1 at the bound itself and for NaN
      const bool is_clamped = clamp != 0 && (su > clamp || su < -clamp);
      const T g_t = is_clamped ? T(0) : blk.mask[b] * g_x[b];
      g_mask[b] += g_x[b] * clamp_scalar(su, clamp);
      g_s[b] += g_t * u;
      const T g_u = blk.s[b] * g_t;
      d_dot_g_u[b] += d[b] * g_u;
      g_d[b] = g_u * blk.inverse_rho[b];
    }
  }
  if (p.options.coord_norm > 0) {
    for (int b = 0; b < count; ++b) {
      const T inverse = blk.inverse_rho[b];
      // at distance 0 the gradient of the norm is 0
      const T norm = sqrt_scalar(blk.r[b]);
      d_dot_g_u[b] = norm == 0 ? T(0) : d_dot_g_u[b] * inverse * inverse / norm;
    }
    for (int c = 0; c < p.dim; ++c) {
      const int at = c * kBlockRows;
      for (int b = 0; b < count; ++b) t.g_d[at + b] -= d_dot_g_u[b] * t.d[at + b];
    }
  }
  if (!p.options.coord_tanh) return;
  for (int b = 0; b < count; ++b) g_s[b] *= 1 - blk.s[b] * blk.s[b];
}

// g_z3 = g_s w_x act'(z3) into its tile, and the block's share of the gradients of w3, b3 and w_x.
template <class T>
inline void head_backward(const Problem<T>& p, const Block<T>& blk, Tiles<T>& t, const T* message,
                          const T* g_s, bool overwrite, T* sums) {
  const int count = blk.count, ld = p.ld;
  for_panels<T>(p.vectors, [&](int column, auto width) {
    constexpr int NV = decltype(width)::value;
    Vec<T> bias[NV] = {}, last[NV] = {};
    for (int b = 0; b < count; ++b) {
#pragma GCC unroll 4
      for (int n = 0; n < NV; ++n) {
        const int64_t at = b * ld + column + n * kWidth<T>;
        const Vec<T> g = load(t.g_z3 + at) * g_s[b];
        store(t.g_z3 + at, g);
        bias[n] += g;
        last[n] += load(t.a3 + at) * g_s[b];
      }
    }
    for (int n = 0; n < NV; ++n) {
      const int at = column + n * kWidth<T>;
      if (p.needs_w3) add_to_sums(sums + p.offsets.b3 + at, overwrite, bias[n]);
      if (p.needs_w_x) add_to_sums(sums + p.offsets.w_x + at, overwrite, last[n]);
    }
  });
  if (!p.needs_w3) return;
  weight_gemm(t.g_z3, ld, message, ld, count, p.hidden, p.vectors, overwrite, sums + p.offsets.w3,
              ld);
}

// g_m = gM_i + W3^T g_z3 into its tile.
template <class T>
inline void message_gradient(const Problem<T>& p, const Block<T>& blk, Tiles<T>& t) {
  const int full = p.hidden / kWidth<T>, rest = p.hidden - full * kWidth<T>;
  const bool head = p.g_shift != nullptr;
  if (head) {
    gemm(t.g_z3, p.ld, blk.count, p.w3_backward, p.hidden, p.vectors, Start::kZero, kNone<T>, t.g_m,
         p.ld);
    if (p.g_m == nullptr) return;
  }
  for (int b = 0; b < blk.count; ++b) {
    const T* from = p.g_m + static_cast<int64_t>(blk.receiver[b]) * p.hidden;
    T* row = t.g_m + b * p.ld;
    const auto add = [&](int column, Vec<T> g) {
      store(row + column, head ? load(row + column) + g : g);
    };
    for (int v = 0; v < full; ++v) add(v * kWidth<T>, load(from + v * kWidth<T>));
    if (rest != 0) add(full * kWidth<T>, load_part(from + full * kWidth<T>, rest));
  }
}

// g_z2 = g_n act'(z2) into t.d2, with g_n = g mask g_m + (mask g_m . n) g (1 - g) w_g, and the
// block's share of the gradients of b2, w_g and b_g; g_mask [count] += g (g_m . n).
template <class T>
inline void message_backward(const Problem<T>& p, const Block<T>& blk, Tiles<T>& t, T* g_mask,
                             bool overwrite, T* sums) {
  const int count = blk.count, ld = p.ld, vectors = p.vectors;
  message_gradient(p, blk, t);
  T g_logit[kBlockRows], factor[kBlockRows];
  for (int b = 0; b < count; ++b) factor[b] = blk.gate[b] * blk.mask[b];
  if (p.attention || p.g_edge_mask != nullptr) {
    RowVectors<T> products;
    for (int b = 0; b < count; ++b) {
      Vec<T> sum{};
      for (int v = 0; v < vectors; ++v) {
        const int64_t at = b * ld + v * kWidth<T>;
        sum += load(t.g_m + at) * load(t.n + at);
      }
      products.row[b] = sum;
    }
    products.sum(count, g_logit);
    for (int b = 0; b < count; ++b) {
      const T gate = blk.gate[b], q = g_logit[b];
      g_mask[b] += gate * q;
      g_logit[b] = blk.mask[b] * q * gate * (1 - gate);
    }
  }
  for_panels<T>(vectors, [&](int column, auto width) {
    constexpr int NV = decltype(width)::value;
    Vec<T> bias[NV] = {}, gate_weight[NV] = {};
    for (int b = 0; b < count; ++b) {
#pragma GCC unroll 4
      for (int n = 0; n < NV; ++n) {
        const int64_t at = b * ld + column + n * kWidth<T>;
        Vec<T> g = load(t.g_m + at) * factor[b];
        if (p.attention) {
          g += g_logit[b] * load(p.w_g + column + n * kWidth<T>);
          gate_weight[n] += g_logit[b] * load(t.n + at);
        }
        g *= load(t.d2 + at);
        store(t.d2 + at, g);
        bias[n] += g;
      }
    }
    for (int n = 0; n < NV; ++n) {
      const int at = column + n * kWidth<T>;
      if (p.needs_w2) add_to_sums(sums + p.offsets.b2 + at, overwrite, bias[n]);
      if (p.needs_w_g) add_to_sums(sums + p.offsets.w_g + at, overwrite, gate_weight[n]);
    }
  });
  if (!p.needs_w_g) return;
  T gate_bias = overwrite ? T(0) : sums[p.offsets.b_g];
  for (int b = 0; b < count; ++b) gate_bias += g_logit[b];
  sums[p.offsets.b_g] = gate_bias;
}

// g_z1 = (W2^T g_z2) act'(z1) into g_z1 [count, ld]; it is added to the receivers' rows of P, and
// to the gradient of w_r. g_r [count] = w_r . g_z1.
template <class T>
inline void first_backward(const Problem<T>& p, const Block<T>& blk, Tiles<T>& t, T* g_z1, T* g_r,
                           bool overwrite, T* sums, RowSink<T>& sink) {
  const int count = blk.count, ld = p.ld;
  RowVectors<T> products;
  for_panels<T>(p.vectors, [&](int column, auto width) {
    constexpr int NV = decltype(width)::value;
    Vec<T> distance[NV] = {};
    for_each_run(blk, [&](int64_t row, int begin, int end) {
      Vec<T> sum[NV] = {};
      for (int b = begin; b < end; ++b) {
        Vec<T> part = column == 0 ? Vec<T>{} : products.row[b];
#pragma GCC unroll 4
        for (int n = 0; n < NV; ++n) {
          const int64_t at = b * ld + column + n * kWidth<T>;
          const Vec<T> g = load(t.g_m + at) * load(t.d1 + at);
          store(g_z1 + at, g);
          sum[n] += g;
          distance[n] += g * blk.r[b];
          part += g * load(p.w_r + column + n * kWidth<T>);
        }
        products.row[b] = part;
      }
      if (p.g_pq == nullptr) return;
      T* partial = sink.partial(row, 0);
      T* out = (partial != nullptr ? partial : p.g_pq + row * p.pq_stride) + column;
      for (int n = 0; n < NV; ++n, out += kWidth<T>) {
        const int lanes_left = p.hidden - column - n * kWidth<T>;
        if (lanes_left >= kWidth<T>) {
          store(out, load(out) + sum[n]);
        } else {
          store_part(out, load_part(out, lanes_left) + sum[n], lanes_left);
        }
      }
    });
    for (int n = 0; n < NV && p.needs_w_r; ++n) {
      add_to_sums(sums + p.offsets.w_r + column + n * kWidth<T>, overwrite, distance[n]);
    }
  });
  if (p.g_x != nullptr) products.sum(count, g_r);
}

// The gradients of w_a, of edge_attr (W_a^T g_z1), and of d: 2 g_r d is added to t.g_d, which is
// written to g_d_out [count, D] for the senders and added to the receivers' rows of g_x.
template <class T>
inline void inputs_backward(const Problem<T>& p, const Block<T>& blk, Tiles<T>& t, const T* g_z1,
                            const T* g_r, T* g_d_out, bool overwrite, T* sums, RowSink<T>& sink) {
  const int count = blk.count, ld = p.ld, vectors = p.vectors;
  for (int k = 0; k < p.attrs && p.needs_w_r; ++k) {
    T column[kBlockRows];
    for (int b = 0; b < count; ++b) column[b] = blk.attr[b][k];
    add_columns(g_z1, ld, static_cast<const T*>(column), count, vectors, overwrite,
                sums + p.offsets.w_a + static_cast<int64_t>(k) * ld);
  }
  if (p.g_edge_attr != nullptr) {
    for (int b = 0; b < count; ++b) {
      for (int k = 0; k < p.attrs; ++k) {
        p.g_edge_attr[blk.edge[b] * p.attrs + k] = dot(g_z1 + b * ld, p.w_a + k * ld, vectors);
      }
    }
  }
  if (p.g_x == nullptr) return;
  const bool head = p.g_shift != nullptr;
  for (int c = 0; c < p.dim; ++c) {
    const int at = c * kBlockRows;
    for (int b = 0; b < count; ++b) {
      const T through_r = 2 * g_r[b] * t.d[at + b];
      t.g_d[at + b] = head ? t.g_d[at + b] + through_r : through_r;
    }
    for (int b = 0; b < count; ++b) g_d_out[b * p.dim + c] = t.g_d[at + b];
  }
  sum_coords(p, blk, t.g_d, p.g_x, sink);
}

// All gradients of one block. `overwrite`: its share of the weight gradients is written to `sums`,
// as in a task's first block, else added. g_z1 [count, ld] and g_d [count, D] are left to the sums
// to senders.
template <class T, Activation act>
inline void backward_block(const Problem<T>& p, int64_t edge, Block<T>& blk, Tiles<T>& t, T* g_z1,
                           T* g_d, bool overwrite, T* sums, RowSink<T>& sink) {
  const int count = blk.count, ld = p.ld;
  T g_s[kBlockRows], g_r[kBlockRows], g_mask[kBlockRows] = {};
  const T* message = recompute<T, act>(p, edge, blk, t);
  if (p.g_shift != nullptr) {
    shift_backward(p, blk, t, g_s, g_mask);
    head_backward(p, blk, t, message, g_s, overwrite, sums);
  }
  message_backward(p, blk, t, g_mask, overwrite, sums);
  if (p.g_edge_mask != nullptr) {
    for (int b = 0; b < count; ++b) p.g_edge_mask[blk.edge[b]] = g_mask[b];
  }
  if (p.needs_w2) {
    weight_gemm(t.d2, ld, t.a1, ld, count, p.hidden, p.vectors, overwrite, sums + p.offsets.w2, ld);
  }
  if (!p.needs_z1) return;

  // g_m has been used: W2^T g_z2 takes its tile
  gemm(t.d2, ld, count, p.w2_backward, p.hidden, p.vectors, Start::kZero, kNone<T>, t.g_m, ld);
  first_backward(p, blk, t, g_z1, g_r, overwrite, sums, sink);
  inputs_backward(p, blk, t, g_z1, g_r, g_d, overwrite, sums, sink);
}

// The gradients of a task's edges; those of weights go to its accumulator `sums`.
template <class T, Activation act>
inline void backward_task(const Problem<T>& p, const Wave<T>& wave, int64_t task, T* sums,
                          T* scratch) {
  Tiles<T> tiles(p, scratch);
  Block<T> blk;
  const int64_t slot = task - wave.first_task;
  const int64_t first = p.task_begin(wave.first_task);
  const int64_t begin = p.task_begin(task), end = p.task_begin(task + 1);
  if ((p.g_pq != nullptr || p.g_x != nullptr) && p.senders != nullptr) {
    group_by_senders(p, begin, static_cast<int>(end - begin),
                     wave.range_starts + slot * (p.sender_ranges + 1),
                     wave.range_edges + (begin - first));
  }
  RowSink<T> sink(p, wave.first_slot + slot, begin, end);
  int64_t row = find_row(p.rowptr, p.nodes, begin);
  for (int64_t e = begin; e < end; e += kBlockEdges) {
    const int count = static_cast<int>(end - e < kBlockEdges ? end - e : kBlockEdges);
    const int64_t offset = e - first;
    gather_block(p, e, count, row, blk, tiles.d);
    backward_block<T, act>(p, e, blk, tiles, wave.g_z1 + offset * p.ld, wave.g_d + offset * p.dim,
                           e == begin, sums, sink);
  }
}

}  // namespace EGNN_ISA
}  // namespace egnn
