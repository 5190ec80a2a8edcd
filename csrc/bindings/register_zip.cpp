#include "bindings.hpp"
#include "mudsc/zip.hpp"

namespace mudsc::bindings {

namespace {

std::int64_t zip_units(std::uintptr_t similarity, int dtype, std::int64_t row_stride, std::int64_t units,
                       std::int64_t num_models, std::int64_t remaining, std::int64_t budget, double shrink,
                       std::uintptr_t cluster_of_unit, std::uintptr_t values, int isa) {
  ZipProblem problem{};
  problem.similarity = pointer<const void>(similarity);
  problem.type = static_cast<ScalarType>(dtype);
  problem.row_stride = row_stride;
  problem.units = units;
  problem.num_models = num_models;
  problem.remaining = remaining;
  problem.budget = budget;
  problem.shrink = shrink;
  problem.cluster_of_unit = pointer<std::int64_t>(cluster_of_unit);
  problem.values = pointer<double>(values);
  return MUDSC_CALL_KERNEL(static_cast<Isa>(isa), zip_units, problem);
}

}  // namespace

void register_zip(py::module_& module) {
  module.def("zip_units", &zip_units, py::arg("similarity"), py::arg("dtype"), py::arg("row_stride"), py::arg("units"),
             py::arg("num_models"), py::arg("remaining"), py::arg("budget"), py::arg("shrink"),
             py::arg("cluster_of_unit"), py::arg("values"), py::arg("isa"), py::call_guard<py::gil_scoped_release>());
}

}  // namespace mudsc::bindings
