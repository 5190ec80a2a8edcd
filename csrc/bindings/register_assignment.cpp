#include <pybind11/numpy.h>

#include <new>
#include <vector>

#include "bindings.hpp"
#include "mudsc/assignment.hpp"

namespace mudsc::bindings {
namespace {

// A matrix of numpy that can be read as it is.
struct Matrix {
  const void* values;
  ScalarType type;
  std::int64_t rows;
  std::int64_t columns;
};

// Whether `object` is a contiguous, aligned matrix of native float32 or float64, not empty and not so large that
// threads would help.
bool read_matrix(const py::detail::npy_api& numpy, PyObject* object, Matrix& matrix) {
  using Numpy = py::detail::npy_api;
  constexpr int kReadable = Numpy::NPY_ARRAY_C_CONTIGUOUS_ | Numpy::NPY_ARRAY_ALIGNED_;
  constexpr std::int64_t kMostEntries = 1 << 20;
  if (Py_TYPE(object) != numpy.PyArray_Type_) return false;
  const auto* const array = py::detail::array_proxy(object);
  if (array->nd != 2 || (array->flags & kReadable) != kReadable) return false;
  const auto* const descriptor = py::detail::array_descriptor_proxy(array->descr);
  const bool is_double = descriptor->type_num == Numpy::NPY_DOUBLE_;
  if ((!is_double && descriptor->type_num != Numpy::NPY_FLOAT_) || descriptor->byteorder != '=') return false;
  matrix = Matrix{array->data, is_double ? ScalarType::float64 : ScalarType::float32, array->dimensions[0],
                  array->dimensions[1]};
  return matrix.rows > 0 && matrix.columns > 0 && matrix.rows <= kMostEntries / matrix.columns;
}

// A new array of numpy and the address of its entries: [count], or a single number for a count of -1.
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

template <class Value>
std::vector<unsigned char> transposed(const Matrix& matrix) {
  std::vector<unsigned char> result(static_cast<std::size_t>(matrix.rows * matrix.columns) * sizeof(Value));
  const Value* const from = static_cast<const Value*>(matrix.values);
  Value* const to = reinterpret_cast<Value*>(result.data());
  for (std::int64_t i = 0; i < matrix.rows; ++i) {
    for (std::int64_t j = 0; j < matrix.columns; ++j) to[j * matrix.rows + i] = from[i * matrix.columns + j];
  }
  return result;
}

struct Results {
  std::int64_t* column_of_row;
  double* row_duals;
  double* column_duals;
  double* objective;
  double* gap;
};

// Solves a matrix with rows <= columns.
bool solve(const Matrix& matrix, bool maximize, int isa, const Results& results) {
  constexpr std::int64_t kFewEntries = 4096;
  AssignmentStatus status;
  const AssignmentProblem problem{matrix.values,
                                  matrix.type,
                                  1,
                                  matrix.rows,
                                  matrix.columns,
                                  maximize,
                                  0.0,
                                  1,
                                  nullptr,
                                  results.column_of_row,
                                  results.row_duals,
                                  results.column_duals,
                                  results.objective,
                                  results.gap,
                                  &status};
  if (matrix.rows * matrix.columns <= kFewEntries) {
    // Done before another thread could take the lock over.
    MUDSC_CALL_KERNEL(static_cast<Isa>(isa), linear_assignment, problem);
  } else {
    py::gil_scoped_release released;
    MUDSC_CALL_KERNEL(static_cast<Isa>(isa), linear_assignment, problem);
  }
  return status == AssignmentStatus::optimal;
}

// The same without duals, which go to scratch memory.
bool solve_columns(const Matrix& matrix, bool maximize, int isa, std::int64_t* column_of_row) {
  constexpr std::int64_t kNear = 128;
  const std::int64_t duals = matrix.rows + matrix.columns;
  double near_duals[kNear], objective, gap;
  std::vector<double> far_duals(duals > kNear ? static_cast<std::size_t>(duals) : 0);
  double* const row_duals = duals > kNear ? far_duals.data() : near_duals;
  return solve(matrix, maximize, isa, Results{column_of_row, row_duals, row_duals + matrix.rows, &objective, &gap});
}

bool solve_into(const Matrix& matrix, bool maximize, int isa, std::int64_t* rows, std::int64_t* columns) {
  if (matrix.rows <= matrix.columns) {
    for (std::int64_t i = 0; i < matrix.rows; ++i) rows[i] = i;
    return solve_columns(matrix, maximize, isa, columns);
  }
  const auto values = matrix.type == ScalarType::float64 ? transposed<double>(matrix) : transposed<float>(matrix);
  const Matrix wide{values.data(), matrix.type, matrix.columns, matrix.rows};
  std::vector<std::int64_t> row_of_column(static_cast<std::size_t>(matrix.columns));
  if (!solve_columns(wide, maximize, isa, row_of_column.data())) return false;
  std::vector<std::int64_t> column_of_row(static_cast<std::size_t>(matrix.rows), -1);
  for (std::int64_t j = 0; j < matrix.columns; ++j) {
    column_of_row[static_cast<std::size_t>(row_of_column[static_cast<std::size_t>(j)])] = j;
  }
  for (std::int64_t i = 0, k = 0; i < matrix.rows; ++i) {
    const std::int64_t column = column_of_row[static_cast<std::size_t>(i)];
    if (column < 0) continue;
    rows[k] = i;
    columns[k++] = column;
  }
  return true;
}

// Reads (matrix, maximize) and calls solve_plain(numpy, matrix, maximize, isa) for a new reference to the result, or
// null. None if there is anything that is not known here, errors too.
template <class SolvePlain>
PyObject* with_plain(PyObject* const* arguments, Py_ssize_t count, const SolvePlain& solve_plain) {
  try {
    const py::detail::npy_api& numpy = py::detail::npy_api::get();
    Matrix matrix;
    if (count != 2 || !PyBool_Check(arguments[1]) || !read_matrix(numpy, arguments[0], matrix)) Py_RETURN_NONE;
    const int isa = isa_of_environment();
    if (isa < 0) Py_RETURN_NONE;
    return solve_plain(numpy, matrix, arguments[1] == Py_True, isa);
  } catch (py::error_already_set& error) {
    error.restore();
    return nullptr;
  } catch (const OutOfMemory&) {
    return PyErr_NoMemory();
  } catch (const std::bad_alloc&) {
    return PyErr_NoMemory();
  }
}

// assign_array(cost_matrix, maximize) -> (row indices, column indices) or None: the whole of
// mudsc_fast.linear_sum_assignment for the plain case, in which a call in Python takes longer than the search. Unlike
// other bindings it checks its arguments. None, errors included, is left to the caller's general way.
PyObject* assign_array(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  const auto solve_plain = [](const auto& numpy, const Matrix& matrix, bool maximize, int isa) -> PyObject* {
    const std::int64_t pairs = matrix.rows < matrix.columns ? matrix.rows : matrix.columns;
    const NewArray<std::int64_t> rows(numpy, pairs), columns(numpy, pairs);
    if (!solve_into(matrix, maximize, isa, rows.data, columns.data)) Py_RETURN_NONE;
    return PyTuple_Pack(2, rows.ptr(), columns.ptr());
  };
  return with_plain(arguments, count, solve_plain);
}

// solve_array(similarity, maximize) -> (columns, objective, row duals, column duals, gap) or None: the same for
// mudsc_fast.linear_assignment of a matrix with no more rows than columns.
PyObject* solve_array(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  const auto solve_plain = [](const auto& numpy, const Matrix& matrix, bool maximize, int isa) -> PyObject* {
    if (matrix.rows > matrix.columns) Py_RETURN_NONE;
    const NewArray<std::int64_t> columns(numpy, matrix.rows);
    const NewArray<double> objective(numpy, -1), row_duals(numpy, matrix.rows), column_duals(numpy, matrix.columns),
        gap(numpy, -1);
    const Results results{columns.data, row_duals.data, column_duals.data, objective.data, gap.data};
    if (!solve(matrix, maximize, isa, results)) Py_RETURN_NONE;
    return PyTuple_Pack(5, columns.ptr(), objective.ptr(), row_duals.ptr(), column_duals.ptr(), gap.ptr());
  };
  return with_plain(arguments, count, solve_plain);
}

}  // namespace

void register_assignment(py::module_& module) {
  module.add_object("assign_array", plain_function<assign_array>("assign_array"));
  module.add_object("solve_array", plain_function<solve_array>("solve_array"));
  module.def(
      "linear_assignment",
      [](int isa, int threads, int dtype, std::uintptr_t values, std::int64_t batch, std::int64_t rows,
         std::int64_t columns, bool maximize, double tolerance, std::uintptr_t prices, std::uintptr_t column_of_row,
         std::uintptr_t row_duals, std::uintptr_t column_duals, std::uintptr_t objective, std::uintptr_t gap,
         std::uintptr_t status) {
        const AssignmentProblem problem{pointer<const void>(values),
                                        static_cast<ScalarType>(dtype),
                                        batch,
                                        rows,
                                        columns,
                                        maximize,
                                        tolerance,
                                        threads,
                                        pointer<const double>(prices),
                                        pointer<std::int64_t>(column_of_row),
                                        pointer<double>(row_duals),
                                        pointer<double>(column_duals),
                                        pointer<double>(objective),
                                        pointer<double>(gap),
                                        pointer<AssignmentStatus>(status)};
        py::gil_scoped_release released;
        MUDSC_CALL_KERNEL(static_cast<Isa>(isa), linear_assignment, problem);
      },
      py::kw_only(), py::arg("isa"), py::arg("threads"), py::arg("dtype"), py::arg("values"), py::arg("batch"),
      py::arg("rows"), py::arg("columns"), py::arg("maximize"), py::arg("tolerance"), py::arg("prices"),
      py::arg("column_of_row"), py::arg("row_duals"), py::arg("column_duals"), py::arg("objective"), py::arg("gap"),
      py::arg("status"));
}

}  // namespace mudsc::bindings
