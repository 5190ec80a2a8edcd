// Points in tiles of neighbours, with the box around each tile: bounds entries of a row without computing them.
//
// Points are put in the order of a k-d tree, whose leaves are the tiles. The bound of a tile is computed as an entry is,
// from the nearest corner of its box, with the same roundings, which are monotonic: no entry of the tile is better.
#pragma once

#include "assignment_scan.hpp"
#include "assignment_sorting.hpp"
#include "kernel.hpp"

namespace mudsc::MUDSC_ISA {
namespace {

class PointBoxes {
 public:
  static constexpr std::int64_t kTile = 32;        // points
  static constexpr std::int64_t kMaxFeatures = 8;  // boxes of more features hold too little of the space between points
  static constexpr float kInfinite = __builtin_huge_valf();

  PointBoxes() = default;
  PointBoxes(const float* points, std::int64_t count, std::int64_t features)
      : points_(points),
        count_(count),
        features_(features),
        tile_count_((count + kTile - 1) / kTile),
        padded_tiles_((tile_count_ + kBlock - 1) / kBlock * kBlock),
        order_(count),
        lows_(features * padded_tiles_, 0.0f),
        highs_(features * padded_tiles_, 0.0f),
        max_prices_(padded_tiles_, 0.0f) {
    for (std::int64_t j = 0; j < count; ++j) order_[j] = j;
    split(0, count);
    for (std::int64_t tile = 0; tile < tile_count_; ++tile) {
      for (std::int64_t k = 0; k < features; ++k) {
        float low = kInfinite, high = -kInfinite;
        for (std::int64_t place = tile * kTile; place < end_of(tile); ++place) {
          const float value = coordinate(order_[place], k);
          low = value < low ? value : low;
          high = value > high ? value : high;
        }
        lows_[k * padded_tiles_ + tile] = low;
        highs_[k * padded_tiles_ + tile] = high;
        if (tile == 0 || low < corners_[k][0]) corners_[k][0] = low;
        if (tile == 0 || high > corners_[k][1]) corners_[k][1] = high;
      }
    }
  }

  bool is_empty() const { return count_ == 0; }
  std::int64_t padded_tiles() const { return padded_tiles_; }
  std::int64_t end_of(std::int64_t tile) const { return (tile + 1) * kTile < count_ ? (tile + 1) * kTile : count_; }

  // The point at a place of the order.
  std::int64_t point_at(std::int64_t place) const { return order_[place]; }

  // Keeps the largest price of each tile, after the price at `place` has changed from `before`. All are 0 at first.
  void change_price(std::int64_t place, float before, const float* prices) {
    const std::int64_t tile = place / kTile;
    if (before == max_prices_[tile] || prices[place] > before) set_max_price(tile, prices);
  }

  // Writes a lower bound of `cost - price` of the tiles: the cost is the squared distance from x, or minus the product.
  // Infinite for tiles that pad the last block.
  void bound_tiles(const float* x, bool squared_distance, float* bounds) const {
    for (std::int64_t tile = 0; tile < padded_tiles_; tile += kLanesOfFloat) {
      Vector sums = {};
      for (std::int64_t k = 0; k < features_; ++k) {
        const Vector low = *reinterpret_cast<const Unaligned*>(lows_.data() + k * padded_tiles_ + tile);
        const Vector high = *reinterpret_cast<const Unaligned*>(highs_.data() + k * padded_tiles_ + tile);
        if (squared_distance) {
          const Vector below = low - x[k], above = x[k] - high;
          Vector outside = below > above ? below : above;
          outside = outside > 0.0f ? outside : Vector{};
          sums += outside * outside;
        } else {
          const Vector with_low = x[k] * low, with_high = x[k] * high;
          sums -= with_low > with_high ? with_low : with_high;
        }
      }
      const Vector prices = *reinterpret_cast<const Unaligned*>(max_prices_.data() + tile);
      *reinterpret_cast<Unaligned*>(bounds + tile) = sums - prices;
    }
    for (std::int64_t tile = tile_count_; tile < padded_tiles_; ++tile) bounds[tile] = kInfinite;
  }

