// Aligned memory, and buffers that are used again.
#pragma once

#include <cstdint>

namespace egnn {

constexpr int64_t kAlignment = 64;

// Throws std::bad_alloc. Freed by std::free. Large memory is asked for in huge pages: rows are read
// and written in no order, and with small pages finding the page costs as much as the row.
char* allocate(int64_t bytes);

// Buffers that outlive a call, such as what a forward keeps for its backward. A training step takes
// and returns the same ones; fresh pages from the system would cost it more than filling them.
// Returned buffers stay with the process up to kPooledBytes. Any thread may call.
constexpr int64_t kPooledBytes = int64_t{64} << 20;
char* take_buffer(int64_t bytes);
void return_buffer(char* buffer, int64_t bytes);

}  // namespace egnn
