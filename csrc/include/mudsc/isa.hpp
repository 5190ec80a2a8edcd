// Instruction levels: the same kernel source is compiled once per level, each in a namespace named after it.
//
// A contract header declares its kernel for every level with
//     MUDSC_DECLARE_KERNEL(void zip_units(const ZipProblem& problem));
// the kernel's source defines it once, inside `namespace mudsc::MUDSC_ISA`, and a caller picks one with
//     MUDSC_CALL_KERNEL(level, zip_units, problem);
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#define MUDSC_X86_64 1
#else
#define MUDSC_X86_64 0
#endif

namespace mudsc {

enum class Isa : std::int32_t { baseline = 0, avx2 = 1, avx512 = 2 };

// The highest level that was compiled and that this processor supports.
Isa supported_isa();

}  // namespace mudsc

#if MUDSC_X86_64
#define MUDSC_DECLARE_KERNEL(...) \
  namespace baseline {            \
  __VA_ARGS__;                    \
  }                               \
  namespace avx2 {                \
  __VA_ARGS__;                    \
  }                               \
  namespace avx512 {              \
  __VA_ARGS__;                    \
  }                               \
  static_assert(true, "")
#define MUDSC_CALL_KERNEL(level, name, ...)                             \
  ((level) == ::mudsc::Isa::avx512 ? ::mudsc::avx512::name(__VA_ARGS__) \
   : (level) == ::mudsc::Isa::avx2 ? ::mudsc::avx2::name(__VA_ARGS__)   \
                                   : ::mudsc::baseline::name(__VA_ARGS__))
#else
#define MUDSC_DECLARE_KERNEL(...) \
  namespace baseline {            \
  __VA_ARGS__;                    \
  }                               \
  static_assert(true, "")
#define MUDSC_CALL_KERNEL(level, name, ...) ((void)(level), ::mudsc::baseline::name(__VA_ARGS__))
#endif
