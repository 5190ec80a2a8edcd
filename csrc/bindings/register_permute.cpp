#include <pybind11/stl.h>

#include <cmath>
#include <memory>
#include <tuple>
#include <vector>

#include "bindings.hpp"
#include "mudsc/permute.hpp"
#include "tensors.hpp"

namespace mudsc::bindings {
namespace {

// kind, address of the index, address of the scale or 0, units in, units out
using AxisArguments = std::tuple<int, std::uintptr_t, std::uintptr_t, std::int64_t, std::int64_t>;

AxisMap axis_map(const AxisArguments& axis) {
  return AxisMap{static_cast<UnitMapKind>(std::get<0>(axis)), pointer<const std::int64_t>(std::get<1>(axis)),
                 pointer<const double>(std::get<2>(axis)), std::get<3>(axis), std::get<4>(axis)};
}

// ---- Whole calls of mudsc_fast.permute_merge ------------------------------------------------------------------

// What a call needs of Python, found once.
struct Torch {
  const DlpackFunctions* functions;
  py::object tensor_type, parameter_type, map_type, empty_like, num_threads, records_gradients;
  py::str requires_grad{"requires_grad"}, is_neg{"is_neg"}, new_empty{"new_empty"};
  py::str on_cpu{"on_cpu"}, is_permutation{"is_permutation"}, units_in{"units_in"}, units_out{"units_out"};
};

constexpr int kMostModels = 8;
constexpr int kMostAxes = 8;

struct MappedAxis {
  std::int32_t axis;
  AxisMap map;
};

// The arguments of a call, read and checked.
struct PlainMerge {
  int num_models = 0;
  int num_axes = 0;
  int num_mapped = 0;
  bool keeps_shape = true;
  ScalarType type = ScalarType::float32;
  std::int64_t shape[kMostAxes];  // of the tensors
  const void* tensors[kMostModels];
  double weights[kMostModels];
  MappedAxis mapped[2];
  // What is read, also if another thread changes the arguments meanwhile.
  py::object held_tensors[kMostModels], held_maps[2];
};

py::object attribute(PyObject* object, const py::str& name) {
  return py::reinterpret_steal<py::object>(PyObject_GetAttr(object, name.ptr()));
}

bool is_false(const py::object& value) { return value.ptr() == Py_False; }

// Other subclasses of Tensor may have their own notion of what is done with them.
bool is_plain(const Torch& torch, PyObject* object) {
  PyObject* const type = reinterpret_cast<PyObject*>(Py_TYPE(object));
  return type == torch.tensor_type.ptr() || type == torch.parameter_type.ptr();
}

bool needs_gradient(const Torch& torch, PyObject* tensor) {
  return !is_false(attribute(tensor, torch.requires_grad)) && !is_false(torch.records_gradients());
}

bool read_length(PyObject* object, const py::str& name, std::int64_t& length) {
  const py::object value = attribute(object, name);
  if (!value || !PyLong_CheckExact(value.ptr())) return false;
  length = PyLong_AsLongLong(value.ptr());
  return length >= 0;
}

// A tensor of a type that kernels read, in the host's memory, contiguous, and not recorded for gradients.
bool read_plain(const Torch& torch, PyObject* object, DlpackTensor& tensor, ScalarType& type) {
  if (!is_plain(torch, object)) return false;
  const auto negated = py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(object, torch.is_neg.ptr()));
  return is_false(negated) && !needs_gradient(torch, object) && read_contiguous(*torch.functions, object, tensor) &&
         read_type(tensor, type);
}

// Such tensors, alike and not empty.
bool read_tensors(const Torch& torch, PyObject* list, PlainMerge& merge) {
  if (!PyList_CheckExact(list) && !PyTuple_CheckExact(list)) return false;
  const Py_ssize_t count = PySequence_Fast_GET_SIZE(list);
  if (count < 1 || count > kMostModels) return false;
  merge.num_models = static_cast<int>(count);
  for (int i = 0; i < merge.num_models; ++i) {
    PyObject* const object = PySequence_Fast_GET_ITEM(list, i);
    DlpackTensor tensor;
    ScalarType type;
    if (!read_plain(torch, object, tensor, type) || tensor.num_axes > kMostAxes) return false;
    if (i == 0) {
      merge.type = type;
      merge.num_axes = tensor.num_axes;
    } else if (type != merge.type || tensor.num_axes != merge.num_axes) {
      return false;
    }
    for (int axis = 0; axis < merge.num_axes; ++axis) {
      if (i == 0) merge.shape[axis] = tensor.shape[axis];
      if (merge.shape[axis] != tensor.shape[axis] || tensor.shape[axis] == 0) return false;
    }
    merge.tensors[i] = tensor.data;
    merge.held_tensors[i] = py::reinterpret_borrow<py::object>(object);
  }
  return true;
}

// A map of as many models and units as the tensors have.
bool read_map(const Torch& torch, PyObject* object, std::int64_t length, int num_models, AxisMap& map,
              py::object& arrays) {
  constexpr std::uint8_t kSigned = 0;
  if (Py_TYPE(object) != reinterpret_cast<PyTypeObject*>(torch.map_type.ptr())) return false;
  arrays = attribute(object, torch.on_cpu);
  const py::object is_permutation = attribute(object, torch.is_permutation);
  DlpackTensor index;
  if (!arrays || !is_permutation || !read_length(object, torch.units_in, map.units_in) ||
      !read_length(object, torch.units_out, map.units_out) || map.units_in != length || map.units_out == 0 ||
      !read_contiguous(*torch.functions, PyTuple_GET_ITEM(arrays.ptr(), 0), index)) {
    return false;
  }
  map.kind = is_false(is_permutation) ? UnitMapKind::clusters : UnitMapKind::gather;
  const std::int64_t entries = map.kind == UnitMapKind::gather ? map.units_out : map.units_in;
  if (index.type_code != kSigned || index.type_bits != 64 || index.num_axes != 2 || index.shape[0] != num_models ||
      index.shape[1] != entries) {
    return false;
  }
  map.index = static_cast<const std::int64_t*>(index.data);
  map.scale = nullptr;
  PyObject* const scale = PyTuple_GET_ITEM(arrays.ptr(), 1);
  if (scale == Py_None) return true;
  DlpackTensor factors;
  ScalarType type;
  if (!read_contiguous(*torch.functions, scale, factors) || !read_type(factors, type) || type != ScalarType::float64 ||
      factors.num_axes != 1 || factors.shape[0] != map.units_out) {
    return false;
  }
  map.scale = static_cast<const double*>(factors.data);
  return true;
}

bool read_maps(const Torch& torch, PyObject* maps, PlainMerge& merge) {
  if (!PyDict_CheckExact(maps) || PyDict_Size(maps) > 2) return false;
  PyObject *key, *value;
  for (Py_ssize_t at = 0; PyDict_Next(maps, &at, &key, &value) != 0;) {
    if (!PyLong_CheckExact(key)) return false;
    const long axis = PyLong_AsLong(key);
    if (axis < 0 || axis >= merge.num_axes) return false;
    py::object& held = merge.held_maps[merge.num_mapped];
    MappedAxis& mapped = merge.mapped[merge.num_mapped++];
    mapped.axis = static_cast<std::int32_t>(axis);
    if (!read_map(torch, value, merge.shape[axis], merge.num_models, mapped.map, held)) return false;
    merge.keeps_shape = merge.keeps_shape && mapped.map.units_out == mapped.map.units_in;
  }
  if (merge.num_mapped == 2 && merge.mapped[1].axis < merge.mapped[0].axis) {
    const MappedAxis first = merge.mapped[1];
    merge.mapped[1] = merge.mapped[0];
    merge.mapped[0] = first;
  }
  return true;
}

bool read_weights(PyObject* weights, PlainMerge& merge) {
  if (weights != Py_None && ((!PyList_CheckExact(weights) && !PyTuple_CheckExact(weights)) ||
                             PySequence_Fast_GET_SIZE(weights) != merge.num_models)) {
    return false;
  }
  for (int i = 0; i < merge.num_models; ++i) {
    merge.weights[i] = 1.0 / merge.num_models;
    if (weights == Py_None) continue;
    PyObject* const weight = PySequence_Fast_GET_ITEM(weights, i);
    if (!PyFloat_CheckExact(weight)) return false;
    merge.weights[i] = PyFloat_AS_DOUBLE(weight);
    if (!std::isfinite(merge.weights[i])) return false;
  }
  return true;
}

std::int64_t product(const std::int64_t* lengths, int begin, int end) {
  std::int64_t result = 1;
  for (int axis = begin; axis < end; ++axis) result *= lengths[axis];
  return result;
}

// How the tensors are seen, as mudsc_fast.kernels._permute.view_of.
PermuteProblem view_of(const PlainMerge& merge) {
  constexpr std::int64_t kShortLine = 64;
  const std::int64_t* const shape = merge.shape;
  const int end = merge.num_axes;
  const auto identity = [](std::int64_t length) {
    return AxisMap{UnitMapKind::identity, nullptr, nullptr, length, length};
  };
  PermuteProblem problem{merge.type,  merge.num_models, merge.tensors,        merge.weights, 1, 1, 1, identity(1),
                         identity(1), /*out=*/nullptr,  /*out_is_new=*/false, /*threads=*/1};
  if (merge.num_mapped == 0) {
    const int first = end < 1 ? end : 1;
    problem.rows = identity(product(shape, 0, first));
    problem.columns = identity(product(shape, first, end));
    return problem;
  }
  const MappedAxis& rows = merge.mapped[0];
  const std::int64_t before = product(shape, 0, rows.axis);
  if (merge.num_mapped == 2) {
    const MappedAxis& columns = merge.mapped[1];
    problem.outer = before;
    problem.rows = rows.map;
    problem.middle = product(shape, rows.axis + 1, columns.axis);
    problem.columns = columns.map;
    problem.inner = product(shape, columns.axis + 1, end);
    return problem;
  }
  const std::int64_t after = product(shape, rows.axis + 1, end);
  if (after < kShortLine) {
    problem.rows = identity(before);
    problem.columns = rows.map;
    problem.inner = after;
  } else {
    problem.outer = before;
    problem.rows = rows.map;
    problem.columns = identity(after);
  }
  return problem;
}

std::int64_t length_out(const PlainMerge& merge, int axis) {
  for (int i = 0; i < merge.num_mapped; ++i) {
    if (merge.mapped[i].axis == axis) return merge.mapped[i].map.units_out;
  }
  return merge.shape[axis];
}

bool overlap(const void* a, std::int64_t bytes_of_a, const void* b, std::int64_t bytes_of_b) {
  const auto begin_of_a = reinterpret_cast<std::uintptr_t>(a), begin_of_b = reinterpret_cast<std::uintptr_t>(b);
  return begin_of_a < begin_of_b + static_cast<std::uintptr_t>(bytes_of_b) &&
         begin_of_b < begin_of_a + static_cast<std::uintptr_t>(bytes_of_a);
}

// Whether a given tensor can take the result: of its shape and type, and apart from all that is merged.
bool read_out(const Torch& torch, const PlainMerge& merge, PyObject* object, DlpackTensor& out) {
  ScalarType type;
  if (!read_plain(torch, object, out, type) || type != merge.type || out.num_axes != merge.num_axes) return false;
  std::int64_t bytes_in = kScalarBytes[static_cast<int>(type)], bytes_out = bytes_in;
  for (int axis = 0; axis < merge.num_axes; ++axis) {
    if (out.shape[axis] != length_out(merge, axis)) return false;
    bytes_in *= merge.shape[axis];
    bytes_out *= out.shape[axis];
  }
  for (int i = 0; i < merge.num_models; ++i) {
    if (overlap(out.data, bytes_out, merge.tensors[i], bytes_in)) return false;
  }
  return true;
}

// A new tensor of the result's shape, like the first of those that are merged.
py::object new_result(const Torch& torch, const PlainMerge& merge, PyObject* like) {
  py::object result;
  if (merge.keeps_shape) {
    result = py::reinterpret_steal<py::object>(PyObject_CallOneArg(torch.empty_like.ptr(), like));
  } else {
    py::tuple shape(static_cast<std::size_t>(merge.num_axes));
    for (int axis = 0; axis < merge.num_axes; ++axis) {
      shape[static_cast<std::size_t>(axis)] = length_out(merge, axis);
    }
    result = py::reinterpret_steal<py::object>(PyObject_CallMethodOneArg(like, torch.new_empty.ptr(), shape.ptr()));
  }
  if (!result) throw py::error_already_set();
  return result;
}

int threads_for(const Torch& torch, std::int64_t entries) {
  constexpr std::int64_t kFewEntries = 1 << 18;
  if (entries <= kFewEntries) return 1;
  return torch.num_threads().cast<int>();
}

void run(const Torch& torch, PermuteProblem problem, int isa, void* out, bool out_is_new) {
  // From so many bytes on, a result's first touch costs more than the sum itself, and less on huge pages.
  constexpr std::int64_t kHugePages = 1 << 22;
  constexpr std::int64_t kFewEntries = 1 << 14;
  const std::int64_t lines = problem.outer * problem.middle * problem.inner;
  const std::int64_t read = lines * problem.rows.units_in * problem.columns.units_in * problem.num_models;
  const std::int64_t written = lines * problem.rows.units_out * problem.columns.units_out;
  const std::int64_t entries = read < written ? written : read;
  const std::int64_t bytes = kScalarBytes[static_cast<int>(problem.dtype)];
  problem.out = out;
  problem.out_is_new = out_is_new && written * bytes >= kHugePages;
  problem.threads = threads_for(torch, entries);
  if (entries <= kFewEntries) {
    // Done before another thread could take the lock over.
    MUDSC_CALL_KERNEL(static_cast<Isa>(isa), permute_merge, problem);
  } else {
    const py::gil_scoped_release released;
    MUDSC_CALL_KERNEL(static_cast<Isa>(isa), permute_merge, problem);
  }
}

// merge(tensors, maps, weights, out) -> tensor or None: the whole of mudsc_fast.permute_merge for what most calls pass,
// of small tensors of which checks in Python take longer than the sum. Unlike other bindings it checks its arguments.
// None, for anything that is not known here and for errors, leaves the call to the general way.
PyObject* merge_plain(PyObject* self, PyObject* const* arguments, Py_ssize_t count) {
  const Torch& torch = *static_cast<const Torch*>(PyCapsule_GetPointer(self, nullptr));
  try {
    PlainMerge merge;
    const int isa = isa_of_environment();
    const bool is_read = count == 4 && isa >= 0 && read_tensors(torch, arguments[0], merge) &&
                         read_maps(torch, arguments[1], merge) && read_weights(arguments[2], merge);
    const bool is_new = is_read && arguments[3] == Py_None;
    DlpackTensor out;
    if (!is_read || (!is_new && !read_out(torch, merge, arguments[3], out))) {
      PyErr_Clear();
      Py_RETURN_NONE;
    }
    py::object result = is_new ? new_result(torch, merge, PySequence_Fast_GET_ITEM(arguments[0], 0))
                               : py::reinterpret_borrow<py::object>(arguments[3]);
    if (is_new && !read_contiguous(*torch.functions, result.ptr(), out)) Py_RETURN_NONE;
    run(torch, view_of(merge), isa, out.data, is_new);
    return result.release().ptr();
  } catch (py::error_already_set& error) {
    error.restore();
    return nullptr;
  } catch (const OutOfMemory&) {
    return PyErr_NoMemory();
  }
}

// Returns the function above, or None where torch does not tell how its tensors are read.
py::object plain_permute_merge(const py::object& torch_module, const py::object& map_type) {
  const py::object tensor_type = torch_module.attr("Tensor");
  const DlpackFunctions* const functions = dlpack_functions(tensor_type);
  if (functions == nullptr) return py::none();
  auto torch = std::make_unique<Torch>(Torch{
      functions, tensor_type, torch_module.attr("nn").attr("Parameter"), map_type, torch_module.attr("empty_like"),
      torch_module.attr("get_num_threads"), torch_module.attr("is_grad_enabled")});
  const py::capsule self(torch.get(), [](void* data) { delete static_cast<Torch*>(data); });
  torch.release();
  return plain_function<merge_plain>("permute_merge", self);
}

}  // namespace

