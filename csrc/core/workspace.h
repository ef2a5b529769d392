// Memory of one call: a single buffer, handed out in pieces.
#pragma once

#include <algorithm>
#include <cstdint>

#include "memory.h"

namespace egnn {

class Workspace {
 public:
  Workspace() = default;
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  ~Workspace() {
    if (block_ != nullptr) return_buffer(block_, size_);
  }

  // Calls request(last) twice with the same requests: first to add up their sizes, then to hand
  // out the memory (last is true).
  template <class Request>
  void plan(Request&& request) {
    request(false);
    size_ = used_;
    used_ = 0;
    block_ = take_buffer(size_);
    request(true);
  }

  // Within plan(): room for `count` elements, null in the first round.
  template <class T>
  T* take(int64_t count) {
    const int64_t bytes = aligned_size(count * static_cast<int64_t>(sizeof(T)));
    if (bytes >= kPage) used_ = aligned_size(std::max(used_, kPage));
    char* piece = block_ == nullptr ? nullptr : block_ + used_;
    used_ += bytes;
    return reinterpret_cast<T*>(piece);
  }

 private:
  char* block_ = nullptr;
  int64_t size_ = 0, used_ = 0;
};

}  // namespace egnn