  // A bound of the magnitudes of the entries of x, 0 if all are.
  float largest_magnitude(const float* x, bool squared_distance) const {
    float sum = 0.0f;
    for (std::int64_t k = 0; k < features_; ++k) {
      float largest = 0.0f;
      for (const float corner : corners_[k]) {
        const float part = squared_distance ? (x[k] - corner) * (x[k] - corner) : x[k] * corner;
        const float magnitude = part < 0.0f ? -part : part;
        largest = magnitude > largest ? magnitude : largest;
      }
      sum += largest;
    }
    return sum;
  }

 private:
  using Vector = VectorOf<float>::Type;
  using Unaligned = VectorOf<float>::Unaligned;
  static constexpr std::int64_t kBlock = RowScanner<float>::kBlock;
  static constexpr std::int64_t kLanesOfFloat = kVectorBytes / static_cast<std::int64_t>(sizeof(float));

  float coordinate(std::int64_t point, std::int64_t feature) const { return points_[point * features_ + feature]; }

  void set_max_price(std::int64_t tile, const float* prices) {
    float largest = -kInfinite;
    for (std::int64_t place = tile * kTile; place < end_of(tile); ++place) {
      largest = prices[place] > largest ? prices[place] : largest;
    }
    max_prices_[tile] = largest;
  }

  // Orders the places [begin, end), which begin with a tile: halves of whole tiles, by the widest feature. Equal points
  // stay in ascending order. Recursion is as deep as the logarithm of the number of tiles.
  void split(std::int64_t begin, std::int64_t end) {
    if (end - begin <= kTile) {
      sort_ascending(order_.data() + begin, end - begin);
      return;
    }
    const std::int64_t feature = widest_feature(begin, end),
                       middle = begin + (end - begin + kTile) / (2 * kTile) * kTile;
    select(begin, end, middle, feature);
    split(begin, middle);
    split(middle, end);
  }

  std::int64_t widest_feature(std::int64_t begin, std::int64_t end) const {
    std::int64_t widest = 0;
    float width = -1.0f;
    for (std::int64_t k = 0; k < features_; ++k) {
      float low = kInfinite, high = -kInfinite;
      for (std::int64_t place = begin; place < end; ++place) {
        const float value = coordinate(order_[place], k);
        low = value < low ? value : low;
        high = value > high ? value : high;
      }
      if (high - low > width) width = high - low, widest = k;
    }
    return widest;
  }

  // Moves the points that come before the one of rank `middle` to places before it: Hoare's selection.
  void select(std::int64_t begin, std::int64_t end, std::int64_t middle, std::int64_t feature) {
    const auto less = [&](std::int64_t a, std::int64_t b) {
      const float first = coordinate(a, feature), second = coordinate(b, feature);
      return first != second ? first < second : a < b;
    };
    std::int64_t low = begin, high = end - 1;
    while (low < high) {
      const std::int64_t pivot = order_[low + (high - low) / 2];
      std::int64_t i = low, j = high;
      while (i <= j) {
        while (less(order_[i], pivot)) ++i;
        while (less(pivot, order_[j])) --j;
        if (i <= j) {
          const std::int64_t point = order_[i];
          order_[i++] = order_[j];
          order_[j--] = point;
        }
      }
      if (middle <= j) {
        high = j;
      } else if (middle >= i) {
        low = i;
      } else {
        return;
      }
    }
  }

  const float* points_ = nullptr;
  std::int64_t count_ = 0, features_ = 0, tile_count_ = 0, padded_tiles_ = 0;
  Buffer<std::int64_t> order_;
  Buffer<float> lows_, highs_;           // [features, padded_tiles_]
  Buffer<float> max_prices_;             // [padded_tiles_]
  float corners_[kMaxFeatures][2] = {};  // of the box around all points
};

}  // namespace
}  // namespace mudsc::MUDSC_ISA
