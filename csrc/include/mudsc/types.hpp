// Types shared by every contract.
#pragma once

#include <cstdint>

namespace mudsc {

// Values are part of the binding: python/mudsc_fast/kernels/_scalar_types.py names the same numbers.
enum class ScalarType : std::int32_t { float16 = 0, bfloat16 = 1, float32 = 2, float64 = 3 };
// Indexed by type. Not a function, because kernel objects may only emit templates of their own namespace.
constexpr std::int64_t kScalarBytes[] = {2, 2, 4, 8};

// Thrown by kernels if scratch memory cannot be allocated; the bindings convert it to MemoryError.
struct OutOfMemory {};

}  // namespace mudsc
