#include "tensors.hpp"

#include <string>

namespace mudsc::bindings {
namespace {

constexpr std::int32_t kHost = 1, kCuda = 2;  // DLPack's types of devices
constexpr const char* kTypeNames[] = {"float16", "bfloat16", "float32", "float64", "int32", "int64", "other"};

bool by_attributes = false;

// Torch objects needed to read and make tensors. Looked up once and kept, since modules cannot be unloaded.
struct Torch {
  py::object tensor_type, parameter_type, from_numpy;
  py::str is_neg{"is_neg"};
  const DlpackFunctions* functions;
  py::object types[6];  // in the order of EntryType
};

const Torch& torch() {
  static const Torch* const found = [] {
    const py::module_ module = py::module_::import("torch");
    auto* const torch = new Torch{};
    torch->tensor_type = module.attr("Tensor");
    torch->parameter_type = module.attr("nn").attr("Parameter");
    torch->from_numpy = module.attr("from_numpy");
    torch->functions = dlpack_functions(torch->tensor_type);
    for (int type = 0; type < 6; ++type) torch->types[type] = module.attr(kTypeNames[type]);
    return torch;
  }();
  return *found;
}

EntryType type_of(const DlpackTensor& tensor) {
  constexpr std::uint8_t kSigned = 0, kFloat = 2, kBrainFloat = 4;
  const auto is = [&](std::uint8_t code, std::uint8_t bits) {
    return tensor.type_code == code && tensor.type_bits == bits;
  };
  if (tensor.type_lanes != 1) return EntryType::other;
  if (is(kFloat, 32)) return EntryType::float32;
  if (is(kFloat, 64)) return EntryType::float64;
  if (is(kSigned, 64)) return EntryType::int64;
  if (is(kSigned, 32)) return EntryType::int32;
  if (is(kFloat, 16)) return EntryType::float16;
  if (is(kBrainFloat, 16)) return EntryType::bfloat16;
  return EntryType::other;
}

[[noreturn]] void fail_elsewhere(const char* name, int device) {
  throw py::value_error(std::string(name) + " must be " +
                        (device == kHostMemory ? "in host memory" : "on CUDA device " + std::to_string(device)));
}

std::string shape_text(const std::int64_t* lengths, std::size_t count) {
  std::string text = "[";
  for (std::size_t axis = 0; axis < count; ++axis) {
    if (axis != 0) text += ", ";
    text += lengths[axis] < 0 ? "any" : std::to_string(lengths[axis]);
  }
  return text + "]";
}

}  // namespace

void read_tensors_by_attributes(bool enabled) { by_attributes = enabled; }

py::object tensor_of_array(py::handle array) { return torch().from_numpy(array); }

const DlpackFunctions* dlpack_functions(const py::object& tensor_type) {
  constexpr std::uint32_t kMajorVersion = 1;
  if (!py::hasattr(tensor_type, "__dlpack_c_exchange_api__")) return nullptr;
  const py::object capsule = tensor_type.attr("__dlpack_c_exchange_api__");
  const auto* const functions =
      static_cast<const DlpackFunctions*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (functions == nullptr) throw py::error_already_set();
  return functions->major_version == kMajorVersion && functions->read != nullptr ? functions : nullptr;
}

bool TensorView::try_read(const DlpackFunctions& functions, PyObject* object, TensorView& view) {
  DlpackTensor tensor;
  if (functions.read(object, &tensor) != 0) {
    PyErr_Clear();
    return false;
  }
  if (tensor.device_type != kHost) return false;
  view.read_dlpack(tensor);
  return true;
}

bool TensorView::try_read_plain(PyObject* object, TensorView& view) {
  const Torch& known = torch();
  PyObject* const type = reinterpret_cast<PyObject*>(Py_TYPE(object));
  if (type != known.tensor_type.ptr() && type != known.parameter_type.ptr()) return false;
  if (known.functions == nullptr || by_attributes || !try_read(*known.functions, object, view)) return false;
  // A view may stand for the negatives of the entries in memory.
  const auto negated = py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(object, known.is_neg.ptr()));
  if (!negated) PyErr_Clear();
  return negated.ptr() == Py_False;
}

