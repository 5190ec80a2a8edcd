// The module of the CUDA kernels, and that of the same kernels in the simulator.
#include "cuda_bindings.hpp"

#if defined(MUDSC_CUDA_SIMULATOR)
#include "simulator.hpp"
#endif

namespace mudsc::bindings {
namespace {

#if defined(MUDSC_CUDA_SIMULATOR)
void register_simulator(py::module_& module) {
  module.def("set_seed", &cuda_sim::set_seed, py::arg("seed"));
  module.def("set_shared_memory_limit", &cuda_sim::set_shared_memory_limit, py::arg("bytes"));
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
