#include "bindings.hpp"
#include "mudsc/zip.hpp"
#include "tensors.hpp"

namespace mudsc::bindings {
namespace {

std::int64_t zip_units(const py::object& similarity, std::int64_t num_models, std::int64_t remaining,
                       std::int64_t budget, double shrink, const py::object& cluster_of_unit, const py::object& values,
                       int isa) {
  const TensorView matrix(similarity, "similarity");
  matrix.expect_float();
  matrix.expect_shape({-1, -1});
  ZipProblem problem{};
  problem.units = matrix.shape[0];
  matrix.expect_shape({problem.units, problem.units});
  matrix.expect_adjacent();
  problem.similarity = matrix.data;
  problem.type = matrix.scalar_type();
  problem.row_stride = matrix.strides[0];
  problem.num_models = num_models;
  problem.remaining = remaining;
  problem.budget = budget;
  problem.shrink = shrink;
  problem.cluster_of_unit = TensorView(cluster_of_unit, "cluster_of_unit").contiguous<std::int64_t>({problem.units});
  problem.values = TensorView(values, "values").contiguous<double>({problem.units - remaining});
  const py::gil_scoped_release released;
  return MUDSC_CALL_KERNEL(static_cast<Isa>(isa), zip_units, problem);
}

}  // namespace

void register_zip(py::module_& module) {
  module.attr("ZIP_NOT_FINITE") = kZipNotFinite;
  module.def("zip_units", &zip_units, py::arg("similarity"), py::arg("num_models"), py::arg("remaining"),
             py::arg("budget"), py::arg("shrink"), py::arg("cluster_of_unit"), py::arg("values"), py::arg("isa"));
}

}  // namespace mudsc::bindings
