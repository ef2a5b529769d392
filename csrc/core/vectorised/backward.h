// The gradients of one task's edges: the block is run again, then back through it (the formulas are
// in CONTRIBUTING.md, "The algorithm").
#pragma once

#include "forward.h"

namespace egnn {
namespace EGNN_ISA {

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

template <class T>
inline int64_t backward_scratch(const Problem<T>& p) {
  return 8 * static_cast<int64_t>(kBlockRows) * p.ld + 2 * kBlockRows * p.dim + 10 * kWidth<T>;
}

// The tiles of a worker, [kBlockRows, ld] each.
template <class T>
struct Tiles {
  T *a1, *d1;    // first activation and its derivative
  T *n, *d2;     // second; d2 becomes g_z2
  T* m;          // the message: gate * mask * n (n itself where both are 1)
  T *a3, *g_z3;  // the head's activation; w_x * derivative, then g_z3
  T* g_m;        // gradient of the message
  T *d, *g_d;    // coordinate differences and their gradients, by component

  Tiles(const Problem<T>& p, T* scratch) {
    Carver<T> carve{scratch};
    T** const tiles[] = {&a1, &d1, &n, &d2, &m, &a3, &g_z3, &g_m};
    for (T** tile : tiles) {
      *tile = carve.take(static_cast<int64_t>(kBlockRows) * p.ld);
    }
    d = carve.take(kBlockRows * p.dim);
    g_d = carve.take(kBlockRows * p.dim);
  }
};

// Runs the block forward, keeping what the way back needs; returns the message's tile. `edge` is
// the block's first.
template <class T, int act>
inline const T* recompute(const Problem<T>& p, int64_t edge, Block<T>& blk, Tiles<T>& t) {
  const int count = blk.count, ld = p.ld, vectors = p.vectors;
  const T slope = p.slope;
  first_layer<T, act, true>(p, blk, t.a1, t.d1);
  const T* z2 = p.z2 != nullptr ? p.z2 + edge * ld : t.n;
  if (p.z2 == nullptr) {
    gemm(t.a1, ld, count, p.w2_forward, p.hidden, vectors, Start::kBias, p.b2, t.n, ld);
  }
  RowParts<T> parts;
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
    if (p.attention) parts.row[b] = logit;
  }
  const bool scaled = p.attention || p.edge_mask != nullptr;
  if (p.attention) make_gates(p, blk, parts);
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
    parts.row[b] = sum;
  }
  make_heads(p, blk, parts);
  return message;
}

// Back through the coordinate head's output: g_s into `g_s`, the direction's share into t.g_d, and
// the mask's share into g_mask.
template <class T>
inline void back_through_shift(const Problem<T>& p, const Block<T>& blk, Tiles<T>& t, T* g_s,
                               T* g_mask) {
  const int count = blk.count;
  T along[kBlockRows] = {};
  for (int b = 0; b < count; ++b) g_s[b] = 0;
  for (int c = 0; c < p.dim; ++c) {
    const T* d = t.d + c * kBlockRows;
    T* g_d = t.g_d + c * kBlockRows;
    T given[kBlockRows];
    for (int b = 0; b < count; ++b) {
      given[b] = p.g_shift[static_cast<int64_t>(blk.receiver[b]) * p.dim + c];
    }
    for (int b = 0; b < count; ++b) {
      const T u = d[b] * blk.inverse_rho[b];
      const T su = blk.s[b] * u;
      // as torch.clamp: the bound itself passes, NaN as well
      const bool stopped = p.clamp != 0 && (su > p.clamp || su < -p.clamp);
      const T g_t = stopped ? T(0) : blk.mask[b] * given[b];
      g_mask[b] += given[b] * clamp_scalar(su, p.clamp);
      g_s[b] += g_t * u;
      const T g_u = blk.s[b] * g_t;
      along[b] += d[b] * g_u;
      g_d[b] = g_u * blk.inverse_rho[b];
    }
  }
  if (p.norm > 0) {
    for (int b = 0; b < count; ++b) {
      const T inverse = blk.inverse_rho[b];
      // at distance 0 the norm's gradient is 0
      const T norm = sqrt_scalar(blk.r[b]);
      along[b] = norm == 0 ? T(0) : along[b] * inverse * inverse / norm;
    }
    for (int c = 0; c < p.dim; ++c) {
      const int at = c * kBlockRows;
      for (int b = 0; b < count; ++b) t.g_d[at + b] -= along[b] * t.d[at + b];
    }
  }
  if (!p.tanh) return;
  for (int b = 0; b < count; ++b) g_s[b] *= 1 - blk.s[b] * blk.s[b];
}

// Calls body(first column, panel) for the panels of a row, each with its width in vectors as a
// constant, so that a panel's sums over rows stay in registers.
template <class T, class Body>
EGNN_INLINE void for_panels(int vectors, const Body& body) {
  for (int v0 = 0; v0 < vectors; v0 += kPanelVectors) {
    const int nv = vectors - v0 < kPanelVectors ? vectors - v0 : kPanelVectors;
    for_width(nv, [&](auto width) { body(v0 * kWidth<T>, width); });
  }
}

