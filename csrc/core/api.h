// The core's interface: the two operators and their derivatives, and the choice of instruction set.
#pragma once

#include <string>
#include <vector>

#include "args.h"

namespace egnn {

// All four compare the number of rows of edge_attr and edge_mask with the number of edges, and
// throw std::invalid_argument before anything is written.
void messages_forward(const MessagesArgs& args);
void messages_backward(const MessagesArgs& args);
void layer_forward(const LayerArgs& args);
void layer_backward(const LayerArgs& args);

// Elements of a layer's stored activations; 0 without edges.
int64_t layer_stored_elements(const LayerArgs& args);

// to = silu(from), `repeats` times; each thread takes a part of the elements.
void silu(uintptr_t from, uintptr_t to, int64_t count, bool is_double, int threads, int repeats);

// Names are "portable", "avx2" and "avx512". The best set that the machine has is used, unless
// EGNN_FAST_CPU_ISA or set_instruction_set names another.
std::vector<std::string> supported_instruction_sets();
std::string instruction_set();
void set_instruction_set(const std::string& name);

}  // namespace egnn
