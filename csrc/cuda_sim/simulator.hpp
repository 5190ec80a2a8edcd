// Runs CUDA kernels on a CPU: device functions are C++, threads are fibers that switch at barriers and warp functions.
//
// For tests only. Within a launch, fibers run one at a time, in an order shuffled by a seed. A missing barrier makes
// results depend on the seed, and is a race under ThreadSanitizer, which is informed of barriers only. Blocks run one
// after another, those of a cooperative launch together. Shared memory is allocated to the exact byte, so that
// AddressSanitizer checks its bounds, and filled with a pattern, so that reads of uninitialized memory are noticed.
// Misuse of barriers and warp functions (exited or disagreeing lanes, threads at different barriers) is an error.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__ __restrict
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace mudsc::cuda_sim {

// Blocks of a cooperative launch: few, and more than one.
constexpr unsigned kCooperativeBlocks = 3;

// Order of the fibers of later launches: 0 is ascending; odd seeds let a warp run ahead, even ones mix all threads.
void set_seed(std::uint64_t seed);
// Whether asynchronous copies are made at once, as with some seeds, or when they are waited for.
bool copies_at_once();
// Bytes of dynamic shared memory that a block can have: what the largest devices have unless a test sets less.
std::size_t shared_memory_limit();
void set_shared_memory_limit(std::size_t bytes);

// Throws mudsc::cuda::LaunchError for impossible shapes, and std::runtime_error for misuse within the kernel.
void launch(const char* name, dim3 blocks, dim3 threads, std::size_t shared_bytes, bool cooperative,
            const std::function<void()>& body);

struct Position {
  dim3 thread, block, block_size, grid_size;
  unsigned lane;
};
const Position& position();

void block_barrier();
void grid_barrier();
// Publishes a value to the lanes of `mask` and returns those of all 32, until this lane's next exchange.
const std::uint64_t* warp_exchange(std::uint32_t mask, std::uint64_t value);
void* shared_array(const void* key, std::size_t bytes);
void* dynamic_shared();

// Ends the launch with an error.
void fail(const char* message);

// Addresses in the block's dynamic shared memory, which does not start at a round address on a device.
std::uint32_t shared_address(const void* pointer);
// Records a store of this thread that tensor cores may read, and a fence.proxy.async, which makes its stores visible to
// them.
void note_write(const void* to, std::size_t bytes);
void fence_writes();
// Memory that tensor cores read. Reading out of bounds, or data stored since the last fence, is an error.
const void* read_by_tensor_core(std::uint32_t address, std::size_t bytes);

template <class T>
inline T from_bits(std::uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
template <class T>
inline const std::uint64_t* exchange(std::uint32_t mask, T value) {
  static_assert(sizeof(T) <= sizeof(std::uint64_t), "warp functions take up to 8 bytes");
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return warp_exchange(mask, bits);
}
template <class T, class Combine>
inline T reduce(std::uint32_t mask, T value, const Combine& combine) {
  const std::uint64_t* const values = exchange(mask, value);
  T result = from_bits<T>(values[__builtin_ctz(mask)]);
  for (std::uint32_t rest = mask & (mask - 1); rest != 0; rest &= rest - 1) {
    result = combine(result, from_bits<T>(values[__builtin_ctz(rest)]));
  }
  return result;
}

}  // namespace mudsc::cuda_sim

#define threadIdx (::mudsc::cuda_sim::position().thread)
#define blockIdx (::mudsc::cuda_sim::position().block)
#define blockDim (::mudsc::cuda_sim::position().block_size)
#define gridDim (::mudsc::cuda_sim::position().grid_size)

inline void __syncthreads() { mudsc::cuda_sim::block_barrier(); }
inline int __syncthreads_count(int predicate);
inline void __syncwarp(unsigned mask = 0xffffffffu) { mudsc::cuda_sim::warp_exchange(mask, 0); }
template <class T>
inline T __shfl_sync(unsigned mask, T value, int source) {
  return mudsc::cuda_sim::from_bits<T>(mudsc::cuda_sim::exchange(mask, value)[source & 31]);
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int distance) {
  const unsigned lane = mudsc::cuda_sim::position().lane;
  return mudsc::cuda_sim::from_bits<T>(mudsc::cuda_sim::exchange(mask, value)[lane ^ static_cast<unsigned>(distance)]);
}
template <class T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned distance) {
  const unsigned lane = mudsc::cuda_sim::position().lane;
  const std::uint64_t* const values = mudsc::cuda_sim::exchange(mask, value);
  return lane < distance ? value : mudsc::cuda_sim::from_bits<T>(values[lane - distance]);
}
template <class T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned distance) {
  const unsigned lane = mudsc::cuda_sim::position().lane;
  const std::uint64_t* const values = mudsc::cuda_sim::exchange(mask, value);
  return lane + distance > 31 ? value : mudsc::cuda_sim::from_bits<T>(values[lane + distance]);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const unsigned bit = predicate ? 1u << mudsc::cuda_sim::position().lane : 0u;
  return mudsc::cuda_sim::reduce(mask, bit, [](unsigned a, unsigned b) { return a | b; });
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }
inline unsigned __reduce_max_sync(unsigned mask, unsigned value) {
  return mudsc::cuda_sim::reduce(mask, value, [](unsigned a, unsigned b) { return a > b ? a : b; });
}
inline unsigned __reduce_min_sync(unsigned mask, unsigned value) {
  return mudsc::cuda_sim::reduce(mask, value, [](unsigned a, unsigned b) { return a < b ? a : b; });
}
inline unsigned __reduce_add_sync(unsigned mask, unsigned value) {
  return mudsc::cuda_sim::reduce(mask, value, [](unsigned a, unsigned b) { return a + b; });
}