TensorView::TensorView(py::handle object, const char* name, int device) : name_(name) {
  const Torch& known = torch();
  if (!py::isinstance(object, known.tensor_type)) {
    throw py::type_error(std::string(name) + " must be a torch.Tensor, got " + Py_TYPE(object.ptr())->tp_name);
  }
  if (known.functions != nullptr && !by_attributes) {
    DlpackTensor tensor;
    if (known.functions->read(object.ptr(), &tensor) != 0) throw py::error_already_set();
    const bool is_there =
        device == kHostMemory ? tensor.device_type == kHost : tensor.device_type == kCuda && tensor.device_id == device;
    if (!is_there) fail_elsewhere(name, device);
    read_dlpack(tensor);
  } else {
    read_attributes(object, device);
  }
}

void TensorView::read_dlpack(const DlpackTensor& tensor) {
  data = static_cast<char*>(tensor.data) + tensor.byte_offset;
  type = type_of(tensor);
  num_axes = tensor.num_axes;
  shape = tensor.shape;
  strides = tensor.strides;
}

void TensorView::read_attributes(py::handle object, int device) {
  const Torch& known = torch();
  const bool is_there = device == kHostMemory
                            ? object.attr("is_cpu").cast<bool>()
                            : object.attr("is_cuda").cast<bool>() && object.attr("get_device")().cast<int>() == device;
  if (!is_there) fail_elsewhere(name_, device);
  data = reinterpret_cast<void*>(object.attr("data_ptr")().cast<std::uintptr_t>());
  const py::object dtype = object.attr("dtype");
  for (int known_type = 0; known_type < 6; ++known_type) {
    if (dtype.is(known.types[known_type])) type = static_cast<EntryType>(known_type);
  }
  for (const py::object& lengths : {py::object(object.attr("shape")), py::object(object.attr("stride")())}) {
    for (const py::handle length : lengths) lengths_.push_back(length.cast<std::int64_t>());
  }
  num_axes = static_cast<int>(lengths_.size() / 2);
  shape = lengths_.data();
  strides = lengths_.data() + num_axes;
}

bool TensorView::is_contiguous() const {
  std::int64_t distance = 1;
  for (int axis = num_axes; axis-- > 0;) {
    if (shape[axis] == 0) return true;
    if (shape[axis] != 1 && strides[axis] != distance) return false;
    distance *= shape[axis];
  }
  return true;
}

std::int64_t TensorView::entries() const {
  std::int64_t count = 1;
  for (int axis = 0; axis < num_axes; ++axis) count *= shape[axis];
  return count;
}

void TensorView::fail(const std::string& expected) const {
  throw py::value_error(std::string(name_) + " must be " + expected + ", got " + kTypeNames[static_cast<int>(type)] +
                        " of shape " + shape_text(shape, static_cast<std::size_t>(num_axes)));
}

void TensorView::expect_float() const {
  if (!is_float()) fail("float16, bfloat16, float32 or float64");
}

void TensorView::expect_type(EntryType expected) const {
  if (type != expected) fail(kTypeNames[static_cast<int>(expected)]);
}

void TensorView::expect_shape(const std::int64_t* lengths, std::size_t count) const {
  bool fits = static_cast<std::size_t>(num_axes) == count;
  for (std::size_t axis = 0; fits && axis < count; ++axis) fits = lengths[axis] < 0 || lengths[axis] == shape[axis];
  if (!fits) fail("of shape " + shape_text(lengths, count));
}

void TensorView::expect_contiguous() const {
  if (!is_contiguous()) fail("contiguous");
}

void TensorView::expect_adjacent() const {
  if (num_axes == 0 || (shape[num_axes - 1] > 1 && strides[num_axes - 1] != 1)) fail("rows of adjacent entries");
}

}  // namespace mudsc::bindings