void register_permute(py::module_& module) {
  module.def("plain_permute_merge", &plain_permute_merge, py::arg("torch"), py::arg("map_type"));
  module.def(
      "permute_merge",
      [](int isa, int threads, int dtype, const std::vector<std::uintptr_t>& tensors,
         const std::vector<double>& weights, std::int64_t outer, std::int64_t middle, std::int64_t inner,
         const AxisArguments& rows, const AxisArguments& columns, std::uintptr_t out, bool out_is_new) {
        std::vector<const void*> addresses;
        for (const std::uintptr_t tensor : tensors) addresses.push_back(pointer<const void>(tensor));
        const PermuteProblem problem{static_cast<ScalarType>(dtype),
                                     static_cast<std::int64_t>(tensors.size()),
                                     addresses.data(),
                                     weights.data(),
                                     outer,
                                     middle,
                                     inner,
                                     axis_map(rows),
                                     axis_map(columns),
                                     pointer<void>(out),
                                     out_is_new,
                                     threads};
        const py::gil_scoped_release released;
        MUDSC_CALL_KERNEL(static_cast<Isa>(isa), permute_merge, problem);
      },
      py::arg("isa"), py::arg("threads"), py::arg("dtype"), py::arg("tensors"), py::arg("weights"), py::arg("outer"),
      py::arg("middle"), py::arg("inner"), py::arg("rows"), py::arg("columns"), py::arg("out"), py::arg("out_is_new"));
  module.def(
      "permute_in_place",
      [](int isa, int threads, int dtype, std::int64_t outer, std::int64_t middle, std::int64_t inner,
         const AxisArguments& rows, const AxisArguments& columns, std::uintptr_t out) {
        const PermuteProblem problem{static_cast<ScalarType>(dtype),
                                     1,
                                     nullptr,
                                     nullptr,
                                     outer,
                                     middle,
                                     inner,
                                     axis_map(rows),
                                     axis_map(columns),
                                     pointer<void>(out),
                                     false,
                                     threads};
        const py::gil_scoped_release released;
        MUDSC_CALL_KERNEL(static_cast<Isa>(isa), permute_in_place, problem);
      },
      py::arg("isa"), py::arg("threads"), py::arg("dtype"), py::arg("outer"), py::arg("middle"), py::arg("inner"),
      py::arg("rows"), py::arg("columns"), py::arg("out"));
}

}  // namespace mudsc::bindings
