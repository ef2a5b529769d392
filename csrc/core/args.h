// What a call of the edge pass is made of. Plain data: no torch, no Python.
#pragma once

#include <cstdint>

namespace egnn {

// The record that a kernel takes; csrc/records.h fills it. Addresses are integers; 0 means absent.
// Shapes: N nodes, E = rowptr[N] edges, H hidden, D coordinate dimension, A attribute width.
struct Args {
  bool is_double = false;
  int threads = 1;
  int64_t num_nodes = 0;
  int64_t hidden = 0;
  int64_t coord_dim = 0;
  int64_t attr_dim = 0;
  int64_t attr_rows = -1;  // rows of edge_attr and edge_mask; -1 where there is none
  int64_t mask_rows = -1;
  int64_t w_r_stride = 1;  // w_r and w_a may be columns of a wider matrix
  int64_t w_a_stride = 0;

  uintptr_t pq = 0;         // [N, 2H]: P and Q side by side
  uintptr_t x = 0;          // [N, D]
  uintptr_t edge_attr = 0;  // [E, A], the user's edge order
  uintptr_t edge_mask = 0;  // [E], the user's edge order
  uintptr_t w_r = 0;        // [H], strided
  uintptr_t w_a = 0;        // [H, A], rows strided
  uintptr_t w2 = 0, b2 = 0;
  uintptr_t w_g = 0, b_g = 0;         // gate
  uintptr_t w3 = 0, b3 = 0, w_x = 0;  // coordinate head
  uintptr_t rowptr = 0;               // [N + 1], int64
  uintptr_t senders = 0;              // [E], int32; absent for a complete graph
  uintptr_t perm = 0;                 // [E], int32; absent where it is the identity
  uintptr_t first = 0;                // [N], int32; complete graphs only

  int activation = 0;  // 0 SiLU, 1 ReLU, 2 LeakyReLU
  double negative_slope = 0.01;
  double norm = 0;  // 0 none, -1 detached |d| + 1e-8, k > 0: |d| + k
  bool tanh = false;
  double clamp = 0;  // 0: none

  uintptr_t m = 0, shift = 0;      // forward: [N, H], [N, D]
  uintptr_t g_m = 0, g_shift = 0;  // backward: their cotangents
  // backward: gradients, absent where nobody asked
  uintptr_t g_pq = 0, g_coords = 0, g_edge_attr = 0, g_edge_mask = 0, g_w_r = 0, g_w_a = 0;
  uintptr_t g_w2 = 0, g_b2 = 0, g_w_g = 0, g_b_g = 0, g_w3 = 0, g_b3 = 0, g_w_x = 0;
};

// A whole layer: the edge pass of Args (its m and shift are outputs forward, absent where no
// backward follows, and inputs backward; pq, w_r and w_a follow from h and w1) and the node-level
// parts around it. Widths: F in, O out, B node attributes.
struct LayerArgs : Args {
  int64_t in_features = 0;
  int64_t out_features = 0;
  int64_t node_attr_dim = 0;
  bool residual = false;
  double coord_scale = 1;

  uintptr_t h = 0;                                               // [N, F]
  uintptr_t v = 0;                                               // [N, D]
  uintptr_t node_attr = 0;                                       // [N, B]
  uintptr_t coord_weight = 0;                                    // [N]
  uintptr_t w1 = 0, b1 = 0;                                      // [H, 2F + 1 + A], [H]
  uintptr_t node_w1 = 0, node_b1 = 0, node_w2 = 0, node_b2 = 0;  // [H, F + H + B], [O, H]
  uintptr_t vel_w1 = 0, vel_b1 = 0, vel_w2 = 0, vel_b2 = 0;      // [H, F], [H]

  uintptr_t h_out = 0, x_out = 0, v_out = 0;  // [N, O], [N, D], [N, D]
  // written forward, read backward; absent, or another instruction set's: computed again
  uintptr_t kept = 0;
  uintptr_t g_h_out = 0, g_x_out = 0, g_v_out = 0;  // their cotangents
  uintptr_t g_h = 0, g_v = 0, g_node_attr = 0, g_coord_weight = 0, g_w1 = 0, g_b1 = 0;
  uintptr_t g_node_w1 = 0, g_node_b1 = 0, g_node_w2 = 0, g_node_b2 = 0;
  uintptr_t g_vel_w1 = 0, g_vel_b1 = 0, g_vel_w2 = 0, g_vel_b2 = 0;
};

}  // namespace egnn
