// Reads PyTorch's tensors by DLPack's C exchange API, and checks them.
//
// Reading a whole tensor this way takes about as long as reading one of its attributes in Python.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <stdexcept>
#include <string>

#include "dlpack.h"

namespace egnn {

namespace py = pybind11;

// torch.Tensor, its subclass Parameter, and what is needed to read them; set by
// set_tensor_classes().
struct TensorClasses {
  PyTypeObject *tensor = nullptr, *parameter = nullptr;
  PyObject* is_neg = nullptr;
  const DLPackExchangeAPI* api = nullptr;
};

inline TensorClasses& tensor_classes() {
  static TensorClasses classes;
  return classes;
}

// Throws std::runtime_error if this release of PyTorch lacks the API, or has another version of it.
inline void set_tensor_classes(const py::type& tensor, const py::type& parameter) {
  constexpr const char* kName = "dlpack_exchange_api";
  const py::object capsule = py::getattr(tensor, "__dlpack_c_exchange_api__", py::none());
  if (!PyCapsule_IsValid(capsule.ptr(), kName)) {
    throw std::runtime_error("torch.Tensor has no DLPack exchange API");
  }
  const auto* api =
      static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule.ptr(), kName));
  if (api->header.version.major != 1) {
    throw std::runtime_error("expected version 1 of the DLPack exchange API, got " +
                             std::to_string(api->header.version.major));
  }
  if (api->dltensor_from_py_object_no_sync == nullptr) {
    throw std::runtime_error("the DLPack exchange API cannot describe a tensor");
  }
  // the references are never released: they are needed as long as the process runs
  TensorClasses& c = tensor_classes();
  c.is_neg = py::object(tensor.attr("is_neg")).release().ptr();
  c.tensor = reinterpret_cast<PyTypeObject*>(py::object(tensor).release().ptr());
  c.parameter = reinterpret_cast<PyTypeObject*>(py::object(parameter).release().ptr());
  c.api = api;
}

enum class DType { kOther, kFloat32, kFloat64, kInt32, kInt64 };

inline DType dtype_of(const DLTensor& t) {
  if (t.dtype.lanes != 1) return DType::kOther;
  const bool wide = t.dtype.bits == 64;
  if (!wide && t.dtype.bits != 32) return DType::kOther;
  if (t.dtype.code == 2) return wide ? DType::kFloat64 : DType::kFloat32;
  if (t.dtype.code == 0) return wide ? DType::kInt64 : DType::kInt32;
  return DType::kOther;
}

inline int64_t numel(const DLTensor& t) {
  int64_t count = 1;
  for (int k = 0; k < t.ndim; ++k) count *= t.shape[k];
  return count;
}

// Whether an object is a strided tensor on the CPU that has memory. `view` then describes it, with
// the byte offset added to the address. Freed memory and PyTorch's lazy zeros have no address.
inline bool describe_tensor(PyObject* object, DLTensor& view) {
  const TensorClasses& c = tensor_classes();
  if (!PyObject_TypeCheck(object, c.tensor)) return false;
  if (c.api->dltensor_from_py_object_no_sync(object, &view) != 0) {
    PyErr_Clear();  // it has no strided memory: sparse, quantised or meta
    return false;
  }
  view.data = static_cast<char*>(view.data) + (view.data != nullptr ? view.byte_offset : 0);
  return view.device.device_type == 1 && (view.data != nullptr || numel(view) == 0);
}

