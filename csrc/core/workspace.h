// Memory of one call: a single block, handed out in pieces, kept by the thread for the next call.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>

#include "memory.h"

namespace egnn {

class Workspace {
 public:
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
        kept.memory.reset(egnn::allocate(used_));
        kept.size = used_;
      }
      block_ = kept.memory.get();
    } else {
      own_.reset(egnn::allocate(used_));
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

  char* block_ = nullptr;
  int64_t used_ = 0;
  Memory own_;
};

}  // namespace egnn
