// Tensors as arguments of bindings: read and checked here, without torch's headers.
//
// Recent versions of torch publish a table of functions on the tensor type that describes a tensor in about 50 ns (the
// exchange API of DLPack 1.2). With older versions the tensor's attributes are read.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <initializer_list>
#include <string>
#include <vector>

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
  int (*read)(void* object, DlpackTensor* tensor);  // nonzero, with an exception set, if the tensor cannot be described
  void* current_stream;
};

// The table of a tensor type, or null if this version of torch has none.
const DlpackFunctions* dlpack_functions(const py::object& tensor_type);

// Entry types that bindings accept.
enum class EntryType : std::int32_t { float16, bfloat16, float32, float64, int32, int64, other };
template <class T>
constexpr EntryType kEntryType = EntryType::other;
template <>
inline constexpr EntryType kEntryType<float> = EntryType::float32;
template <>
inline constexpr EntryType kEntryType<double> = EntryType::float64;
template <>
inline constexpr EntryType kEntryType<std::int32_t> = EntryType::int32;
template <>
inline constexpr EntryType kEntryType<std::int64_t> = EntryType::int64;

// Used instead of a CUDA device index.
constexpr int kHostMemory = -1;

// A dense tensor in host memory or on a CUDA device. Valid as long as the object it was read from.
class TensorView {
 public:
  // Errors refer to the argument as `name`. Raises TypeError if the object is not a tensor, and ValueError if it is
  // neither in host memory nor on the device of that index.
  TensorView(py::handle object, const char* name, int device = kHostMemory);
  // The same without exceptions, for fast paths: returns false if the object is not such a tensor.
  static bool try_read(const DlpackFunctions& functions, PyObject* object, TensorView& view);
  // Reads a torch.Tensor or Parameter (no other subclass) in host memory whose entries are as they are in memory. For
  // callers that compute no gradient and are not traced. False for anything else, without an exception.
  static bool try_read_plain(PyObject* object, TensorView& view);
  TensorView() = default;
  TensorView(const TensorView&) = delete;
  TensorView& operator=(const TensorView&) = delete;

  void* data = nullptr;
  EntryType type = EntryType::other;
  int num_axes = 0;
  const std::int64_t* shape = nullptr;
  const std::int64_t* strides = nullptr;  // in entries

  bool is_contiguous() const;
  bool is_float() const { return type <= EntryType::float64; }
  // Of a tensor of floating-point numbers.
  ScalarType scalar_type() const { return static_cast<ScalarType>(type); }
  std::int64_t entries() const;

  // Checks that raise ValueError: the type of entries, the shape (-1 for any length), the order in memory.
  void expect_float() const;
  void expect_type(EntryType expected) const;
  void expect_shape(const std::int64_t* lengths, std::size_t count) const;
  void expect_shape(std::initializer_list<std::int64_t> lengths) const {
    expect_shape(lengths.begin(), lengths.size());
  }
  void expect_contiguous() const;
  // Rows of adjacent entries: the last axis has stride 1.
  void expect_adjacent() const;

  // The entries of a contiguous tensor of type T and of a shape.
  template <class T>
  T* contiguous(std::initializer_list<std::int64_t> expected) const {
    expect_type(kEntryType<T>);
    expect_shape(expected);
    expect_contiguous();
    return static_cast<T*>(data);
  }

 private:
  void read_dlpack(const DlpackTensor& tensor);
  void read_attributes(py::handle object, int device);
  [[noreturn]] void fail(const std::string& expected) const;

  const char* name_ = "";
  std::vector<std::int64_t> lengths_;  // shape and strides if the tensor object does not hold them itself
};

// The entries of an optional tensor; null for None.
template <class T>
T* optional_contiguous(py::handle object, const char* name, std::initializer_list<std::int64_t> shape) {
  return object.is_none() ? nullptr : TensorView(object, name).contiguous<T>(shape);
}

// A tensor that shares the memory of a NumPy array.
py::object tensor_of_array(py::handle array);

// Lets tests read tensors by attributes, as in older versions of torch.
void read_tensors_by_attributes(bool enabled);

}  // namespace mudsc::bindings
