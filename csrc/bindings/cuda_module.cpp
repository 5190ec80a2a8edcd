// The module of the CUDA kernels, and that of the same kernels in the simulator.
#include <pybind11/stl.h>

#include <tuple>

#include "cuda_bindings.hpp"
#include "mudsc/build_info.hpp"

#if defined(MUDSC_CUDA_SIMULATOR)
#include "auction_rounds.hpp"
#include "row_lists.hpp"
#include "simulator.hpp"
#endif

namespace mudsc::bindings {
namespace {

#if defined(MUDSC_CUDA_SIMULATOR)
void register_simulator(py::module_& module) {
  module.def("set_seed", &cuda_sim::set_seed, py::arg("seed"));
  module.def("set_shared_memory_limit", &cuda_sim::set_shared_memory_limit, py::arg("bytes"));
  module.def("auction_rounds", [](std::uintptr_t values, std::int64_t n, bool maximize, float epsilon,
                                  std::int64_t stop, std::int64_t max_rounds, std::int64_t max_bids,
                                  std::uintptr_t class_of_row, std::uintptr_t prices, std::uintptr_t column_of_row) {
    const py::gil_scoped_release released;
    const cuda_sim::RoundCounts counts = cuda_sim::auction_rounds(
        pointer<const float>(values), n, maximize, epsilon, stop, max_rounds, max_bids,
        pointer<const std::int32_t>(class_of_row), pointer<float>(prices), pointer<std::int32_t>(column_of_row));
    return std::make_tuple(counts.rounds, counts.bids, counts.small_rounds);
  });
  module.def(
      "list_rows",
      [](std::uintptr_t values, std::int64_t n, bool maximize, std::int64_t threads, std::uintptr_t rows,
         std::int64_t count, std::uintptr_t duals, std::int64_t wanted, std::int64_t capacity, std::uintptr_t columns,
         std::uintptr_t costs, std::uintptr_t sizes, std::uintptr_t floors) {
        const cuda::LargeProblem problem{pointer<const void>(values), ScalarType::float32, n, n, maximize};
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
        cuda_sim::list_rows(problem, request, threads);
      },
      py::arg("values"), py::arg("n"), py::arg("maximize"), py::arg("threads"), py::kw_only(), py::arg("rows"),
      py::arg("count"), py::arg("duals"), py::arg("wanted"), py::arg("capacity"), py::arg("columns"), py::arg("costs"),
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
