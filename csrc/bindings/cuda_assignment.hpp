// Arguments of the assignment kernels that their bindings and the simulator's plain loops share.
#pragma once

#include "cuda_bindings.hpp"
#include "mudsc/assignment_cuda.hpp"

namespace mudsc::bindings {

// A request to list rows [count], into lists [count, capacity].
inline cuda::ListRequest list_request(const cuda::LargeProblem& problem, py::handle rows, py::handle duals,
                                      std::int64_t wanted, py::handle columns, py::handle costs, py::handle sizes,
                                      py::handle floors, int memory) {
  const TensorView listed(columns, "columns", memory);
  listed.expect_shape({-1, -1});
  const std::int64_t count = listed.shape[0], capacity = listed.shape[1];
  if (wanted < 1 || (capacity != problem.columns && (capacity > problem.columns || capacity < wanted))) {
    throw py::value_error("columns must have room for the wanted entries of a list, or for all columns");
  }
  return {TensorView(rows, "rows", memory).contiguous<std::int32_t>({count}),
          count,
          TensorView(duals, "duals", memory).contiguous<double>({problem.columns}),
          wanted,
          capacity,
          listed.contiguous<std::int32_t>({count, capacity}),
          TensorView(costs, "costs", memory).contiguous<float>({count, capacity}),
          TensorView(sizes, "sizes", memory).contiguous<std::int32_t>({count}),
          TensorView(floors, "floors", memory).contiguous<double>({count})};
}

}  // namespace mudsc::bindings
