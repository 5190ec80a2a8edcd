// A fast path of mudsc_fast.permute_merge for common arguments, because for small tensors the checks in Python take
// longer than the sum. Reads and checks its arguments, allocates the result and calls the kernel. Returns None for
// unsupported or invalid arguments; the general path in Python then takes over.
#include <cmath>
#include <memory>

#include "bindings.hpp"
#include "permute_arguments.hpp"

namespace mudsc::bindings {
namespace {

// Python objects that a call needs, looked up once.
struct PermuteObjects {
  const DlpackFunctions* functions;
  py::object tensor_type, parameter_type, map_type, empty_like, num_threads, records_gradients;
  py::str requires_grad{"requires_grad"}, is_neg{"is_neg"}, new_empty{"new_empty"};
  UnitMapNames map_names;
};

constexpr int kMaxModels = 8;
constexpr int kMaxAxes = 8;

// The arguments of a call, read and checked.
struct FastMerge {
  int num_models = 0;
  int num_axes = 0;
  int num_mapped = 0;
  bool keeps_shape = true;
  ScalarType type = ScalarType::float32;
  std::int64_t shape[kMaxAxes];  // of the tensors
  const void* tensors[kMaxModels];
  double weights[kMaxModels];
  MappedAxis mapped[kMaxMapped];
  // Keeps the objects alive, even if another thread changes the arguments meanwhile.
  py::object held_tensors[kMaxModels], held_maps[kMaxMapped];
};

bool is_false(const py::object& value) { return value.ptr() == Py_False; }

// Other subclasses of Tensor may override the operation.
bool is_plain(const PermuteObjects& torch, PyObject* object) {
  PyObject* const type = reinterpret_cast<PyObject*>(Py_TYPE(object));
  return type == torch.tensor_type.ptr() || type == torch.parameter_type.ptr();
}

bool needs_gradient(const PermuteObjects& torch, PyObject* tensor) {
  const auto required = py::reinterpret_steal<py::object>(PyObject_GetAttr(tensor, torch.requires_grad.ptr()));
  return !is_false(required) && !is_false(torch.records_gradients());
}

// A contiguous float tensor in host memory, not recorded for gradients.
bool read_plain(const PermuteObjects& torch, PyObject* object, TensorView& view) {
  if (!is_plain(torch, object)) return false;
  const auto negated = py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(object, torch.is_neg.ptr()));
  return is_false(negated) && !needs_gradient(torch, object) && TensorView::try_read(*torch.functions, object, view) &&
         view.is_float() && view.is_contiguous();
}

// Tensors of this kind that share a shape and dtype and are not empty.
bool read_tensors(const PermuteObjects& torch, PyObject* list, FastMerge& merge) {
  if (!PyList_CheckExact(list) && !PyTuple_CheckExact(list)) return false;
  const Py_ssize_t count = PySequence_Fast_GET_SIZE(list);
  if (count < 1 || count > kMaxModels) return false;
  merge.num_models = static_cast<int>(count);
  for (int i = 0; i < merge.num_models; ++i) {
    PyObject* const object = PySequence_Fast_GET_ITEM(list, i);
    TensorView view;
    if (!read_plain(torch, object, view) || view.num_axes > kMaxAxes) return false;
    if (i == 0) {
      merge.type = view.scalar_type();
      merge.num_axes = view.num_axes;
    } else if (view.scalar_type() != merge.type || view.num_axes != merge.num_axes) {
      return false;
    }
    for (int axis = 0; axis < merge.num_axes; ++axis) {
      if (i == 0) merge.shape[axis] = view.shape[axis];
      if (merge.shape[axis] != view.shape[axis] || view.shape[axis] == 0) return false;
    }
    merge.tensors[i] = view.data;
    merge.held_tensors[i] = py::reinterpret_borrow<py::object>(object);
  }
  return true;
}

bool read_maps(const PermuteObjects& torch, PyObject* maps, FastMerge& merge) {
  if (!PyDict_CheckExact(maps) || PyDict_Size(maps) > kMaxMapped) return false;
  PyObject *key, *value;
  for (Py_ssize_t at = 0; PyDict_Next(maps, &at, &key, &value) != 0;) {
    if (!PyLong_CheckExact(key)) return false;
    const long axis = PyLong_AsLong(key);
    if (axis < 0 || axis >= merge.num_axes) return false;
    if (Py_TYPE(value) != reinterpret_cast<PyTypeObject*>(torch.map_type.ptr())) return false;
    py::object& held = merge.held_maps[merge.num_mapped];
    MappedAxis& mapped = merge.mapped[merge.num_mapped++];
    mapped.axis = static_cast<int>(axis);
    AxisMap& map = mapped.map;
    if (!read_unit_map(torch.map_names, value, merge.shape[axis], merge.num_models, map, held)) return false;
    if (map.units_out == 0) return false;
    merge.keeps_shape = merge.keeps_shape && map.units_out == map.units_in;
  }
  if (merge.num_mapped == 2 && merge.mapped[1].axis < merge.mapped[0].axis) {
    const MappedAxis first = merge.mapped[1];
    merge.mapped[1] = merge.mapped[0];
    merge.mapped[0] = first;
  }
  return true;
}

bool read_weights(PyObject* weights, FastMerge& merge) {
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

std::int64_t length_out(const FastMerge& merge, int axis) {
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

// Whether a tensor can take the result: it has the shape and type, and shares no memory with the inputs.
bool read_out(const PermuteObjects& torch, const FastMerge& merge, PyObject* object, TensorView& out) {
  if (!read_plain(torch, object, out) || out.scalar_type() != merge.type || out.num_axes != merge.num_axes) {
    return false;
  }
  std::int64_t bytes_in = kScalarBytes[static_cast<int>(merge.type)], bytes_out = bytes_in;
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

// A new tensor of the result's shape, like the first input.
py::object new_result(const PermuteObjects& torch, const FastMerge& merge, PyObject* like) {
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

int threads_for(const PermuteObjects& torch, std::int64_t entries) {
  constexpr std::int64_t kFewEntries = 1 << 18;
  if (entries <= kFewEntries) return 1;
  return torch.num_threads().cast<int>();
}

void run(const PermuteObjects& torch, const FastMerge& merge, int isa, void* out, bool out_is_new) {
  constexpr std::int64_t kFewEntries = 1 << 14;
  PermuteProblem problem = permute_problem(merge.type, merge.shape, merge.num_axes, merge.mapped, merge.num_mapped);
  problem.num_models = merge.num_models;
  problem.tensors = merge.tensors;
  problem.weights = merge.weights;
  problem.out = out;
  const std::int64_t lines = problem.outer * problem.middle * problem.inner;
  const std::int64_t read = lines * problem.rows.units_in * problem.columns.units_in * problem.num_models;
  const std::int64_t written = lines * problem.rows.units_out * problem.columns.units_out;
  const std::int64_t entries = read < written ? written : read;
  problem.out_is_new = out_is_new && written * kScalarBytes[static_cast<int>(problem.dtype)] >= kHugePages;
  problem.threads = threads_for(torch, entries);
  if (entries <= kFewEntries) {
    // Runs before another thread can take the lock.
    MUDSC_CALL_KERNEL(static_cast<Isa>(isa), permute_merge, problem);
  } else {
    const py::gil_scoped_release released;
    MUDSC_CALL_KERNEL(static_cast<Isa>(isa), permute_merge, problem);
  }
}

// merge(tensors, maps, weights, out) -> tensor or None
PyObject* merge_fast(PyObject* self, PyObject* const* arguments, Py_ssize_t count) {
  const PermuteObjects& torch = *static_cast<const PermuteObjects*>(PyCapsule_GetPointer(self, nullptr));
  try {
    FastMerge merge;
    const int isa = isa_of_environment();
    const bool is_read = count == 4 && isa >= 0 && read_tensors(torch, arguments[0], merge) &&
                         read_maps(torch, arguments[1], merge) && read_weights(arguments[2], merge);
    const bool is_new = is_read && arguments[3] == Py_None;
    TensorView out;
    if (!is_read || (!is_new && !read_out(torch, merge, arguments[3], out))) {
      PyErr_Clear();
      Py_RETURN_NONE;
    }
    py::object result = is_new ? new_result(torch, merge, PySequence_Fast_GET_ITEM(arguments[0], 0))
                               : py::reinterpret_borrow<py::object>(arguments[3]);
    if (is_new && (!TensorView::try_read(*torch.functions, result.ptr(), out) || !out.is_contiguous())) Py_RETURN_NONE;
    run(torch, merge, isa, out.data, is_new);
    return result.release().ptr();
  } catch (const py::builtin_exception&) {  // the map does not fit the tensors: the general path raises the error
    PyErr_Clear();
    Py_RETURN_NONE;
  } catch (py::error_already_set& error) {
    error.restore();
    return nullptr;
  } catch (const OutOfMemory&) {
    return PyErr_NoMemory();
  }
}

}  // namespace

py::object fast_permute_merge(const py::object& torch_module, const py::object& map_type) {
  const py::object tensor_type = torch_module.attr("Tensor");
  const DlpackFunctions* const functions = dlpack_functions(tensor_type);
  if (functions == nullptr) return py::none();
  auto torch = std::make_unique<PermuteObjects>();
  torch->functions = functions;
  torch->tensor_type = tensor_type;
  torch->parameter_type = torch_module.attr("nn").attr("Parameter");
  torch->map_type = map_type;
  torch->empty_like = torch_module.attr("empty_like");
  torch->num_threads = torch_module.attr("get_num_threads");
  torch->records_gradients = torch_module.attr("is_grad_enabled");
  const py::capsule self(torch.get(), [](void* data) { delete static_cast<PermuteObjects*>(data); });
  torch.release();
  return plain_function<merge_fast>("permute_merge", self);
}

}  // namespace mudsc::bindings
