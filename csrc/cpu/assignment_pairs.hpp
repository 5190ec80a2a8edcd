// The pairs and duals of one problem, whatever its entries are read from; finding equal rows and columns and putting
// them in order; and the certificate.
#pragma once

#include "assignment_scan.hpp"
#include "assignment_sorting.hpp"
#include "kernel.hpp"
#include "mudsc/assignment.hpp"

namespace mudsc::MUDSC_ISA {
namespace {

constexpr std::int64_t kLanes = kVectorBytes / static_cast<std::int64_t>(sizeof(double));
// Buffers of doubles are padded repeated at every instruction level.
constexpr std::int64_t kPadding = 64 / static_cast<std::int64_t>(sizeof(double));
typedef double Lanes __attribute__((vector_size(kLanes * sizeof(double)), may_alias));

inline std::int64_t padded(std::int64_t count) { return (count + kPadding - 1) / kPadding * kPadding; }

// Mixes a number into a hash; -0 and 0 are equal.
inline void mix(std::uint64_t& hash, double value) {
  value += 0.0;
  std::uint64_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  hash = (hash ^ bits) * 0x9e3779b97f4a7c15u;
  hash ^= hash >> 29;
}

// Writes the duals, objective and gap of a problem solved as the minimization of `sign` times its values. Expects the
// smallest reduced costs in `problem.row_duals`. The gap is the total slack of the pairs.
template <class Cost>
inline void write_proof(const AssignmentProblem& problem, std::int64_t index, double sign, const double* v,
                        const Cost& cost) {
  const std::int64_t* const column_of_row = problem.column_of_row + index * problem.rows;
  double* const row_duals = problem.row_duals + index * problem.rows;
  double* const column_duals = problem.column_duals + index * problem.columns;
  // Summed in blocks, so that rounding does not add up over thousands of rows.
  constexpr std::int64_t kSummedAtOnce = 64;
  double objective = 0.0, slack = 0.0;
  for (std::int64_t begin = 0; begin < problem.rows; begin += kSummedAtOnce) {
    const std::int64_t end = begin + kSummedAtOnce < problem.rows ? begin + kSummedAtOnce : problem.rows;
    double sum = 0.0;
    for (std::int64_t i = begin; i < end; ++i) {
      const double matched = cost(i, column_of_row[i]);
      sum += matched;
      slack += matched - v[column_of_row[i]] - row_duals[i];
      row_duals[i] *= sign;
    }
    objective += sum;
  }
  for (std::int64_t j = 0; j < problem.columns; ++j) column_duals[j] = sign * v[j] + 0.0;
  problem.objective[index] = sign * objective;
  problem.gap[index] = slack;
}

// One problem at a time, minimized: cost = value, or -value to maximize. At the end u_i + v_j <= cost_ij with equality
// for pairs. If there are more columns than rows, v_j <= 0, and v_j = 0 for columns without a row.
class PairState {
 protected:
  explicit PairState(const AssignmentProblem& problem)
      : rows_(problem.rows),
        columns_(problem.columns),
        sign_(problem.maximize ? -1.0 : 1.0),
        v_(padded(problem.columns), 0.0),
        u_(rows_, 0.0),
        row_of_column_(columns_),
        hashes_(columns_),
        refined_(columns_),
        order_(columns_),
        members_(columns_) {}

  // Selects problem `index` of the batch: nothing matched, column duals as given or 0.
  void begin(const AssignmentProblem& problem, std::int64_t index) {
    column_of_row_ = problem.column_of_row + index * rows_;
    for (std::int64_t i = 0; i < rows_; ++i) column_of_row_[i] = -1;
    row_of_column_.fill(-1);
    v_.fill(0.0);
    if (problem.prices != nullptr && rows_ == columns_) {
      const double* const prices = problem.prices + index * columns_;
      for (std::int64_t j = 0; j < columns_; ++j) v_[j] = sign_ * prices[j];
    }
  }

  void assign(std::int64_t row, std::int64_t column) {
    column_of_row_[row] = column;
    row_of_column_[column] = row;
  }

  // The hash of rows that are zero in every entry; other rows never have it.
  static constexpr std::uint64_t kHashOfZeros = 0;

  // Equal rows can exchange their columns. They get them in ascending order, so that the result does not depend on the
  // search. for_equal_rows(skip, visit) is that of the derived class.
  template <class ForEqualRows>
  void order_rows(const ForEqualRows& for_equal_rows) {
    const auto in_order = [this](const std::int64_t* rows, std::int64_t count) {
      for (std::int64_t k = 1; k < count; ++k) {
        if (column_of_row_[rows[k]] < column_of_row_[rows[k - 1]]) return false;
      }
      return true;
    };
    for_equal_rows(in_order,
                   [this](const std::int64_t* rows, std::int64_t count) { order_columns_of_rows(rows, count); });
  }

  // The same for columns, whose sampled hashes are in hashes_: of equal columns, the first ones get a row, in ascending
  // order. Equal columns have equal duals if both have rows, and 0 if one has none.
  template <class Refine, class KeepEqual>
  void order_columns(const Refine& refine, const KeepEqual& keep_equal) {
    const auto in_order = [this](const std::int64_t* columns, std::int64_t count) {
      for (std::int64_t k = 1; k < count; ++k) {
        const std::int64_t row = row_of_column_[columns[k]], before = row_of_column_[columns[k - 1]];
        if (row >= 0 && (before < 0 || row < before)) return false;
      }
      return true;
    };
    for_equal_groups(columns_, hashes_, in_order, refine, keep_equal,
                     [this](const std::int64_t* columns, std::int64_t size) { order_rows_of_columns(columns, size); });
  }

