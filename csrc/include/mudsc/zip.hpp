// Contract of the zip op: greedy clustering of the units of all models.
#pragma once

#include <cstdint>

#include "mudsc/isa.hpp"
#include "mudsc/types.hpp"

namespace mudsc {

struct ZipProblem {
  const void* similarity;   // [units, units]; only read
  ScalarType type;          // of similarity; half types are computed in float32
  std::int64_t row_stride;  // in entries; the columns of a row are adjacent
  std::int64_t units;       // of all models together
  std::int64_t num_models;  // divides units; unit u belongs to model u / (units / num_models)
  std::int64_t remaining;   // clusters to end with
  std::int64_t budget;      // merges allowed inside each model
  double shrink;            // factor on a merged cluster's similarities; <= 0 severs them instead

  std::int64_t* cluster_of_unit;  // [units], out: cluster ids in the order of each cluster's first unit
  double* values;                 // [units - remaining], out: similarity at which each merge was made
};

// Returned if an entry, also of the diagonal, is NaN or infinite.
constexpr std::int64_t kZipNotFinite = -1;

// Returns the number of merges made: fewer than units - remaining if no legal pair was left.
MUDSC_DECLARE_KERNEL(std::int64_t zip_units(const ZipProblem& problem));

}  // namespace mudsc
