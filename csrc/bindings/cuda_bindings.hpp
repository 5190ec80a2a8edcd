// Shared by the cuda_<op>.cpp files: bindings of the CUDA kernels, which take addresses on the device, its index and a
// stream that python/mudsc_fast/kernels/cuda has checked, release the GIL and launch.
#pragma once

#include "bindings.hpp"
#include "mudsc/cuda.hpp"

namespace mudsc::bindings {

inline cuda::Stream stream_of(int device, std::uintptr_t handle) { return {device, pointer<void>(handle)}; }

void register_cuda_assignment(py::module_& module);
void register_cuda_zip(py::module_& module);

#if defined(MUDSC_CUDA_SIMULATOR)
void register_simulator_checks(py::module_& module);
#endif

}  // namespace mudsc::bindings
