#include <pybind11/stl.h>

#include <new>
#include <optional>
#include <vector>

#include "arrays.hpp"
#include "assignment_matrix.hpp"
#include "bindings.hpp"
#include "mudsc/threads.hpp"

namespace mudsc::bindings {
namespace {

using NumpyApi = py::detail::npy_api;

// Runs work(), without the lock of the interpreter unless `entries` are so few that another thread could not take the
// lock over before the work is done.
template <class Work>
void run_unlocked(std::int64_t entries, const Work& work) {
  constexpr std::int64_t kFewEntries = 4096;
  if (entries <= kFewEntries) return work();
  py::gil_scoped_release released;
  work();
}

// ---- small single matrices: (matrix, option...) -> results, or None for anything that these functions do not know ---
//
// A call in Python takes longer than the search here, so these read their arguments and make the results themselves.
// None, errors included, is left to the general way of the caller.

// Reads a matrix that is not so large that threads would help.
bool read_small_matrix(const NumpyApi& numpy, PyObject* object, MatrixView& matrix) {
  constexpr std::int64_t kMaxEntries = 1 << 20;
  const bool is_read = read_matrix(numpy, object, matrix) || read_tensor_matrix(object, matrix);
  return is_read && matrix.rows <= kMaxEntries && matrix.columns <= kMaxEntries &&
         matrix.rows * matrix.columns <= kMaxEntries;
}

// Reads a finite number of Python.
bool read_number(PyObject* object, double& value) {
  if (PyFloat_Check(object)) {
    value = PyFloat_AS_DOUBLE(object);
  } else if (PyLong_CheckExact(object)) {
    value = PyLong_AsDouble(object);
    if (PyErr_Occurred()) {
      PyErr_Clear();
      return false;
    }
  } else {
    return false;
  }
  return std::isfinite(value);
}

// Reads matrix, options and instruction level; false for anything unknown. `threshold` may be null or None.
bool read_problem(const NumpyApi& numpy, PyObject* object, PyObject* maximize, PyObject* threshold, MatrixView& matrix,
                  AssignmentOptions& options) {
  if (!PyBool_Check(maximize) || !read_small_matrix(numpy, object, matrix)) return false;
  options = AssignmentOptions{maximize == Py_True, threshold != nullptr && threshold != Py_None, 0.0, Isa::baseline, 1};
  if (options.has_threshold && !read_number(threshold, options.threshold)) return false;
  const int isa = isa_of_environment();
  options.isa = static_cast<Isa>(isa);
  return isa >= 0;
}

bool solve_small(const MatrixView& matrix, const AssignmentOptions& options, AssignmentResult& result) {
  AssignmentStatus status = AssignmentStatus::invalid;
  run_unlocked(matrix.rows * matrix.columns, [&] { status = solve_matrix(matrix, options, result); });
  return status == AssignmentStatus::optimal;
}

// Calls make(numpy) for a new reference, and turns exceptions of C++ into those of Python.
template <class Make>
PyObject* with_errors(const Make& make) {
  try {
    return make(NumpyApi::get());
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const OutOfMemory&) {
    PyErr_NoMemory();
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  }
  return nullptr;
}

// assign_array(cost_matrix, maximize) -> (row indices, column indices), tensors for a tensor, or None: the whole of
// mudsc_fast.linear_sum_assignment.
PyObject* assign_array(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  return with_errors([&](const NumpyApi& numpy) -> PyObject* {
    MatrixView matrix;
    AssignmentOptions options;
    if (count != 2 || !read_problem(numpy, arguments[0], arguments[1], nullptr, matrix, options)) Py_RETURN_NONE;
    const std::int64_t pairs = matrix.rows < matrix.columns ? matrix.rows : matrix.columns;
    const NewArray<std::int64_t> rows(numpy, pairs), columns(numpy, pairs);
    const bool tall = matrix.rows > matrix.columns;
    Scratch<std::int64_t, 128> column_of_row(tall ? matrix.rows : 0);
    AssignmentResult result{tall ? column_of_row.data() : columns.data, nullptr, nullptr, 0.0, 0.0};
    if (!solve_small(matrix, options, result)) Py_RETURN_NONE;
    for (std::int64_t i = 0; i < pairs; ++i) rows.data[i] = i;
    for (std::int64_t i = 0, k = 0; tall && i < matrix.rows; ++i) {
      const std::int64_t column = result.column_of_row[i];
      if (column < 0) continue;
      rows.data[k] = i;
      columns.data[k++] = column;
    }
    if (Py_TYPE(arguments[0]) == numpy.PyArray_Type_) return PyTuple_Pack(2, rows.ptr(), columns.ptr());
    const py::object row_tensor = tensor_of_array(rows.ptr()), column_tensor = tensor_of_array(columns.ptr());
    return PyTuple_Pack(2, row_tensor.ptr(), column_tensor.ptr());
  });
}

// What a result needs besides the columns, in one array because each array takes time to make: objective, gap, row
// duals and column duals.
class Numbers {
 public:
  Numbers(const NumpyApi& numpy, const MatrixView& matrix) : array_(numpy, 2 + matrix.rows + matrix.columns) {}
  void point(AssignmentResult& result, std::int64_t rows) const {
    result.row_duals = array_.data + 2;
    result.column_duals = array_.data + 2 + rows;
  }
  // Writes the two that the solver returns by value.
  static void finish(const AssignmentResult& result) {
    result.row_duals[-2] = result.objective;
    result.row_duals[-1] = result.gap;
  }
  PyObject* ptr() const { return array_.ptr(); }

