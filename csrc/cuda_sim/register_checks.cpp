// Kernels that are wrong on purpose, and a correct one, to test what the simulator detects.
#include <pybind11/stl.h>

#include <vector>

#include "cuda_bindings.hpp"
#include "device.hpp"
#include "tensor_core.hpp"

namespace mudsc::bindings {
namespace {

constexpr int kThreads = 64;

// Sums 0 .. kThreads - 1 in shared memory, without the barrier between the steps if `barrier` is false.
__global__ void sum_in_steps(bool barrier, int* result) {
  MUDSC_SHARED(int, partial, kThreads);
  const int thread = static_cast<int>(threadIdx.x);
  partial[thread] = thread;
  __syncthreads();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (thread < half) partial[thread] += partial[thread + half];
    if (barrier) __syncthreads();
  }
  if (thread == 0) *result = partial[0];
}

// Half of the threads wait at the block's barrier, the others at the warp's.
__global__ void wait_apart() {
  if (threadIdx.x % 2 == 0) {
    __syncthreads();
  } else {
    __syncwarp();
  }
}

// Lane 0 exits, and the others wait for it.
__global__ void wait_for_the_exited() {
  if (threadIdx.x == 0) return;
  __syncwarp();
}

// The step that a warpgroup omits.
enum class Forgotten { nothing, fence_of_stores, fence_of_registers, wait };

using Tile = cuda::SwizzledLayout<float, false, 128>;
using Sums = cuda::WarpgroupSums<float, false>;

// One warpgroup multiplies 64 x 8 by 128 x 8 numbers; the result's entry (r, c) is the sum of (r + k) (c - k).
__global__ void multiply_once(Forgotten forgotten, float* result) {
  float* const a = reinterpret_cast<float*>(Tile::first_pattern(cuda::dynamic_shared()));
  float* const b = a + Tile::kNumbers;
  const int unit = static_cast<int>(threadIdx.x);
  for (int k = 0; k < Sums::kDepth; ++k) {
    a[Tile::at(unit, k)] = static_cast<float>(unit + k);
    b[Tile::at(unit, k)] = static_cast<float>(unit - k);
    cuda::note_write(a + Tile::at(unit, k), sizeof(float));
    cuda::note_write(b + Tile::at(unit, k), sizeof(float));
  }
  if (forgotten != Forgotten::fence_of_stores) cuda::fence_writes();
  __syncthreads();
  Sums sums;
  if (forgotten != Forgotten::fence_of_registers) sums.begin();
  sums.multiply(Tile::operand(a, 0), Tile::operand(b, 0), true);
  sums.close_group();
  if (forgotten != Forgotten::wait) sums.wait();
  // Without the wait, this overwrites operands that have not been read yet.
  __syncthreads();
  a[Tile::at(unit, 0)] = 1e9f;
  __syncthreads();
  if (forgotten == Forgotten::wait) {
    cuda::fence_writes();
    sums.wait();
  }
  for (int k = 0; k < Sums::kNumbers; ++k) result[Sums::row(k) * Sums::kColumns + Sums::column(k)] = sums.values[k];
}

const cuda::LaunchShape kShape{dim3(1), dim3(kThreads), 0};
const cuda::Stream kStream{0, nullptr};

}  // namespace

void register_simulator_checks(py::module_& module) {
  module.def("check_sum", [](bool barrier) {
    int result = 0;
    cuda::launch("sum_in_steps", sum_in_steps, kShape, kStream, barrier, &result);
    return result;
  });
  module.def("check_wait_apart", [] { cuda::launch("wait_apart", wait_apart, kShape, kStream); });
  module.def("check_exited_lane", [] { cuda::launch("wait_for_the_exited", wait_for_the_exited, kShape, kStream); });
  module.def("check_warpgroup", [](int forgotten) {
    std::vector<float> result(Sums::kRows * Sums::kColumns);
    const cuda::LaunchShape shape{dim3(1), dim3(Sums::kThreads),
                                  Tile::kPatternBytes + 2 * sizeof(float) * Tile::kNumbers};
    cuda::launch("multiply_once", multiply_once, shape, kStream, static_cast<Forgotten>(forgotten), result.data());
    return result;
  });
  module.def("check_block_size",
             [](unsigned threads) { cuda::launch("wait_apart", wait_apart, {dim3(1), dim3(threads), 0}, kStream); });
}

}  // namespace mudsc::bindings
