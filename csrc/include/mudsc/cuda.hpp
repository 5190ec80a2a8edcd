// Shared by the CUDA contracts: where to launch, and the error of a failed launch.
#pragma once

#include <stdexcept>
#include <string>

namespace mudsc::cuda {

// A queue of work on a device. The simulator knows only one and ignores it.
struct Stream {
  int device;
  void* handle;  // cudaStream_t
};

// Names the kernel that could not be launched, and why.
struct LaunchError : std::runtime_error {
  LaunchError(const std::string& kernel, const std::string& reason)
      : std::runtime_error("CUDA kernel " + kernel + " could not be launched: " + reason) {}
};

// Why no kernel can run on a device (on any device, if the index is negative); empty if kernels can run.
std::string unavailable_reason(int device);

// CUDA's version numbers: 13000 is 13.0. For the driver, the newest version that it supports; 0 without a driver.
struct Versions {
  int toolkit, driver;
};
Versions cuda_versions();

}  // namespace mudsc::cuda
