// The data of one dense assignment problem: a padded copy of the costs, duals, pairs, and classes of equal rows.
//
// Memory traffic: the matrix is read once and copied with rows padded to whole vectors. At the sizes this is for, the
// copy stays in cache. A matrix with many columns is not copied: its rows are converted one at a time.
#pragma once

#include "assignment_scan.hpp"
#include "assignment_state.hpp"
#include "assignment_vectors.hpp"

namespace mudsc::MUDSC_ISA {
namespace {

// `Number`: type of the copied costs. Where it is narrower than the values', only values that it holds are copied.
template <class T, class Number = typename ArithmeticOf<T>::type>
class DenseProblem {
 protected:
  static constexpr bool kNarrows = sizeof(Number) < sizeof(typename ArithmeticOf<T>::type);

  explicit DenseProblem(const AssignmentProblem& problem)
      : rows_(problem.rows),
        columns_(problem.columns),
        width_((problem.columns + kPad - 1) / kPad * kPad),
        table_size_(std::int64_t{1} << (65 - __builtin_clzll(static_cast<std::uint64_t>(problem.rows)))),
        copied_(problem.columns <= kMaxCopied),
        sign_(problem.maximize ? Number(-1) : Number(1)) {
    // One block for all arrays: a dozen allocations take longer than solving a small problem.
    std::int64_t bytes = 0;
    for_each_array([&](auto*& array, std::int64_t count) {
      (void)array;
      bytes += block_bytes(count * static_cast<std::int64_t>(sizeof *array));
    });
    unsigned char* at = inline_block_;
    if (bytes > kInlineBytes) {
      heap_block_ = Buffer<unsigned char>(bytes);
      at = heap_block_.data();
    }
    for_each_array([&](auto*& array, std::int64_t count) {
      place(array, at);
      at += block_bytes(count * static_cast<std::int64_t>(sizeof *array));
    });
  }
  DenseProblem(const DenseProblem&) = delete;
  DenseProblem& operator=(const DenseProblem&) = delete;

  // A column that a path search has closed, and its state then; in Crouse's order also the column that took its place.
  struct Closed {
    std::int64_t column;
    double distance;
    double dual;
    std::int64_t place;
    std::int64_t successor;
  };

  // Rows are padded to whole vectors of costs.
  static constexpr std::int64_t kPad = 64 / static_cast<std::int64_t>(sizeof(Number));
  // Up to this many columns costs are copied: 16 MB at most.
  static constexpr std::int64_t kMaxCopied = 1448;
  // Up to this many columns Crouse's order of search is the fastest too.
  static constexpr std::int64_t kMaxAlwaysInOrder = 12;
  // Tied pairs per row; beyond that an optimum is assumed not to be unique.
  static constexpr std::int64_t kMaxTiesPerRow = 4;
  static constexpr std::int64_t kInlineBytes = 8192;
  static constexpr std::int64_t kWord = 64;

  static std::int64_t block_bytes(std::int64_t bytes) { return (bytes + 63) & ~std::int64_t{63}; }
  template <class Item>
  static void place(Item*& array, unsigned char* at) {
    array = reinterpret_cast<Item*>(at);
  }

  // Calls visit(array, count) for every array.
  template <class Visit>
  void for_each_array(const Visit& visit) {
    visit(costs_, copied_ ? rows_ * width_ : width_);
    visit(v_, width_);
    visit(u_, rows_);
    visit(distance_, width_);
    visit(parent_, width_ + 1);
    visit(row_of_column_, width_);
    visit(closed_, rows_);
    visit(free_rows_, rows_);
    visit(is_free_, (width_ + kWord - 1) / kWord);
    visit(moved_, (width_ + kWord - 1) / kWord);
    visit(open_, columns_);
    visit(places_, columns_);
    visit(ties_, (kMaxTiesPerRow + 1) * rows_ + 1);
    visit(tie_begin_, rows_ + 2);
    visit(in_degree_, rows_ + 1);
    visit(sums_, rows_);
    visit(classes_, rows_);
    visit(class_seen_, rows_);
    visit(table_, table_size_);
  }

  void begin(const AssignmentProblem& problem, std::int64_t index) {
    values_ = static_cast<const T*>(problem.values) + index * rows_ * columns_;
    next_ = index + 1 < problem.batch ? values_ + rows_ * columns_ : nullptr;
    column_of_row_ = problem.column_of_row + index * rows_;
    initial_prices_ = problem.prices == nullptr || rows_ != columns_ ? nullptr : problem.prices + index * columns_;
  }

  void clear_assignment() {
    for (std::int64_t i = 0; i < rows_; ++i) column_of_row_[i] = -1;
    for (std::int64_t j = 0; j < columns_; ++j) row_of_column_[j] = -1;
    for (std::int64_t k = 0; k * kWord < columns_; ++k) {
      const std::int64_t left = columns_ - k * kWord;
      is_free_[k] = left >= kWord ? ~std::uint64_t{0} : (std::uint64_t{1} << left) - 1;
    }
  }

