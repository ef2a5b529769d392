// The core's interface: the fused edge pass and the whole layer on the CPU, forward and backward.
#pragma once

#include <string>
#include <vector>

#include "args.h"

namespace egnn {

// All four check the counts that only the core can see (rows of edge_attr and edge_mask against E)
// and throw std::invalid_argument before anything is written.
void forward(const Args& args);
void backward(const Args& args);
void layer_forward(const LayerArgs& args);
void layer_backward(const LayerArgs& args);

// Elements of LayerArgs::kept; 0 without edges.
int64_t layer_kept_size(const LayerArgs& args);

// to = silu(from), a share a thread, `repeats` times over.
void silu(uintptr_t from, uintptr_t to, int64_t count, bool is_double, int threads, int repeats);

// Names: "portable", "avx2", "avx512". The one in use is the best that the machine has, unless
// EGNN_FAST_CPU_ISA or set_instruction_set says otherwise.
std::vector<std::string> supported_instruction_sets();
std::string instruction_set();
void set_instruction_set(const std::string& name);

}  // namespace egnn
