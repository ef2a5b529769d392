// The parts of DLPack that read PyTorch's tensors and that give it a buffer.
//
// Declared here so that the build needs no headers of DLPack.
#pragma once

#include <cstdint>

// NOLINTBEGIN: names and layout are the standard's
struct DLDevice {
  int32_t device_type;  // 1: CPU
  int32_t device_id;
};

struct DLDataType {
  uint8_t code;  // 0: signed integer, 2: floating point
  uint8_t bits;
  uint16_t lanes;
};

struct DLTensor {
  void* data;
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

struct DLManagedTensor {
  DLTensor dl_tensor;
  void* manager_ctx;
  void (*deleter)(DLManagedTensor* self);
};

// Functions that a tensor class of Python offers to C (DLPack 1.3). Those that are not used are
// declared without arguments, to keep the layout.
struct DLPackExchangeAPI {
  struct {
    struct {
      uint32_t major, minor;
    } version;
    void* prev_api;
  } header;
  void (*managed_tensor_allocator)();
  void (*managed_tensor_from_py_object_no_sync)();
  void (*managed_tensor_to_py_object_no_sync)();
  // fills `out` without taking ownership; returns 0, or sets a Python error
  int (*dltensor_from_py_object_no_sync)(void* py_object, DLTensor* out);
  void (*current_work_stream)();
};
// NOLINTEND
