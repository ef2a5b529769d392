// A checksum of memory, by chunks in parallel.
#include "checksum.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "schedule.h"

namespace egnn {
namespace {

// Random bits: digits of pi.
constexpr uint64_t kKeys[] = {0x243f6a8885a308d3, 0x13198a2e03707345, 0xa4093822299f31d1,
                              0x082efa98ec4e6c89, 0x452821e638d01377, 0xbe5466cf34e90c6d,
                              0xc0ac29b7c97c50dd, 0x3f84d5b5b5470917};
constexpr int kLanes = 8;  // chains of products, independent so that their latencies overlap
constexpr int64_t kStripe = 16 * kLanes;
constexpr int64_t kChunk = int64_t{1} << 18;  // bytes that one task sums

// Combines the two halves of a product: each bit of a factor affects the whole result.
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
  // not the keys themselves: exchanging the factors of a product must change the result
  uint64_t lanes[kLanes];
  for (int k = 0; k < kLanes; ++k) lanes[k] = mix(kKeys[k], kKeys[(k + 3) % kLanes]);
  const auto add = [&lanes](const char* stripe) {
    for (int k = 0; k < kLanes; ++k) {
      lanes[k] = mix(word(stripe + 16 * k) ^ kKeys[k], word(stripe + 16 * k + 8) ^ lanes[k]);
    }
  };
  const int64_t whole = bytes / kStripe * kStripe;
  for (int64_t k = 0; k < whole; k += kStripe) add(data + k);
  char rest[kStripe] = {};
  if (whole < bytes) {
    std::memcpy(rest, data + whole, bytes - whole);
    add(rest);
  }
  uint64_t sum = mix(static_cast<uint64_t>(bytes) ^ kKeys[0], kKeys[1]);
  for (int k = 0; k < kLanes; ++k) sum = mix(sum ^ lanes[k], kKeys[k]);
  return sum;
}

}  // namespace

uint64_t checksum(const void* data, int64_t bytes, int threads) {
  const char* begin = static_cast<const char*>(data);
  if (bytes <= kChunk) return chunk_checksum(begin, bytes);
  std::vector<uint64_t> parts((bytes + kChunk - 1) / kChunk);
  Schedule schedule;
  schedule.add_step(static_cast<int64_t>(parts.size()), [&](int64_t k, int) {
    parts[k] = chunk_checksum(begin + k * kChunk, std::min(kChunk, bytes - k * kChunk));
  });
  schedule.run(threads);
  return checksum(parts.data(), static_cast<int64_t>(parts.size() * sizeof parts[0]), 1);
}

}  // namespace egnn
