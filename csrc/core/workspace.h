// Memory of one call: a single block, handed out in pieces, kept by the thread for the next call.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace egnn {

class Workspace {
 public:
  static constexpr int64_t kAlignment = 64;
  // a thread keeps up to this many bytes between calls, so that small calls touch no fresh pages
  static constexpr int64_t kKept = int64_t{16} << 20;

  // Calls request(last) twice with the same requests: first to add up their sizes, then to hand
  // out the memory (last is true).
  template <class Request>
  void plan(Request&& request) {
    request(false);
    allocate();
    request(true);
  }

  // Within plan(): room for `count` elements, null in the first round.
  template <class T>
  T* take(int64_t count) {
    const int64_t bytes =
        (count * static_cast<int64_t>(sizeof(T)) + kAlignment - 1) / kAlignment * kAlignment;
    char* piece = block_ == nullptr ? nullptr : block_ + used_;
    used_ += bytes;
    return reinterpret_cast<T*>(piece);
  }

 private:
  void allocate() {
    if (used_ <= kKept) {
      thread_local Held kept;
      if (kept.size < used_) {
        kept.memory.reset(allocate_bytes(used_));
        kept.size = used_;
      }
      block_ = kept.memory.get();
    } else {
      own_.reset(allocate_bytes(used_));
      block_ = own_.get();
    }
    used_ = 0;
  }

  struct Free {
    void operator()(char* memory) const { std::free(memory); }
  };
  using Memory = std::unique_ptr<char, Free>;
  struct Held {
    Memory memory;
    int64_t size = 0;
  };

  // Rows are read and written in no order: with small pages, finding the page costs as much as the
  // row.
  static constexpr int64_t kHugePage = int64_t{2} << 20;

  static char* allocate_bytes(int64_t bytes) {
    void* memory = nullptr;
    const bool large = bytes >= 2 * kHugePage;
    const auto alignment = static_cast<size_t>(large ? kHugePage : kAlignment);
    if (posix_memalign(&memory, alignment, static_cast<size_t>(bytes)) != 0) {
      throw std::bad_alloc();
    }
#if defined(__linux__)
    if (large) madvise(memory, static_cast<size_t>(bytes), MADV_HUGEPAGE);  // a wish
#endif
    return static_cast<char*>(memory);
  }

  char* block_ = nullptr;
  int64_t used_ = 0;
  Memory own_;
};

}  // namespace egnn
