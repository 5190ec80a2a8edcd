// Contract of the correlation op on a CUDA device. All pointers are on the device; no function waits for it.
#pragma once

#include <cstdint>

#include "mudsc/correlation.hpp"
#include "mudsc/cuda.hpp"

namespace mudsc::cuda {

// One model's features, seen as [outer, units, inner] of any strides (in elements).
struct FeatureView {
  const void* values;
  std::int64_t outer_stride;
  std::int64_t unit_stride;
  std::int64_t inner_stride;
  // [outer]: index along the features' outer axis; null for the identity.
  const std::int32_t* outer_index;
  float* shift;  // [units], written by correlation_shift: subtracted from the unit's values
};

// Models whose shifts are estimated in one launch.
constexpr int kShiftModels = 8;

struct ShiftProblem {
  ScalarType dtype;                    // all but float64
  FeatureView features[kShiftModels];  // of the first `models`
  std::int32_t models;
  std::int64_t outer;
  std::int64_t units;
  std::int64_t inner;
};

// products[p, a, b] = sum of (x_a - shift_a) (y_b - shift_b) over the samples [p, p + 1) * samples_per_part, NaN as 0.
struct ProductProblem {
  ScalarType dtype;  // all but float64
  FeatureView rows;
  FeatureView columns;
  std::int64_t outer;
  std::int64_t units;
  std::int64_t inner;
  bool symmetric;  // rows are columns: entries below the diagonal's tiles (correlation_tile) need not be written
  std::int64_t parts;
  std::int64_t samples_per_part;  // a multiple of 64
  float* products;                // [parts, units, units]
  double* row_sums;               // null, or [parts, 2, units]: of x - shift, and of its square
  double* column_sums;            // the same of y; null if symmetric
  // By wgmma, which devices of compute capability 9.0 have, and code for 9.0a uses: other code writes NaN.
  bool warpgroups;
};

// The moments of a batch, from its sums, and the terms that combine it with the moments of earlier samples. One thread
// per unit.
struct MomentsProblem {
  const double* sums;   // [models, parts, 2, units]: of x - shift, and of its square
  const float* shifts;  // [models, units]
  std::int64_t models;
  std::int64_t parts;
  std::int64_t units;
  double count;        // samples of the batch
  double num_samples;  // samples before
  double* mean;        // [models, units] of the samples before
  double* squares;     // [models, units]
  bool updates;        // whether `mean` and `squares` take the batch in
  // Out, [models, 3, units]: the sum of x - shift; the mean of the batch minus the mean before; the sum of squares
  // about the mean of the batch.
  double* batch;
  std::uint8_t* in_range;  // set to 0 if a value is not finite, or a sum of squares overflows float32
};

// comoment += weight * (sum of products - outer(row_sums, column_sums) / count
//                       + shift_weight * outer(row_shifts, column_shifts)).
struct JoinProblem {
  ScalarType product_dtype;  // float32 or float64
  const void* products;      // [parts, units, units]
  std::int64_t parts;
  std::int64_t units;
  bool symmetric;          // as above: entries that are not written are not read
  const double* row_sums;  // [units], or null if there is nothing to subtract
  const double* column_sums;
  double count;
  const double* row_shifts;  // [units]
  const double* column_shifts;
  double shift_weight;
  double weight;
  double* comoment;  // [units, units]
};

// Units of a tile's side.
std::int64_t correlation_tile();

void correlation_shift(const ShiftProblem& problem, Stream stream);
void correlation_product(const ProductProblem& problem, Stream stream);
void correlation_moments(const MomentsProblem& problem, Stream stream);
void correlation_join(const JoinProblem& problem, Stream stream);
// The final quotient of csrc/include/mudsc/correlation.hpp; `other` may be `out`.
void correlation_blend(const CorrelateProblem& problem, Stream stream);

}  // namespace mudsc::cuda