// g_z3 = g_s * w_x * act'(z3) in its tile, and its sums into the head's weights.
template <class T>
inline void back_through_head(const Problem<T>& p, const Block<T>& blk, Tiles<T>& t,
                              const T* message, const T* g_s, bool fresh, T* sums) {
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
      if (p.needs_w3) add_to_sums(sums + p.at.b3 + at, fresh, bias[n]);
      if (p.needs_w_x) add_to_sums(sums + p.at.w_x + at, fresh, last[n]);
    }
  });
  if (!p.needs_w3) return;
  weight_gemm(t.g_z3, ld, message, ld, count, p.hidden, p.vectors, fresh, sums + p.at.w3, ld);
}

// The gradient of the message, g_m = gM_i + W3^T g_z3, into t.g_m.
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

// From the gradient of the message to g_z2, in t.d2: mask, gate and second activation.
template <class T>
inline void back_to_second(const Problem<T>& p, const Block<T>& blk, Tiles<T>& t, T* g_mask,
                           bool fresh, T* sums) {
  const int count = blk.count, ld = p.ld, vectors = p.vectors;
  message_gradient(p, blk, t);
  T g_logit[kBlockRows], factor[kBlockRows];
  for (int b = 0; b < count; ++b) factor[b] = blk.gate[b] * blk.mask[b];
  if (p.attention || p.g_edge_mask != nullptr) {
    RowParts<T> parts;
    for (int b = 0; b < count; ++b) {
      Vec<T> sum{};
      for (int v = 0; v < vectors; ++v) {
        const int64_t at = b * ld + v * kWidth<T>;
        sum += load(t.g_m + at) * load(t.n + at);
      }
      parts.row[b] = sum;
    }
    parts.sum(count, g_logit);
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
      if (p.needs_w2) add_to_sums(sums + p.at.b2 + at, fresh, bias[n]);
      if (p.needs_w_g) add_to_sums(sums + p.at.w_g + at, fresh, gate_weight[n]);
    }
  });
  if (!p.needs_w_g) return;
  T gate_bias = fresh ? T(0) : sums[p.at.b_g];
  for (int b = 0; b < count; ++b) gate_bias += g_logit[b];
  sums[p.at.b_g] = gate_bias;
}

// g_z1 = t.g_m * act'(z1) into its place, its sums to receivers and into w_r, and the gradient of
// the squared distance, w_r . g_z1, into g_r.
template <class T>
inline void back_to_first(const Problem<T>& p, const Block<T>& blk, Tiles<T>& t, T* g_z1, T* g_r,
                          bool fresh, T* sums, RowSink<T>& sink) {
  const int count = blk.count, ld = p.ld;
  RowParts<T> parts;
  for_panels<T>(p.vectors, [&](int column, auto width) {
    constexpr int NV = decltype(width)::value;
    Vec<T> distance[NV] = {};
    for_each_run(blk, [&](int64_t row, int begin, int end) {
      Vec<T> sum[NV] = {};
      for (int b = begin; b < end; ++b) {
        Vec<T> part = column == 0 ? Vec<T>{} : parts.row[b];
#pragma GCC unroll 4
        for (int n = 0; n < NV; ++n) {
          const int64_t at = b * ld + column + n * kWidth<T>;
          const Vec<T> g = load(t.g_m + at) * load(t.d1 + at);
          store(g_z1 + at, g);
          sum[n] += g;
          distance[n] += g * blk.r[b];
          part += g * load(p.w_r + column + n * kWidth<T>);
        }
        parts.row[b] = part;
      }
      if (p.g_pq == nullptr) return;
      T* aside = sink.aside(row, 0);
      T* out = (aside != nullptr ? aside : p.g_pq + row * p.pq_stride) + column;
      for (int n = 0; n < NV; ++n, out += kWidth<T>) {
        const int lanes_left = p.hidden - column - n * kWidth<T>;
        if (lanes_left >= kWidth<T>) {
          store(out, load(out) + sum[n]);
        } else {
          store_part(out, load_part(out, lanes_left) + sum[n], lanes_left);
        }
      }
    });
    for (int n = 0; n < NV && p.needs_first_weights; ++n) {
      add_to_sums(sums + p.at.w_r + column + n * kWidth<T>, fresh, distance[n]);
    }
  });
  if (p.g_coords != nullptr) parts.sum(count, g_r);
}

