#include "sorting.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "schedule.h"

namespace egnn {
namespace {

// random bits: the digits of pi
constexpr uint64_t kKeys[] = {0x243f6a8885a308d3, 0x13198a2e03707345, 0xa4093822299f31d1,
                              0x082efa98ec4e6c89, 0x452821e638d01377, 0xbe5466cf34e90c6d,
                              0xc0ac29b7c97c50dd, 0x3f84d5b5b5470917};
constexpr int kLanes = 8;  // independent products, so that none waits for the one before
constexpr int64_t kStripe = 16 * kLanes;
constexpr int64_t kChunk = int64_t{1} << 18;  // what a thread takes at a time

// the two halves of a product, combined: each bit of a factor reaches the whole result
inline uint64_t mix(uint64_t a, uint64_t b) {
  __extension__ using uint128 = unsigned __int128;
  const uint128 product = static_cast<uint128>(a) * b;
  return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
}

inline uint64_t word(const char* data) {
  uint64_t value;
  std::memcpy(&value, data, sizeof value);
  return value;
}

uint64_t chunk_checksum(const char* data, int64_t bytes) {
  // not the keys themselves: a product is the same if its factors are exchanged
  uint64_t lanes[kLanes];
  for (int k = 0; k < kLanes; ++k) lanes[k] = mix(kKeys[k], kKeys[(k + 3) % kLanes]);
  const auto take = [&lanes](const char* stripe) {
    for (int k = 0; k < kLanes; ++k) {
      lanes[k] = mix(word(stripe + 16 * k) ^ kKeys[k], word(stripe + 16 * k + 8) ^ lanes[k]);
    }
  };
  const int64_t whole = bytes / kStripe * kStripe;
  for (int64_t k = 0; k < whole; k += kStripe) take(data + k);
  char rest[kStripe] = {};
  if (whole < bytes) {
    std::memcpy(rest, data + whole, bytes - whole);
    take(rest);
  }
  uint64_t sum = mix(static_cast<uint64_t>(bytes) ^ kKeys[0], kKeys[1]);
  for (int k = 0; k < kLanes; ++k) sum = mix(sum ^ lanes[k], kKeys[k]);
  return sum;
}

}  // namespace

bool sort_by_receiver(const int64_t* edges, int64_t num_edges, int64_t num_nodes, int64_t* rowptr,
                      int32_t* senders, int32_t* perm) {
  const int64_t* receivers = edges;
  const int64_t* from = edges + num_edges;
  for (int64_t i = 0; i <= num_nodes; ++i) rowptr[i] = 0;
  bool sorted = true;
  for (int64_t e = 0; e < num_edges; ++e) {
    ++rowptr[receivers[e] + 1];
    sorted = sorted && (e == 0 || receivers[e - 1] <= receivers[e]);
  }
  for (int64_t i = 0; i < num_nodes; ++i) rowptr[i + 1] += rowptr[i];
  std::vector<int64_t> next(rowptr, rowptr + num_nodes);
  for (int64_t e = 0; e < num_edges; ++e) {
    const int64_t place = next[receivers[e]]++;
    senders[place] = static_cast<int32_t>(from[e]);
    perm[place] = static_cast<int32_t>(e);
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

uint64_t checksum(const void* data, int64_t bytes, int threads) {
  const char* begin = static_cast<const char*>(data);
  if (bytes <= kChunk) return chunk_checksum(begin, bytes);
  std::vector<uint64_t> parts((bytes + kChunk - 1) / kChunk);
  Schedule schedule;
  schedule.add(static_cast<int64_t>(parts.size()), [&](int64_t k, int) {
    parts[k] = chunk_checksum(begin + k * kChunk, std::min(kChunk, bytes - k * kChunk));
  });
  schedule.run(threads);
  return checksum(parts.data(), static_cast<int64_t>(parts.size() * sizeof parts[0]), 1);
}

}  // namespace egnn
