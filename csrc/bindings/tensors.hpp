// Reading torch's tensors where a call in Python would take longer than the work: without torch's headers, by the
// function table that the tensor type of recent versions publishes (the "exchange API" of DLPack 1.2 and later).
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

#include "mudsc/types.hpp"

namespace mudsc::bindings {

namespace py = pybind11;

// Layouts of the DLPack standard.
struct DlpackTensor {
  void* data;
  std::int32_t device_type;
  std::int32_t device_id;
  std::int32_t num_axes;
  std::uint8_t type_code;
  std::uint8_t type_bits;
  std::uint16_t type_lanes;
  std::int64_t* shape;
  std::int64_t* strides;
  std::uint64_t byte_offset;
};

struct DlpackFunctions {
  std::uint32_t major_version;
  std::uint32_t minor_version;
  DlpackFunctions* previous;
  void* allocate;
  void* to_managed;
  void* from_managed;
  int (*read)(void* object, DlpackTensor* tensor);  // not zero, and an exception is set, if it cannot be described
  void* current_stream;
};

// The table of a tensor type, or null for one that has none.
inline const DlpackFunctions* dlpack_functions(const py::object& tensor_type) {
  constexpr std::uint32_t kMajorVersion = 1;
  if (!py::hasattr(tensor_type, "__dlpack_c_exchange_api__")) return nullptr;
  const py::object capsule = tensor_type.attr("__dlpack_c_exchange_api__");
  const auto* const functions =
      static_cast<const DlpackFunctions*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (functions == nullptr) throw py::error_already_set();
  return functions->major_version == kMajorVersion && functions->read != nullptr ? functions : nullptr;
}

// Reads a tensor that lies in the host's memory, entry after entry; false, without an exception, for any other. That
// the entries of a view are meant negated is not in the table: whoever takes foreign tensors asks them.
inline bool read_contiguous(const DlpackFunctions& functions, PyObject* object, DlpackTensor& tensor) {
  constexpr std::int32_t kHost = 1;
  if (functions.read(object, &tensor) != 0) {
    PyErr_Clear();
    return false;
  }
  if (tensor.device_type != kHost || tensor.type_lanes != 1) return false;
  std::int64_t entries = 1;
  for (std::int32_t axis = tensor.num_axes; axis-- > 0;) {
    if (tensor.shape[axis] != 1 && tensor.strides[axis] != entries) return false;
    entries *= tensor.shape[axis];
  }
  tensor.data = static_cast<char*>(tensor.data) + tensor.byte_offset;
  return true;
}

// Finds the type of a tensor's entries if kernels read it.
inline bool read_type(const DlpackTensor& tensor, ScalarType& type) {
  constexpr std::uint8_t kFloat = 2, kBrainFloat = 4;
  if (tensor.type_code == kBrainFloat && tensor.type_bits == 16) {
    type = ScalarType::bfloat16;
  } else if (tensor.type_code == kFloat && tensor.type_bits == 16) {
    type = ScalarType::float16;
  } else if (tensor.type_code == kFloat && tensor.type_bits == 32) {
    type = ScalarType::float32;
  } else if (tensor.type_code == kFloat && tensor.type_bits == 64) {
    type = ScalarType::float64;
  } else {
    return false;
  }
  return true;
}

}  // namespace mudsc::bindings
