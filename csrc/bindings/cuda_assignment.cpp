#include "cuda_bindings.hpp"
#include "mudsc/assignment_cuda.hpp"

namespace mudsc::bindings {
namespace {

void register_batch(py::module_& module) {
  module.def(
      "assignment_batch_fits",
      [](std::int64_t rows, std::int64_t columns, int device, std::uintptr_t stream) {
        AssignmentProblem problem{};
        problem.rows = rows;
        problem.columns = columns;
        return cuda::assignment_batch_fits(problem, stream_of(device, stream));
      },
      py::arg("rows"), py::arg("columns"), py::arg("device"), py::arg("stream"));
  module.def(
      "assignment_batch",
      [](int dtype, std::uintptr_t values, std::int64_t batch, std::int64_t rows, std::int64_t columns, bool maximize,
         std::uintptr_t prices, std::uintptr_t column_of_row, std::uintptr_t row_duals, std::uintptr_t column_duals,
         std::uintptr_t objective, std::uintptr_t gap, std::uintptr_t status, int device, std::uintptr_t stream) {
        const AssignmentProblem problem{pointer<const void>(values),
                                        static_cast<ScalarType>(dtype),
                                        batch,
                                        rows,
                                        columns,
                                        maximize,
                                        0.0,
                                        1,
                                        pointer<const double>(prices),
                                        pointer<std::int64_t>(column_of_row),
                                        pointer<double>(row_duals),
                                        pointer<double>(column_duals),
                                        pointer<double>(objective),
                                        pointer<double>(gap),
                                        pointer<AssignmentStatus>(status)};
        const py::gil_scoped_release released;
        cuda::assignment_batch(problem, stream_of(device, stream));
      },
      py::kw_only(), py::arg("dtype"), py::arg("values"), py::arg("batch"), py::arg("rows"), py::arg("columns"),
      py::arg("maximize"), py::arg("prices"), py::arg("column_of_row"), py::arg("row_duals"), py::arg("column_duals"),
      py::arg("objective"), py::arg("gap"), py::arg("status"), py::arg("device"), py::arg("stream"));
}

}  // namespace

void register_cuda_assignment(py::module_& module) {
  register_batch(module);
}

}  // namespace mudsc::bindings
