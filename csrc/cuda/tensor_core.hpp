// Tensor cores, matrix loads and asynchronous copies: PTX on the device, the same arithmetic in C++ in the simulator.
//
// The products of a step are exact and their sum is rounded towards zero, as tensor cores do; operands in TF32 lose the
// low 13 bits.
#pragma once

#include "device.hpp"

namespace mudsc::cuda {

// A warp's share of a 16 x 8 result: lane l has rows l / 4 and l / 4 + 8, columns 2 (l % 4) and the next.
struct Accumulator {
  float values[4];
};

#if defined(__CUDACC__)

__device__ __forceinline__ unsigned shared_address(const void* pointer) {
  return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

// Copies of one thread from global to shared memory, in groups: copy several times, then close the group.
class AsyncCopies {
 public:
  // If not `inside`, writes zeros and reads nothing.
  template <int kBytes>
  __device__ __forceinline__ void copy(void* to, const void* from, bool inside) {
    const int bytes = inside ? kBytes : 0;
    if constexpr (kBytes == 16) {
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes)
                   : "memory");
    } else {
      asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes)
                   : "memory");
    }
  }
  __device__ __forceinline__ void close_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
  // Until all groups but the last kLeft are there, for this thread to see.
  template <int kLeft>
  __device__ __forceinline__ void wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
  }
};

