// Shared by the cuda_<op>.cpp files: bindings of the CUDA kernels, which take tensors, the index of their device and a
// stream, check the tensors as views, release the GIL and launch.
#pragma once

#include <initializer_list>
#include <type_traits>

#include "bindings.hpp"
#include "mudsc/cuda.hpp"
#include "tensors.hpp"

namespace mudsc::bindings {

inline cuda::Stream stream_of(int device, std::uintptr_t handle) { return {device, pointer<void>(handle)}; }

// Where the tensors of a launch must be: in host memory for the simulator.
inline int memory_of([[maybe_unused]] const cuda::Stream& stream) {
#if defined(MUDSC_CUDA_SIMULATOR)
  return kHostMemory;
#else
  return stream.device;
#endif
}

// The entries of a contiguous tensor of type T and of a shape (-1 for any length).
template <class T>
T* entries_of(py::handle tensor, const char* name, std::initializer_list<std::int64_t> shape,
              const cuda::Stream& stream) {
  return TensorView(tensor, name, memory_of(stream)).contiguous<std::remove_const_t<T>>(shape);
}

// The same; null for None.
template <class T>
T* optional_entries_of(py::handle tensor, const char* name, std::initializer_list<std::int64_t> shape,
                       const cuda::Stream& stream) {
  return tensor.is_none() ? nullptr : entries_of<T>(tensor, name, shape, stream);
}

void register_cuda_assignment(py::module_& module);
void register_cuda_correlation(py::module_& module);
void register_cuda_zip(py::module_& module);

#if defined(MUDSC_CUDA_SIMULATOR)
void register_simulator_checks(py::module_& module);
#endif

}  // namespace mudsc::bindings
