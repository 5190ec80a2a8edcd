// The auction of csrc/cuda/assignment_large.cu, round by round, as plain loops. It gives bitwise the same prices and
// pairs at sizes that are too large for the simulator, and counts rounds and bids.
#include "auction_rounds.hpp"

#include <cmath>
#include <limits>
#include <vector>

namespace mudsc::cuda_sim {
namespace {

struct Offer {
  float price;
  std::int64_t row;
};

struct BestTwo {
  float first, second;
  std::int64_t column;
};

BestTwo best_two(const float* values, const float* prices, std::int64_t columns, float sign) {
  // Reduces per lane first, because a single chain of dependent comparisons would be slow.
  constexpr int kLanes = 16;
  float first[kLanes], second[kLanes];
  for (int k = 0; k < kLanes; ++k) first[k] = second[k] = -std::numeric_limits<float>::infinity();
  const auto take = [&](int lane, float worth) {
    const float lower = worth < first[lane] ? worth : first[lane];
    second[lane] = lower > second[lane] ? lower : second[lane];
    first[lane] = worth > first[lane] ? worth : first[lane];
  };
  std::int64_t j = 0;
  for (; j + kLanes <= columns; j += kLanes) {
    for (int k = 0; k < kLanes; ++k) take(k, sign * values[j + k] - prices[j + k]);
  }
  for (; j < columns; ++j) take(0, sign * values[j] - prices[j]);
  BestTwo best{first[0], second[0], 0};
  for (int k = 1; k < kLanes; ++k) {
    const float lower = first[k] < best.first ? first[k] : best.first;
    best.first = first[k] > best.first ? first[k] : best.first;
    best.second = std::fmax(best.second, std::fmax(lower, second[k]));
  }
  while (sign * values[best.column] - prices[best.column] != best.first) ++best.column;
  return best;
}

}  // namespace

RoundCounts auction_rounds(const float* values, std::int64_t n, bool maximize, float epsilon, std::int64_t stop,
                           std::int64_t max_rounds, std::int64_t max_bids, const std::int32_t* class_of_row,
                           float* prices, std::int32_t* column_of_row) {
  const float sign = maximize ? 1.0f : -1.0f;
  std::vector<std::int64_t> active, row_of_column(n, -1);
  for (std::int64_t i = 0; i < n; ++i) {
    if (class_of_row[i] == i) active.push_back(i);
    column_of_row[i] = -1;
  }
  std::vector<Offer> offers(n);
  RoundCounts counts{0, 0, 0};
  const auto left = [&] { return static_cast<std::int64_t>(active.size()); };
  for (; epsilon > 0.0f && left() > stop && counts.rounds < max_rounds && counts.bids < max_bids; ++counts.rounds) {
    std::vector<std::int64_t> offered, next;
    for (Offer& offer : offers) offer.row = -1;
    for (const std::int64_t row : active) {
      const BestTwo best = best_two(values + row * n, prices, n, sign);
      const float price = prices[best.column], offered_price = price + ((best.first - best.second) + epsilon);
      const float higher = offered_price > price ? offered_price : std::nextafter(price, HUGE_VALF);
      Offer& offer = offers[best.column];
      if (offer.row < 0) offered.push_back(best.column);
      if (offer.row < 0 || higher > offer.price || (higher == offer.price && row < offer.row)) {
        if (offer.row >= 0) next.push_back(offer.row);
        offer = {higher, row};
      } else {
        next.push_back(row);
      }
    }
    for (const std::int64_t column : offered) {
      const std::int64_t before = row_of_column[column];
      if (before >= 0) {
        column_of_row[before] = -1;
        next.push_back(before);
      }
      prices[column] = offers[column].price;
      row_of_column[column] = offers[column].row;
      column_of_row[offers[column].row] = static_cast<std::int32_t>(column);
    }
    counts.bids += static_cast<std::int64_t>(active.size());
    counts.small_rounds += active.size() < 132;
    active = std::move(next);
  }
  return counts;
}

}  // namespace mudsc::cuda_sim
