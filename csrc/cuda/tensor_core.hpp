// Tensor cores, matrix loads and asynchronous copies: PTX on the device, the same arithmetic in C++ in the simulator.
//
// The products of a step are exact and their sum is rounded towards zero, as tensor cores do; operands in TF32 lose the
// low 13 bits. Asynchronous work happens when it is waited for, as late as a device may do it; copies happen at once
// with some seeds of the simulator.
#pragma once

#include <type_traits>

#include "device.hpp"

// Whether the code for this architecture has wgmma: that for 9.0a, and the simulator's.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || !defined(__CUDACC__)
#define MUDSC_HAS_WGMMA 1
#else
#define MUDSC_HAS_WGMMA 0
#endif

namespace mudsc::cuda {

// A warp's fragment of a 16 x 8 result: lane l has rows l / 4 and l / 4 + 8, columns 2 (l % 4) and the next.
struct Accumulator {
  float values[4];
};

__device__ __forceinline__ unsigned shared_address(const void* pointer);

// Operands of wgmma in shared memory: rows of 128 bytes in which chunks of 16 are swizzled, eight rows to a pattern of
// 1024 bytes. A row is a unit's samples or, for units that are adjacent (halves only), a sample's units; a tile of more
// units than such a row holds is several tiles of `kSamples` rows.
template <class T, bool kUnitsAreAdjacent, int kUnitsOfTile>
struct SwizzledLayout {
  using Number = T;
  static constexpr bool kUnitsAdjacent = kUnitsAreAdjacent;
  static constexpr int kUnits = kUnitsOfTile;
  static constexpr int kPatternBytes = 1024, kRowBytes = 128, kChunkBytes = 16;
  static constexpr int kRowNumbers = kRowBytes / static_cast<int>(sizeof(T));
  static constexpr int kChunk = kChunkBytes / static_cast<int>(sizeof(T));
  static constexpr int kSamples = kRowNumbers;
  static constexpr int kRow = kUnitsAdjacent ? kUnits : kSamples, kRows = kUnitsAdjacent ? kSamples : kUnits;
  static constexpr int kStride = kRowNumbers, kPeriod = 8;  // rows this far apart have the same layout
  static constexpr int kNumbers = kUnits * kSamples;
  __device__ static __forceinline__ int at(int unit, int sample) {
    const int row = kUnitsAdjacent ? unit / kRowNumbers * kSamples + sample : unit;
    const int along = kUnitsAdjacent ? unit % kRowNumbers : sample;
    return row * kRowNumbers + ((along / kChunk ^ row % 8) * kChunk) + along % kChunk;
  }

  // Alignment of a tile in shared memory: that of the swizzle pattern.
  __device__ static __forceinline__ unsigned char* first_pattern(unsigned char* memory) {
    return memory + (0u - shared_address(memory)) % kPatternBytes;
  }
  // The matrix descriptor of 32 bytes of samples, the tile's first, of units from `first_unit` on (a multiple of 64);
  // that of the next 32 bytes is kOperandStep more. Swizzling is applied to the address, so that a step along a row is
  // an addition; a step down the rows is 32 bytes of samples in as many rows.
  static constexpr std::uint64_t kOperandStep = (kUnitsAdjacent ? 32 / sizeof(T) * kRowBytes : 32) / 16;
  __device__ static __forceinline__ std::uint64_t operand(const T* tile, int first_unit);
};

// A warpgroup's share of 64 x 128 sums of products, and those in flight. Warp w of the group has rows 16 w and on; in
// each eight columns a thread's numbers are an Accumulator of those rows.
template <class T, bool kUnitsAdjacent>
class WarpgroupSums {
 public:
  static constexpr int kRows = 64, kColumns = 128, kThreads = 4 * kWarp;
  static constexpr int kNumbers = kRows * kColumns / kThreads;
  static constexpr int kDepth = 32 / static_cast<int>(sizeof(T));