// c += a b in TF32: a is 16 x 8, b is 8 x 8.
__device__ __forceinline__ void multiply_tf32(Accumulator& c, const std::uint32_t (&a)[4],
                                              const std::uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c.values[0]), "+f"(c.values[1]), "+f"(c.values[2]), "+f"(c.values[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// c += a b in a half format: a is 16 x 16, b is 16 x 8.
template <class T>
__device__ __forceinline__ void multiply_halves(Accumulator& c, const std::uint32_t (&a)[4],
                                                const std::uint32_t (&b)[2]);
template <>
__device__ __forceinline__ void multiply_halves<BFloat16>(Accumulator& c, const std::uint32_t (&a)[4],
                                                          const std::uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c.values[0]), "+f"(c.values[1]), "+f"(c.values[2]), "+f"(c.values[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
__device__ __forceinline__ void multiply_halves<Half>(Accumulator& c, const std::uint32_t (&a)[4],
                                                      const std::uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c.values[0]), "+f"(c.values[1]), "+f"(c.values[2]), "+f"(c.values[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Four 8 x 8 matrices of halves from shared memory. Lane l gives the address of row l % 8 of matrix l / 8 and gets of
// each matrix row l / 4, columns 2 (l % 4) and the next; if kTransposed, of its transpose.
template <bool kTransposed>
__device__ __forceinline__ void load_matrices(std::uint32_t (&matrices)[4], const void* row) {
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
                 : "r"(shared_address(row))
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
                 : "r"(shared_address(row))
                 : "memory");
  }
}

#else

// Copies are made when they are waited for, as late as a device may make them.
class AsyncCopies {
 public:
  template <int kBytes>
  void copy(void* to, const void* from, bool inside) {
    copies_[copied_++ % kMost] = {to, from, inside ? kBytes : 0, kBytes};
  }
  void close_group() { ends_[groups_++ % kMost] = copied_; }
  template <int kLeft>
  void wait() {
    const int end = groups_ > kLeft ? ends_[(groups_ - 1 - kLeft) % kMost] : 0;
    for (; done_ < end; ++done_) {
      const Copy& one = copies_[done_ % kMost];
      std::memset(one.to, 0, static_cast<std::size_t>(one.written));
      if (one.read > 0) std::memcpy(one.to, one.from, static_cast<std::size_t>(one.read));
    }
  }

 private:
  struct Copy {
    void* to;
    const void* from;
    int read, written;
  };
  static constexpr int kMost = 128;
  Copy copies_[kMost];
  int ends_[kMost];
  int copied_ = 0, groups_ = 0, done_ = 0;
};

namespace twin {

// The registers of all lanes.
template <int kRegisters>
struct Fragments {
  std::uint32_t of_lane[kWarp][kRegisters];

  explicit Fragments(const std::uint32_t (&mine)[kRegisters]) {
    for (int pair = 0; pair < kRegisters; pair += 2) {
      const std::uint64_t both = mine[pair] | static_cast<std::uint64_t>(mine[pair + 1]) << 32;
      const std::uint64_t* const all = cuda_sim::warp_exchange(kWholeWarp, both);
      for (int lane = 0; lane < kWarp; ++lane) {
        of_lane[lane][pair] = static_cast<std::uint32_t>(all[lane]);
        of_lane[lane][pair + 1] = static_cast<std::uint32_t>(all[lane] >> 32);
      }
    }
  }
};

inline float round_towards_zero(double value) {
  const float nearest = static_cast<float>(value);
  const bool away = std::fabs(static_cast<double>(nearest)) > std::fabs(value);
  return away ? __uint_as_float(__float_as_uint(nearest) - 1) : nearest;
}

inline float tf32(std::uint32_t bits) { return __uint_as_float(bits & 0xffffe000u); }

template <class T>
inline float half_of(std::uint32_t bits, int which) {
  return widen(T{static_cast<std::uint16_t>(bits >> (16 * which))});
}

// Adds the products to this lane's entries; a(row, k) and b(k, column) read operands.
template <int kDepth, class A, class B>
inline void multiply(Accumulator& c, const A& a, const B& b) {
  const int lane = static_cast<int>(cuda_sim::position().lane);
  for (int entry = 0; entry < 4; ++entry) {
    const int row = lane / 4 + 8 * (entry / 2), column = 2 * (lane % 4) + entry % 2;
    double sum = static_cast<double>(c.values[entry]);
    for (int k = 0; k < kDepth; ++k) sum += static_cast<double>(a(row, k)) * static_cast<double>(b(k, column));
    c.values[entry] = round_towards_zero(sum);
  }
}

}  // namespace twin

inline void multiply_tf32(Accumulator& c, const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  const twin::Fragments<4> all_a(a);
  const twin::Fragments<2> all_b(b);
  twin::multiply<8>(
      c, [&](int row, int k) { return twin::tf32(all_a.of_lane[row % 8 * 4 + k % 4][row / 8 + 2 * (k / 4)]); },
      [&](int k, int column) { return twin::tf32(all_b.of_lane[column * 4 + k % 4][k / 4]); });
}

template <class T>
inline void multiply_halves(Accumulator& c, const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  const twin::Fragments<4> all_a(a);
  const twin::Fragments<2> all_b(b);
  twin::multiply<16>(
      c,
      [&](int row, int k) {
        return twin::half_of<T>(all_a.of_lane[row % 8 * 4 + k % 8 / 2][row / 8 + 2 * (k / 8)], k % 2);
      },
      [&](int k, int column) { return twin::half_of<T>(all_b.of_lane[column * 4 + k % 8 / 2][k / 8], k % 2); });
}

template <bool kTransposed>
inline void load_matrices(std::uint32_t (&matrices)[4], const void* row) {
  const std::uint64_t* const rows = cuda_sim::exchange(kWholeWarp, row);
  const unsigned lane = cuda_sim::position().lane, down = lane / 4, across = lane % 4 * 2;
  for (unsigned matrix = 0; matrix < 4; ++matrix) {
    std::uint32_t halves[2];
    for (unsigned k = 0; k < 2; ++k) {
      const unsigned from_row = kTransposed ? across + k : down, from_column = kTransposed ? down : across + k;
      halves[k] = cuda_sim::from_bits<const std::uint16_t*>(rows[matrix * 8 + from_row])[from_column];
    }
    matrices[matrix] = halves[0] | halves[1] << 16;
  }
}

#endif

}  // namespace mudsc::cuda
