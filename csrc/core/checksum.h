// A checksum of memory.
#pragma once

#include <cstdint>

namespace egnn {

// A 64-bit checksum of memory of any alignment, the same on any number of threads. Two contents
// that were not made to collide have equal checksums with probability 2^-64.
uint64_t checksum(const void* data, int64_t bytes, int threads);

}  // namespace egnn
