// What every .cu source includes: CUDA under nvcc, and under a C++ compiler the simulator that runs threads as fibers.
//
// Sources are plain CUDA except for four things that differ between the two: shared arrays (MUDSC_SHARED), dynamic
// shared memory (dynamic_shared), the grid barrier (grid_barrier) and launches (launch, launch_cooperative).
#pragma once

#include <cstdint>

#include "mudsc/cuda.hpp"
#include "mudsc/types.hpp"

#if defined(__CUDACC__)
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#else
#include "../cuda_sim/simulator.hpp"
#endif

#define MUDSC_NUMBERS_NAMESPACE mudsc::cuda
#define MUDSC_NUMBERS_FUNCTION __device__ __forceinline__
#include "mudsc/numbers.hpp"

#if defined(__CUDACC__)
#define MUDSC_SHARED(type, name, count) __shared__ type name[count]
#else
#define MUDSC_SHARED(type, name, count) \
  static const char name##_key = 0;     \
  type* const name = static_cast<type*>(::mudsc::cuda_sim::shared_array(&name##_key, sizeof(type) * (count)))
#endif

// Loop unrolling: by four, for independent loads in flight; or fully, so that arrays stay in registers.
#if defined(__CUDACC__)
#define MUDSC_UNROLL _Pragma("unroll")
#define MUDSC_UNROLL_4 _Pragma("unroll 4")
#else
#define MUDSC_UNROLL
#define MUDSC_UNROLL_4
#endif

namespace mudsc::cuda {

struct LaunchShape {
  dim3 blocks;
  dim3 threads;
  std::size_t shared_bytes;
};

// Kernel parameters are excluded from template deduction, so arguments are converted as in a normal call.
template <class T>
struct Exactly {
  using type = T;
};

#if defined(__CUDACC__)

__device__ __forceinline__ void grid_barrier() { cooperative_groups::this_grid().sync(); }
__device__ __forceinline__ unsigned char* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char mudsc_dynamic_shared[];
  return mudsc_dynamic_shared;
}

inline void check(cudaError_t error, const char* kernel) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // so that the error is reported once
  throw LaunchError(kernel, cudaGetErrorString(error));
}

// Bytes of shared memory that one block of the kernel can have, those of static arrays included.
inline std::size_t shared_memory_limit(const char* name, Stream stream) {
  int bytes = 0;
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, stream.device), name);
  return static_cast<std::size_t>(bytes);
}

// By default a block gets 48 KB, static arrays included. Always request all that the static arrays leave: a smaller
// limit, enough for this launch, could be too small for one that another thread is about to make.
template <class... Parameters>
void prepare_launch(const char* name, void (*kernel)(Parameters...), const LaunchShape& shape, Stream stream) {
  check(cudaSetDevice(stream.device), name);
  if (shape.shared_bytes == 0) return;
  const void* const function = reinterpret_cast<const void*>(kernel);
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, function), name);
  const std::size_t left = shared_memory_limit(name, stream) - attributes.sharedSizeBytes;
  check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(left)), name);
}

template <class... Parameters>
void launch(const char* name, void (*kernel)(Parameters...), const LaunchShape& shape, Stream stream,
            typename Exactly<Parameters>::type... parameters) {
  prepare_launch(name, kernel, shape, stream);
  void* addresses[] = {static_cast<void*>(&parameters)...};
  check(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), shape.blocks, shape.threads, addresses,
                         shape.shared_bytes, static_cast<cudaStream_t>(stream.handle)),
        name);
}

// Blocks of a cooperative launch for each multiprocessor: every block arrives at every barrier of the grid, so more
// blocks than keep the memory busy make each round slower.
constexpr int kMaxCooperativeBlocks = 2;

// Launches as many blocks as are on the device at the same time, so that they may wait for each other; kernels loop
// over their work by gridDim.x. Other processes can hold a part of the device (MPS): then fewer blocks are tried.
template <class... Parameters>
void launch_cooperative(const char* name, void (*kernel)(Parameters...), int threads, std::size_t shared_bytes,
                        Stream stream, typename Exactly<Parameters>::type... parameters) {
  prepare_launch(name, kernel, {dim3(1), dim3(threads), shared_bytes}, stream);
  const void* const function = reinterpret_cast<const void*>(kernel);
  int resident = 0, multiprocessors = 0;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, function, threads, shared_bytes), name);
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, stream.device), name);
  void* addresses[] = {static_cast<void*>(&parameters)...};
  for (int blocks = (resident < kMaxCooperativeBlocks ? resident : kMaxCooperativeBlocks) * multiprocessors;;
       blocks /= 2) {
    const cudaError_t error = cudaLaunchCooperativeKernel(function, dim3(blocks), dim3(threads), addresses,
                                                          shared_bytes, static_cast<cudaStream_t>(stream.handle));
    if (error == cudaErrorCooperativeLaunchTooLarge && blocks > 1) {
      cudaGetLastError();
      continue;
    }
    return check(error, name);
  }
}

#else

inline void grid_barrier() { cuda_sim::grid_barrier(); }
inline unsigned char* dynamic_shared() { return static_cast<unsigned char*>(cuda_sim::dynamic_shared()); }

template <class... Parameters>
void launch(const char* name, void (*kernel)(Parameters...), const LaunchShape& shape, Stream,
            typename Exactly<Parameters>::type... parameters) {
  cuda_sim::launch(name, shape.blocks, shape.threads, shape.shared_bytes, false, [=] { kernel(parameters...); });
}

template <class... Parameters>
void launch_cooperative(const char* name, void (*kernel)(Parameters...), int threads, std::size_t shared_bytes, Stream,
                        typename Exactly<Parameters>::type... parameters) {
  cuda_sim::launch(name, dim3(cuda_sim::kCooperativeBlocks), dim3(threads), shared_bytes, true,
                   [=] { kernel(parameters...); });
}

inline std::size_t shared_memory_limit(const char*, Stream) { return cuda_sim::shared_memory_limit(); }

#endif

// Unsigned keys in the order of the floating-point numbers; 0 is less than the key of every number except NaN.
__device__ __forceinline__ std::uint32_t ordered(float value) {
  const std::uint32_t bits = __float_as_uint(value);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float from_ordered(std::uint32_t key) {
  return __uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key);
}
__device__ __forceinline__ unsigned long long ordered(double value) {
  const unsigned long long bits = static_cast<unsigned long long>(__double_as_longlong(value));
  return bits >> 63 ? ~bits : bits | 0x8000000000000000ull;
}
__device__ __forceinline__ double from_ordered(unsigned long long key) {
  return __longlong_as_double(static_cast<long long>(key >> 63 ? key & 0x7fffffffffffffffull : ~key));
}

// Threads per block. Few in the simulator, where every thread of every barrier costs time.
#if defined(__CUDACC__)
constexpr int block_threads(int on_device, int /* simulated */) { return on_device; }
#else
constexpr int block_threads(int /* on_device */, int simulated) { return simulated; }
#endif

constexpr unsigned kWholeWarp = 0xffffffffu;
constexpr int kWarp = 32;

template <class Real>
constexpr Real infinity = static_cast<Real>(__builtin_huge_val());

}  // namespace mudsc::cuda
