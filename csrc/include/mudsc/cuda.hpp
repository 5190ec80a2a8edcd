// What the CUDA contracts share: where to launch, and what a failed launch throws.
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

// Why no kernel can run on a device, or, where it is negative, on any; empty if they can.
std::string unavailable_reason(int device);

}  // namespace mudsc::cuda
