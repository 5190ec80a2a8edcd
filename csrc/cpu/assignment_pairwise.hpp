// Rows of a matrix that is computed from features and never stored: a source of rows (assignment_rows.hpp).
//
// Entry (i, j) is the float that adding up x_ik * y_jk, or (x_ik - y_jk)^2, in the order of k gives, each operation
// rounded. It does not depend on the instruction level, or on the rows and columns that are computed with it.
// Memory traffic: the features of all columns, for every panel of rows and for every row that is read again. They are
// stored in tiles of 32 columns, feature by feature, so that vectors hold columns and memory is read in order.
//
// Many columns of few features are put in an order in which tiles hold neighbours (assignment_boxes.hpp): then only the
// tiles that can hold one of a row's smallest reduced costs are computed. Inside the solver, a column is its place.
#pragma once

#include "assignment_boxes.hpp"
#include "assignment_rows.hpp"

namespace mudsc::MUDSC_ISA {
namespace {

class PairwiseRows : protected PairState {
 public:
  using Problem = PairwiseProblem;
  using Scan = float;

 protected:
  struct RowScratch {
    RowScratch() = default;
    explicit RowScratch(const PairwiseRows& rows)
        : row(rows.tile_count_ * kTile),
          bounds(rows.boxes_.padded_tiles()),
          prices(rows.is_pruned() ? rows.tile_count_ * kTile : 0),
          keys(prices.size()),
          columns(prices.size()) {}
    Buffer<float> row;  // values of a row, or of the columns that may matter
    // Where rows are pruned: a bound for each tile; prices, reduced costs and columns that go with the values.
    Buffer<float> bounds, prices, keys;
    Buffer<std::int32_t> columns;
  };

  // Entries of a row that may be among its smallest reduced costs.
  struct NearEntries {
    std::int64_t count;
    float bound;  // no other entry has a smaller reduced cost
  };

 private:
  using Vector = VectorOf<float>::Type;
  using Unaligned = VectorOf<float>::Unaligned;
  static constexpr std::int64_t kTile = PointBoxes::kTile;
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

