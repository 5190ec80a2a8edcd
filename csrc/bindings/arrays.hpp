// Reading matrices and making NumPy arrays without the conversions of pybind11, which take longer than a small problem.
#pragma once

#include <pybind11/numpy.h>

#include <cstdint>

#include "mudsc/types.hpp"
#include "tensors.hpp"

namespace mudsc::bindings {

namespace py = pybind11;

// A matrix in memory: entry (i, j) is values[i * row_stride + j * column_stride].
struct MatrixView {
  const void* values;
  ScalarType type;
  std::int64_t rows;
  std::int64_t columns;
  std::int64_t row_stride;
  std::int64_t column_stride;

  bool is_contiguous() const { return column_stride == 1 && row_stride == columns; }
  MatrixView transposed() const { return {values, type, columns, rows, column_stride, row_stride}; }
};

// Fits the view of a matrix with at least one entry and positive strides; false for others. Strides are in entries.
inline bool fit_matrix(MatrixView& matrix) {
  // An axis of length 1 may have any stride.
  if (matrix.rows == 1) matrix.row_stride = matrix.columns;
  if (matrix.columns == 1) matrix.column_stride = 1;
  return matrix.rows > 0 && matrix.columns > 0 && matrix.row_stride > 0 && matrix.column_stride > 0;
}

// Reads a float32 or float64 tensor in host memory; see TensorView::try_read_plain.
inline bool read_tensor_matrix(PyObject* object, MatrixView& matrix) {
  TensorView view;
  if (!TensorView::try_read_plain(object, view) || view.num_axes != 2) return false;
  if (view.type != EntryType::float32 && view.type != EntryType::float64) return false;
  matrix = MatrixView{view.data, view.scalar_type(), view.shape[0], view.shape[1], view.strides[0], view.strides[1]};
  return fit_matrix(matrix);
}

// Reads an aligned array of native float32 or float64 with two axes, at least one entry and positive strides. Returns
// false, without raising an exception, for any other object.
inline bool read_matrix(const py::detail::npy_api& numpy, PyObject* object, MatrixView& matrix) {
  using Numpy = py::detail::npy_api;
  if (Py_TYPE(object) != numpy.PyArray_Type_) return false;
  const auto* const array = py::detail::array_proxy(object);
  if (array->nd != 2 || (array->flags & Numpy::NPY_ARRAY_ALIGNED_) == 0) return false;
  const auto* const descriptor = py::detail::array_descriptor_proxy(array->descr);
  const bool is_double = descriptor->type_num == Numpy::NPY_DOUBLE_;
  if ((!is_double && descriptor->type_num != Numpy::NPY_FLOAT_) || descriptor->byteorder != '=') return false;
  const ScalarType type = is_double ? ScalarType::float64 : ScalarType::float32;
  const int log2_bytes = is_double ? 3 : 2;  // two divisions would take a fiftieth of a small call
  const std::int64_t row_bytes = array->strides[0], column_bytes = array->strides[1];
  matrix = MatrixView{array->data,
                      type,
                      array->dimensions[0],
                      array->dimensions[1],
                      row_bytes >> log2_bytes,
                      column_bytes >> log2_bytes};
  const std::int64_t partial_bytes = (row_bytes | column_bytes) & ((1 << log2_bytes) - 1);
  return partial_bytes == 0 && fit_matrix(matrix);
}

// A new array with one axis of `count` entries, or a single number for a count of -1.
template <class Value>
class NewArray {
 public:
  NewArray(const py::detail::npy_api& numpy, std::int64_t count) {
    Py_intptr_t shape = count;
    PyObject* const descriptor = numpy.PyArray_DescrFromType_(py::detail::npy_format_descriptor<Value>::value);
    array_ = py::reinterpret_steal<py::object>(numpy.PyArray_NewFromDescr_(
        numpy.PyArray_Type_, descriptor, count < 0 ? 0 : 1, &shape, nullptr, nullptr, 0, nullptr));
    if (!array_) throw py::error_already_set();
    data = reinterpret_cast<Value*>(py::detail::array_proxy(array_.ptr())->data);
  }
  PyObject* ptr() const { return array_.ptr(); }

  Value* data;

 private:
  py::object array_;
};

}  // namespace mudsc::bindings
