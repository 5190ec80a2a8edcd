#include "cuda_bindings.hpp"
#include "mudsc/zip_cuda.hpp"

namespace mudsc::bindings {
namespace {

std::int64_t zip_workspace_bytes(int dtype, std::int64_t units, std::int64_t num_models) {
  ZipProblem problem{};
  problem.type = static_cast<ScalarType>(dtype);
  problem.units = units;
  problem.num_models = num_models;
  return cuda::zip_workspace_bytes(problem);
}

void zip_units(py::handle similarity, std::int64_t num_models, std::int64_t remaining, std::int64_t budget,
               double shrink, py::handle cluster_of_unit, py::handle values, py::handle workspace, py::handle merges,
               int device, std::uintptr_t handle) {
  const cuda::Stream stream = stream_of(device, handle);
  const TensorView matrix(similarity, "similarity", memory_of(stream));
  matrix.expect_float();
  matrix.expect_shape({-1, -1});
  matrix.expect_adjacent();
  const std::int64_t units = matrix.shape[0];
  matrix.expect_shape({units, units});
  const ZipProblem problem{matrix.data,
                           matrix.scalar_type(),
                           matrix.strides[0],
                           units,
                           num_models,
                           remaining,
                           budget,
                           shrink,
                           entries_of<std::int64_t>(cluster_of_unit, "cluster_of_unit", {units}, stream),
                           entries_of<double>(values, "values", {units - remaining}, stream)};
  const TensorView memory(workspace, "workspace", memory_of(stream));
  const std::int64_t needed = cuda::zip_workspace_bytes(problem);
  if (memory.entries() * static_cast<std::int64_t>(sizeof(std::int64_t)) < needed) {
    throw py::value_error("workspace must have " + std::to_string(needed) + " bytes");
  }
  void* const scratch = memory.contiguous<std::int64_t>({-1, 2});
  std::int64_t* const count = entries_of<std::int64_t>(merges, "merges", {1}, stream);
  const py::gil_scoped_release released;
  cuda::zip_units(problem, scratch, count, stream);
}

}  // namespace

void register_cuda_zip(py::module_& module) {
  module.def("zip_workspace_bytes", &zip_workspace_bytes, py::arg("dtype"), py::arg("units"), py::arg("num_models"));
  module.def("zip_units", &zip_units, py::kw_only(), py::arg("similarity"), py::arg("num_models"), py::arg("remaining"),
             py::arg("budget"), py::arg("shrink"), py::arg("cluster_of_unit"), py::arg("values"), py::arg("workspace"),
             py::arg("merges"), py::arg("device"), py::arg("stream"));
}

}  // namespace mudsc::bindings
