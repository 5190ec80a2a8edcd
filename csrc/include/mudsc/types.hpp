// Types shared by every contract.
#pragma once

#include <cstdint>

namespace mudsc {

// Values are part of the binding: python/mudsc_fast/kernels/_scalar_types.py names the same numbers.
enum class ScalarType : std::int32_t { float16 = 0, bfloat16 = 1, float32 = 2, float64 = 3 };
// By type. No function: what is no template of a kernel's own namespace must not be emitted by its objects.
constexpr std::int64_t kScalarBytes[] = {2, 2, 4, 8};

// Thrown by kernels when scratch memory cannot be had; the bindings turn it into MemoryError.
struct OutOfMemory {};

}  // namespace mudsc
