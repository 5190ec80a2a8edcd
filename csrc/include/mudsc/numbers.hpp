// Number types of the kernels and their conversions: one source for the kernels on the CPU and in CUDA.
//
// The file that includes this one defines
//   MUDSC_NUMBERS_NAMESPACE: where the types live. Each instruction level has its own copy, because the linker keeps only
//     one of several inline functions of a name, which could be the one with instructions that the processor lacks;
//   MUDSC_NUMBERS_FUNCTION: the specifiers of a function.
#pragma once

#include <cstdint>
#include <cstring>

namespace MUDSC_NUMBERS_NAMESPACE {

// Storage types of the half formats, distinct so that overloads choose the conversion.
struct Half {
  std::uint16_t bits;
};
struct BFloat16 {
  std::uint16_t bits;
};

// The type in which numbers of storage type T are computed.
template <class T>
struct ArithmeticOf {
  using type = float;
};
template <>
struct ArithmeticOf<double> {
  using type = double;
};

MUDSC_NUMBERS_FUNCTION float bits_to_float(std::uint32_t bits) {
#if defined(__CUDACC__)
  return __uint_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
#endif
}
MUDSC_NUMBERS_FUNCTION std::uint32_t float_to_bits(float value) {
#if defined(__CUDACC__)
  return __float_as_uint(value);
#else
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
#endif
}

// Selects by a mask, because compilers do not vectorize loops with branches, nor selections between floating-point
// operations, which might trap.
template <class Bits>
MUDSC_NUMBERS_FUNCTION Bits chosen(bool condition, Bits if_true, Bits if_false) {
  const Bits mask = Bits(0) - static_cast<Bits>(condition);
  return (if_true & mask) | (if_false & ~mask);
}

MUDSC_NUMBERS_FUNCTION double widen(double value) { return value; }
MUDSC_NUMBERS_FUNCTION float widen(float value) { return value; }
MUDSC_NUMBERS_FUNCTION float widen(BFloat16 value) {
  return bits_to_float(static_cast<std::uint32_t>(value.bits) << 16);
}
// Exact for every half, including subnormals, infinities and NaN.
MUDSC_NUMBERS_FUNCTION float widen(Half value) {
#if defined(__CUDACC__)
  return __half2float(__ushort_as_half(value.bits));
#else
  const std::uint32_t sign = static_cast<std::uint32_t>(value.bits & 0x8000u) << 16;
  const std::uint32_t magnitude = static_cast<std::uint32_t>(value.bits & 0x7fffu) << 13;
  // Multiplying by 2^112 changes the base of the exponent.
  std::uint32_t bits = float_to_bits(bits_to_float(magnitude) * bits_to_float(0x77800000u));
  bits |= chosen(magnitude >= 0x0f800000u, 0x7f800000u, 0u);  // inf and NaN
  return bits_to_float(bits | sign);
#endif
}

// Rounds to nearest, ties to even, as torch does.
MUDSC_NUMBERS_FUNCTION void narrow(double value, double& out) { out = value; }
MUDSC_NUMBERS_FUNCTION void narrow(double value, float& out) { out = static_cast<float>(value); }
MUDSC_NUMBERS_FUNCTION void narrow(float value, float& out) { out = value; }
MUDSC_NUMBERS_FUNCTION void narrow(float value, BFloat16& out) {
  const std::uint32_t bits = float_to_bits(value);
  const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  out.bits = static_cast<std::uint16_t>(chosen((bits & 0x7fffffffu) > 0x7f800000u, 0x7fc0u, rounded));  // NaN
}
MUDSC_NUMBERS_FUNCTION void narrow(float value, Half& out) {
#if defined(__CUDACC__)
  out.bits = __half_as_ushort(__float2half_rn(value));
#else
  const std::uint32_t bits = float_to_bits(value);
  const std::uint32_t sign = (bits >> 16) & 0x8000u;
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  const std::uint32_t normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u) >> 13;
  // Adding 0.5 aligns the mantissa to multiples of 2^-24, and the addition rounds to even.
  const std::uint32_t subnormal = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
  std::uint32_t half = chosen(magnitude < 0x38800000u, subnormal, normal);
  half = chosen(magnitude >= 0x477ff000u, 0x7c00u, half);  // rounds to infinity: at least 65520
  half = chosen(magnitude > 0x7f800000u, 0x7e00u, half);   // NaN
  out.bits = static_cast<std::uint16_t>(half | sign);
#endif
}

}  // namespace MUDSC_NUMBERS_NAMESPACE
