// The steps around the matrix product of a correlation: centering features, summing co-moments, the final quotient.
#pragma once

#include <cstdint>

#include "mudsc/isa.hpp"
#include "mudsc/types.hpp"

namespace mudsc {

// Which samples are read along one axis of the features, and which of them are summed.
struct SampleOrder {
  const std::int32_t* members;  // places in the features' axis; null: all in order
  const std::int32_t* starts;   // [samples + 1] start of each sample's members; null: each sample is a single member
  const double* scale;          // [samples] factor of each sum, or null
};

// Features seen as [outer, units, inner] of any strides (in elements); a sample is a pair (outer, inner).
struct CenterProblem {
  ScalarType dtype;
  const void* features;
  std::int64_t outer;
  std::int64_t units;
  std::int64_t inner;
  std::int64_t outer_stride;
  std::int64_t unit_stride;
  std::int64_t inner_stride;
  SampleOrder outer_order;
  SampleOrder inner_order;    // if one of the two has `starts`, the other is empty, and features are not empty
  ScalarType centered_dtype;  // float32, or float64; float64 features need float64
  bool unit_major;            // whether `centered` is [units, samples] or, for unit_stride 1 only, [samples, units]
  void* centered;
  double* mean;     // [units]
  double* squares;  // [units] sums of squares of `centered`
  std::int32_t threads;
};

// comoment += product + outer(row_shift, column_shift); matrices [rows, units], contiguous.
struct AccumulateProblem {
  ScalarType product_dtype;  // float32 or float64
  const void* product;
  const double* row_shift;
  const double* column_shift;
  std::int64_t rows;
  std::int64_t units;
  double* comoment;
  std::int32_t threads;
};

// out[r, c] = comoment[r, c] / count / max(row_deviation[r] * column_deviation[c], eps), and if there is another
// similarity, blended with it: balance * out[r, c] + (1 - balance) * other[r, c]
struct CorrelateProblem {
  const double* comoment;  // [units, units]
  const double* row_deviation;
  const double* column_deviation;
  std::int64_t units;
  double count;
  double eps;
  ScalarType dtype;
  void* out;
  void* mirror;             // null, or where to write the transpose; `out` itself: the upper triangle is mirrored
  std::int64_t row_stride;  // of `out` and `mirror`, in elements
  const void* other;        // null, or of the dtype of `out`; symmetric if `mirror` is given
  std::int64_t other_stride;
  double balance;  // in [0, 1]
  std::int32_t threads;
};

MUDSC_DECLARE_KERNEL(void center_features(const CenterProblem& problem));
MUDSC_DECLARE_KERNEL(void accumulate_comoment(const AccumulateProblem& problem));
MUDSC_DECLARE_KERNEL(void correlate(const CorrelateProblem& problem));

}  // namespace mudsc
