// Weighted sum of tensors whose units are re-indexed along up to two axes.
#pragma once

#include <cstdint>

#include "mudsc/isa.hpp"
#include "mudsc/types.hpp"

namespace mudsc {

enum class UnitMapKind : std::int32_t { identity = 0, gather = 1, clusters = 2 };

// How the units along one axis of every model become the units of the result. Indices are in range.
struct AxisMap {
  UnitMapKind kind;
  const std::int64_t* index;  // gather: [num_models, units_out] input units; clusters: [num_models, units_in]
  const double* scale;        // clusters: [units_out] factor of each cluster's sum, or null
  std::int64_t units_in;
  std::int64_t units_out;
};

// Tensors are contiguous, seen as [outer, rows, middle, columns, inner]; `out` overlaps none of them.
struct PermuteProblem {
  ScalarType dtype;
  std::int64_t num_models;
  const void* const* tensors;  // [num_models]
  const double* weights;       // [num_models]
  std::int64_t outer;
  std::int64_t middle;
  std::int64_t inner;
  AxisMap rows;
  AxisMap columns;  // fewer than 2^31 - 1 units
  void* out;
  bool out_is_new;  // newly allocated and never touched, so that huge pages can be requested for it
  std::int32_t threads;
};

MUDSC_DECLARE_KERNEL(void permute_merge(const PermuteProblem& problem));

// Re-indexes `out` itself; rows and columns are permutations (gathers that are bijections) or stay as they are. The
// tensors and weights of the problem are not read.
MUDSC_DECLARE_KERNEL(void permute_in_place(const PermuteProblem& problem));

}  // namespace mudsc