// From g_z1 to the attributes and the coordinates; g_d_out [count, D].
template <class T>
inline void back_to_inputs(const Problem<T>& p, const Block<T>& blk, Tiles<T>& t, const T* g_z1,
                           const T* g_r, T* g_d_out, bool fresh, T* sums, RowSink<T>& sink) {
  const int count = blk.count, ld = p.ld, vectors = p.vectors;
  for (int k = 0; k < p.attrs && p.needs_first_weights; ++k) {
    T column[kBlockRows];
    for (int b = 0; b < count; ++b) column[b] = blk.attr[b][k];
    add_columns(g_z1, ld, static_cast<const T*>(column), count, vectors, fresh,
                sums + p.at.w_a + static_cast<int64_t>(k) * ld);
  }
  if (p.g_edge_attr != nullptr) {
    for (int b = 0; b < count; ++b) {
      for (int k = 0; k < p.attrs; ++k) {
        p.g_edge_attr[blk.edge[b] * p.attrs + k] = dot(g_z1 + b * ld, p.w_a + k * ld, vectors);
      }
    }
  }
  if (p.g_coords == nullptr) return;
  const bool head = p.g_shift != nullptr;
  for (int c = 0; c < p.dim; ++c) {
    const int at = c * kBlockRows;
    for (int b = 0; b < count; ++b) {
      const T through_r = 2 * g_r[b] * t.d[at + b];
      t.g_d[at + b] = head ? t.g_d[at + b] + through_r : through_r;
    }
    for (int b = 0; b < count; ++b) g_d_out[b * p.dim + c] = t.g_d[at + b];
  }
  sum_coords(p, blk, t.g_d, p.g_coords, sink);
}

// `fresh`: the task's first block, which writes the sums rather than adding to them.
template <class T, int act>
inline void backward_block(const Problem<T>& p, int64_t edge, Block<T>& blk, Tiles<T>& t, T* g_z1,
                           T* g_d, bool fresh, T* sums, RowSink<T>& sink) {
  const int count = blk.count, ld = p.ld;
  T g_s[kBlockRows], g_r[kBlockRows], g_mask[kBlockRows] = {};
  const T* message = recompute<T, act>(p, edge, blk, t);
  if (p.g_shift != nullptr) {
    back_through_shift(p, blk, t, g_s, g_mask);
    back_through_head(p, blk, t, message, g_s, fresh, sums);
  }
  back_to_second(p, blk, t, g_mask, fresh, sums);
  if (p.g_edge_mask != nullptr) {
    for (int b = 0; b < count; ++b) p.g_edge_mask[blk.edge[b]] = g_mask[b];
  }
  if (p.needs_w2) {
    weight_gemm(t.d2, ld, t.a1, ld, count, p.hidden, p.vectors, fresh, sums + p.at.w2, ld);
  }
  if (!p.needs_first) return;

  // g_m's tile is free again
  gemm(t.d2, ld, count, p.w2_backward, p.hidden, p.vectors, Start::kZero, kNone<T>, t.g_m, ld);
  back_to_first(p, blk, t, g_z1, g_r, fresh, sums, sink);
  back_to_inputs(p, blk, t, g_z1, g_r, g_d, fresh, sums, sink);
}

// The task's edges by range of senders, in their order within each.
template <class T>
inline void group_senders(const Problem<T>& p, int64_t begin, int count, uint16_t* starts,
                          uint16_t* edges) {
  const int32_t* senders = p.senders + begin;
  uint16_t next[kMaxSenderRanges + 1] = {};
  for (int k = 0; k < count; ++k) ++next[(senders[k] >> p.sender_shift) + 1];
  for (int r = 0; r < p.sender_ranges; ++r) {
    next[r + 1] = static_cast<uint16_t>(next[r + 1] + next[r]);
    starts[r] = next[r];
  }
  starts[p.sender_ranges] = static_cast<uint16_t>(count);
  for (int k = 0; k < count; ++k) {
    edges[next[senders[k] >> p.sender_shift]++] = static_cast<uint16_t>(k);
  }
}

template <class T, int act>
inline void backward_task(const Problem<T>& p, const Wave<T>& wave, int64_t task, T* sums,
                          T* scratch) {
  Tiles<T> tiles(p, scratch);
  Block<T> blk;
  const int64_t slot = task - wave.first_task;
  const int64_t first = p.task_begin(wave.first_task);
  const int64_t begin = p.task_begin(task), end = p.task_begin(task + 1);
  if ((p.g_pq != nullptr || p.g_coords != nullptr) && p.senders != nullptr) {
    group_senders(p, begin, static_cast<int>(end - begin),
                  wave.range_starts + slot * (p.sender_ranges + 1),
                  wave.range_edges + (begin - first));
  }
  RowSink<T> sink(p, wave.slots + slot, begin, end);
  int64_t row = find_row(p.rowptr, p.nodes, begin);
  for (int64_t e = begin; e < end; e += kBlockEdges) {
    const int count = static_cast<int>(end - e < kBlockEdges ? end - e : kBlockEdges);
    const int64_t place = e - first;
    gather_block(p, e, count, row, blk, tiles.d);
    backward_block<T, act>(p, e, blk, tiles, wave.g_z1 + place * p.ld, wave.g_d + place * p.dim,
                           e == begin, sums, sink);
  }
}

}  // namespace EGNN_ISA
}  // namespace egnn