 private:
  NewArray<double> array_;
};

// A new object of the type, with these attributes; as object.__new__ and two assignments to its __dict__ would make it,
// in a quarter of the time.
PyObject* make_result(PyObject* type, PyObject* arrays, const AssignmentOptions& options) {
  PyTypeObject* const of_result = reinterpret_cast<PyTypeObject*>(type);
  static PyObject* const kArrays = PyUnicode_InternFromString("_arrays");
  static PyObject* const kThreshold = PyUnicode_InternFromString("threshold");
  const py::object result = py::reinterpret_steal<py::object>(of_result->tp_alloc(of_result, 0));
  if (!result || PyObject_GenericSetAttr(result.ptr(), kArrays, arrays) != 0) throw py::error_already_set();
  if (options.has_threshold) {
    const py::float_ threshold(options.threshold);
    if (PyObject_GenericSetAttr(result.ptr(), kThreshold, threshold.ptr()) != 0) throw py::error_already_set();
  }
  return result.inc_ref().ptr();
}

// solve_array(similarity, maximize, threshold, result_type) -> an object of that type with the attribute `_arrays`:
// columns and numbers; for None instead of a type, a tensor of the columns; or None: mudsc_fast.linear_assignment.
PyObject* solve_array(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  return with_errors([&](const NumpyApi& numpy) -> PyObject* {
    MatrixView matrix;
    AssignmentOptions options;
    if (count != 4 || !(PyType_Check(arguments[3]) || arguments[3] == Py_None) ||
        !read_problem(numpy, arguments[0], arguments[1], arguments[2], matrix, options)) {
      Py_RETURN_NONE;
    }
    const NewArray<std::int64_t> columns(numpy, matrix.rows);
    AssignmentResult result{columns.data, nullptr, nullptr, 0.0, 0.0};
    if (arguments[3] == Py_None) {
      if (!solve_small(matrix, options, result)) Py_RETURN_NONE;
      return tensor_of_array(columns.ptr()).release().ptr();
    }
    const Numbers numbers(numpy, matrix);
    numbers.point(result, matrix.rows);
    if (!solve_small(matrix, options, result)) Py_RETURN_NONE;
    Numbers::finish(result);
    const py::object arrays = py::reinterpret_steal<py::object>(PyTuple_Pack(2, columns.ptr(), numbers.ptr()));
    return make_result(arguments[3], arrays.ptr(), options);
  });
}

// assign_both_ways(cost_matrix, threshold, need_square) -> (cost, column of each row, row of each column) or None: the
// form in which lap answers, with int32 and -1. The threshold may be None.
PyObject* assign_both_ways(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  return with_errors([&](const NumpyApi& numpy) -> PyObject* {
    MatrixView matrix;
    AssignmentOptions options;
    if (count != 3 || Py_TYPE(arguments[0]) != numpy.PyArray_Type_) Py_RETURN_NONE;
    if (!read_problem(numpy, arguments[0], Py_False, arguments[1], matrix, options)) Py_RETURN_NONE;
    if (arguments[2] != Py_False && matrix.rows != matrix.columns) Py_RETURN_NONE;
    const NewArray<std::int32_t> columns(numpy, matrix.rows), rows(numpy, matrix.columns);
    Scratch<std::int64_t, 128> column_of_row(matrix.rows);
    AssignmentResult result{column_of_row.data(), nullptr, nullptr, 0.0, 0.0};
    if (!solve_small(matrix, options, result)) Py_RETURN_NONE;
    for (std::int64_t j = 0; j < matrix.columns; ++j) rows.data[j] = -1;
    for (std::int64_t i = 0; i < matrix.rows; ++i) {
      const std::int64_t column = result.column_of_row[i];
      columns.data[i] = static_cast<std::int32_t>(column);
      if (column >= 0) rows.data[column] = static_cast<std::int32_t>(i);
    }
    const py::object cost = py::reinterpret_steal<py::object>(PyFloat_FromDouble(result.objective));
    return PyTuple_Pack(3, cost.ptr(), columns.ptr(), rows.ptr());
  });
}

// ---- lists of matrices, and batches of one shape ------------------------------------------------------------------

// Matrices of a list with where their results go, solved on threads: one call for problems of any shapes.
struct Listed {
  std::vector<MatrixView> matrices;
  std::vector<AssignmentResult> results;
  std::vector<AssignmentStatus> statuses;

