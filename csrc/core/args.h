// The operators' arguments: their names, and the records that bring a call's values to the core.
//
// Names, order and shapes are those of egnn_fast/operators/signature.py, which is compared with
// them when the extension is loaded. The members of the records below, the positions in
// csrc/records.h and the names that csrc/bindings.cpp exports all follow from these lists.
// Plain data: no torch, no Python, no standard library.
#pragma once

#include <cstddef>
#include <cstdint>

// clang-format off

// Inputs: X(name, presence, shape...). Sizes: N nodes, E edges, H hidden, D coordinates, A edge
// attributes, B node attributes, F input and O output features.

// The operator `messages` is the edge pass. Rows of edge_attr and edge_mask are in the user's order
// of edges.
#define EGNN_MESSAGES_INPUTS(X)                       \
  X(pq, required, N, 2*H) /* P and Q side by side */  \
  X(x, required, N, D)                                \
  X(edge_attr, optional, E, A)                        \
  X(edge_mask, optional, E)                           \
  X(w_r, required, H)                                 \
  X(w_a, optional, H, A)                              \
  X(w2, required, H, H)                               \
  X(b2, required, H)                                  \
  X(w_g, gate, H)                                     \
  X(b_g, gate, 1)                                     \
  X(w3, head, H, H)                                   \
  X(b3, head, H)                                      \
  X(w_x, head, H)

// The operator `layer` is a whole layer: P and Q, the edge pass, phi_h, phi_v and the new
// coordinates. coord_weight is the factor of the mean.
#define EGNN_LAYER_INPUTS(X)                          \
  X(h, required, N, F)                                \
  X(x, required, N, D)                                \
  X(v, velocity, N, D)                                \
  X(edge_attr, optional, E, A)                        \
  X(edge_mask, optional, E)                           \
  X(node_attr, optional, N, B)                        \
  X(coord_weight, optional, N)                        \
  X(edge_w1, required, H, 2*F + 1 + A)                \
  X(edge_b1, required, H)                             \
  X(edge_w2, required, H, H)                          \
  X(edge_b2, required, H)                             \
  X(node_w1, required, H, F + H + B)                  \
  X(node_b1, required, H)                             \
  X(node_w2, required, O, H)                          \
  X(node_b2, required, O)                             \
  X(att_w, gate, 1, H)                                \
  X(att_b, gate, 1)                                   \
  X(coord_w1, head, H, H)                             \
  X(coord_b1, head, H)                                \
  X(coord_w2, head, 1, H)                             \
  X(vel_w1, velocity, H, F)                           \
  X(vel_b1, velocity, H)                              \
  X(vel_w2, velocity, 1, H)                           \
  X(vel_b2, velocity, 1)

// The graph's tensors, which follow the inputs: rowptr [N + 1] int64, senders [E] int32 (absent
// for complete components), perm [E] int32 (the user's number of each edge; absent if they are in
// receiver order), first [N] int32 (first node of a node's component; complete components only).
#define EGNN_GRAPH(X) X(rowptr) X(senders) X(perm) X(first)

// Outputs, each of which has a cotangent: the sums M and X of the edge pass; new h, x and v.
#define EGNN_MESSAGES_OUTPUTS(X) X(m) X(x)
#define EGNN_LAYER_OUTPUTS(X) X(h) X(x) X(v)

// What a layer's forward stores for its backward: the sums M [N, H] and X [N, D], and activations
// (core/stored_activations.h).
#define EGNN_LAYER_CONSTANTS(X) X(m) X(shift) X(activations)

// Options: X(name, type), where T is the type of real numbers.
#define EGNN_EDGE_OPTIONS(X)                                            \
  X(activation, Activation)                                             \
  X(negative_slope, T) /* of LeakyReLU */                               \
  X(coord_norm, T)     /* 0: rho = 1; -1: |d| + 1e-8, detached;         \
                          k > 0: |d| + k, differentiated */             \
  X(coord_tanh, bool)  /* tanh after w_x */                             \
  X(coord_clamp, T)    /* bound on the components of s u; 0: none */