  __device__ static __forceinline__ int row(int number) {
    const int thread = static_cast<int>(threadIdx.x) % kThreads;
    return thread / kWarp * 16 + thread % kWarp / 4 + number / 2 % 2 * 8;
  }
  __device__ static __forceinline__ int column(int number) {
    return number / 4 * 8 + static_cast<int>(threadIdx.x) % 4 * 2 + number % 2;
  }

  // Call it before the first product after `values` were accessed.
  __device__ __forceinline__ void begin();
  // Adds a b (or stores it, if it is the first product), to be finished by `wait`: `kDepth` samples of the descriptors'
  // operands.
  __device__ __forceinline__ void multiply(std::uint64_t a, std::uint64_t b, bool from_zero);
  __device__ __forceinline__ void close_group();
  // Waits until no product is in flight.
  __device__ __forceinline__ void wait();

  float values[kNumbers] = {};

 private:
#if defined(__CUDACC__)
  __device__ __forceinline__ void hold();
#else
  struct Pending {
    std::uint64_t a, b;
    bool from_zero;
  };
  static constexpr int kMaxPending = 16;
  void execute(const Pending& product);

  Pending pending_[kMaxPending];
  int issued_ = 0, closed_ = 0;
  bool begun_ = false;
#endif
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
  // Waits until all groups but the last kLeft have arrived, for this thread to see.
  template <int kLeft>
  __device__ __forceinline__ void wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
  }
};

// Stores to shared memory that wgmma will read are recorded, so that the simulator detects a missing fence.
__device__ __forceinline__ void note_write(const void*, std::size_t) {}
// Call it after a thread's stores and before the barrier that precedes wgmma, which reads through the async proxy.
__device__ __forceinline__ void fence_writes() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

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

// Loads four 8 x 8 matrices of halves from shared memory. Lane l passes the address of row l % 8 of matrix l / 8 and
// receives row l / 4, columns 2 (l % 4) and the next, of each matrix (of its transpose if kTransposed).
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

// The accumulator registers of a thread, as operands of inline assembly.
#define MUDSC_8_REGISTERS(first)                                                                  \
  "+f"(values[first]), "+f"(values[first + 1]), "+f"(values[first + 2]), "+f"(values[first + 3]), \
      "+f"(values[first + 4]), "+f"(values[first + 5]), "+f"(values[first + 6]), "+f"(values[first + 7])
#define MUDSC_64_REGISTERS                                                                                         \
  MUDSC_8_REGISTERS(0), MUDSC_8_REGISTERS(8), MUDSC_8_REGISTERS(16), MUDSC_8_REGISTERS(24), MUDSC_8_REGISTERS(32), \
      MUDSC_8_REGISTERS(40), MUDSC_8_REGISTERS(48), MUDSC_8_REGISTERS(56)
#define MUDSC_WGMMA(shape_and_types, flags)                                                                 \
  "{\n.reg .pred adds;\nsetp.ne.b32 adds, %66, 0;\n"                                                        \
  "wgmma.mma_async.sync.aligned." shape_and_types                                                           \
  " "                                                                                                       \
  "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27," \
  "%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,"    \
  "%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}, %64, %65, adds, 1, 1" flags ";\n}"

