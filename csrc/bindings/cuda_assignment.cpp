#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <string>
#include <utility>
#include <vector>

#include "cuda_assignment.hpp"
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
      false,
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

// One problem of [rows, columns] values.
cuda::LargeProblem large_problem(py::handle values, bool maximize, const cuda::Stream& stream) {
  const TensorView matrix(values, "values", memory_of(stream));
  matrix.expect_float();
  matrix.expect_shape({-1, -1});
  matrix.expect_contiguous();
  return {matrix.data, matrix.scalar_type(), matrix.shape[0], matrix.shape[1], maximize};
}

void assignment_inspect(py::handle values, bool maximize, py::handle prices, py::handle gaps, py::handle magnitudes,
                        py::handle hashes, int device, std::uintptr_t handle) {
  const cuda::Stream stream = stream_of(device, handle);
  const cuda::LargeProblem problem = large_problem(values, maximize, stream);
  const cuda::Inspection inspection{
      entries_of<const float>(prices, "prices", {problem.columns}, stream),
      entries_of<float>(gaps, "gaps", {problem.rows}, stream),
      entries_of<float>(magnitudes, "magnitudes", {problem.rows}, stream),
      entries_of<std::int64_t>(hashes, "hashes", {problem.rows}, stream),
  };
  const py::gil_scoped_release released;
  cuda::assignment_inspect(problem, inspection, stream);
}

void assignment_check_classes(py::handle values, py::handle class_of_row, int device, std::uintptr_t handle) {
  const cuda::Stream stream = stream_of(device, handle);
  const cuda::LargeProblem problem = large_problem(values, false, stream);
  auto* const classes = entries_of<std::int32_t>(class_of_row, "class_of_row", {problem.rows}, stream);
  const py::gil_scoped_release released;
  cuda::assignment_check_classes(problem, classes, stream);
}

std::int64_t assignment_bid_workspace_bytes(std::int64_t rows, std::int64_t columns) {
  return cuda::assignment_bid_workspace_bytes({nullptr, ScalarType::float32, rows, columns, false});
}

void assignment_bid(py::handle values, bool maximize, py::handle epsilon, std::int64_t stop, std::int64_t max_rounds,
                    std::int64_t max_bids, py::handle class_of_row, py::handle prices, py::handle column_of_row,
                    py::handle counts, py::handle workspace, int device, std::uintptr_t handle) {
  const cuda::Stream stream = stream_of(device, handle);
  const cuda::LargeProblem problem = large_problem(values, maximize, stream);
  const cuda::Auction auction{
      entries_of<const float>(epsilon, "epsilon", {1}, stream),
      stop,
      max_rounds,
      max_bids,
      entries_of<const std::int32_t>(class_of_row, "class_of_row", {problem.rows}, stream),
      entries_of<float>(prices, "prices", {problem.columns}, stream),
      entries_of<std::int32_t>(column_of_row, "column_of_row", {problem.rows}, stream),
      entries_of<std::int64_t>(counts, "counts", {2}, stream),
  };
  const TensorView memory(workspace, "workspace", memory_of(stream));
  const std::int64_t needed = cuda::assignment_bid_workspace_bytes(problem);
  if (memory.entries() * static_cast<std::int64_t>(sizeof(std::int64_t)) < needed) {
    throw py::value_error("workspace must have " + std::to_string(needed) + " bytes");
  }
  void* const scratch = memory.contiguous<std::int64_t>({-1, 2});
  const py::gil_scoped_release released;
  cuda::assignment_bid(problem, auction, scratch, stream);
}

void assignment_list(py::handle values, bool maximize, py::handle rows, py::handle duals, std::int64_t wanted,
                     py::handle columns, py::handle costs, py::handle sizes, py::handle floors, int device,
                     std::uintptr_t handle) {
  const cuda::Stream stream = stream_of(device, handle);
  const cuda::LargeProblem problem = large_problem(values, maximize, stream);
  const cuda::ListRequest request =
      list_request(problem, rows, duals, wanted, columns, costs, sizes, floors, memory_of(stream));
  const py::gil_scoped_release released;
  cuda::assignment_list(problem, request, stream);
}

void assignment_certify(py::handle values, bool maximize, py::handle duals, py::handle column_of_row, py::handle least,
                        py::handle paired, int device, std::uintptr_t handle) {
  const cuda::Stream stream = stream_of(device, handle);
  const cuda::LargeProblem problem = large_problem(values, maximize, stream);
  const auto* const v = entries_of<const double>(duals, "duals", {problem.columns}, stream);
  const auto* const columns = entries_of<const std::int64_t>(column_of_row, "column_of_row", {problem.rows}, stream);
  auto* const min_costs = entries_of<double>(least, "least", {problem.rows}, stream);
  auto* const pair_costs = entries_of<double>(paired, "paired", {problem.rows}, stream);
  const py::gil_scoped_release released;
  cuda::assignment_certify(problem, v, columns, min_costs, pair_costs, stream);
}