// Whether each is None or a plain tensor: a torch.Tensor or Parameter but no subclass, strided, on
// the CPU, with memory, and not lazily negated. The same as is_plain in egnn_fast/runtime/eager.py,
// for all tensors of a call at once.
inline bool are_plain(const py::handle& tensors) {
  const TensorClasses& c = tensor_classes();
  const auto all = py::reinterpret_steal<py::object>(PySequence_Fast(tensors.ptr(), "tensors"));
  if (!all) throw py::error_already_set();
  PyObject** items = PySequence_Fast_ITEMS(all.ptr());
  for (Py_ssize_t k = 0; k < PySequence_Fast_GET_SIZE(all.ptr()); ++k) {
    PyObject* item = items[k];
    if (item == Py_None) continue;
    DLTensor view;
    if ((Py_TYPE(item) != c.tensor && Py_TYPE(item) != c.parameter) ||
        !describe_tensor(item, view)) {
      return false;
    }
    PyObject* negated = PyObject_CallOneArg(c.is_neg, item);
    if (negated == nullptr) throw py::error_already_set();
    Py_DECREF(negated);  // True and False stay alive
    if (negated == Py_True) return false;
  }
  return true;
}

constexpr int64_t kAnySize = -1;

// A list of `count` tensors, some of them None, that remembers whether a check has failed. It owns
// no tensor.
template <size_t count>
class TensorList {
 public:
  explicit TensorList(const py::handle& tensors) {
    const auto all = py::reinterpret_steal<py::object>(PySequence_Fast(tensors.ptr(), "tensors"));
    if (!all) throw py::error_already_set();
    const Py_ssize_t size = PySequence_Fast_GET_SIZE(all.ptr());
    if (size != static_cast<Py_ssize_t>(count)) {
      throw std::invalid_argument("expected " + std::to_string(count) + " tensors, got " +
                                  std::to_string(size));
    }
    PyObject** items = PySequence_Fast_ITEMS(all.ptr());
    for (size_t k = 0; k < count; ++k) {
      present_[k] = items[k] != Py_None;
      if (present_[k] && !describe_tensor(items[k], views_[k])) valid_ = false;
    }
  }

  // False once a check has failed, or if a tensor cannot be read.
  bool valid() const { return valid_; }
  bool has(size_t k) const { return present_[k]; }
  const DLTensor& operator[](size_t k) const { return views_[k]; }

  // Whether tensor k is present and has this number of dimensions, so that its sizes may be read.
  bool has_dims(size_t k, int dims) const {
    return valid_ && present_[k] && views_[k].ndim == dims;
  }

  void require(bool condition) { valid_ = valid_ && condition; }

  // Requires that tensor k, if it is present, is dense and has this dtype and shape. Returns its
  // address; 0 if it is absent or wrong.
  uintptr_t dense(size_t k, DType dtype, int64_t rows) {
    return address(k, dtype, 1, {rows, 1}, 0);
  }
  uintptr_t dense(size_t k, DType dtype, int64_t rows, int64_t columns) {
    return address(k, dtype, 2, {rows, columns}, 0);
  }
  // Like dense(), but the first dimension may have any stride.
  uintptr_t strided(size_t k, DType dtype, int64_t rows) {
    return address(k, dtype, 1, {rows, 1}, 1);
  }
  uintptr_t strided(size_t k, DType dtype, int64_t rows, int64_t columns) {
    return address(k, dtype, 2, {rows, columns}, 1);
  }

 private:
  // Dimensions from `first` on must be dense.
  uintptr_t address(size_t k, DType dtype, int dims, std::array<int64_t, 2> shape, int first) {
    if (!valid_ || !present_[k]) return 0;
    const DLTensor& t = views_[k];
    valid_ = t.ndim == dims && dtype_of(t) == dtype;
    for (int d = 0; d < dims && valid_; ++d) {
      valid_ = shape[d] == kAnySize || t.shape[d] == shape[d];
    }
    if (!valid_) return 0;
    int64_t expected = 1;
    // the stride of a dimension of size 1 does not matter, nor those of an empty tensor
    for (int d = dims - 1; d >= first && numel(t) != 0; --d) {
      if (t.shape[d] != 1 && t.strides[d] != expected) valid_ = false;
      expected *= t.shape[d];
    }
    return valid_ ? reinterpret_cast<uintptr_t>(t.data) : 0;
  }

  std::array<DLTensor, count> views_;
  std::array<bool, count> present_;
  bool valid_ = true;
};

}  // namespace egnn
