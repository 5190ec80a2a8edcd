// The module of the CUDA kernels, and that of the same kernels in the simulator.
#include <pybind11/stl.h>

#include <tuple>

#include "cuda_bindings.hpp"
#include "mudsc/build_info.hpp"

#if defined(MUDSC_CUDA_SIMULATOR)
#include "auction_rounds.hpp"
#include "cuda_assignment.hpp"
#include "row_lists.hpp"
#include "simulator.hpp"
#endif

namespace mudsc::bindings {
namespace {

#if defined(MUDSC_CUDA_SIMULATOR)
std::tuple<std::int64_t, std::int64_t, std::int64_t> auction_rounds(py::handle values, bool maximize, float epsilon,
                                                                    std::int64_t stop, std::int64_t max_rounds,
                                                                    std::int64_t max_bids, py::handle class_of_row,
                                                                    py::handle prices, py::handle column_of_row) {
  const TensorView matrix(values, "values");
  matrix.expect_shape({-1, -1});
  const std::int64_t n = matrix.shape[0];
  const auto* const entries = matrix.contiguous<float>({n, n});
  const auto* const classes = TensorView(class_of_row, "class_of_row").contiguous<std::int32_t>({n});
  auto* const raised = TensorView(prices, "prices").contiguous<float>({n});
  auto* const columns = TensorView(column_of_row, "column_of_row").contiguous<std::int32_t>({n});
  const py::gil_scoped_release released;
  const cuda_sim::RoundCounts counts =
      cuda_sim::auction_rounds(entries, n, maximize, epsilon, stop, max_rounds, max_bids, classes, raised, columns);
  return {counts.rounds, counts.bids, counts.small_rounds};
}

void list_rows(py::handle values, bool maximize, std::int64_t threads, py::handle rows, py::handle duals,
               std::int64_t wanted, py::handle columns, py::handle costs, py::handle sizes, py::handle floors) {
  const TensorView matrix(values, "values");
  matrix.expect_shape({-1, -1});
  const cuda::LargeProblem problem{matrix.contiguous<float>({matrix.shape[0], matrix.shape[1]}), ScalarType::float32,
                                   matrix.shape[0], matrix.shape[1], maximize};
  const cuda::ListRequest request =
      list_request(problem, rows, duals, wanted, columns, costs, sizes, floors, kHostMemory);
  const py::gil_scoped_release released;
  cuda_sim::list_rows(problem, request, threads);
}

void register_simulator(py::module_& module) {
  module.def("set_seed", &cuda_sim::set_seed, py::arg("seed"));
  module.def("set_shared_memory_limit", &cuda_sim::set_shared_memory_limit, py::arg("bytes"));
  module.def("auction_rounds", &auction_rounds, py::kw_only(), py::arg("values"), py::arg("maximize"),
             py::arg("epsilon"), py::arg("stop"), py::arg("max_rounds"), py::arg("max_bids"), py::arg("class_of_row"),
             py::arg("prices"), py::arg("column_of_row"));
  module.def("list_rows", &list_rows, py::kw_only(), py::arg("values"), py::arg("maximize"), py::arg("threads"),
             py::arg("rows"), py::arg("duals"), py::arg("wanted"), py::arg("columns"), py::arg("costs"),
             py::arg("sizes"), py::arg("floors"));
  register_simulator_checks(module);
}
#endif

}  // namespace
}  // namespace mudsc::bindings

// A launch that fails throws a std::runtime_error that names the kernel; pybind11 makes it a RuntimeError.
PYBIND11_MODULE(MUDSC_CUDA_MODULE, module) {
  using namespace mudsc;
  module.doc() = "CUDA kernels of mudsc_fast; see mudsc_fast.ops for the functions to call.";
  module.def("unavailable_reason", &cuda::unavailable_reason, pybind11::arg("device") = -1);
  module.attr("architectures") = build_info::kCudaArchitectures;  // as in CMAKE_CUDA_ARCHITECTURES
  module.def("versions", [] {
    const cuda::Versions versions = cuda::cuda_versions();
    return std::make_pair(versions.toolkit, versions.driver);
  });
  bindings::register_cuda_assignment(module);
  bindings::register_cuda_correlation(module);
  bindings::register_cuda_zip(module);
#if defined(MUDSC_CUDA_SIMULATOR)
  bindings::register_simulator(module);
#endif
}