void register_large(py::module_& module) {
  module.def("assignment_inspect", &assignment_inspect, py::kw_only(), py::arg("values"), py::arg("maximize"),
             py::arg("prices"), py::arg("gaps"), py::arg("magnitudes"), py::arg("hashes"), py::arg("device"),
             py::arg("stream"));
  module.def("assignment_check_classes", &assignment_check_classes, py::kw_only(), py::arg("values"),
             py::arg("class_of_row"), py::arg("device"), py::arg("stream"));
  module.def("assignment_bid_workspace_bytes", &assignment_bid_workspace_bytes, py::arg("rows"), py::arg("columns"));
  module.def("assignment_bid", &assignment_bid, py::kw_only(), py::arg("values"), py::arg("maximize"),
             py::arg("epsilon"), py::arg("stop"), py::arg("max_rounds"), py::arg("max_bids"), py::arg("class_of_row"),
             py::arg("prices"), py::arg("column_of_row"), py::arg("counts"), py::arg("workspace"), py::arg("device"),
             py::arg("stream"));
  module.def("assignment_list", &assignment_list, py::kw_only(), py::arg("values"), py::arg("maximize"),
             py::arg("rows"), py::arg("duals"), py::arg("wanted"), py::arg("columns"), py::arg("costs"),
             py::arg("sizes"), py::arg("floors"), py::arg("device"), py::arg("stream"));
  module.def("assignment_certify", &assignment_certify, py::kw_only(), py::arg("values"), py::arg("maximize"),
             py::arg("duals"), py::arg("column_of_row"), py::arg("least"), py::arg("paired"), py::arg("device"),
             py::arg("stream"));
}

// ListSearch, with the sizes that its tensors must have.
class HostSearch {
 public:
  HostSearch(py::handle duals, py::handle class_of_row, std::int64_t wanted)
      : rows_(length_of(class_of_row, "class_of_row")),
        columns_(length_of(duals, "duals")),
        search_(rows_, columns_, TensorView(duals, "duals").contiguous<double>({columns_}),
                TensorView(class_of_row, "class_of_row").contiguous<std::int32_t>({rows_}), wanted) {}

  void continue_auction(py::handle duals, py::handle column_of_row, double epsilon) {
    search_.continue_auction(TensorView(duals, "duals").contiguous<double>({columns_}),
                             TensorView(column_of_row, "column_of_row").contiguous<std::int32_t>({rows_}), epsilon);
  }

  // Returns (entries wanted, rows [k] int32) of each group of lists to make.
  std::vector<std::pair<std::int64_t, py::array_t<std::int32_t>>> advance() {
    const std::vector<cuda::RowsToList>* groups = nullptr;
    {
      const py::gil_scoped_release released;
      groups = &search_.advance();
    }
    std::vector<std::pair<std::int64_t, py::array_t<std::int32_t>>> requests;
    for (const cuda::RowsToList& group : *groups) {
      const auto count = static_cast<py::ssize_t>(group.rows.size());
      requests.emplace_back(group.wanted, py::array_t<std::int32_t>(count, group.rows.data()));
    }
    return requests;
  }

  void set_lists(py::handle rows, py::handle columns, py::handle costs, py::handle sizes, py::handle floors) {
    const TensorView row_numbers(rows, "rows"), listed(columns, "columns");
    listed.expect_shape({-1, -1});
    const std::int64_t count = listed.shape[0], capacity = listed.shape[1];
    const cuda::MadeLists lists{count,
                                capacity,
                                row_numbers.contiguous<std::int32_t>({count}),
                                listed.contiguous<std::int32_t>({count, capacity}),
                                TensorView(costs, "costs").contiguous<float>({count, capacity}),
                                TensorView(sizes, "sizes").contiguous<std::int32_t>({count}),
                                TensorView(floors, "floors").contiguous<double>({count})};
    for (std::int64_t k = 0; k < count; ++k) {
      if (lists.rows[k] < 0 || lists.rows[k] >= rows_) throw py::value_error("rows must be rows of the matrix");
      if (lists.sizes[k] < 0 || lists.sizes[k] > capacity) throw py::value_error("sizes must not exceed the capacity");
    }
    const py::gil_scoped_release released;
    search_.set_lists(lists);
  }

  py::array_t<double> duals() const { return py::array_t<double>(columns_, search_.duals()); }
  py::array_t<std::int64_t> column_of_row() const { return py::array_t<std::int64_t>(rows_, search_.column_of_row()); }

 private:
  static std::int64_t length_of(py::handle tensor, const char* name) {
    const TensorView view(tensor, name);
    view.expect_shape({-1});
    return view.shape[0];
  }

  std::int64_t rows_, columns_;
  cuda::ListSearch search_;
};

void register_search(py::module_& module) {
  // Local: the simulator's module has the same class, and a process may import both.
  py::class_<HostSearch>(module, "ListSearch", py::module_local())
      .def(py::init<py::handle, py::handle, std::int64_t>(), py::kw_only(), py::arg("duals"), py::arg("class_of_row"),
           py::arg("wanted"))
      .def("continue_auction", &HostSearch::continue_auction, py::kw_only(), py::arg("duals"), py::arg("column_of_row"),
           py::arg("epsilon"))
      .def("advance", &HostSearch::advance)
      .def("set_lists", &HostSearch::set_lists, py::kw_only(), py::arg("rows"), py::arg("columns"), py::arg("costs"),
           py::arg("sizes"), py::arg("floors"))
      .def("duals", &HostSearch::duals)
      .def("column_of_row", &HostSearch::column_of_row);
}

}  // namespace

void register_cuda_assignment(py::module_& module) {
  register_batch(module);
  register_large(module);
  register_search(module);
}

}  // namespace mudsc::bindings
