// Whether there is a device, and whether this build has code for it.
#include "device.hpp"

namespace mudsc::cuda {

#if defined(__CUDACC__)
namespace {
__global__ void do_nothing() {}
}  // namespace

// Without a driver the call fails and leaves `count` alone: any error means no device.
std::string unavailable_reason(int device) {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) {
    cudaGetLastError();
    return cudaGetErrorString(error);
  }
  if (count == 0) return "no CUDA device";
  if (device < 0) return "";
  int current = 0;
  cudaGetDevice(&current);
  cudaFuncAttributes attributes;
  cudaError_t found = cudaSetDevice(device);
  if (found == cudaSuccess) found = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(do_nothing));
  cudaSetDevice(current);
  cudaGetLastError();
  return found == cudaSuccess ? "" : cudaGetErrorString(found);
}
#else
std::string unavailable_reason(int) { return ""; }
#endif

}  // namespace mudsc::cuda
