// Counting sort by receiver.
#include "sorting.h"

#include <algorithm>
#include <vector>

namespace egnn {

bool sort_by_receiver(const int64_t* edges, int64_t num_edges, int64_t num_nodes, int64_t* rowptr,
                      int32_t* senders, int32_t* perm) {
  const int64_t* receivers = edges;
  const int64_t* old_senders = edges + num_edges;
  for (int64_t i = 0; i <= num_nodes; ++i) rowptr[i] = 0;
  bool sorted = true;
  for (int64_t e = 0; e < num_edges; ++e) {
    ++rowptr[receivers[e] + 1];
    sorted = sorted && (e == 0 || receivers[e - 1] <= receivers[e]);
  }
  for (int64_t i = 0; i < num_nodes; ++i) rowptr[i + 1] += rowptr[i];
  std::vector<int64_t> next(rowptr, rowptr + num_nodes);
  for (int64_t e = 0; e < num_edges; ++e) {
    const int64_t position = next[receivers[e]]++;
    senders[position] = static_cast<int32_t>(old_senders[e]);
    perm[position] = static_cast<int32_t>(e);
  }
  return sorted;
}

std::pair<int64_t, int64_t> index_range(const int64_t* indices, int64_t count) {
  int64_t low = indices[0], high = indices[0];
  for (int64_t k = 1; k < count; ++k) {
    low = std::min(low, indices[k]);
    high = std::max(high, indices[k]);
  }
  return {low, high};
}

}  // namespace egnn
