// Contract of the zip op on a CUDA device.
#pragma once

#include <cstdint>

#include "mudsc/cuda.hpp"
#include "mudsc/zip.hpp"

namespace mudsc::cuda {

// Required size of `workspace` in bytes.
std::int64_t zip_workspace_bytes(const ZipProblem& problem);

// All pointers are on the device. Writes the number of merges to `merges`; does not wait for the device.
void zip_units(const ZipProblem& problem, void* workspace, std::int64_t* merges, Stream stream);

}  // namespace mudsc::cuda
