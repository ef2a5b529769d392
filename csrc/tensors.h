// PyTorch's tensors as the extension reads them: by DLPack's C exchange API, some tens of
// nanoseconds each, where each attribute read from Python takes as long.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <initializer_list>
#include <stdexcept>
#include <string>

#include "dlpack.h"

namespace egnn {

namespace py = pybind11;

// torch.Tensor and what belongs to it; set once by connect().
struct TensorClasses {
  PyTypeObject *tensor = nullptr, *parameter = nullptr;
  PyObject* is_neg = nullptr;
  const DLPackExchangeAPI* api = nullptr;
};

inline TensorClasses& classes() {
  static TensorClasses found;
  return found;
}

inline void connect(const py::type& tensor, const py::type& parameter) {
  const py::object capsule = py::getattr(tensor, "__dlpack_c_exchange_api__", py::none());
  if (capsule.is_none()) throw std::runtime_error("torch.Tensor has no DLPack exchange API");
  void* pointer = PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api");
  if (pointer == nullptr) throw py::error_already_set();
  const auto* api = static_cast<const DLPackExchangeAPI*>(pointer);
  if (api->header.version.major != 1 || api->dltensor_from_py_object_no_sync == nullptr) {
    throw std::runtime_error("torch.Tensor has another DLPack exchange API than version 1");
  }
  // never released: they live as long as the process
  TensorClasses& c = classes();
  c.is_neg = py::object(tensor.attr("is_neg")).release().ptr();
  c.tensor = reinterpret_cast<PyTypeObject*>(py::object(tensor).release().ptr());
  c.parameter = reinterpret_cast<PyTypeObject*>(py::object(parameter).release().ptr());
  c.api = api;
}

enum class Kind { kOther, kFloat32, kFloat64, kInt32, kInt64 };

inline Kind kind_of(const DLTensor& t) {
  if (t.dtype.lanes != 1) return Kind::kOther;
  const bool wide = t.dtype.bits == 64;
  if (!wide && t.dtype.bits != 32) return Kind::kOther;
  if (t.dtype.code == 2) return wide ? Kind::kFloat64 : Kind::kFloat32;
  if (t.dtype.code == 0) return wide ? Kind::kInt64 : Kind::kInt32;
  return Kind::kOther;
}

inline int64_t count_of(const DLTensor& t) {
  int64_t count = 1;
  for (int k = 0; k < t.ndim; ++k) count *= t.shape[k];
  return count;
}

// Whether an object is a tensor with strided memory on the CPU, which `view` then describes. What
// PyTorch fills later (lazy zeros), and memory that was freed, has no address.
inline bool read(PyObject* object, DLTensor& view) {
  const TensorClasses& c = classes();
  if (!PyObject_TypeCheck(object, c.tensor)) return false;
  if (c.api->dltensor_from_py_object_no_sync(object, &view) != 0) {
    PyErr_Clear();  // sparse, quantised, on a device without memory
    return false;
  }
  view.data = static_cast<char*>(view.data) + (view.data != nullptr ? view.byte_offset : 0);
  return view.device.device_type == 1 && (view.data != nullptr || count_of(view) == 0);
}

// Whether all are None or plain tensors: of PyTorch's own classes, not lazily negated, readable.
inline bool are_plain(const py::handle& tensors) {
  const TensorClasses& c = classes();
  const auto all = py::reinterpret_steal<py::object>(PySequence_Fast(tensors.ptr(), "tensors"));
  if (!all) throw py::error_already_set();
  PyObject** items = PySequence_Fast_ITEMS(all.ptr());
  for (Py_ssize_t k = 0; k < PySequence_Fast_GET_SIZE(all.ptr()); ++k) {
    PyObject* item = items[k];
    if (item == Py_None) continue;
    DLTensor view;
    if ((Py_TYPE(item) != c.tensor && Py_TYPE(item) != c.parameter) || !read(item, view)) {
      return false;
    }
    PyObject* negated = PyObject_CallOneArg(c.is_neg, item);
    if (negated == nullptr) throw py::error_already_set();
    Py_DECREF(negated);  // True and False never die
    if (negated == Py_True) return false;
  }
  return true;
}

constexpr int64_t kAnyNumber = -1;

// `count` tensors, some of them None, that are to fit each other.
template <size_t count>
class TensorList {
 public:
  explicit TensorList(const py::handle& tensors) {
    const auto all = py::reinterpret_steal<py::object>(PySequence_Fast(tensors.ptr(), "tensors"));
    if (!all) throw py::error_already_set();
    if (PySequence_Fast_GET_SIZE(all.ptr()) != static_cast<Py_ssize_t>(count)) {
      throw std::invalid_argument("expected " + std::to_string(count) + " tensors");
    }
    PyObject** items = PySequence_Fast_ITEMS(all.ptr());
    for (size_t k = 0; k < count; ++k) {
      present_[k] = items[k] != Py_None;
      if (present_[k] && !read(items[k], views_[k])) fit_ = false;
    }
  }

  // Whether what was asked for so far held of all tensors.
  bool fit() const { return fit_; }
  bool has(size_t k) const { return present_[k]; }
  const DLTensor& operator[](size_t k) const { return views_[k]; }

  // Whether these dimensions can be asked for. A tensor that is absent has none.
  bool has_dims(size_t k, int dims) const { return fit_ && present_[k] && views_[k].ndim == dims; }

  void require(bool condition) { fit_ = fit_ && condition; }

  // All of these are there, or none.
  void together(std::initializer_list<size_t> group) {
    for (size_t k : group) require(present_[k] == present_[*group.begin()]);
  }

  // The address of a dense tensor of this kind and shape; 0 where there is none.
  uintptr_t dense(size_t k, Kind kind, int64_t rows) {
    return address(k, kind, 1, {rows, 1}, true);
  }
  uintptr_t dense(size_t k, Kind kind, int64_t rows, int64_t columns) {
    return address(k, kind, 2, {rows, columns}, true);
  }
  // The same of a vector whose elements, or a matrix whose rows, are any number apart.
  uintptr_t strided(size_t k, Kind kind, int64_t rows) {
    return address(k, kind, 1, {rows, 1}, false);
  }
  uintptr_t strided(size_t k, Kind kind, int64_t rows, int64_t columns) {
    return address(k, kind, 2, {rows, columns}, false);
  }

 private:
  uintptr_t address(size_t k, Kind kind, int dims, std::array<int64_t, 2> shape, bool dense) {
    if (!fit_ || !present_[k]) return 0;
    const DLTensor& t = views_[k];
    fit_ = t.ndim == dims && kind_of(t) == kind;
    for (int d = 0; d < dims && fit_; ++d) fit_ = shape[d] == kAnyNumber || t.shape[d] == shape[d];
    int64_t step = 1;
    for (int d = dims - 1; d >= 0 && fit_ && count_of(t) != 0; --d) {
      const bool free = t.shape[d] == 1 || (d == 0 && !dense);
      fit_ = free || t.strides[d] == step;
      step *= t.shape[d];
    }
    return fit_ ? reinterpret_cast<uintptr_t>(t.data) : 0;
  }

  std::array<DLTensor, count> views_;
  std::array<bool, count> present_;
  bool fit_ = true;
};

}  // namespace egnn
