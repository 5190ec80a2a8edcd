// Streaming correlation on the device, except the product: shifts, moments, joining, and the final quotient.
//
// correlation_shift estimates the mean of each unit of all models from a few hundred samples. Subtracted before the
// product, it keeps E[xy] - E[x] E[y] from cancelling; any value near the mean serves as well as the mean itself.
//
// correlation_moments turns the sums of the product kernel into means, squares and a range check of the features, and
// combines them with the moments of earlier samples.
//
// correlation_join adds products to float64 co-moments. Per entry it moves 4 bytes for each part and 16 more.
//
// correlation_blend reads a co-moment (8 bytes) and, for a blend, the other similarity, and writes the solver's input.
// The mirrored entries are written from the same tile.
//
// An update of two models is four launches: shift, product, moments and join. "full" has two more products and joins.
// No atomics: results do not depend on the order of blocks.
#include "correlation_product.hpp"

namespace mudsc::cuda {
namespace {

// A shift is estimated from at least this many samples, if available, and from fewer than twice as many.
constexpr std::int64_t kShiftSamples = 256;
constexpr int kShiftUnits = 32, kShiftThreads = block_threads(256, 64), kShiftShares = kShiftThreads / kShiftUnits;
// A unit in a half format is shifted if its mean is more than this many deviations from zero. Otherwise only a few bits
// of a float32 sum cancel, and unshifted features are three times as fast.
constexpr double kUnshiftedDeviations = 2;

template <class Source>
__global__ void __launch_bounds__(kShiftThreads) correlation_shift_kernel(const ShiftProblem problem) {
  MUDSC_SHARED(double, sums, kShiftThreads);
  MUDSC_SHARED(double, squares, kShiftThreads);
  const int share = static_cast<int>(threadIdx.x) / kShiftUnits;
  const std::int64_t unit = static_cast<std::int64_t>(blockIdx.x) * kShiftUnits + threadIdx.x % kShiftUnits;
  const Samples samples{problem.outer, problem.inner, problem.outer * problem.inner};
  FeatureView features = problem.features[0];
  MUDSC_UNROLL for (int model = 1; model < kShiftModels; ++model) {  // constant indices, so no copy in local memory
    if (blockIdx.y == static_cast<unsigned>(model)) features = problem.features[model];
  }
  const std::int64_t step = samples.end > kShiftSamples ? samples.end / kShiftSamples : 1;
  const Source* const values = static_cast<const Source*>(features.values);
  double sum = 0, square = 0;
  if (unit < problem.units) {
    for (std::int64_t sample = share * step; sample < samples.end; sample += kShiftShares * step) {
      const float value = widen(values[samples.offset(features, sample) + unit * features.unit_stride]);
      const double number = value == value ? static_cast<double>(value) : 0.0;
      sum += number;
      square += number * number;
    }
  }
  sums[threadIdx.x] = sum;
  squares[threadIdx.x] = square;
  __syncthreads();
  if (share != 0 || unit >= problem.units) return;
  for (int k = 1; k < kShiftShares; ++k) {
    sum += sums[k * kShiftUnits + threadIdx.x];
    square += squares[k * kShiftUnits + threadIdx.x];
  }
  const double count = static_cast<double>((samples.end + step - 1) / step), mean = sum / count;
  const double variance = square / count - mean * mean;
  const bool near_zero = mean * mean <= kUnshiftedDeviations * kUnshiftedDeviations * variance;
  features.shift[unit] = sizeof(Source) == 2 && near_zero ? 0.0f : static_cast<float>(mean);
}

constexpr int kMomentsThreads = block_threads(128, 32);

__global__ void __launch_bounds__(kMomentsThreads) correlation_moments_kernel(const MomentsProblem problem) {
  constexpr double kLargestFloat = 3.4028234663852886e38;
  const std::int64_t unit = static_cast<std::int64_t>(blockIdx.x) * kMomentsThreads + threadIdx.x;
  const std::int64_t model = blockIdx.y, units = problem.units;
  if (unit >= units) return;
  const double* const sums = problem.sums + model * problem.parts * 2 * units + unit;
  double sum = 0, square = 0;
  for (std::int64_t part = 0; part < problem.parts; ++part) {
    sum += sums[part * 2 * units];
    square += sums[part * 2 * units + units];
  }
  if (!(square <= kLargestFloat)) *problem.in_range = 0;  // all threads write the same value
  const std::int64_t at = model * units + unit;
  const double mean = static_cast<double>(problem.shifts[at]) + sum / problem.count;
  const double about_mean = square - sum * sum / problem.count;
  const double squares = about_mean > 0 ? about_mean : 0;
  const double shift = mean - problem.mean[at];
  double* const batch = problem.batch + model * 3 * units + unit;
  batch[0] = sum;
  batch[units] = shift;
  batch[2 * units] = squares;
  if (!problem.updates) return;
  const double share = problem.count / (problem.num_samples + problem.count);
  problem.squares[at] += squares + problem.num_samples * share * shift * shift;
  problem.mean[at] += shift * share;
}

constexpr int kJoinThreads = block_threads(256, 64);

template <class T>
__global__ void __launch_bounds__(kJoinThreads) correlation_join_kernel(const JoinProblem problem) {
  const std::int64_t row = blockIdx.x, units = problem.units;
  const bool subtracts = problem.row_sums != nullptr;
  const double first = subtracts ? problem.row_sums[row] / -problem.count : 0.0;
  const double second = problem.shift_weight * problem.row_shifts[row];
  const T* const products = static_cast<const T*>(problem.products) + row * units;
  double* const comoments = problem.comoment + row * units;
  const std::int64_t begin = problem.symmetric ? row / kTile * kTile : 0;
  for (std::int64_t k = begin + threadIdx.x; k < units; k += kJoinThreads) {
    double sum = static_cast<double>(products[k]);
    for (std::int64_t part = 1; part < problem.parts; ++part) {
      sum += static_cast<double>(products[part * units * units + k]);
    }
    if (subtracts) sum += first * problem.column_sums[k];
    comoments[k] += problem.weight * (sum + second * problem.column_shifts[k]);
  }
}

constexpr int kBlendTile = 32, kBlendRows = block_threads(8, 2);

// torch.lerp's formula, exact at both ends.
template <class Real>
__device__ __forceinline__ Real blend(Real other, Real quotient, Real balance) {
  return balance < Real(0.5) ? other + balance * (quotient - other)
                             : quotient - (quotient - other) * (Real(1) - balance);
}

template <class T>
__global__ void __launch_bounds__(kBlendTile* kBlendRows) correlation_blend_kernel(const CorrelateProblem p) {
  using Real = typename ArithmeticOf<T>::type;
  MUDSC_SHARED(T, transposed, kBlendTile * (kBlendTile + 1));
  const bool symmetric = p.out == p.mirror;
  if (symmetric && blockIdx.x < blockIdx.y) return;
  const int across = static_cast<int>(threadIdx.x) % kBlendTile, down = static_cast<int>(threadIdx.x) / kBlendTile;
  const std::int64_t top = static_cast<std::int64_t>(blockIdx.y) * kBlendTile;
  const std::int64_t left = static_cast<std::int64_t>(blockIdx.x) * kBlendTile;
  const std::int64_t column = left + across;
  for (int k = down; k < kBlendTile; k += kBlendRows) {
    const std::int64_t row = top + k;
    if (row >= p.units || column >= p.units || (symmetric && row > column)) continue;
    const double deviations = p.row_deviation[row] * p.column_deviation[column];
    const double quotient = p.comoment[row * p.units + column] / (p.count * (deviations > p.eps ? deviations : p.eps));
    T result;
    if (p.other == nullptr) {
      narrow(quotient, result);
    } else {
      const T other = static_cast<const T*>(p.other)[row * p.other_stride + column];
      narrow(static_cast<double>(blend(widen(other), static_cast<Real>(quotient), static_cast<Real>(p.balance))),
             result);
    }
    static_cast<T*>(p.out)[row * p.row_stride + column] = result;
    transposed[across * (kBlendTile + 1) + k] = result;
  }
  if (p.mirror == nullptr) return;
  __syncthreads();
  T* const mirror = static_cast<T*>(p.mirror);
  for (int k = down; k < kBlendTile; k += kBlendRows) {
    const std::int64_t row = left + k, mirrored = top + across;
    if (row >= p.units || mirrored >= p.units || (symmetric && row <= mirrored)) continue;
    mirror[row * p.row_stride + mirrored] = transposed[k * (kBlendTile + 1) + across];
  }
}

template <class Source>
void run_shift(const ShiftProblem& problem, Stream stream) {
  launch("correlation_shift", correlation_shift_kernel<Source>,
         {dim3(count_of(problem.units, kShiftUnits), static_cast<unsigned>(problem.models)), dim3(kShiftThreads), 0},
         stream, problem);
}

template <class T>
void run_join(const JoinProblem& problem, Stream stream) {
  launch("correlation_join", correlation_join_kernel<T>,
         {dim3(static_cast<unsigned>(problem.units)), dim3(kJoinThreads), 0}, stream, problem);
}

template <class T>
void run_blend(const CorrelateProblem& problem, Stream stream) {
  const unsigned tiles = count_of(problem.units, kBlendTile);
  launch("correlation_blend", correlation_blend_kernel<T>, {dim3(tiles, tiles), dim3(kBlendTile * kBlendRows), 0},
         stream, problem);
}

}  // namespace

void correlation_shift(const ShiftProblem& problem, Stream stream) {
  switch (problem.dtype) {
    case ScalarType::float16: return run_shift<Half>(problem, stream);
    case ScalarType::bfloat16: return run_shift<BFloat16>(problem, stream);
    default: return run_shift<float>(problem, stream);
  }
}

void correlation_moments(const MomentsProblem& problem, Stream stream) {
  launch(
      "correlation_moments", correlation_moments_kernel,
      {dim3(count_of(problem.units, kMomentsThreads), static_cast<unsigned>(problem.models)), dim3(kMomentsThreads), 0},
      stream, problem);
}

void correlation_join(const JoinProblem& problem, Stream stream) {
  problem.product_dtype == ScalarType::float64 ? run_join<double>(problem, stream) : run_join<float>(problem, stream);
}

void correlation_blend(const CorrelateProblem& problem, Stream stream) {
  switch (problem.dtype) {
    case ScalarType::float16: return run_blend<Half>(problem, stream);
    case ScalarType::bfloat16: return run_blend<BFloat16>(problem, stream);
    case ScalarType::float32: return run_blend<float>(problem, stream);
    case ScalarType::float64: return run_blend<double>(problem, stream);
  }
}

}  // namespace mudsc::cuda
