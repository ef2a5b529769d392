// The memory of one call: a single buffer, divided into arrays.
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
    if (buffer_ != nullptr) return_buffer(buffer_, size_);
  }

  // Calls request(is_last) twice, which must take the same arrays both times: the first round adds
  // up their sizes, the second (is_last) divides the memory.
  template <class Request>
  void plan(Request&& request) {
    request(false);
    size_ = used_;
    used_ = 0;
    buffer_ = take_buffer(size_);
    request(true);
  }

  // An array of `count` elements; null in the first round. Called within plan().
  template <class T>
  T* take(int64_t count) {
    const int64_t bytes = aligned_size(count * static_cast<int64_t>(sizeof(T)));
    if (bytes >= kPage) used_ = aligned_size(std::max(used_, kPage));
    char* array = buffer_ == nullptr ? nullptr : buffer_ + used_;
    used_ += bytes;
    return reinterpret_cast<T*>(array);
  }

 private:
  char* buffer_ = nullptr;
  int64_t size_ = 0, used_ = 0;
};

}  // namespace egnn