// Relaxed, as on the device: they do not order other accesses.
template <class T>
inline T atomicAdd(T* address, T value) {
  return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}
inline float atomicAdd(float* address, float value) {
  float known;
  __atomic_load(address, &known, __ATOMIC_RELAXED);
  for (float sum = known + value;
       !__atomic_compare_exchange(address, &known, &sum, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);) {
    sum = known + value;
  }
  return known;
}
inline double atomicAdd(double* address, double value) {
  double known;
  __atomic_load(address, &known, __ATOMIC_RELAXED);
  for (double sum = known + value;
       !__atomic_compare_exchange(address, &known, &sum, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);) {
    sum = known + value;
  }
  return known;
}
template <class T>
inline T atomicMax(T* address, T value) {
  T known = __atomic_load_n(address, __ATOMIC_RELAXED);
  while (known < value &&
         !__atomic_compare_exchange_n(address, &known, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return known;
}
template <class T>
inline T atomicOr(T* address, T value) {
  return __atomic_fetch_or(address, value, __ATOMIC_RELAXED);
}

inline std::uint32_t __float_as_uint(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline float __uint_as_float(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline long long __double_as_longlong(double value) {
  long long bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline double __longlong_as_double(long long bits) {
  double value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline int __ffs(int value) { return __builtin_ffs(value); }
// Additions and products that the compiler must not contract.
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __dmul_rn(double a, double b) { return a * b; }
template <class T>
inline T __ldg(const T* address) {
  return *address;
}
template <class T>
inline T __ldcs(const T* address) {
  return *address;
}

inline int __syncthreads_count(int predicate) {
  static const char key = 0;
  unsigned* const counts = static_cast<unsigned*>(mudsc::cuda_sim::shared_array(&key, sizeof(unsigned)));
  const dim3 thread = threadIdx;
  mudsc::cuda_sim::block_barrier();
  if (thread.x == 0 && thread.y == 0 && thread.z == 0) counts[0] = 0;
  mudsc::cuda_sim::block_barrier();
  if (predicate) atomicAdd(counts, 1u);
  mudsc::cuda_sim::block_barrier();
  return static_cast<int>(counts[0]);
}
