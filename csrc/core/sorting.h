// Counting sort of an edge list by receiver, and the range of its indices.
#pragma once

#include <cstdint>
#include <utility>

namespace egnn {

// Stable. edges [2, E]: receivers, then senders, all in [0, num_nodes). Writes rowptr [N + 1],
// senders [E] and perm [E] (an edge's position in `edges`); returns whether perm is the identity.
bool sort_by_receiver(const int64_t* edges, int64_t num_edges, int64_t num_nodes, int64_t* rowptr,
                      int32_t* senders, int32_t* perm);

// The smallest and the largest of count > 0 indices.
std::pair<int64_t, int64_t> index_range(const int64_t* indices, int64_t count);

}  // namespace egnn