  // The word of a set of columns that has the bit of this column. Without a sign, a division is a single shift.
  static std::uint64_t& word_of(std::uint64_t* set, std::int64_t column) {
    return set[static_cast<std::uint64_t>(column) / kWord];
  }
  static std::uint64_t bit_of(std::int64_t column) { return std::uint64_t{1} << (column % kWord); }

  bool is_free(std::int64_t column) const { return row_of_column_[column] < 0; }

  void assign(std::int64_t row, std::int64_t column) {
    row_of_column_[column] = row;
    column_of_row_[row] = column;
    word_of(is_free_, column) &= ~bit_of(column);
  }

  double cost(std::int64_t row, std::int64_t column) const {
    return static_cast<double>(copied_ ? costs_[row * width_ + column]
                                       : sign_ * widen(values_[row * columns_ + column]));
  }

  // A row's costs, padded with infinity to whole vectors.
  const Number* row_costs(std::int64_t row) {
    if (copied_) return costs_ + row * width_;
    write_costs(row, costs_);
    return costs_;
  }

  void write_costs(std::int64_t row, Number* out) const {
    const T* const values = values_ + row * columns_;
    std::int64_t j = 0;
    if constexpr (sizeof(T) == sizeof(Number)) {
      // Writes whole vectors up to the end and replaces the entries of the next row by infinity. A vector that was
      // written in pieces would stall the next load.
      using Vector = typename VectorOf<Number>::Type;
      using Memory = typename VectorOf<Number>::Unaligned;
      using Bits = typename VectorOf<Number>::Bits;
      constexpr std::int64_t kVectorLanes = kVectorBytes / static_cast<std::int64_t>(sizeof(Number));
      const auto costs_at = [&](std::int64_t begin) -> Vector {
        return sign_ * Vector(*reinterpret_cast<const Memory*>(values + begin));
      };
      for (; j + kVectorLanes <= columns_; j += kVectorLanes) *reinterpret_cast<Memory*>(out + j) = costs_at(j);
      if (j < columns_ && row * columns_ + j + kVectorLanes <= rows_ * columns_) {
        Bits lanes;
        for (std::int64_t k = 0; k < kVectorLanes; ++k) lanes[k] = static_cast<std::int32_t>(k);
        const Bits left = static_cast<std::int32_t>(columns_ - j) - Bits{};
        const Vector costs = costs_at(j);
        *reinterpret_cast<Memory*>(out + j) = lanes < left ? costs : static_cast<Number>(kInfinity) - Vector{};
        j += kVectorLanes;
      }
    }
    for (; j < columns_; ++j) out[j] = static_cast<Number>(sign_ * widen(values[j]));
    for (; j < width_; ++j) out[j] = static_cast<Number>(kInfinity);
  }

  // Whether costs that were narrowed are those of the row.
  bool is_exact(std::int64_t row, const Number* costs) const {
    const T* const values = values_ + row * columns_;
    std::int64_t equal = 0;
    for (std::int64_t j = 0; j < columns_; ++j) equal += static_cast<T>(costs[j]) == static_cast<T>(sign_) * values[j];
    return equal == columns_;
  }

  // Copies the costs. Returns false if a cost is NaN or -inf, or `Number` does not hold it. Finds the largest magnitude
  // and whether several rows or columns are zero. If not, column minima become the initial duals of a square problem
  // without given prices.
  bool copy_costs() {
    using Vector = typename VectorOf<Number>::Type;
    using Memory = typename VectorOf<Number>::Unaligned;
    constexpr std::int64_t kVectorLanes = kVectorBytes / static_cast<std::int64_t>(sizeof(Number));
    constexpr Number kInfinite = static_cast<Number>(kInfinity);
    const std::int64_t width = width_;  // not loaded again after each vector that is written
    Number* const minima = reinterpret_cast<Number*>(distance_);
    for (std::int64_t j = 0; j < width; ++j) minima[j] = kInfinite;
    Vector most{}, bad{};
    for (std::int64_t i = 0; i < rows_; ++i) {
      Number* const row = copied_ ? costs_ + i * width : costs_;
      write_costs(i, row);
      if constexpr (kNarrows) {
        if (!is_exact(i, row)) return false;
      }
      Vector sum{};
      for (std::int64_t j = 0; j < width; j += kVectorLanes) {
        const Vector costs = *reinterpret_cast<const Memory*>(row + j);
        Memory& least = *reinterpret_cast<Memory*>(minima + j);
        least = costs < least ? costs : least;
        const Vector opposite = -costs;
        const Vector magnitude = costs > opposite ? costs : opposite;
        const Vector finite = magnitude < kInfinite ? magnitude : Vector{};
        most = finite > most ? finite : most;
        sum += finite;
        bad += costs > -kInfinite ? Vector{} : Vector{} + Number(1);  // for NaN and for -inf
      }
      sums_[i] = 0;
      for (std::int64_t k = 0; k < kVectorLanes; ++k) sums_[i] += sum[k];
    }
    largest_ = 0.0;
    double bad_count = 0.0;
    for (std::int64_t k = 0; k < kVectorLanes; ++k) {
      const double candidate = static_cast<double>(most[k]);
      largest_ = candidate > largest_ ? candidate : largest_;
      bad_count += static_cast<double>(bad[k]);
    }
    detect_zeros(minima);
    const bool start_at_minima =
        rows_ == columns_ && initial_prices_ == nullptr && columns_ > kMaxAlwaysInOrder && !has_zeros_ && !background_;
    for (std::int64_t j = width; j-- > 0;) {
      const double least = static_cast<double>(minima[j]);
      v_[j] = start_at_minima && least < kInfinity ? least : 0.0;
    }
    if (initial_prices_ != nullptr) {
      for (std::int64_t j = 0; j < columns_; ++j) v_[j] = static_cast<double>(sign_) * initial_prices_[j];
    }
    return bad_count == 0.0;
  }

