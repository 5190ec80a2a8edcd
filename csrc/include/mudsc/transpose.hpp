// Transposes small squares of numbers in vector registers.
//
// In an unnamed namespace: each instruction level must keep its own copy (see csrc/cpu/kernel.hpp).
#pragma once

#include <cstdint>

namespace mudsc {
namespace {

// Entries of two vectors, chosen by constant numbers: clang and gcc before 12 have one of these each.
#if defined(__clang__)
#define MUDSC_SHUFFLE(order, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define MUDSC_SHUFFLE(order, a, b, ...) __builtin_shuffle(a, b, order{__VA_ARGS__})
#endif

// Vectors of 16 bytes, which every supported processor has; memory need not be aligned.
template <class Value>
struct Quad;
template <>
struct Quad<float> {
  typedef float Memory __attribute__((vector_size(16), aligned(4), may_alias));
  typedef float Type __attribute__((vector_size(16)));
  typedef std::int32_t Order __attribute__((vector_size(16)));
};
template <>
struct Quad<double> {
  typedef double Memory __attribute__((vector_size(16), aligned(8), may_alias));
  typedef double Type __attribute__((vector_size(16)));
  typedef std::int64_t Order __attribute__((vector_size(16)));
};

// Writes a square of 4 x 4 or 2 x 2 entries transposed.
[[maybe_unused]] inline void transpose_square(const float* from, std::int64_t from_stride, float* to,
                                              std::int64_t to_stride) {
  using Q = Quad<float>;
  const auto read = [&](std::int64_t row) -> Q::Type {
    return *reinterpret_cast<const Q::Memory*>(from + row * from_stride);
  };
  const auto write = [&](std::int64_t row, Q::Type values) {
    *reinterpret_cast<Q::Memory*>(to + row * to_stride) = values;
  };
  const Q::Type a = read(0), b = read(1), c = read(2), d = read(3);
  const Q::Type ab_low = MUDSC_SHUFFLE(Q::Order, a, b, 0, 4, 1, 5);
  const Q::Type ab_high = MUDSC_SHUFFLE(Q::Order, a, b, 2, 6, 3, 7);
  const Q::Type cd_low = MUDSC_SHUFFLE(Q::Order, c, d, 0, 4, 1, 5);
  const Q::Type cd_high = MUDSC_SHUFFLE(Q::Order, c, d, 2, 6, 3, 7);
  write(0, MUDSC_SHUFFLE(Q::Order, ab_low, cd_low, 0, 1, 4, 5));
  write(1, MUDSC_SHUFFLE(Q::Order, ab_low, cd_low, 2, 3, 6, 7));
  write(2, MUDSC_SHUFFLE(Q::Order, ab_high, cd_high, 0, 1, 4, 5));
  write(3, MUDSC_SHUFFLE(Q::Order, ab_high, cd_high, 2, 3, 6, 7));
}
[[maybe_unused]] inline void transpose_square(const double* from, std::int64_t from_stride, double* to,
                                              std::int64_t to_stride) {
  using Q = Quad<double>;
  const Q::Type a = *reinterpret_cast<const Q::Memory*>(from);
  const Q::Type b = *reinterpret_cast<const Q::Memory*>(from + from_stride);
  *reinterpret_cast<Q::Memory*>(to) = MUDSC_SHUFFLE(Q::Order, a, b, 0, 2);
  *reinterpret_cast<Q::Memory*>(to + to_stride) = MUDSC_SHUFFLE(Q::Order, a, b, 1, 3);
}

}  // namespace
}  // namespace mudsc
