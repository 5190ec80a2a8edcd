// See auction_rounds.cpp.
#pragma once

#include <cstdint>

namespace mudsc::cuda_sim {

struct RoundCounts {
  std::int64_t rounds;
  std::int64_t bids;
  std::int64_t small_rounds;  // with fewer bids than an H100 has multiprocessors
};

// Of equal rows, identified by the first of them, only the first bids. Prices start as given and are raised;
// column_of_row is -1 for rows that remain.
RoundCounts auction_rounds(const float* values, std::int64_t n, bool maximize, float epsilon, std::int64_t stop,
                           std::int64_t max_rounds, std::int64_t max_bids, const std::int32_t* class_of_row,
                           float* prices, std::int32_t* column_of_row);

}  // namespace mudsc::cuda_sim