// Those that a layer has besides.
#define EGNN_NODE_OPTIONS(X)                                            \
  X(coord_scale, T)       /* factor c of the coordinate update */       \
  X(residual, bool)       /* h is added to phi_h's output; F = O */     \
  X(carry_velocity, bool) /* the layer returns the new velocity */

#define EGNN_ACTIVATIONS(X) X(silu) X(relu) X(leaky_relu)

// clang-format on

namespace egnn {

// Whether a call has an input. A part of the layer (gate, coordinate head, phi_v) has all of its
// tensors, or none.
enum class Presence : int { required, optional, gate, head, velocity };
constexpr int kPresences = 5;

#define EGNN_ENUMERATOR(name, ...) name,
enum class Activation : int { EGNN_ACTIVATIONS(EGNN_ENUMERATOR) };
#undef EGNN_ENUMERATOR

// A struct of addresses, one for each name of a list; 0 where there is no tensor.
#define EGNN_ADDRESS(name, ...) uintptr_t name = 0;
#define EGNN_MEMBER(name, ...) &Self::name,
#define EGNN_ADDRESSES(Struct, LIST)                                     \
  struct Struct {                                                        \
    using Self = Struct;                                                 \
    LIST(EGNN_ADDRESS)                                                   \
    static constexpr uintptr_t Self::* kMembers[] = {LIST(EGNN_MEMBER)}; \
  }
EGNN_ADDRESSES(MessagesInputs, EGNN_MESSAGES_INPUTS);
EGNN_ADDRESSES(MessagesOutputs, EGNN_MESSAGES_OUTPUTS);
EGNN_ADDRESSES(LayerInputs, EGNN_LAYER_INPUTS);
EGNN_ADDRESSES(LayerOutputs, EGNN_LAYER_OUTPUTS);
EGNN_ADDRESSES(LayerConstants, EGNN_LAYER_CONSTANTS);
EGNN_ADDRESSES(GraphTensors, EGNN_GRAPH);
#undef EGNN_ADDRESSES
#undef EGNN_MEMBER
#undef EGNN_ADDRESS

#define EGNN_FIELD(name, type) type name{};
template <class T>
struct EdgeOptions {
  EGNN_EDGE_OPTIONS(EGNN_FIELD)
};
template <class T>
struct LayerOptions : EdgeOptions<T> {
  EGNN_NODE_OPTIONS(EGNN_FIELD)
};
#undef EGNN_FIELD

// What the records of both operators have; csrc/records.h fills them.
struct CommonArgs {
  bool is_double = false;
  int threads = 1;
  int64_t num_nodes = 0;        // N
  int64_t hidden = 0;           // H
  int64_t coord_dim = 0;        // D
  int64_t attr_dim = 0;         // A
  int64_t edge_attr_rows = -1;  // rows of edge_attr and edge_mask; -1: absent
  int64_t edge_mask_rows = -1;
  GraphTensors graph;
};

struct MessagesArgs : CommonArgs {
  EdgeOptions<double> options;
  int64_t w_r_stride = 1;  // w_r and w_a may be columns of a wider matrix
  int64_t w_a_stride = 0;
  MessagesInputs inputs;
  MessagesOutputs outputs;     // written by the forward
  MessagesOutputs cotangents;  // read by the backward
  MessagesInputs gradients;    // written by the backward; absent: not wanted
};

struct LayerArgs : CommonArgs {
  LayerOptions<double> options;
  int64_t in_features = 0;    // F
  int64_t out_features = 0;   // O
  int64_t node_attr_dim = 0;  // B
  LayerInputs inputs;
  LayerOutputs outputs, cotangents;
  LayerInputs gradients;
  // Written by the forward, read by the backward. All are absent in a forward that no backward
  // follows. Without activations, or with those of another instruction set, the backward
  // computes them again.
  LayerConstants constants;
};

// The memory at an address of a record.
template <class T>
const T* input(uintptr_t address) {
  return reinterpret_cast<const T*>(address);
}
template <class T>
T* output(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace egnn
