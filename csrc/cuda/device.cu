// Versions of CUDA, whether there is a device, and whether this build has code for it.
#include "device.hpp"

#if defined(__CUDACC__)
#include <thread>
#endif

namespace mudsc::cuda {

#if defined(__CUDACC__)
namespace {

__global__ void do_nothing() {}

// 13000 is CUDA 13.0.
std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

std::string reason_for(cudaError_t error, int device) {
  cudaGetLastError();  // so that the error is reported once
  const std::string text = cudaGetErrorString(error);
  if (error == cudaErrorInsufficientDriver) {
    const Versions versions = cuda_versions();
    if (versions.driver == 0) return "no CUDA driver is installed (" + text + ")";
    return "the driver is for CUDA " + version_text(versions.driver) + ", older than the CUDA " +
           version_text(versions.toolkit) + " that this package was built with: update the driver, or install the " +
           "package again with a CUDA toolkit of version " + version_text(versions.driver) + " or older";
  }
  if (error == cudaErrorNoKernelImageForDevice) {
    int major = 0, minor = 0;
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    const std::string capability = std::to_string(major) + "." + std::to_string(minor);
    if (major < 8) return "the device has compute capability " + capability + "; the kernels need 8.0 or newer";
    return "this build has no code for compute capability " + capability +
           ": install the package again on this machine";
  }
  return text;
}

// Without a driver the call fails and leaves `count` unset: any error means no device.
std::string find_reason(int device) {
  int count = 0;
  cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) return reason_for(error, device);
  if (count == 0) return "no CUDA device";
  if (device < 0) return "";
  cudaFuncAttributes attributes;
  error = cudaSetDevice(device);
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(do_nothing));
  return error == cudaSuccess ? "" : reason_for(error, device);
}

}  // namespace

// Queried in a separate thread: the current device is per thread, and restoring the caller's device would create a
// context (some hundred MB) on a device that the caller may never have used.
std::string unavailable_reason(int device) {
  std::string reason;
  std::thread([&] { reason = find_reason(device); }).join();
  return reason;
}

Versions cuda_versions() {
  Versions versions{CUDART_VERSION, 0};
  if (cudaDriverGetVersion(&versions.driver) != cudaSuccess) cudaGetLastError();
  return versions;
}
#else
std::string unavailable_reason(int) { return ""; }
Versions cuda_versions() { return {}; }
#endif

}  // namespace mudsc::cuda
