// The module of the CUDA kernels, and that of the same kernels in the simulator.
#include <pybind11/stl.h>

#include <tuple>

#include "cuda_bindings.hpp"

#if defined(MUDSC_CUDA_SIMULATOR)
#include "auction_rounds.hpp"
#include "simulator.hpp"
#endif

namespace mudsc::bindings {
namespace {

#if defined(MUDSC_CUDA_SIMULATOR)
void register_simulator(py::module_& module) {
  module.def("set_seed", &cuda_sim::set_seed, py::arg("seed"));
  module.def("set_shared_memory_limit", &cuda_sim::set_shared_memory_limit, py::arg("bytes"));
  module.def("auction_rounds", [](std::uintptr_t values, std::int64_t n, bool maximize, float epsilon,
                                  std::int64_t stop, std::int64_t most_rounds, std::int64_t most_bids,
                                  std::uintptr_t class_of_row, std::uintptr_t prices, std::uintptr_t column_of_row) {
    const py::gil_scoped_release released;
    const cuda_sim::RoundCounts counts =
        cuda_sim::auction_rounds(pointer<const float>(values), n, maximize, epsilon, stop, most_rounds, most_bids,
                                 pointer<const std::int32_t>(class_of_row),
                                 pointer<float>(prices), pointer<std::int32_t>(column_of_row));
    return std::make_tuple(counts.rounds, counts.bids, counts.small_rounds);
  });
  register_simulator_checks(module);
}
#endif

}  // namespace
}  // namespace mudsc::bindings

// A launch that fails throws a std::runtime_error that names the kernel; pybind11 makes it a RuntimeError.
PYBIND11_MODULE(MUDSC_CUDA_MODULE, module) {
  using namespace mudsc;
  module.doc() = "CUDA kernels of mudsc_fast; see mudsc_fast.ops for the functions to call.";
  module.def("unavailable_reason", &cuda::unavailable_reason);
  bindings::register_cuda_assignment(module);
  bindings::register_cuda_zip(module);
#if defined(MUDSC_CUDA_SIMULATOR)
  bindings::register_simulator(module);
#endif
}
