// Runs every CUDA kernel in the simulator at a tiny size, to be compiled with ThreadSanitizer, which is informed of barriers only: two threads that touch the same memory without one between them are reported, in whatever order they
// ran. With the argument "planted", a kernel without a barrier that it needs, to show that such a race is found.
#include <cstdio>
#include <cstring>
#include <vector>

#include "device.hpp"
#include "mudsc/assignment_cuda.hpp"
#include "mudsc/correlation_cuda.hpp"
#include "mudsc/zip_cuda.hpp"

namespace {

using namespace mudsc;

constexpr int kThreads = 64;
const cuda::Stream kStream{0, nullptr};

__global__ void neighbors(bool barrier, int* result) {
  MUDSC_SHARED(int, numbers, kThreads);
  const unsigned thread = threadIdx.x;
  numbers[thread] = static_cast<int>(thread);
  if (barrier) __syncthreads();
  result[thread] = numbers[(thread + 1) % kThreads];
}

std::vector<float> some_values(int count, int modulus) {
  std::vector<float> values(count);
  unsigned state = 1;
  for (float& value : values) {
    state = state * 1664525u + 1013904223u;
    value = static_cast<float>(state >> 16 & 0xffffu) / 65536.0f;
    if (modulus > 0) value = static_cast<float>(static_cast<int>(value * static_cast<float>(modulus)));
  }
  return values;
}

void zip(int units, double shrink, std::int64_t budget) {
  const std::vector<float> similarity = some_values(units * units, 0);
  std::vector<std::int64_t> clusters(units);
  std::vector<double> values(units);
  std::int64_t merges = 0;
  const ZipProblem problem{similarity.data(), ScalarType::float32, units, units, 2, units / 2, budget, shrink,
                           clusters.data(),   values.data()};
  std::vector<double> workspace(cuda::zip_workspace_bytes(problem) / 8 + 1);
  cuda::zip_units(problem, workspace.data(), &merges, kStream);
}

void assign_batch(int rows, int columns) {
  const std::vector<float> values = some_values(2 * rows * columns, 5);
  std::vector<std::int64_t> column_of_row(2 * rows);
  std::vector<double> row_duals(2 * rows), column_duals(2 * columns), objective(2), gap(2);
  std::vector<AssignmentStatus> status(2);
  const AssignmentProblem problem{values.data(),
                                  ScalarType::float32,
                                  2,
                                  rows,
                                  columns,
                                  false,
                                  true,
                                  0.0,
                                  1,
                                  nullptr,
                                  column_of_row.data(),
                                  row_duals.data(),
                                  column_duals.data(),
                                  objective.data(),
                                  gap.data(),
                                  status.data()};
  cuda::assignment_batch(problem, kStream);
}

void assign_large(int n, int modulus) {
  const std::vector<float> values = some_values(n * n, modulus);
  const cuda::LargeProblem problem{values.data(), ScalarType::float32, n, n, true};
  std::vector<float> prices(n, 0.0f), gaps(n), magnitudes(n);
  std::vector<std::int64_t> hashes(n), column_of_row(n), counts(2);
  cuda::assignment_inspect(problem, {prices.data(), gaps.data(), magnitudes.data(), hashes.data()}, kStream);
  std::vector<std::int32_t> class_of_row(n), pairs(n);
  for (int i = 0; i < n; ++i) class_of_row[i] = i - i % 2;
  cuda::assignment_check_classes(problem, class_of_row.data(), kStream);
  const float epsilon = 0.01f;
  std::vector<double> workspace(cuda::assignment_bid_workspace_bytes(problem) / 8 + 1);
  cuda::assignment_bid(problem,
                       {&epsilon, 0, 50, 50 * n, class_of_row.data(), prices.data(), pairs.data(), counts.data()},
                       workspace.data(), kStream);
  const std::vector<double> duals(n, 0.0);
  const int wanted = 3, capacity = 6;
  std::vector<std::int32_t> columns(n * capacity), sizes(n);
  std::vector<float> costs(n * capacity);
  std::vector<double> floors(n), least(n), paired(n);
  cuda::assignment_list(
      problem, {nullptr, n, duals.data(), wanted, capacity, columns.data(), costs.data(), sizes.data(), floors.data()},
      kStream);
  for (int i = 0; i < n; ++i) column_of_row[i] = i;
  cuda::assignment_certify(problem, duals.data(), column_of_row.data(), least.data(), paired.data(), kStream);
}

// Two models of the same values: float32 (4 bytes) or bfloat16 (2), units adjacent or samples, about a mean of
// `offset`; multiplied by mma.sync or by warpgroups.
void correlate(int units, int samples, int bytes, bool units_adjacent, float offset, bool warpgroups) {
  std::vector<float> values = some_values(units * samples, 0);
  std::vector<std::uint16_t> halves(values.size());
  for (std::size_t k = 0; k < values.size(); ++k) {
    values[k] += offset;
    halves[k] = static_cast<std::uint16_t>(__float_as_uint(values[k]) >> 16);
  }
  const ScalarType dtype = bytes == 4 ? ScalarType::float32 : ScalarType::bfloat16;
  const void* const numbers = bytes == 4 ? static_cast<const void*>(values.data()) : halves.data();
  std::vector<float> shift(units), products(2 * units * units);
  // Adjacent units are read through an index of their samples.
  std::vector<std::int32_t> order(samples);
  for (int k = 0; k < samples; ++k) order[k] = samples - 1 - k;
  const cuda::FeatureView view{numbers,
                               units_adjacent ? units : 0,
                               units_adjacent ? 1 : samples,
                               units_adjacent ? units : 1,
                               units_adjacent ? order.data() : nullptr,
                               shift.data()};
  const std::int64_t outer = units_adjacent ? samples : 1, inner = samples / outer;
  cuda::correlation_shift({dtype, {view}, 1, outer, units, inner}, kStream);
  std::vector<double> row_sums(4 * units), column_sums(4 * units), comoment(units * units, 0.0);
  cuda::correlation_product({dtype, view, view, outer, units, inner, false, 2, (samples / 2 + 63) / 64 * 64,
                             products.data(), row_sums.data(), column_sums.data(), warpgroups},
                            kStream);
  std::vector<double> mean(units, 0.0), squares(units, 0.0), batch(3 * units);
  std::uint8_t in_range = 1;
  const double count = samples;
  cuda::correlation_moments({row_sums.data(), shift.data(), 1, 2, units, count, 0.0, mean.data(), squares.data(), true,
                             batch.data(), &in_range},
                            kStream);
  const std::vector<double> vectors(2 * units, 1.0);
  cuda::correlation_join({ScalarType::float32, products.data(), 2, units, false, batch.data(), batch.data(), count,
                          batch.data() + units, batch.data() + units, 1.0, 1.0, comoment.data()},
                         kStream);
  std::vector<float> result(units * units);
  cuda::correlation_blend({comoment.data(), vectors.data(), vectors.data(), units, 1.0, 1e-7, ScalarType::float32,
                           result.data(), result.data(), units, nullptr, 0, 1.0, 1},
                          kStream);
}

}  // namespace

int main(int count, char** arguments) {
  const bool planted = count > 1 && std::strcmp(arguments[1], "planted") == 0;
  std::vector<int> result(kThreads);
  for (std::uint64_t seed = 0; seed < 2; ++seed) {
    cuda_sim::set_seed(seed);
    cuda::launch("neighbors", neighbors, {dim3(1), dim3(kThreads), 0}, kStream, !planted, result.data());
    if (planted) continue;
    zip(6, 0.5, 3);
    zip(6, 0.0, 1);
    assign_batch(6, 9);
    assign_batch(3, 170);
    assign_large(8, 0);
    assign_large(10, 3);
    correlate(36, 250, 4, true, 0.0f, false);
    correlate(16, 260, 2, false, -0.5f, false);
    correlate(9, 70, 2, true, 8.0f, false);
  }
  if (!planted) {
    // With copies made at once, and threads so mixed that the report's history reaches back.
    cuda_sim::set_seed(4);
    correlate(20, 300, 4, true, 0.0f, true);
    correlate(16, 700, 2, true, -0.5f, true);
  }
  std::puts("done");
}
