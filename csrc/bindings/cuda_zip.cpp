#include "cuda_bindings.hpp"
#include "mudsc/zip_cuda.hpp"

namespace mudsc::bindings {
namespace {

ZipProblem zip_problem(std::uintptr_t similarity, int dtype, std::int64_t row_stride, std::int64_t units,
                       std::int64_t num_models, std::int64_t remaining, std::int64_t budget, double shrink,
                       std::uintptr_t cluster_of_unit, std::uintptr_t values) {
  return {pointer<const void>(similarity),
          static_cast<ScalarType>(dtype),
          row_stride,
          units,
          num_models,
          remaining,
          budget,
          shrink,
          pointer<std::int64_t>(cluster_of_unit),
          pointer<double>(values)};
}

}  // namespace

void register_cuda_zip(py::module_& module) {
  module.def(
      "zip_workspace_bytes",
      [](int dtype, std::int64_t units, std::int64_t num_models) {
        return cuda::zip_workspace_bytes(zip_problem(0, dtype, units, units, num_models, 0, 0, 0.0, 0, 0));
      },
      py::arg("dtype"), py::arg("units"), py::arg("num_models"));
  module.def(
      "zip_units",
      [](std::uintptr_t similarity, int dtype, std::int64_t row_stride, std::int64_t units, std::int64_t num_models,
         std::int64_t remaining, std::int64_t budget, double shrink, std::uintptr_t cluster_of_unit,
         std::uintptr_t values, std::uintptr_t workspace, std::uintptr_t merges, int device, std::uintptr_t stream) {
        const ZipProblem problem = zip_problem(similarity, dtype, row_stride, units, num_models, remaining, budget,
                                               shrink, cluster_of_unit, values);
        const py::gil_scoped_release released;
        cuda::zip_units(problem, pointer<void>(workspace), pointer<std::int64_t>(merges), stream_of(device, stream));
      },
      py::kw_only(), py::arg("similarity"), py::arg("dtype"), py::arg("row_stride"), py::arg("units"),
      py::arg("num_models"), py::arg("remaining"), py::arg("budget"), py::arg("shrink"), py::arg("cluster_of_unit"),
      py::arg("values"), py::arg("workspace"), py::arg("merges"), py::arg("device"), py::arg("stream"));
}

}  // namespace mudsc::bindings
