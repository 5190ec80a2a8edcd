#include <pybind11/stl.h>

#include <algorithm>
#include <memory>
#include <tuple>

#include "cuda_bindings.hpp"
#include "mudsc/assignment_cuda.hpp"

namespace mudsc::bindings {
namespace {

void assignment_batch(py::handle values, bool maximize, py::handle prices, py::handle column_of_row,
                      py::handle row_duals, py::handle column_duals, py::handle objective, py::handle gap,
                      py::handle status, int device, std::uintptr_t handle) {
  static_assert(sizeof(AssignmentStatus) == sizeof(std::int32_t), "a status is written as an int32");
  const cuda::Stream stream = stream_of(device, handle);
  const TensorView matrices(values, "values", memory_of(stream));
  matrices.expect_float();
  matrices.expect_shape({-1, -1, -1});
  matrices.expect_contiguous();
  const std::int64_t batch = matrices.shape[0], rows = matrices.shape[1], columns = matrices.shape[2];
  const AssignmentProblem problem{
      matrices.data,
      matrices.scalar_type(),
      batch,
      rows,
      columns,
      maximize,
      0.0,
      1,
      optional_entries_of<const double>(prices, "prices", {batch, columns}, stream),
      entries_of<std::int64_t>(column_of_row, "column_of_row", {batch, rows}, stream),
      entries_of<double>(row_duals, "row_duals", {batch, rows}, stream),
      entries_of<double>(column_duals, "column_duals", {batch, columns}, stream),
      entries_of<double>(objective, "objective", {batch}, stream),
      entries_of<double>(gap, "gap", {batch}, stream),
      reinterpret_cast<AssignmentStatus*>(entries_of<std::int32_t>(status, "status", {batch}, stream))};
  const py::gil_scoped_release released;
  cuda::assignment_batch(problem, stream);
}

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
  module.def("assignment_batch", &assignment_batch, py::kw_only(), py::arg("values"), py::arg("maximize"),
             py::arg("prices"), py::arg("column_of_row"), py::arg("row_duals"), py::arg("column_duals"),
             py::arg("objective"), py::arg("gap"), py::arg("status"), py::arg("device"), py::arg("stream"));
}

// dtype, values, rows, columns, maximize
using MatrixArguments = std::tuple<int, std::uintptr_t, std::int64_t, std::int64_t, bool>;

cuda::LargeProblem large_problem(const MatrixArguments& matrix) {
  return {pointer<const void>(std::get<1>(matrix)), static_cast<ScalarType>(std::get<0>(matrix)), std::get<2>(matrix),
          std::get<3>(matrix), std::get<4>(matrix)};
}

void register_large(py::module_& module) {
  module.def(
      "assignment_inspect",
      [](const MatrixArguments& matrix, std::uintptr_t prices, std::uintptr_t gaps, std::uintptr_t magnitudes,
         std::uintptr_t hashes, int device, std::uintptr_t stream) {
        const cuda::Inspection inspection{pointer<const float>(prices), pointer<float>(gaps),
                                          pointer<float>(magnitudes), pointer<std::int64_t>(hashes)};
        const py::gil_scoped_release released;
        cuda::assignment_inspect(large_problem(matrix), inspection, stream_of(device, stream));
      },
      py::arg("matrix"), py::kw_only(), py::arg("prices"), py::arg("gaps"), py::arg("magnitudes"), py::arg("hashes"),
      py::arg("device"), py::arg("stream"));
  module.def(
      "assignment_check_classes",
      [](const MatrixArguments& matrix, std::uintptr_t class_of_row, int device, std::uintptr_t stream) {
        const py::gil_scoped_release released;
        cuda::assignment_check_classes(large_problem(matrix), pointer<std::int32_t>(class_of_row),
                                       stream_of(device, stream));
      },
      py::arg("matrix"), py::kw_only(), py::arg("class_of_row"), py::arg("device"), py::arg("stream"));
  module.def("assignment_bid_workspace_bytes",
             [](const MatrixArguments& matrix) { return cuda::assignment_bid_workspace_bytes(large_problem(matrix)); });
  module.def(
      "assignment_bid",
      [](const MatrixArguments& matrix, std::uintptr_t epsilon, std::int64_t stop, std::int64_t max_rounds,
         std::int64_t max_bids, std::uintptr_t class_of_row, std::uintptr_t prices, std::uintptr_t column_of_row,
         std::uintptr_t counts, std::uintptr_t workspace, int device, std::uintptr_t stream) {
        const cuda::Auction auction{pointer<const float>(epsilon),
                                    stop,
                                    max_rounds,
                                    max_bids,
                                    pointer<const std::int32_t>(class_of_row),
                                    pointer<float>(prices),
                                    pointer<std::int32_t>(column_of_row),
                                    pointer<std::int64_t>(counts)};
        const py::gil_scoped_release released;
        cuda::assignment_bid(large_problem(matrix), auction, pointer<void>(workspace), stream_of(device, stream));
      },
      py::arg("matrix"), py::kw_only(), py::arg("epsilon"), py::arg("stop"), py::arg("max_rounds"), py::arg("max_bids"),
      py::arg("class_of_row"), py::arg("prices"), py::arg("column_of_row"), py::arg("counts"), py::arg("workspace"),
      py::arg("device"), py::arg("stream"));
  module.def(
      "assignment_list",
      [](const MatrixArguments& matrix, std::uintptr_t rows, std::int64_t count, std::uintptr_t duals,
         std::int64_t wanted, std::int64_t capacity, std::uintptr_t columns, std::uintptr_t costs, std::uintptr_t sizes,
         std::uintptr_t floors, int device, std::uintptr_t stream) {
        const cuda::ListRequest request{pointer<const std::int32_t>(rows),
                                        count,
                                        pointer<const double>(duals),
                                        wanted,
                                        capacity,
                                        pointer<std::int32_t>(columns),
                                        pointer<float>(costs),
                                        pointer<std::int32_t>(sizes),
                                        pointer<double>(floors)};
        const py::gil_scoped_release released;
        cuda::assignment_list(large_problem(matrix), request, stream_of(device, stream));
      },
      py::arg("matrix"), py::kw_only(), py::arg("rows"), py::arg("count"), py::arg("duals"), py::arg("wanted"),
      py::arg("capacity"), py::arg("columns"), py::arg("costs"), py::arg("sizes"), py::arg("floors"), py::arg("device"),
      py::arg("stream"));
  module.def(
      "assignment_certify",
      [](const MatrixArguments& matrix, std::uintptr_t duals, std::uintptr_t column_of_row, std::uintptr_t least,
         std::uintptr_t paired, int device, std::uintptr_t stream) {
        const py::gil_scoped_release released;
        cuda::assignment_certify(large_problem(matrix), pointer<const double>(duals),
                                 pointer<const std::int64_t>(column_of_row), pointer<double>(least),
                                 pointer<double>(paired), stream_of(device, stream));
      },
      py::arg("matrix"), py::kw_only(), py::arg("duals"), py::arg("column_of_row"), py::arg("least"), py::arg("paired"),
      py::arg("device"), py::arg("stream"));
}

void register_paths(py::module_& module) {
  // Local: the simulator's module has the same class, and a process may import both.
  py::class_<cuda::PathSolver>(module, "PathSolver", py::module_local())
      .def(py::init([](std::int64_t rows, std::int64_t columns, std::uintptr_t duals, std::uintptr_t class_of_row,
                       std::int64_t wanted) {
             return std::make_unique<cuda::PathSolver>(rows, columns, pointer<const double>(duals),
                                                       pointer<const std::int32_t>(class_of_row), wanted);
           }),
           py::arg("rows"), py::arg("columns"), py::arg("duals"), py::arg("class_of_row"), py::arg("wanted"))
      .def(
          "set_lists",
          [](cuda::PathSolver& solver, std::uintptr_t rows, std::int64_t count, std::int64_t capacity,
             std::uintptr_t columns, std::uintptr_t costs, std::uintptr_t sizes, std::uintptr_t floors) {
            const py::gil_scoped_release released;
            solver.set_lists(pointer<const std::int32_t>(rows), count, capacity, pointer<const std::int32_t>(columns),
                             pointer<const float>(costs), pointer<const std::int32_t>(sizes),
                             pointer<const double>(floors));
          },
          py::kw_only(), py::arg("rows"), py::arg("count"), py::arg("capacity"), py::arg("columns"), py::arg("costs"),
          py::arg("sizes"), py::arg("floors"))
      .def(
          "continue_auction",
          [](cuda::PathSolver& solver, std::uintptr_t column_of_row, double epsilon) {
            solver.continue_auction(pointer<const std::int32_t>(column_of_row), epsilon);
          },
          py::arg("column_of_row"), py::arg("epsilon"))
      .def("advance",
           [](cuda::PathSolver& solver) {
             std::vector<std::pair<std::int64_t, std::size_t>> requests;  // entries wanted, and of how many rows
             {
               const py::gil_scoped_release released;
               for (const cuda::RowsToList& group : solver.advance()) {
                 requests.emplace_back(group.wanted, group.rows.size());
               }
             }
             return requests;
           })
      .def("copy_requested_rows",
           [](const cuda::PathSolver& solver, std::size_t request, std::uintptr_t out) {
             const std::vector<std::int32_t>& rows = solver.requests()[request].rows;
             std::copy(rows.begin(), rows.end(), pointer<std::int32_t>(out));
           })
      .def("copy_duals", [](const cuda::PathSolver& solver, std::uintptr_t out,
                            std::int64_t columns) { std::copy_n(solver.duals(), columns, pointer<double>(out)); })
      .def("copy_column_of_row", [](const cuda::PathSolver& solver, std::uintptr_t out, std::int64_t rows) {
        std::copy_n(solver.column_of_row(), rows, pointer<std::int64_t>(out));
      });
}

}  // namespace

void register_cuda_assignment(py::module_& module) {
  register_batch(module);
  register_large(module);
  register_paths(module);
}

}  // namespace mudsc::bindings
