// Counting sort of an edge list by receiver, the range of its indices, a checksum of its content.
#pragma once

#include <cstdint>
#include <utility>

namespace egnn {

// Stable. edges [2, E]: receivers, then senders, all in [0, num_nodes). Fills rowptr [N + 1],
// senders [E] and perm [E] (old place of each edge); returns whether perm is the identity.
bool sort_by_receiver(const int64_t* edges, int64_t num_edges, int64_t num_nodes, int64_t* rowptr,
                      int32_t* senders, int32_t* perm);

// The smallest and the largest of count > 0 indices.
std::pair<int64_t, int64_t> index_range(const int64_t* indices, int64_t count);

// A 64-bit checksum of memory of any alignment, the same on any number of threads. Two contents
// that were not made to collide have the same one with probability 2^-64.
uint64_t checksum(const void* data, int64_t bytes, int threads);

}  // namespace egnn
