// Whether there is a device at all.
#include "device.hpp"

namespace mudsc::cuda {

#if defined(__CUDACC__)
// Without a driver the call fails and leaves `count` alone: any error means no device.
std::string unavailable_reason() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) {
    cudaGetLastError();
    return cudaGetErrorString(error);
  }
  return count == 0 ? "no CUDA device" : "";
}
#else
std::string unavailable_reason() { return ""; }
#endif

}  // namespace mudsc::cuda
