// Shared by the dense and the list solver: the state of one problem, the order among equal rows and columns, and the
// certificate.
#pragma once

#include "assignment_scan.hpp"
#include "assignment_sorting.hpp"
#include "kernel.hpp"
#include "mudsc/assignment.hpp"
#include "mudsc/threads.hpp"

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
template <class T>
class AssignmentState {
 protected:
  explicit AssignmentState(const AssignmentProblem& problem)
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
    values_ = static_cast<const T*>(problem.values) + index * rows_ * columns_;
    row_stride_ = problem.transposed ? 1 : columns_;
    column_stride_ = problem.transposed ? rows_ : 1;
    column_of_row_ = problem.column_of_row + index * rows_;
    for (std::int64_t i = 0; i < rows_; ++i) column_of_row_[i] = -1;
    row_of_column_.fill(-1);
    v_.fill(0.0);
    if (problem.prices != nullptr && rows_ == columns_) {
      const double* const prices = problem.prices + index * columns_;
      for (std::int64_t j = 0; j < columns_; ++j) v_[j] = sign_ * prices[j];
    }
  }

  const T& entry(std::int64_t row, std::int64_t column) const {
    return values_[row * row_stride_ + column * column_stride_];
  }

  double cost(std::int64_t row, std::int64_t column) const {
    return sign_ * static_cast<double>(widen(entry(row, column)));
  }

  void assign(std::int64_t row, std::int64_t column) {
    column_of_row_[row] = column;
    row_of_column_[column] = row;
  }

  // The hash of rows that are zero in every entry; other rows never have it.
  static constexpr std::uint64_t kHashOfZeros = 0;

  // Hash of a sample of the entries of a row, enough to tell most rows apart.
  std::uint64_t sampled_hash(std::int64_t row) const {
    std::uint64_t hash = 0;
    for (std::int64_t j = 0; j < columns_; j += columns_ / kSamples + 1) {
      mix(hash, static_cast<double>(widen(entry(row, j))));
    }
    return hash | 1;
  }

  // Calls visit(members, count) for groups of rows that are equal in every entry, members ascending. `hashes` are the
  // rows' sampled hashes, or kHashOfZeros for rows that need not be read. Groups of equal hashes are skipped without
  // reading them if skip(members, count) returns true.
  template <class Skip, class Visit>
  void for_equal_rows(const Buffer<std::uint64_t>& hashes, const Skip& skip, const Visit& visit) {
    bool refined = false;
    const auto refine = [&, this](const std::int64_t* rows, std::int64_t count) {
      if (column_stride_ != 1) {  // all rows at once: each alone would read a cache line per entry
        if (!refined) refine_transposed_rows();
        refined = true;
        return;
      }
      for (std::int64_t k = 0; k < count; ++k) {
        std::uint32_t hash = 0;
        for (std::int64_t j = 0; j < columns_; ++j) hash += bits_of(entry(rows[k], j)) * weight(j);
        refined_[rows[k]] = hash;
      }
    };
    const auto keep_equal = [this](std::int64_t* rows, std::int64_t count) {
      std::int64_t kept = 1;
      const T* const first = &entry(rows[0], 0);
      for (std::int64_t k = 1; k < count; ++k) {
        const T* const other = &entry(rows[k], 0);
        // Most equal rows are equal bit by bit, which memcmp finds fast; 0 and -0 are equal too.
        bool equal = true;
        const std::size_t bytes = static_cast<std::size_t>(columns_) * sizeof(T);
        if (column_stride_ != 1 || std::memcmp(first, other, bytes) != 0) {
          for (std::int64_t j = 0; j < columns_ && equal; ++j) {
            equal = widen(first[j * column_stride_]) == widen(other[j * column_stride_]);
          }
        }
        if (equal) rows[kept++] = rows[k];
      }
      return kept;
    };
    for_equal_groups(rows_, hashes, skip, refine, keep_equal, visit);
  }

  // Rows that are equal in every entry can exchange their columns. They get them in ascending order, so that the result
  // does not depend on the search.
  void order_equal_rows(const Buffer<std::uint64_t>& hashes) {
    const auto in_order = [this](const std::int64_t* rows, std::int64_t count) {
      for (std::int64_t k = 1; k < count; ++k) {
        if (column_of_row_[rows[k]] < column_of_row_[rows[k - 1]]) return false;
      }
      return true;
    };
    for_equal_rows(hashes, in_order, [this](const std::int64_t* rows, std::int64_t count) {
      for (std::int64_t k = 0; k < count; ++k) members_[k] = column_of_row_[rows[k]];
      sort_ascending(members_.data(), count);
      for (std::int64_t k = 0; k < count; ++k) assign(rows[k], members_[k]);
    });
  }

  // The same for columns: of columns that are equal in every entry, the first ones get a row, in ascending order. Equal
  // columns have equal duals if both have rows, and 0 if one has none.
  void order_equal_columns() {
    hashes_.fill(0);
    for (std::int64_t i = 0; i < rows_; i += rows_ / kSamples + 1) {
      const T* const values = &entry(i, 0);
      const std::int64_t stride = column_stride_;
      for (std::int64_t j = 0; j < columns_; ++j) {
        mix(hashes_[j], static_cast<double>(widen(values[j * stride])));
      }
    }
    for (std::int64_t j = 0; j < columns_; ++j) hashes_[j] |= 1;
    const auto in_order = [this](const std::int64_t* columns, std::int64_t count) {
      for (std::int64_t k = 1; k < count; ++k) {
        const std::int64_t row = row_of_column_[columns[k]], before = row_of_column_[columns[k - 1]];
        if (row >= 0 && (before < 0 || row < before)) return false;
      }
      return true;
    };
    bool refined = false;
    const auto refine = [&](const std::int64_t*, std::int64_t) {
      if (refined) return;  // all columns at once: a single column would read a cache line per entry
      refined = true;
      for (std::int64_t j = 0; j < columns_; ++j) refined_[j] = 0;
      for (std::int64_t i = 0; i < rows_ && column_stride_ == 1; ++i) {
        const std::uint32_t row_weight = weight(i);
        const T* const values = &entry(i, 0);
        for (std::int64_t j = 0; j < columns_; ++j) refined_[j] += bits_of(values[j]) * row_weight;
      }
      for (std::int64_t j = 0; j < columns_ && column_stride_ != 1; ++j) {
        const T* const values = &entry(0, j);
        std::uint32_t hash = 0;
        for (std::int64_t i = 0; i < rows_; ++i) hash += bits_of(values[i]) * weight(i);
        refined_[j] = hash;
      }
    };
    const auto keep_equal = [this](std::int64_t* columns, std::int64_t count) {
      for (std::int64_t i = 0; i < rows_ && count > 1; ++i) {
        const T* const values = &entry(i, 0);
        const std::int64_t stride = column_stride_;
        std::int64_t kept = 1;
        for (std::int64_t k = 1; k < count; ++k) {
          columns[kept] = columns[k];
          kept += widen(values[columns[k] * stride]) == widen(values[columns[0] * stride]);
        }
        count = kept;
      }
      return count;
    };
    for_equal_groups(columns_, hashes_, in_order, refine, keep_equal,
                     [this](const std::int64_t* columns, std::int64_t size) {
                       std::int64_t count = 0;
                       for (std::int64_t k = 0; k < size; ++k) {
                         const std::int64_t row = row_of_column_[columns[k]];
                         if (row >= 0) members_[count++] = row;
                         row_of_column_[columns[k]] = -1;
                       }
                       sort_ascending(members_.data(), count);
                       for (std::int64_t k = 0; k < count; ++k) assign(members_[k], columns[k]);
                     });
  }

  // Writes duals, objective and gap; expects the smallest reduced costs in the row duals.
  void write_result(const AssignmentProblem& problem, std::int64_t index) const {
    write_proof(problem, index, sign_, v_.data(), [this](std::int64_t i, std::int64_t j) { return cost(i, j); });
  }

  // Entries per thread from which another thread pays off.
  static constexpr std::int64_t kEntriesPerThread = 1 << 20;
  // Number of entries that the hash of a row or column samples.
  static constexpr std::int64_t kSamples = 32;

  std::int64_t rows_, columns_;
  double sign_;
  const T* values_ = nullptr;
  std::int64_t row_stride_ = 0, column_stride_ = 1;
  std::int64_t* column_of_row_ = nullptr;
  Buffer<double> v_, u_;
  Buffer<std::int64_t> row_of_column_;

 private:
  // An odd number that differs for every position.
  static std::uint32_t weight(std::int64_t position) {
    const std::uint32_t mixed = (static_cast<std::uint32_t>(position) + 1u) * 0x9e3779b9u;
    return (mixed ^ (mixed >> 15)) | 1u;
  }

  // Writes the hashes of all rows of a transposed matrix to refined_.
  void refine_transposed_rows() {
    for (std::int64_t i = 0; i < rows_; ++i) refined_[i] = 0;
    for (std::int64_t j = 0; j < columns_; ++j) {
      const std::uint32_t column_weight = weight(j);
      const T* const values = &entry(0, j);
      for (std::int64_t i = 0; i < rows_; ++i) refined_[i] += bits_of(values[i]) * column_weight;
    }
  }

  // Small integers differ in their high bits only, of which a product with a weight would keep a few.
  static std::uint32_t folded(std::uint32_t bits) { return bits ^ (bits >> 16); }

  // The bits of an entry, equal for 0 and -0.
  static std::uint32_t bits_of(T value) {
    if constexpr (sizeof(T) == sizeof(double)) {
      const double wide = widen(value) + 0.0;
      std::uint64_t bits;
      std::memcpy(&bits, &wide, sizeof bits);
      return folded(static_cast<std::uint32_t>(bits ^ (bits >> 32)));
    } else {
      return folded(float_to_bits(widen(value) + 0.0f));
    }
  }

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

  Buffer<std::uint64_t> hashes_;
  Buffer<std::uint32_t> refined_;
  Buffer<std::int64_t> order_, members_;
};

}  // namespace
}  // namespace mudsc::MUDSC_ISA
