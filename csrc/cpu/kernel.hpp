// What every kernel source needs: scalar loads and scratch memory, in the namespace of its instruction level.
//
// Kernels are compiled several times with different instruction sets. A std inline function or template emitted
// by the AVX-512 object could be the copy that the linker keeps for all, and crash an older processor; so nothing
// of std that is not a plain type enters a kernel, and these helpers live in the level's own namespace.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "mudsc/isa.hpp"
#include "mudsc/types.hpp"

namespace mudsc::MUDSC_ISA {

// Of the widest vectors that the level has.
#if defined(__AVX512F__)
constexpr std::int64_t kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr std::int64_t kVectorBytes = 32;
#else
constexpr std::int64_t kVectorBytes = 16;
#endif

// Thrown by Buffer; bindings turn it into MemoryError.
using mudsc::OutOfMemory;

// To be called before the first use of a large array that is read out of order or written at once: address translation,
// or the faults of the first touch, which are most of the cost, cover more on huge pages. Without effect where the
// system has none.
inline void prefer_huge_pages(void* data, std::int64_t bytes) {
#if defined(__linux__)
  constexpr std::uintptr_t page = 4096;
  const std::uintptr_t begin = (reinterpret_cast<std::uintptr_t>(data) + page - 1) / page * page;
  const std::uintptr_t end =
      (reinterpret_cast<std::uintptr_t>(data) + static_cast<std::uintptr_t>(bytes)) / page * page;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

// 64-byte aligned uninitialised array of a trivial type.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(std::int64_t size) : size_(size) {
    if (size < 0 || static_cast<std::uint64_t>(size) > (SIZE_MAX / 2) / sizeof(T)) throw OutOfMemory{};
    const std::size_t bytes = (static_cast<std::size_t>(size) * sizeof(T) + 63) / 64 * 64;
    data_ = static_cast<T*>(std::aligned_alloc(64, bytes == 0 ? 64 : bytes));
    if (data_ == nullptr) throw OutOfMemory{};
  }
  Buffer(std::int64_t size, T value) : Buffer(size) { fill(value); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  Buffer(Buffer&& other) noexcept : data_(other.data_), size_(other.size_) {
    other.data_ = nullptr;
    other.size_ = 0;
  }
  Buffer& operator=(Buffer&& other) noexcept {
    T* const data = data_;
    const std::int64_t size = size_;
    data_ = other.data_;
    size_ = other.size_;
    other.data_ = data;
    other.size_ = size;
    return *this;
  }
  ~Buffer() { std::free(data_); }

  void fill(T value) {
    for (std::int64_t i = 0; i < size_; ++i) data_[i] = value;
  }
  void prefer_huge_pages() { MUDSC_ISA::prefer_huge_pages(data_, size_ * static_cast<std::int64_t>(sizeof(T))); }
  T* data() { return data_; }
  const T* data() const { return data_; }
  std::int64_t size() const { return size_; }
  T& operator[](std::int64_t i) { return data_[i]; }
  const T& operator[](std::int64_t i) const { return data_[i]; }

 private:
  T* data_ = nullptr;
  std::int64_t size_ = 0;
};

// Storage types of the half formats, distinct so that overloads choose the conversion.
struct Half {
  std::uint16_t bits;
};
struct BFloat16 {
  std::uint16_t bits;
};

inline float bits_to_float(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline std::uint32_t float_to_bits(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// The type that numbers of storage type T are computed in.
template <class T>
struct ArithmeticOf {
  using type = float;
};
template <>
struct ArithmeticOf<double> {
  using type = double;
};

// A choice by a mask: compilers leave loops over branches scalar, and choices between float operations too, which might
// trap.
template <class Bits>
Bits chosen(bool condition, Bits if_true, Bits if_false) {
  const Bits mask = Bits(0) - static_cast<Bits>(condition);
  return (if_true & mask) | (if_false & ~mask);
}

inline double widen(double value) { return value; }
inline float widen(float value) { return value; }
inline float widen(BFloat16 value) { return bits_to_float(static_cast<std::uint32_t>(value.bits) << 16); }
// Exact for every half, subnormals, infinities and NaN included: the exponent is rebased by a multiplication.
inline float widen(Half value) {
  const std::uint32_t sign = static_cast<std::uint32_t>(value.bits & 0x8000u) << 16;
  const std::uint32_t magnitude = static_cast<std::uint32_t>(value.bits & 0x7fffu) << 13;
  std::uint32_t bits = float_to_bits(bits_to_float(magnitude) * bits_to_float(0x77800000u));  // times 2^112
  bits |= chosen(magnitude >= 0x0f800000u, 0x7f800000u, 0u);                                  // inf and NaN
  return bits_to_float(bits | sign);
}

// Round to nearest, ties to even, as torch casts.
inline void narrow(double value, double& out) { out = value; }
inline void narrow(float value, float& out) { out = value; }
inline void narrow(float value, BFloat16& out) {
  const std::uint32_t bits = float_to_bits(value);
  const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  out.bits = static_cast<std::uint16_t>(chosen((bits & 0x7fffffffu) > 0x7f800000u, 0x7fc0u, rounded));  // NaN
}
inline void narrow(float value, Half& out) {
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
}

}  // namespace mudsc::MUDSC_ISA
