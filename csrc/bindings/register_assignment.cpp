#include "bindings.hpp"
#include "mudsc/assignment.hpp"

namespace mudsc::bindings {

void register_assignment(py::module_& module) {
  module.def(
      "linear_assignment",
      [](int isa, int threads, int dtype, std::uintptr_t values, std::int64_t batch, std::int64_t rows,
         std::int64_t columns, bool maximize, double tolerance, std::uintptr_t prices, std::uintptr_t column_of_row,
         std::uintptr_t row_duals, std::uintptr_t column_duals, std::uintptr_t objective, std::uintptr_t gap,
         std::uintptr_t status) {
        const AssignmentProblem problem{pointer<const void>(values),
                                        static_cast<ScalarType>(dtype),
                                        batch,
                                        rows,
                                        columns,
                                        maximize,
                                        tolerance,
                                        threads,
                                        pointer<const double>(prices),
                                        pointer<std::int64_t>(column_of_row),
                                        pointer<double>(row_duals),
                                        pointer<double>(column_duals),
                                        pointer<double>(objective),
                                        pointer<double>(gap),
                                        pointer<AssignmentStatus>(status)};
        py::gil_scoped_release released;
        MUDSC_CALL_KERNEL(static_cast<Isa>(isa), linear_assignment, problem);
      },
      py::kw_only(), py::arg("isa"), py::arg("threads"), py::arg("dtype"), py::arg("values"), py::arg("batch"),
      py::arg("rows"), py::arg("columns"), py::arg("maximize"), py::arg("tolerance"), py::arg("prices"), py::arg("column_of_row"),
      py::arg("row_duals"), py::arg("column_duals"), py::arg("objective"), py::arg("gap"), py::arg("status"));
}

}  // namespace mudsc::bindings
