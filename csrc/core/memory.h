// Aligned memory, and buffers that are used again.
#pragma once

#include <cstdint>

namespace egnn {

constexpr int64_t kAlignment = 64;
// Arrays that a loop reads and writes row by row side by side begin at equal places in their pages.
// A processor compares the low 12 bits of a load with those of the stores before it, and waits
// where they agree: with arbitrary places, loops took up to 1.4 times as long.
constexpr int64_t kPage = 4096;

inline int64_t aligned_size(int64_t bytes) {
  const int64_t unit = bytes < kPage ? kAlignment : kPage;
  return (bytes + unit - 1) / unit * unit;
}

// Throws std::bad_alloc. Freed by std::free. Large memory is asked for in huge pages: rows are read
// and written in no order, and with small pages finding the page costs as much as the row.
char* allocate(int64_t bytes);

// Buffers that outlive a call, such as what a forward keeps for its backward. A training step takes
// and returns the same ones; fresh pages from the system would cost it more than filling them.
// Returned buffers stay with the process, each up to kPooledBuffer, together up to kPooledBytes.
// Any thread may call.
constexpr int64_t kPooledBytes = int64_t{256} << 20;
constexpr int64_t kPooledBuffer = int64_t{64} << 20;
char* take_buffer(int64_t bytes);
void return_buffer(char* buffer, int64_t bytes);

}  // namespace egnn