  // Gives equal rows their columns in ascending order.
  void order_columns_of_rows(const std::int64_t* rows, std::int64_t count) {
    for (std::int64_t k = 0; k < count; ++k) members_[k] = column_of_row_[rows[k]];
    sort_ascending(members_.data(), count);
    for (std::int64_t k = 0; k < count; ++k) assign(rows[k], members_[k]);
  }

  // Gives the rows of equal columns, in ascending order, to the first of these columns.
  void order_rows_of_columns(const std::int64_t* columns, std::int64_t size) {
    std::int64_t count = 0;
    for (std::int64_t k = 0; k < size; ++k) {
      const std::int64_t row = row_of_column_[columns[k]];
      if (row >= 0) members_[count++] = row;
      row_of_column_[columns[k]] = -1;
    }
    sort_ascending(members_.data(), count);
    for (std::int64_t k = 0; k < count; ++k) assign(members_[k], columns[k]);
  }

  // An odd number that differs for every position.
  static std::uint32_t weight(std::int64_t position) {
    const std::uint32_t mixed = (static_cast<std::uint32_t>(position) + 1u) * 0x9e3779b9u;
    return (mixed ^ (mixed >> 15)) | 1u;
  }

  // Small integers differ in their high bits only, of which a product with a weight would keep a few.
  static std::uint32_t folded(std::uint32_t bits) { return bits ^ (bits >> 16); }

  // Equal for 0 and -0.
  static std::uint32_t float_bits(float value) { return folded(float_to_bits(value + 0.0f)); }

  // Visits groups of equal items in [0, count). Compares `hashes` first; then refine(members, count) writes refined_
  // for a group, and keep_equal(members, count) moves those that equal the first to the front.
  template <class Skip, class Refine, class KeepEqual, class Visit>
  void for_equal_groups(std::int64_t count, const Buffer<std::uint64_t>& hashes, const Skip& skip, const Refine& refine,
                        const KeepEqual& keep_equal, const Visit& visit) {
    std::int64_t* const order = order_.data();
    count = list_repeated_hashes(count, hashes);
    sort(order, count,
         [&](std::int64_t a, std::int64_t b) { return hashes[a] != hashes[b] ? hashes[a] < hashes[b] : a < b; });
    for (std::int64_t begin = 0, end; begin < count; begin = end) {
      for (end = begin + 1; end < count && hashes[order[end]] == hashes[order[begin]];) ++end;
      if (end - begin == 1 || skip(order + begin, end - begin)) continue;
      if (hashes[order[begin]] == kHashOfZeros) {
        visit(order + begin, end - begin);
        continue;
      }
      refine(order + begin, end - begin);
      sort(order + begin, end - begin, [&](std::int64_t a, std::int64_t b) {
        return refined_[a] != refined_[b] ? refined_[a] < refined_[b] : a < b;
      });
      for (std::int64_t first = begin, last; first < end; first = last) {
        for (last = first + 1; last < end && refined_[order[last]] == refined_[order[first]];) ++last;
        if (last - first == 1 || skip(order + first, last - first)) continue;
        const std::int64_t equal = keep_equal(order + first, last - first);
        if (equal > 1) visit(order + first, equal);
      }
    }
  }

  // Entries per thread from which another thread pays off.
  static constexpr std::int64_t kEntriesPerThread = 1 << 20;
  // Number of entries that the hash of a row or column samples.
  static constexpr std::int64_t kSamples = 32;

  std::int64_t rows_, columns_;
  double sign_;
  std::int64_t* column_of_row_ = nullptr;
  Buffer<double> v_, u_;
  Buffer<std::int64_t> row_of_column_;
  Buffer<std::uint64_t> hashes_;
  Buffer<std::uint32_t> refined_;

 private:
  // Writes the items of [0, count) whose hash occurs more than once, and a few others, to order_; returns their number.
  // In most problems most hashes are unique, and sorting all of them took an eighth of a search.
  std::int64_t list_repeated_hashes(std::int64_t count, const Buffer<std::uint64_t>& hashes) {
    // Counts how often each bucket occurs, up to 2. Eight buckets per item keep collisions rare.
    std::uint8_t* const counts = reinterpret_cast<std::uint8_t*>(members_.data());
    const std::uint64_t buckets = 8 * static_cast<std::uint64_t>(count);
    const auto bucket_of = [&](std::int64_t k) { return ((hashes[k] * 0x9e3779b97f4a7c15u) >> 40) * buckets >> 24; };
    std::memset(counts, 0, buckets);
    for (std::int64_t k = 0; k < count; ++k) {
      std::uint8_t& seen = counts[bucket_of(k)];
      seen = seen == 0 ? 1 : 2;
    }
    std::int64_t repeated = 0;
    for (std::int64_t k = 0; k < count; ++k) {
      order_[repeated] = k;
      repeated += counts[bucket_of(k)] == 2;
    }
    return repeated;
  }

  Buffer<std::int64_t> order_, members_;
};

}  // namespace
}  // namespace mudsc::MUDSC_ISA
