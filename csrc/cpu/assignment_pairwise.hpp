// Rows of a matrix that is computed from features and never stored: a source of rows (assignment_rows.hpp).
//
// Entry (i, j) is the float that adding up x_ik * y_jk, or (x_ik - y_jk)^2, in the order of k gives, each operation
// rounded. It does not depend on the instruction level, or on the rows and columns that are computed with it.
// Memory traffic: the features of all columns, for every panel of rows and for every row that is read again. They are
// stored in tiles of 32 columns, feature by feature, so that vectors hold columns and memory is read in order.
#pragma once

#include "assignment_rows.hpp"

namespace mudsc::MUDSC_ISA {
namespace {

class PairwiseRows : protected PairState {
 public:
  using Problem = PairwiseProblem;
  using Scan = float;

 private:
  using Vector = VectorOf<float>::Type;
  using Unaligned = VectorOf<float>::Unaligned;
  static constexpr std::int64_t kTile = 32;       // columns
  static constexpr std::int64_t kRowsAtOnce = 4;  // that are computed from a feature of a column once it is loaded
  static constexpr std::int64_t kVectorsAtOnce = 2;
  static constexpr std::int64_t kVectorLanes = kVectorBytes / static_cast<std::int64_t>(sizeof(float));

  std::int64_t place_of(std::int64_t column, std::int64_t feature) const {
    return (column / kTile * features_ + feature) * kTile + column % kTile;
  }

  template <bool kSquared>
  void compute_panel(std::int64_t begin, std::int64_t end, float* out, std::int64_t stride) const {
    for (std::int64_t tile = 0; tile < tile_count_; ++tile) {
      const float* const y = y_.data() + tile * features_ * kTile;
      float* const to = out + tile * kTile;
      std::int64_t i = begin;
      for (; i + kRowsAtOnce <= end; i += kRowsAtOnce) {
        compute_tile<kSquared, kRowsAtOnce>(x_ + i * features_, y, to + (i - begin) * stride, stride);
      }
      for (; i < end; ++i) compute_tile<kSquared, 1>(x_ + i * features_, y, to + (i - begin) * stride, stride);
    }
  }

  template <bool kSquared, std::int64_t kRows>
  void compute_tile(const float* x, const float* y, float* out, std::int64_t stride) const {
    for (std::int64_t j = 0; j < kTile; j += kVectorsAtOnce * kVectorLanes) {
      Vector sums[kRows][kVectorsAtOnce] = {};
      for (std::int64_t k = 0; k < features_; ++k) {
        for (std::int64_t part = 0; part < kVectorsAtOnce; ++part) {
          const Vector of_columns = *reinterpret_cast<const Unaligned*>(y + k * kTile + j + part * kVectorLanes);
          for (std::int64_t row = 0; row < kRows; ++row) {
            if constexpr (kSquared) {
              const Vector difference = x[row * features_ + k] - of_columns;
              sums[row][part] += difference * difference;
            } else {
              sums[row][part] += x[row * features_ + k] * of_columns;
            }
          }
        }
      }
      for (std::int64_t row = 0; row < kRows; ++row) {
        for (std::int64_t part = 0; part < kVectorsAtOnce; ++part) {
          *reinterpret_cast<Unaligned*>(out + row * stride + j + part * kVectorLanes) = sums[row][part];
        }
      }
    }
  }

  template <class Feature>
  auto refine_by(const Feature& feature) {
    return [this, feature](const std::int64_t* items, std::int64_t count) {
      for (std::int64_t at = 0; at < count; ++at) {
        std::uint32_t hash = 0;
        for (std::int64_t k = 0; k < features_; ++k) hash += float_bits(feature(items[at], k)) * weight(k);
        refined_[items[at]] = hash;
      }
    };
  }

  template <class Feature>
  auto keep_equal_by(const Feature& feature) const {
    return [this, feature](std::int64_t* items, std::int64_t count) {
      std::int64_t kept = 1;
      for (std::int64_t at = 1; at < count; ++at) {
        bool equal = true;
        for (std::int64_t k = 0; k < features_ && equal; ++k) equal = feature(items[at], k) == feature(items[0], k);
        if (equal) items[kept++] = items[at];
      }
      return kept;
    };
  }

 protected:
  struct RowScratch {
    RowScratch() = default;
    explicit RowScratch(const PairwiseRows& rows) : row(rows.tile_count_ * kTile) {}
    Buffer<float> row;
  };

