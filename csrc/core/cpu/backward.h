// The gradients of one task's edges: the block is run again, then back through it (the formulas are
// in CONTRIBUTING.md, "The algorithm").
#pragma once

#include "block.h"

namespace egnn {
namespace EGNN_ISA {

template <class T>
inline WeightOffsets weight_offsets(const Problem<T>& p) {
  const int64_t matrix = static_cast<int64_t>(p.hidden + kWeightRows) * p.ld;
  WeightOffsets at;
  at.w2 = 0;
  at.w3 = at.w2 + matrix;
  at.b2 = at.w3 + matrix;
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
  T *d, *g_d;    // coordinate differences and their gradients, [rows, D]

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

// Runs the block forward, keeping what the way back needs; returns the message's tile.
template <class T, int act>
inline const T* recompute(const Problem<T>& p, Block<T>& blk, Tiles<T>& t) {
  const int count = blk.count, ld = p.ld, vectors = p.vectors;
  const T slope = p.slope;
  const bool scaled = p.attention || p.edge_mask != nullptr;
  first_layer<T, act, true>(p, blk, t.a1, t.d1);
  gemm(t.a1, ld, count, p.w2_forward, p.hidden, vectors, Start::kBias, p.b2, t.n, ld);
  for (int b = 0; b < count; ++b) {
    T *n = t.n + b * ld, *d2 = t.d2 + b * ld, *m = t.m + b * ld;
    Vec<T> logit{};
    for (int v = 0; v < vectors; ++v) {
      const int column = v * kWidth<T>;
      Vec<T> value, derivative;
      activate_both<T, act>(load(n + column), slope, value, derivative);
      store(n + column, value);
      store(d2 + column, derivative);
      if (scaled) logit += value * load(p.w_g + column);
    }
    if (!scaled) continue;
    if (p.attention) blk.gate[b] = sigmoid_scalar(horizontal_sum<T>(logit) + p.b_g);
    const T factor = blk.gate[b] * blk.mask[b];
    for (int v = 0; v < vectors; ++v) {
      store(m + v * kWidth<T>, load(n + v * kWidth<T>) * factor);
    }
  }
  const T* message = scaled ? t.m : t.n;
  if (p.g_shift == nullptr) return message;

  gemm(message, ld, count, p.w3_forward, p.hidden, vectors, Start::kBias, p.b3, t.a3, ld);
  for (int b = 0; b < count; ++b) {
    T *a3 = t.a3 + b * ld, *g_z3 = t.g_z3 + b * ld;
    Vec<T> sum{};
    for (int v = 0; v < vectors; ++v) {
      const int column = v * kWidth<T>;
      const Vec<T> w = load(p.w_x + column);
      Vec<T> value, derivative;
      activate_both<T, act>(load(a3 + column), slope, value, derivative);
      store(a3 + column, value);
      store(g_z3 + column, derivative * w);
      sum += value * w;
    }
    const T s = horizontal_sum<T>(sum);
    blk.s[b] = p.tanh ? tanh_scalar(s) : s;
  }
  return message;
}

// Back through the coordinate head's output: g_s into `g_s`, the direction's share into t.g_d, and
// the mask's share into g_mask.
template <class T>
inline void back_through_shift(const Problem<T>& p, const Block<T>& blk, Tiles<T>& t, T* g_s,
                               T* g_mask) {
  for (int b = 0; b < blk.count; ++b) {
    const T* g_row = p.g_shift + static_cast<int64_t>(blk.receiver[b]) * p.dim;
    const T* d = t.d + b * p.dim;
    T* g_d = t.g_d + b * p.dim;
    const T inverse = blk.inverse_rho[b], s = blk.s[b], mask = blk.mask[b];
    T g_tanh = 0, along = 0, masked = 0;
    for (int c = 0; c < p.dim; ++c) {
      const T u = d[c] * inverse;
      const T su = s * u;
      // as torch.clamp: the bound itself passes, NaN as well
      const bool passes = p.clamp == 0 || !(su > p.clamp || su < -p.clamp);
      const T g_t = passes ? mask * g_row[c] : T(0);
      masked += g_row[c] * clamp_scalar(su, p.clamp);
      g_tanh += g_t * u;
      const T g_u = s * g_t;
      along += d[c] * g_u;
      g_d[c] = g_u * inverse;
    }
    if (p.norm > 0 && blk.r[b] != 0) {
      const T factor = along * inverse * inverse / sqrt_scalar(blk.r[b]);
      for (int c = 0; c < p.dim; ++c) g_d[c] -= factor * d[c];
    }
    g_s[b] = p.tanh ? g_tanh * (1 - s * s) : g_tanh;
    g_mask[b] = masked;
  }
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
                           T* sums) {
  const int count = blk.count, ld = p.ld, vectors = p.vectors;
  message_gradient(p, blk, t);
  const bool gated = p.attention || p.g_edge_mask != nullptr;
  for (int b = 0; b < count; ++b) {
    const T *g_m = t.g_m + b * ld, *n = t.n + b * ld;
    T* d2 = t.d2 + b * ld;
    const T gate = blk.gate[b], factor = gate * blk.mask[b];
    T g_logit = 0;
    if (gated) {
      const T q = dot(g_m, n, vectors);
      g_mask[b] += gate * q;
      if (p.attention) g_logit = blk.mask[b] * q * gate * (1 - gate);
    }
    for (int v = 0; v < vectors; ++v) {
      const int column = v * kWidth<T>;
      Vec<T> g = load(g_m + column) * factor;
      if (p.attention) g += g_logit * load(p.w_g + column);
      store(d2 + column, g * load(d2 + column));
    }
    if (!p.needs_w_g) continue;
    T* w_g = sums + p.at.w_g;
    for (int v = 0; v < vectors; ++v) {
      const int column = v * kWidth<T>;
      store(w_g + column, load(w_g + column) + g_logit * load(n + column));
    }
    sums[p.at.b_g] += g_logit;
  }
}

// Back through the first linear: g_z1 [count, ld] is at hand; its sums to receivers, to the
// distance and to the attributes.
template <class T>
inline void back_to_inputs(const Problem<T>& p, const Block<T>& blk, Tiles<T>& t, const T* g_z1,
                           T* g_d_out, T* sums, RowSink<T>& sink) {
  const int count = blk.count, ld = p.ld, vectors = p.vectors;
  if (p.g_pq != nullptr) sum_to_receivers(p, blk, g_z1, p.g_pq, p.pq_stride, sink);
  if (p.needs_first_weights) {
    add_columns(g_z1, ld, blk.r, count, vectors, sums + p.at.w_r);
    for (int k = 0; k < p.attrs; ++k) {
      T column[kBlockRows];
      for (int b = 0; b < count; ++b) column[b] = blk.attr[b][k];
      add_columns(g_z1, ld, column, count, vectors, sums + p.at.w_a + static_cast<int64_t>(k) * ld);
    }
  }
  if (p.g_edge_attr != nullptr) {
    for (int b = 0; b < count; ++b) {
      for (int k = 0; k < p.attrs; ++k) {
        p.g_edge_attr[blk.edge[b] * p.attrs + k] = dot(g_z1 + b * ld, p.w_a + k * ld, vectors);
      }
    }
  }
  if (p.g_coords != nullptr) {
    for (int b = 0; b < count; ++b) {
      const T twice = 2 * dot(g_z1 + b * ld, p.w_r, vectors);
      for (int c = 0; c < p.dim; ++c) {
        const T through_r = twice * t.d[b * p.dim + c];
        const T direct = p.g_shift != nullptr ? t.g_d[b * p.dim + c] : T(0);
        g_d_out[b * p.dim + c] = direct + through_r;
      }
    }
    sum_coords(p, blk, g_d_out, p.g_coords, sink);
  }
}

template <class T, int act>
inline void backward_block(const Problem<T>& p, Block<T>& blk, Tiles<T>& t, T* g_z1, T* g_d,
                           T* sums, RowSink<T>& sink) {
  const int count = blk.count, ld = p.ld;
  T g_s[kBlockRows], g_mask[kBlockRows] = {};
  const T* message = recompute<T, act>(p, blk, t);
  if (p.g_shift != nullptr) {
    back_through_shift(p, blk, t, g_s, g_mask);
    for (int b = 0; b < count; ++b) {
      for (int v = 0; v < p.vectors; ++v) {
        T* place = t.g_z3 + b * ld + v * kWidth<T>;
        store(place, load(place) * g_s[b]);
      }
    }
    if (p.needs_w3) {
      weight_gemm(t.g_z3, ld, message, ld, count, p.hidden, p.vectors, sums + p.at.w3, ld);
      add_columns(t.g_z3, ld, kNone<T>, count, p.vectors, sums + p.at.b3);
    }
    if (p.needs_w_x)
      add_columns(t.a3, ld, static_cast<const T*>(g_s), count, p.vectors, sums + p.at.w_x);
  }
  back_to_second(p, blk, t, g_mask, sums);
  if (p.g_edge_mask != nullptr) {
    for (int b = 0; b < count; ++b) p.g_edge_mask[blk.edge[b]] = g_mask[b];
  }
  if (p.needs_w2) {
    weight_gemm(t.d2, ld, t.a1, ld, count, p.hidden, p.vectors, sums + p.at.w2, ld);
    add_columns(t.d2, ld, kNone<T>, count, p.vectors, sums + p.at.b2);
  }
  if (!p.needs_first) return;

  // g_m's tile is free again; g_z1's own place has no rows to spare
  gemm(t.d2, ld, count, p.w2_backward, p.hidden, p.vectors, Start::kZero, kNone<T>, t.g_m, ld);
  for (int64_t k = 0; k < static_cast<int64_t>(count) * ld; k += kWidth<T>) {
    store(g_z1 + k, load(t.g_m + k) * load(t.d1 + k));
  }
  back_to_inputs(p, blk, t, g_z1, g_d, sums, sink);
}

// Sorts the task's edges by sender, stably: bytes of the key from the lowest up.
inline void sort_senders(const int32_t* senders, int count, int64_t nodes, uint32_t* keys,
                         uint16_t* places, uint32_t* spare_keys, uint16_t* spare_places) {
  for (int k = 0; k < count; ++k) {
    keys[k] = static_cast<uint32_t>(senders[k]);
    places[k] = static_cast<uint16_t>(k);
  }
  uint32_t *from = keys, *to = spare_keys;
  uint16_t *from_place = places, *to_place = spare_places;
  for (int shift = 0; (nodes - 1) >> shift > 0; shift += 8) {
    uint32_t start[257] = {};
    for (int k = 0; k < count; ++k) ++start[((from[k] >> shift) & 255) + 1];
    for (int k = 0; k < 256; ++k) start[k + 1] += start[k];
    for (int k = 0; k < count; ++k) {
      const uint32_t place = start[(from[k] >> shift) & 255]++;
      to[place] = from[k];
      to_place[place] = from_place[k];
    }
    uint32_t* const swap = from;
    from = to;
    to = swap;
    uint16_t* const swap_place = from_place;
    from_place = to_place;
    to_place = swap_place;
  }
  if (from == keys) return;
  for (int k = 0; k < count; ++k) {
    keys[k] = from[k];
    places[k] = from_place[k];
  }
}

template <class T, int act>
inline void backward_task(const Problem<T>& p, int64_t wave_begin, int64_t task, T* sums,
                          T* scratch) {
  Tiles<T> tiles(p, scratch);
  Block<T> blk;
  const int64_t slot = task - wave_begin;
  const int64_t begin = task * p.task_edges;
  const int64_t end = begin + p.task_edges < p.edges ? begin + p.task_edges : p.edges;
  if ((p.g_pq != nullptr || p.g_coords != nullptr) && p.senders != nullptr) {
    uint32_t* keys = p.sender_keys + slot * 2 * p.task_edges;
    uint16_t* places = p.sender_places + slot * 2 * p.task_edges;
    sort_senders(p.senders + begin, static_cast<int>(end - begin), p.nodes, keys, places,
                 keys + p.task_edges, places + p.task_edges);
  }
  RowSink<T> sink(p, slot, begin, end);
  int64_t row = find_row(p.rowptr, p.nodes, begin);
  for (int64_t e = begin; e < end; e += kBlockEdges) {
    const int count = static_cast<int>(end - e < kBlockEdges ? end - e : kBlockEdges);
    const int64_t place = slot * p.task_edges + (e - begin);
    gather_block(p, e, count, row, blk, tiles.d);
    backward_block<T, act>(p, blk, tiles, p.g_z1 + place * p.ld, p.g_d + place * p.dim, sums, sink);
  }
}

}  // namespace EGNN_ISA
}  // namespace egnn