  // Computes the entries of the tiles with a bound above `above` and at most `bound`, and appends them to the `count`
  // entries in the scratch. Returns the number of all.
  std::int64_t append_tiles(std::int64_t row, float above, float bound, const float* prices, std::int64_t count,
                            RowScratch& scratch) const {
    constexpr std::int64_t kBlock = RowScanner<float>::kBlock;
    const float sign = static_cast<float>(sign_);
    for (std::int64_t block = 0; block < scratch.bounds.size(); block += kBlock) {
      const float* const bounds = scratch.bounds.data() + block;
      for (std::uint32_t bits = at_most(bounds, bound) & ~at_most(bounds, above); bits != 0; bits &= bits - 1) {
        const std::int64_t tile = block + __builtin_ctz(bits), begin = tile * kTile, size = boxes_.end_of(tile) - begin;
        float* const values = scratch.row.data() + count;
        const float *const y = y_.data() + begin * features_, *const x = x_ + row * features_;
        if (squared_distance_) {
          compute_tile<true, 1>(x, y, values, 0);
        } else {
          compute_tile<false, 1>(x, y, values, 0);
        }
        for (std::int64_t k = 0; k < size; ++k) {
          scratch.prices[count + k] = prices[begin + k];
          scratch.keys[count + k] = sign * values[k] - prices[begin + k];
          scratch.columns[count + k] = static_cast<std::int32_t>(begin + k);
        }
        count += size;
      }
    }
    return count;
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
  static constexpr bool kMayPrune = true;

  explicit PairwiseRows(const PairwiseProblem& problem)
      : PairState(problem),
        features_(problem.features),
        tile_count_((problem.columns + kTile - 1) / kTile),
        squared_distance_(problem.squared_distance),
        x_(problem.x),
        y_(tile_count_ * kTile * features_, 0.0f) {
    // Squared distances are bounded from below, and products from above.
    constexpr std::int64_t kMinColumns = 8192;
    if (columns_ >= kMinColumns && features_ <= PointBoxes::kMaxFeatures && problem.maximize != squared_distance_) {
      boxes_ = PointBoxes(problem.y, columns_, features_);
    }
    for (std::int64_t j = 0; j < columns_; ++j) {
      const std::int64_t point = is_pruned() ? boxes_.point_at(j) : j;
      for (std::int64_t k = 0; k < features_; ++k) y_[place_of(j, k)] = problem.y[point * features_ + k];
    }
  }

  void begin(const PairwiseProblem& problem, std::int64_t index) {
    PairState::begin(problem, index);
    if (problem.prices == nullptr || rows_ != columns_ || !is_pruned()) return;
    for (std::int64_t j = 0; j < columns_; ++j) v_[j] = sign_ * problem.prices[boxes_.point_at(j)];
  }

  bool is_pruned() const { return !boxes_.is_empty(); }

  void price_changed(std::int64_t column, float before, const float* prices) {
    if (is_pruned()) boxes_.change_price(column, before, prices);
  }

  // Computes the entries that can be among the `wanted` smallest reduced costs of a row: of the tiles with the lowest
  // bounds first, and then of those with a bound up to the `wanted`-th smallest reduced cost found.
  NearEntries gather_near(std::int64_t row, const float* prices, std::int64_t wanted, RowScratch& scratch) const {
    using Scanner = RowScanner<float>;
    const std::int64_t first_tiles = wanted / 8 + 4, tiles = boxes_.padded_tiles();
    float* const bounds = scratch.bounds.data();
    boxes_.bound_tiles(x_ + row * features_, squared_distance_, bounds);
    const float first = Scanner::find_rank(bounds, tiles, first_tiles).bound;
    std::int64_t count = append_tiles(row, -PointBoxes::kInfinite, first, prices, 0, scratch);
    std::int64_t padded_count = count;
    for (; padded_count % Scanner::kBlock != 0; ++padded_count) scratch.keys[padded_count] = PointBoxes::kInfinite;
    const float smallest = Scanner::find_rank(scratch.keys.data(), padded_count, wanted).bound;
    const float bound = smallest > first ? smallest : first;
    count = append_tiles(row, first, bound, prices, count, scratch);
    return NearEntries{count, Scanner::min_above(bounds, tiles, bound)};
  }

  // Computes the entries of the tiles that can hold a reduced cost of at most `bound`.
  std::int64_t gather_up_to(std::int64_t row, const float* prices, float bound, RowScratch& scratch) const {
    boxes_.bound_tiles(x_ + row * features_, squared_distance_, scratch.bounds.data());
    return append_tiles(row, -PointBoxes::kInfinite, bound, prices, 0, scratch);
  }

  // A bound of the magnitudes of a row, 0 if all entries are.
  float largest_magnitude(std::int64_t row) const {
    return boxes_.largest_magnitude(x_ + row * features_, squared_distance_);
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
    if (is_pruned()) return 0;
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

  void write_result(const PairwiseProblem& problem, std::int64_t index) {
    write_proof(problem, index, sign_, v_.data(), [this](std::int64_t i, std::int64_t j) { return cost(i, j); });
    if (!is_pruned()) return;
    for (std::int64_t j = 0; j < columns_; ++j) problem.column_duals[boxes_.point_at(j)] = sign_ * v_[j] + 0.0;
    for (std::int64_t i = 0; i < rows_; ++i) column_of_row_[i] = boxes_.point_at(column_of_row_[i]);
    Buffer<std::uint64_t> row_hashes(rows_);
    for (std::int64_t i = 0; i < rows_; ++i) row_hashes[i] = sampled_hash(i);
    order_equal_rows(row_hashes);
  }

 private:
  std::int64_t features_, tile_count_;
  bool squared_distance_;
  const float* x_;    // [rows, features]
  Buffer<float> y_;   // [tiles, features, kTile]
  PointBoxes boxes_;  // of the columns, if rows are pruned
};

}  // namespace
}  // namespace mudsc::MUDSC_ISA
