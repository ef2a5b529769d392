// Aligned memory and the pool of buffers.
#include "memory.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <deque>
#include <mutex>
#include <new>

namespace egnn {
namespace {

constexpr int64_t kHugePage = int64_t{2} << 20;

struct Buffer {
  char* memory;
  int64_t bytes;
};

struct Pool {
  std::mutex mutex;
  std::deque<Buffer> free;  // least recently returned first
  int64_t bytes = 0;
};

// Never destroyed: a tensor may return its buffer while the process ends.
Pool& pool() {
  static Pool* const p = ::new Pool;
  return *p;
}

// Sizes in steps of a quarter of a power of two, so that batches of similar size share buffers.
int64_t size_class(int64_t bytes) {
  int64_t power = kAlignment;
  while (power * 2 <= bytes) power *= 2;
  const int64_t step = std::max(power / 4, kAlignment);
  return (bytes + step - 1) / step * step;
}

}  // namespace

char* allocate(int64_t bytes) {
  void* memory = nullptr;
  const bool large = bytes >= 2 * kHugePage;
  const auto alignment = static_cast<size_t>(large           ? kHugePage
                                             : bytes < kPage ? kAlignment
                                                             : kPage);
  if (posix_memalign(&memory, alignment, static_cast<size_t>(bytes)) != 0) throw std::bad_alloc();
#if defined(__linux__)
  if (large) madvise(memory, static_cast<size_t>(bytes), MADV_HUGEPAGE);  // may be ignored
#endif
  return static_cast<char*>(memory);
}

char* take_buffer(int64_t bytes) {
  bytes = size_class(bytes);
  Pool& p = pool();
  {
    // try_to_lock: in a child that was forked while another thread held the lock, nobody unlocks it
    const std::unique_lock<std::mutex> lock(p.mutex, std::try_to_lock);
    if (lock.owns_lock()) {
      for (auto buffer = p.free.rbegin(); buffer != p.free.rend(); ++buffer) {
        if (buffer->bytes != bytes) continue;
        char* memory = buffer->memory;
        p.free.erase(std::next(buffer).base());
        p.bytes -= bytes;
        return memory;
      }
    }
  }
  return allocate(bytes);
}

void return_buffer(char* buffer, int64_t bytes) {
  bytes = size_class(bytes);
  Pool& p = pool();
  const std::unique_lock<std::mutex> lock(p.mutex, std::try_to_lock);
  if (!lock.owns_lock() || bytes > kPooledBuffer) {
    std::free(buffer);
    return;
  }
  p.free.push_back({buffer, bytes});
  p.bytes += bytes;
  while (p.bytes > kPooledBytes) {
    std::free(p.free.front().memory);
    p.bytes -= p.free.front().bytes;
    p.free.pop_front();
  }
}

}  // namespace egnn
