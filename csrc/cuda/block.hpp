// Choosing the best of a block's candidates.
#pragma once

#include "device.hpp"

namespace mudsc::cuda {

template <class T>
__device__ __forceinline__ T shuffle_xor(T value, int distance) {
  return __shfl_xor_sync(kWholeWarp, value, distance);
}

// A value and its position.
template <class Real>
struct Entry {
  Real value;
  std::int32_t index;
};

template <class Real>
__device__ __forceinline__ Entry<Real> shuffle_xor(Entry<Real> entry, int distance) {
  return {shuffle_xor(entry.value, distance), shuffle_xor(entry.index, distance)};
}

// The larger one; among equals the first.
struct FirstLargest {
  template <class Real>
  __device__ __forceinline__ Entry<Real> operator()(Entry<Real> a, Entry<Real> b) const {
    return a.value > b.value || (a.value == b.value && a.index < b.index) ? a : b;
  }
};

struct Sum {
  template <class T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a + b;
  }
};
struct Minimum {
  template <class T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a < b ? a : b;
  }
};

// Reduces the values of a warp with `combine`, in any order; every lane gets the result.
template <class T, class Combine>
__device__ __forceinline__ T warp_combine(T value, const Combine& combine) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2) value = combine(value, shuffle_xor(value, distance));
  return value;
}

// The same for a block of whole warps. Also a memory barrier. `identity` is the neutral element of `combine`.
template <class T, class Combine>
__device__ __forceinline__ T block_combine(T value, const Combine& combine, T identity) {
  MUDSC_SHARED(T, of_warp, kWarp);
  const unsigned lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  value = warp_combine(value, combine);
  if (lane == 0) of_warp[warp] = value;
  __syncthreads();
  value = warp_combine(lane < warps ? of_warp[lane] : identity, combine);
  __syncthreads();  // of_warp may be overwritten
  return value;
}

}  // namespace mudsc::cuda