  explicit PairwiseRows(const PairwiseProblem& problem)
      : PairState(problem),
        features_(problem.features),
        tile_count_((problem.columns + kTile - 1) / kTile),
        squared_distance_(problem.squared_distance),
        x_(problem.x),
        y_(tile_count_ * kTile * features_, 0.0f) {
    for (std::int64_t j = 0; j < columns_; ++j) {
      for (std::int64_t k = 0; k < features_; ++k) y_[place_of(j, k)] = problem.y[j * features_ + k];
    }
  }

  double cost(std::int64_t row, std::int64_t column) const {
    float sum = 0.0f;
    for (std::int64_t k = 0; k < features_; ++k) {
      const float x = x_[row * features_ + k], y = y_[place_of(column, k)];
      sum += squared_distance_ ? (x - y) * (x - y) : x * y;
    }
    return sign_ * static_cast<double>(sum);
  }

  const float* row_values(std::int64_t row, RowScratch& scratch) const {
    read_panel(row, row + 1, scratch.row.data(), 0);
    return scratch.row.data();
  }

  // Few features are computed as fast as they are read, from a panel that stays in cache. Many are read for many rows.
  std::int64_t panel_rows() const {
    constexpr std::int64_t kFewFeatures = 16, kMaxRows = 32, kCachedEntries = 1 << 18;
    const std::int64_t rows = kCachedEntries / columns_ / kRowsAtOnce * kRowsAtOnce;
    if (features_ > kFewFeatures || rows > kMaxRows) return kMaxRows;
    return rows > kRowsAtOnce ? rows : kRowsAtOnce;
  }

  // Writes whole tiles: up to kTile - 1 entries after the last one of a row are undefined.
  void read_panel(std::int64_t begin, std::int64_t end, float* out, std::int64_t stride) const {
    if (squared_distance_) {
      compute_panel<true>(begin, end, out, stride);
    } else {
      compute_panel<false>(begin, end, out, stride);
    }
  }

  const void* address_of(std::int64_t) const { return nullptr; }

  template <class InParallel>
  void before_rereading(const InParallel&) {}

  bool rows_are_constant() const {
    RowScratch scratch(*this);
    for (std::int64_t i = 0; i < rows_; ++i) {
      const float* const values = row_values(i, scratch);
      if (values[0] - values[0] != 0.0f) return false;
      for (std::int64_t j = 1; j < columns_; ++j) {
        if (values[j] != values[0]) return false;
      }
    }
    return true;
  }

  // Rows with equal features are equal in every entry.
  std::uint64_t sampled_hash(std::int64_t row) const {
    std::uint64_t hash = 0;
    for (std::int64_t k = 0; k < features_; k += features_ / kSamples + 1) mix(hash, x_[row * features_ + k]);
    return hash | 1;
  }

  template <class Skip, class Visit>
  void for_equal_rows(const Buffer<std::uint64_t>& hashes, const Skip& skip, const Visit& visit) {
    const auto feature = [this](std::int64_t row, std::int64_t k) { return x_[row * features_ + k]; };
    for_equal_groups(rows_, hashes, skip, refine_by(feature), keep_equal_by(feature), visit);
  }

  void order_equal_rows(const Buffer<std::uint64_t>& hashes) {
    order_rows([&](const auto& skip, const auto& visit) { for_equal_rows(hashes, skip, visit); });
  }

  void order_equal_columns() {
    for (std::int64_t j = 0; j < columns_; ++j) {
      hashes_[j] = 0;
      for (std::int64_t k = 0; k < features_; k += features_ / kSamples + 1) mix(hashes_[j], y_[place_of(j, k)]);
      hashes_[j] |= 1;
    }
    const auto feature = [this](std::int64_t column, std::int64_t k) { return y_[place_of(column, k)]; };
    order_columns(refine_by(feature), keep_equal_by(feature));
  }

  void write_result(const PairwiseProblem& problem, std::int64_t index) const {
    write_proof(problem, index, sign_, v_.data(), [this](std::int64_t i, std::int64_t j) { return cost(i, j); });
  }

 private:
  std::int64_t features_, tile_count_;
  bool squared_distance_;
  const float* x_;   // [rows, features]
  Buffer<float> y_;  // [tiles, features, kTile]
};

}  // namespace
}  // namespace mudsc::MUDSC_ISA