  void solve(AssignmentOptions options, int threads) {
    const std::int64_t count = static_cast<std::int64_t>(matrices.size());
    std::int64_t entries = 0;
    for (const MatrixView& matrix : matrices) entries += matrix.rows * matrix.columns;
    options.threads = count == 1 ? threads : 1;
    bool out_of_memory = false;
    auto body = [&](std::int64_t begin, std::int64_t end) {
      try {
        for (std::int64_t k = begin; k < end; ++k) {
          const auto at = static_cast<std::size_t>(k);
          statuses[at] = solve_matrix(matrices[at], options, results[at]);
        }
      } catch (...) {  // OutOfMemory or std::bad_alloc: nothing else is thrown, and no exception may leave a thread
        __atomic_store_n(&out_of_memory, true, __ATOMIC_RELAXED);
      }
    };
    // A thread takes 20 us to start, in which about so many entries are solved.
    constexpr std::int64_t kEntriesPerThread = 1 << 14;
    const std::int64_t mean = entries / count + 1;
    parallel_for(threads, count, kEntriesPerThread / mean + 1, body);
    if (out_of_memory) throw OutOfMemory{};
  }
};

// Returns the results of each matrix, as solve_array does, and the statuses of all.
py::tuple solve_list(const py::list& arrays, bool maximize, const py::object& threshold, bool return_duals, int isa,
                     int threads) {
  const NumpyApi& numpy = NumpyApi::get();
  Listed listed;
  py::list answers;
  std::int64_t entries = 0;
  for (const py::handle array : arrays) {
    MatrixView matrix;
    if (!read_matrix(numpy, array.ptr(), matrix)) throw py::type_error("expected matrices of float32 or float64");
    entries += matrix.rows * matrix.columns;
    const NewArray<std::int64_t> columns(numpy, matrix.rows);
    AssignmentResult result{columns.data, nullptr, nullptr, 0.0, 0.0};
    if (return_duals) {
      const Numbers numbers(numpy, matrix);
      numbers.point(result, matrix.rows);
      answers.append(py::reinterpret_steal<py::object>(PyTuple_Pack(2, columns.ptr(), numbers.ptr())));
    } else {
      answers.append(py::handle(columns.ptr()));
    }
    listed.matrices.push_back(matrix);
    listed.results.push_back(result);
  }
  listed.statuses.resize(listed.matrices.size());
  AssignmentOptions options{maximize, !threshold.is_none(), 0.0, static_cast<Isa>(isa), 1};
  if (options.has_threshold) options.threshold = threshold.cast<double>();
  if (!listed.matrices.empty()) run_unlocked(entries, [&] { listed.solve(options, threads); });
  for (const AssignmentResult& result : listed.results) {
    if (return_duals) Numbers::finish(result);
  }
  py::list statuses;
  for (const AssignmentStatus status : listed.statuses) statuses.append(static_cast<int>(status));
  return py::make_tuple(answers, statuses);
}

template <class Value>
using Array = py::array_t<Value, py::array::c_style>;

// Returns (columns, row duals, column duals, objective, gap, status) of a batch of [batch, rows, columns] values, which
// are an array of any type with the bytes of `dtype`, contiguous, rows <= columns.
py::tuple linear_assignment(const py::array& values, int dtype, bool maximize, double tolerance,
                            const std::optional<Array<double>>& prices, int isa, int threads) {
  const bool readable = values.ndim() == 3 && (values.flags() & py::array::c_style) != 0 && dtype >= 0 &&
                        dtype <= static_cast<int>(ScalarType::float64) && values.itemsize() == kScalarBytes[dtype] &&
                        values.shape(1) <= values.shape(2);
  if (!readable) throw py::type_error("expected contiguous values [batch, rows, columns] with rows <= columns");
  const py::ssize_t batch = values.shape(0), rows = values.shape(1), columns = values.shape(2);
  if (prices && (prices->ndim() != 2 || prices->shape(0) != batch || prices->shape(1) != columns)) {
    throw py::type_error("expected prices [batch, columns]");
  }
  Array<std::int64_t> column_of_row({batch, rows});
  Array<double> row_duals({batch, rows}), column_duals({batch, columns}), objective(batch), gap(batch);
  Array<std::int32_t> status(batch);
  const AssignmentProblem problem{values.data(),
                                  static_cast<ScalarType>(dtype),
                                  batch,
                                  rows,
                                  columns,
                                  false,
                                  maximize,
                                  tolerance,
                                  threads,
                                  prices ? prices->data() : nullptr,
                                  column_of_row.mutable_data(),
                                  row_duals.mutable_data(),
                                  column_duals.mutable_data(),
                                  objective.mutable_data(),
                                  gap.mutable_data(),
                                  reinterpret_cast<AssignmentStatus*>(status.mutable_data())};
  {
    py::gil_scoped_release released;
    MUDSC_CALL_KERNEL(static_cast<Isa>(isa), linear_assignment, problem);
  }
  return py::make_tuple(column_of_row, row_duals, column_duals, objective, gap, status);
}

// The same for one problem whose matrix is computed from features x [rows, features] and y [columns, features], rows <=
// columns; None if values are too large or small.
py::object pairwise_assignment(const Array<float>& x, const Array<float>& y, bool squared_distance, bool maximize,
                               double tolerance, const std::optional<Array<double>>& prices, int isa, int threads) {
  const bool readable = x.ndim() == 2 && y.ndim() == 2 && x.shape(1) == y.shape(1) && x.shape(0) > 0 &&
                        x.shape(0) <= y.shape(0) && y.shape(0) >= kMinPairwiseColumns;
  if (!readable) throw py::type_error("expected features [rows, d] and [columns, d] with rows <= columns");
  const py::ssize_t rows = x.shape(0), columns = y.shape(0);
  if (prices && (prices->ndim() != 1 || prices->shape(0) != columns)) throw py::type_error("expected prices [columns]");
  Array<std::int64_t> column_of_row(rows);
  Array<double> row_duals(rows), column_duals(columns);
  double objective = 0.0, gap = 0.0;
  AssignmentStatus status = AssignmentStatus::invalid;
  const PairwiseProblem problem{{nullptr, ScalarType::float32, 1, rows, columns, false, maximize, tolerance, threads,
                                 prices ? prices->data() : nullptr, column_of_row.mutable_data(),
                                 row_duals.mutable_data(), column_duals.mutable_data(), &objective, &gap, &status},
                                x.data(),
                                y.data(),
                                x.shape(1),
                                squared_distance};
  bool solved;
  {
    py::gil_scoped_release released;
    solved = MUDSC_CALL_KERNEL(static_cast<Isa>(isa), pairwise_assignment, problem);
  }
  if (!solved) return py::none();
  return py::make_tuple(column_of_row, row_duals, column_duals, objective, gap);
}

}  // namespace

void register_assignment(py::module_& module) {
  module.add_object("assign_array", plain_function<assign_array>("assign_array"));
  module.add_object("solve_array", plain_function<solve_array>("solve_array"));
  module.add_object("assign_both_ways", plain_function<assign_both_ways>("assign_both_ways"));
  module.def("solve_list", &solve_list, py::arg("arrays"), py::arg("maximize"), py::arg("threshold"),
             py::arg("return_duals"), py::arg("isa"), py::arg("threads"));
  module.def("linear_assignment", &linear_assignment, py::arg("values"), py::arg("dtype"), py::arg("maximize"),
             py::arg("tolerance"), py::arg("prices"), py::arg("isa"), py::arg("threads"));
  module.def("pairwise_assignment", &pairwise_assignment, py::arg("x"), py::arg("y"), py::arg("squared_distance"),
             py::arg("maximize"), py::arg("tolerance"), py::arg("prices"), py::arg("isa"), py::arg("threads"));
}

}  // namespace mudsc::bindings