template <class T, bool kUnitsAdjacent>
__device__ __forceinline__ void WarpgroupSums<T, kUnitsAdjacent>::multiply(std::uint64_t a, std::uint64_t b,
                                                                           bool from_zero) {
  const int adds = from_zero ? 0 : 1;
  if constexpr (sizeof(T) == 4) {
    asm volatile(MUDSC_WGMMA("m64n128k8.f32.tf32.tf32", "") : MUDSC_64_REGISTERS : "l"(a), "l"(b), "r"(adds));
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    asm volatile(MUDSC_WGMMA("m64n128k16.f32.bf16.bf16", ", %67, %67")
                 : MUDSC_64_REGISTERS
                 : "l"(a), "l"(b), "r"(adds), "n"(kUnitsAdjacent ? 1 : 0));
  } else {
    asm volatile(MUDSC_WGMMA("m64n128k16.f32.f16.f16", ", %67, %67")
                 : MUDSC_64_REGISTERS
                 : "l"(a), "l"(b), "r"(adds), "n"(kUnitsAdjacent ? 1 : 0));
  }
}
template <class T, bool kUnitsAdjacent>
__device__ __forceinline__ void WarpgroupSums<T, kUnitsAdjacent>::begin() {
  hold();
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
template <class T, bool kUnitsAdjacent>
__device__ __forceinline__ void WarpgroupSums<T, kUnitsAdjacent>::close_group() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <class T, bool kUnitsAdjacent>
__device__ __forceinline__ void WarpgroupSums<T, kUnitsAdjacent>::wait() {
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  hold();
}
// Keeps the compiler from moving uses of the registers across it.
template <class T, bool kUnitsAdjacent>
__device__ __forceinline__ void WarpgroupSums<T, kUnitsAdjacent>::hold() {
  asm volatile("" : MUDSC_64_REGISTERS : : "memory");
}

#else

inline unsigned shared_address(const void* pointer) { return cuda_sim::shared_address(pointer); }
inline void note_write(const void* to, std::size_t bytes) { cuda_sim::note_write(to, bytes); }
inline void fence_writes() { cuda_sim::fence_writes(); }

// Copies of one thread.
class AsyncCopies {
 public:
  template <int kBytes>
  void copy(void* to, const void* from, bool inside) {
    if ((shared_address(to) | reinterpret_cast<std::uintptr_t>(from)) % kBytes != 0) {
      cuda_sim::fail("an asynchronous copy from or to an address that is not aligned");
    }
    const Copy one{to, from, inside ? kBytes : 0, kBytes};
    if (cuda_sim::copies_at_once()) return make(one);
    copies_[copied_++ % kMaxCopies] = one;
  }
  void close_group() { ends_[groups_++ % kMaxCopies] = copied_; }
  template <int kLeft>
  void wait() {
    const int end = groups_ > kLeft ? ends_[(groups_ - 1 - kLeft) % kMaxCopies] : 0;
    for (; done_ < end; ++done_) make(copies_[done_ % kMaxCopies]);
  }

 private:
  struct Copy {
    void* to;
    const void* from;
    int read, written;
  };
  static void make(const Copy& one) {
    std::memset(one.to, 0, static_cast<std::size_t>(one.written));
    if (one.read > 0) std::memcpy(one.to, one.from, static_cast<std::size_t>(one.read));
    note_write(one.to, static_cast<std::size_t>(one.written));
  }
  static constexpr int kMaxCopies = 128;
  Copy copies_[kMaxCopies];
  int ends_[kMaxCopies];
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

namespace twin {

// An operand of wgmma, addressed through its descriptor.
template <class T, bool kTransposed>
class Operand {
 public:
  explicit Operand(std::uint64_t descriptor)
      : start_(field(descriptor, 0)), leading_(field(descriptor, 16)), stride_(field(descriptor, 32)) {
    if (descriptor >> 62 != 1) cuda_sim::fail("a matrix descriptor of another swizzle than that of 128 bytes");
    if ((descriptor >> 49 & 7) != 0) cuda_sim::fail("a matrix descriptor with a base offset");
  }

  // The number in row or column `outside` at position k of the sum.
  float at(unsigned outside, unsigned k) const {
    constexpr unsigned kSize = sizeof(T), kRowBytes = 128, kPerRow = kRowBytes / kSize;
    const unsigned offset =
        kTransposed ? outside / kPerRow * leading_ + outside % kPerRow * kSize + k / 8 * stride_ + k % 8 * kRowBytes
                    : outside / 8 * stride_ + outside % 8 * kRowBytes + k * kSize;
    const unsigned address = start_ + offset;
    const void* const place = cuda_sim::read_by_tensor_core(address ^ (address >> 7 & 7) << 4, kSize);
    if constexpr (sizeof(T) == 4) {
      return tf32(*static_cast<const std::uint32_t*>(place));
    } else {
      return widen(*static_cast<const T*>(place));
    }
  }

 private:
  static unsigned field(std::uint64_t descriptor, int first) {
    return static_cast<unsigned>(descriptor >> first & 0x3fff) << 4;
  }
  unsigned start_, leading_, stride_;
};

}  // namespace twin

template <class T, bool kUnitsAdjacent>
void WarpgroupSums<T, kUnitsAdjacent>::begin() {
  begun_ = true;
}
template <class T, bool kUnitsAdjacent>
void WarpgroupSums<T, kUnitsAdjacent>::multiply(std::uint64_t a, std::uint64_t b, bool from_zero) {
  const std::uint64_t* const all = cuda_sim::exchange(kWholeWarp, a * 31 + b);
  if (all[0] != all[cuda_sim::position().lane]) cuda_sim::fail("lanes disagree about the operands of a wgmma");
  if (!begun_) cuda_sim::fail("a wgmma without a wgmma.fence since its registers were touched");
  if (issued_ == kMaxPending) cuda_sim::fail("more products in flight than the simulator keeps");
  pending_[issued_++] = {a, b, from_zero};
}
template <class T, bool kUnitsAdjacent>
void WarpgroupSums<T, kUnitsAdjacent>::close_group() {
  closed_ = issued_;
}
template <class T, bool kUnitsAdjacent>
void WarpgroupSums<T, kUnitsAdjacent>::wait() {
  if (closed_ != issued_) cuda_sim::fail("a product of no group is not waited for");
  for (int k = 0; k < issued_; ++k) execute(pending_[k]);
  issued_ = closed_ = 0;
  begun_ = false;
}
template <class T, bool kUnitsAdjacent>
void WarpgroupSums<T, kUnitsAdjacent>::execute(const Pending& product) {
  const twin::Operand<T, kUnitsAdjacent> a(product.a), b(product.b);
  float of_rows[2][kDepth];
  for (int half = 0; half < 2; ++half) {
    for (int k = 0; k < kDepth; ++k) {
      of_rows[half][k] = a.at(static_cast<unsigned>(row(2 * half)), static_cast<unsigned>(k));
    }
  }
  for (int number = 0; number < kNumbers; number += number % 2 == 0 ? 1 : 3) {
    float of_column[kDepth];
    for (int k = 0; k < kDepth; ++k) {
      of_column[k] = b.at(static_cast<unsigned>(column(number)), static_cast<unsigned>(k));
    }
    for (int half = 0; half < 2; ++half) {
      float& value = values[number + 2 * half];
      double sum = product.from_zero ? 0.0 : static_cast<double>(value);
      for (int k = 0; k < kDepth; ++k) sum += static_cast<double>(of_rows[half][k]) * static_cast<double>(of_column[k]);
      value = twin::round_towards_zero(sum);
    }
  }
}

#endif

template <class T, bool kUnitsAreAdjacent, int kUnitsOfTile>
__device__ __forceinline__ std::uint64_t SwizzledLayout<T, kUnitsAreAdjacent, kUnitsOfTile>::operand(const T* tile,
                                                                                                     int first_unit) {
  // Either way 64 units take 64 rows of 128 bytes. Shared memory has less than 2^18 bytes, so that the address stays in
  // its field of 14 bits when steps are added.
  const unsigned address = shared_address(tile) + static_cast<unsigned>(first_unit * kRowBytes);
  // From the units of one row to those of the next tile; unused if a row holds samples.
  constexpr std::uint64_t kLeadingBytes = kUnitsAdjacent ? kSamples * kRowBytes : kChunkBytes;
  constexpr std::uint64_t kSwizzle128 = 1;
  return kSwizzle128 << 62 | static_cast<std::uint64_t>(kPatternBytes) / 16 << 32 | kLeadingBytes / 16 << 16 |
         address >> 4;
}

}  // namespace mudsc::cuda