  // Detects several rows of zeros, or columns that look like zeros next to better ones. They can exchange partners, so
  // the optimum is not unique, and starting from column minima would raise all columns to their level.
  void detect_zeros(const Number* minima) {
    std::int64_t zero_rows = 0, zero_columns = 0, better_columns = 0;
    for (std::int64_t i = 0; i < rows_; ++i) zero_rows += sums_[i] == 0;
    for (std::int64_t j = 0; j < columns_; ++j) {
      zero_columns += minima[j] == 0;
      better_columns += minima[j] < 0;
    }
    has_zeros_ = zero_rows > 1 || (rows_ == columns_ && zero_columns > 1 && better_columns > 0);
  }

  // Whether each row repeats one finite cost. Usually decided after the first row.
  bool rows_are_constant() const {
    if (!copied_) return false;
    const std::size_t overlap = static_cast<std::size_t>(columns_ - 1) * sizeof(Number);
    for (std::int64_t i = 0; i < rows_; ++i) {
      const Number* const costs = costs_ + i * width_;
      if (std::memcmp(costs, costs + 1, overlap) != 0 || !(costs[0] < static_cast<Number>(kInfinity))) return false;
    }
    return true;
  }

  // Sets the class of each row to the first row that equals it in every entry (hashed by the row sum), and returns the
  // number of repeated rows. Finding fewer, as when rows are not copied, only makes the search slower.
  std::int64_t find_classes() {
    std::int64_t repeated = 0;
    for (std::int64_t i = 0; i < rows_; ++i) {
      classes_[i] = static_cast<std::int32_t>(i);
      class_seen_[i] = 0;
    }
    searches_ = 0;
    if (!copied_) return 0;
    for (std::int64_t k = 0; k < table_size_; ++k) table_[k] = -1;
    for (std::int64_t i = 0; i < rows_; ++i) {
      const double sum = static_cast<double>(sums_[i]);
      std::uint64_t bits;
      std::memcpy(&bits, &sum, sizeof bits);
      const std::uint64_t hash = (bits * 0x9e3779b97f4a7c15u) >> 32;
      for (std::int64_t at = static_cast<std::int64_t>(hash) & (table_size_ - 1);; at = (at + 1) & (table_size_ - 1)) {
        const std::int32_t other = table_[at];
        if (other < 0) {
          table_[at] = static_cast<std::int32_t>(i);
          break;
        }
        const std::size_t bytes = static_cast<std::size_t>(columns_) * sizeof(Number);
        if (sums_[i] == sums_[other] && std::memcmp(costs_ + i * width_, costs_ + other * width_, bytes) == 0) {
          classes_[i] = other;
          ++repeated;
          break;
        }
      }
    }
    return repeated;
  }

  std::int64_t rows_, columns_, width_;
  std::int64_t table_size_;  // a power of 2, at least twice the rows
  bool copied_;
  bool background_ = false;
  bool has_zeros_ = false;  // several rows or columns are zero
  Number sign_;
  const T* values_ = nullptr;
  const T* next_ = nullptr;  // values of the next problem
  const double* initial_prices_ = nullptr;
  std::int64_t* column_of_row_ = nullptr;
  double largest_ = 0.0, rounding_ = 0.0;
  // Arrays over columns are padded to whole vectors, duals with 0 and costs with infinity.
  Number* costs_;
  double *v_, *u_, *distance_;
  std::int64_t *parent_, *row_of_column_, *free_rows_, *open_, *places_;
  Closed* closed_;
  std::uint64_t *is_free_, *moved_;
  std::int32_t *ties_, *tie_begin_, *in_degree_;
  Number* sums_;  // of the magnitudes in a row
  // Equal rows: the class of each row, the last search that reached each class, and a hash table of rows.
  std::int32_t *classes_, *class_seen_, *table_;
  std::int32_t searches_ = 0;
  Buffer<unsigned char> heap_block_;
  alignas(64) unsigned char inline_block_[kInlineBytes];
};

}  // namespace
}  // namespace mudsc::MUDSC_ISA
