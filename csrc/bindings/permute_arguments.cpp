#include "permute_arguments.hpp"

namespace mudsc::bindings {
namespace {

std::int64_t product(const std::int64_t* lengths, int begin, int end) {
  std::int64_t result = 1;
  for (int axis = begin; axis < end; ++axis) result *= lengths[axis];
  return result;
}

AxisMap axis_map(int axis, std::int64_t length, const MappedAxis* mapped, int num_mapped) {
  for (int i = 0; i < num_mapped; ++i) {
    if (mapped[i].axis == axis) return mapped[i].map;
  }
  return {UnitMapKind::identity, nullptr, nullptr, length, length};
}

py::object attribute(PyObject* object, const py::str& name) {
  return py::reinterpret_steal<py::object>(PyObject_GetAttr(object, name.ptr()));
}

bool read_length(PyObject* object, const py::str& name, std::int64_t& length) {
  const py::object value = attribute(object, name);
  if (!value || !PyLong_CheckExact(value.ptr())) return false;
  length = PyLong_AsLongLong(value.ptr());
  return length >= 0;
}

}  // namespace

PermuteView permute_view(const std::int64_t* shape, int num_axes, const int* mapped, int num_mapped) {
  // With fewer entries per unit, a single mapped axis is treated as columns: longer lines, fewer loops.
  constexpr std::int64_t kShortLine = 64;
  PermuteView view;
  if (num_mapped == 0) {
    const int first = num_axes < 1 ? num_axes : 1;
    view.rows = product(shape, 0, first);
    view.columns = product(shape, first, num_axes);
    return view;
  }
  const int first = mapped[0];
  const std::int64_t before = product(shape, 0, first);
  const std::int64_t after = product(shape, mapped[num_mapped - 1] + 1, num_axes);
  if (num_mapped == 2) {
    view.outer = before;
    view.rows = shape[first];
    view.row_axis = first;
    view.middle = product(shape, first + 1, mapped[1]);
    view.columns = shape[mapped[1]];
    view.column_axis = mapped[1];
    view.inner = after;
  } else if (after < kShortLine) {
    view.rows = before;
    view.columns = shape[first];
    view.column_axis = first;
    view.inner = after;
  } else {
    view.outer = before;
    view.rows = shape[first];
    view.row_axis = first;
    view.columns = after;
  }
  return view;
}

PermuteProblem permute_problem(ScalarType type, const std::int64_t* shape, int num_axes, const MappedAxis* mapped,
                               int num_mapped) {
  int axes[kMaxMapped] = {};
  for (int i = 0; i < num_mapped; ++i) axes[i] = mapped[i].axis;
  const PermuteView view = permute_view(shape, num_axes, axes, num_mapped);
  PermuteProblem problem{};
  problem.dtype = type;
  problem.num_models = 1;
  problem.outer = view.outer;
  problem.middle = view.middle;
  problem.inner = view.inner;
  problem.rows = axis_map(view.row_axis, view.rows, mapped, num_mapped);
  problem.columns = axis_map(view.column_axis, view.columns, mapped, num_mapped);
  problem.threads = 1;
  return problem;
}

bool read_unit_map(const UnitMapNames& names, PyObject* object, std::int64_t length, std::int64_t num_models,
                   AxisMap& map, py::object& arrays) {
  arrays = attribute(object, names.on_cpu);
  const py::object is_permutation = attribute(object, names.is_permutation);
  if (!arrays || !is_permutation || !read_length(object, names.units_in, map.units_in) ||
      !read_length(object, names.units_out, map.units_out) || map.units_in != length) {
    return false;
  }
  map.kind = is_permutation.ptr() == Py_False ? UnitMapKind::clusters : UnitMapKind::gather;
  const std::int64_t entries = map.kind == UnitMapKind::gather ? map.units_out : map.units_in;
  map.index = TensorView(PyTuple_GET_ITEM(arrays.ptr(), 0), "index").contiguous<std::int64_t>({num_models, entries});
  map.scale = optional_contiguous<double>(PyTuple_GET_ITEM(arrays.ptr(), 1), "scale", {map.units_out});
  return true;
}

}  // namespace mudsc::bindings
