// Kernels that are wrong on purpose, and one that is right: they prove what the simulator finds.
#include "cuda_bindings.hpp"
#include "device.hpp"

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

// Lane 0 leaves, and the others wait for it.
__global__ void wait_for_the_exited() {
  if (threadIdx.x == 0) return;
  __syncwarp();
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
  module.def("check_block_size", [](unsigned threads) {
    cuda::launch("wait_apart", wait_apart, {dim3(1), dim3(threads), 0}, kStream);
  });
}

}  // namespace mudsc::bindings
