// Linear assignment: pairs rows with columns at minimum total cost, with dual values that prove the optimum.
#pragma once

#include <cstdint>

#include "mudsc/isa.hpp"
#include "mudsc/types.hpp"

namespace mudsc {

enum class AssignmentStatus : std::int32_t {
  optimal = 0,
  invalid = 1,     // an entry is NaN, or has a cost of -inf
  infeasible = 2,  // forbidden pairs leave no assignment of all rows
};

// `batch` problems of [rows, columns] contiguous values, rows <= columns. An entry's cost is its value, or minus its
// value if `maximize`; a cost of +inf forbids the pair. Result arrays hold the problems one after another.
struct AssignmentProblem {
  const void* values;
  ScalarType type;
  std::int64_t batch;
  std::int64_t rows;
  std::int64_t columns;
  bool transposed;  // values are [columns, rows] in memory: entry (i, j) is values[j * rows + i]; only for a batch of 1
  bool maximize;
  double tolerance;  // the gap may be this share of the objective's magnitude
  int threads;
  const double* prices;  // [batch, columns] dual values of columns to start from, or null; used where rows == columns

  std::int64_t* column_of_row;  // [batch, rows]
  double* row_duals;            // [batch, rows]
  double* column_duals;         // [batch, columns]; 0 for columns without a row
  double* objective;            // [batch] sum of the chosen values
  double* gap;                  // [batch] distance of the objective to the dual bound
  AssignmentStatus* status;     // [batch]; results of a problem that is not optimal are undefined
};

// With duals u, v of a minimized problem: u_i + v_j <= cost_ij for all pairs, with equality for chosen ones, and
// v_j <= 0. Maximized: u_i + v_j >= value_ij and v_j >= 0. The sum of all duals bounds every assignment.
MUDSC_DECLARE_KERNEL(void linear_assignment(const AssignmentProblem& problem));

// A problem whose matrix is not in memory: value (i, j) is the float sum of x_ik * y_jk, or of (x_ik - y_jk)^2, over the
// features k in ascending order. `values` is null, the type float32, and the batch 1.
struct PairwiseProblem : AssignmentProblem {
  const float* x;  // [rows, features]
  const float* y;  // [columns, features]
  std::int64_t features;
  bool squared_distance;
};

// From so many columns on.
constexpr std::int64_t kMinPairwiseColumns = 768;

// Returns false, with nothing written, if values are so large or small that sums of floats could leave their range.
MUDSC_DECLARE_KERNEL(bool pairwise_assignment(const PairwiseProblem& problem));

}  // namespace mudsc
