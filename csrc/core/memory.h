// Aligned memory, and a pool of buffers that are reused.
#pragma once

#include <cstdint>

namespace egnn {

constexpr int64_t kAlignment = 64;
// Large arrays begin at the start of a page. A processor compares the low 12 bits of a load's
// address with those of earlier stores, and stalls where they are equal (4K aliasing). Loops that
// read one array and write another row by row took up to 1.4 times as long with arbitrary offsets.
constexpr int64_t kPage = 4096;

inline int64_t aligned_size(int64_t bytes) {
  const int64_t unit = bytes < kPage ? kAlignment : kPage;
  return (bytes + unit - 1) / unit * unit;
}

// Memory to be freed by std::free; throws std::bad_alloc. Large memory is requested in huge pages:
// rows are read and written in random order, and with small pages a TLB miss costs as much as a
// row.
char* allocate(int64_t bytes);

// Buffers that outlive a call, such as a forward's activations. A training step takes and returns
// the same ones; new pages from the system would cost more than filling them. The pool holds
// returned buffers of up to kPooledBuffer each and kPooledBytes together. Any thread may call.
constexpr int64_t kPooledBytes = int64_t{256} << 20;
constexpr int64_t kPooledBuffer = int64_t{64} << 20;
char* take_buffer(int64_t bytes);
void return_buffer(char* buffer, int64_t bytes);

}  // namespace egnn
