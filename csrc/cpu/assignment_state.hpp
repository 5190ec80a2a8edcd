// What the dense and the sparse assignment solver share: the state of one problem, an order among equal rows and
// columns, and the certificate.
#pragma once

#include "assignment_scan.hpp"
#include "kernel.hpp"
#include "mudsc/assignment.hpp"
#include "mudsc/threads.hpp"

namespace mudsc::MUDSC_ISA {
namespace {

constexpr double kInfinity = __builtin_huge_val();
constexpr std::int64_t kLanes = kVectorBytes / static_cast<std::int64_t>(sizeof(double));
// Buffers of doubles are padded alike at every instruction level.
constexpr std::int64_t kPadding = 64 / static_cast<std::int64_t>(sizeof(double));
typedef double Lanes __attribute__((vector_size(kLanes * sizeof(double)), may_alias));

inline std::int64_t padded(std::int64_t count) { return (count + kPadding - 1) / kPadding * kPadding; }

// Heap sort: no recursion, no extra memory, bounded by n log n.
template <class Less>
inline void sort(std::int64_t* items, std::int64_t count, const Less& less) {
  const auto sift = [&](std::int64_t root, std::int64_t end) {
    for (;;) {
      std::int64_t child = 2 * root + 1;
      if (child >= end) return;
      if (child + 1 < end && less(items[child], items[child + 1])) ++child;
      if (!less(items[root], items[child])) return;
      const std::int64_t item = items[root];
      items[root] = items[child];
      items[child] = item;
      root = child;
    }
  };
  for (std::int64_t root = count / 2; root-- > 0;) sift(root, count);
  for (std::int64_t end = count; end-- > 1;) {
    const std::int64_t item = items[0];
    items[0] = items[end];
    items[end] = item;
    sift(0, end);
  }
}
inline void sort_ascending(std::int64_t* items, std::int64_t count) {
  sort(items, count, [](std::int64_t a, std::int64_t b) { return a < b; });
}

// Mixes a number into a hash; -0 and 0 are equal.
inline void mix(std::uint64_t& hash, double value) {
  value += 0.0;
  std::uint64_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  hash = (hash ^ bits) * 0x9e3779b97f4a7c15u;
  hash ^= hash >> 29;
}

// Writes duals, objective and gap of a problem solved as `sign` times its values, minimised: from its pairs, its column
// duals `v`, and least reduced costs in place of its row duals. What the pairs lack to equality is the gap.
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

// One problem at a time, minimised: cost = value, or -value to maximise. At the end u_i + v_j <= cost_ij with equality
// for pairs and, where there are more columns than rows, v_j <= 0 and v_j = 0 for columns without a row.
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

  // Points at problem `index` of the batch, nothing matched, column duals as given or 0.
  void begin(const AssignmentProblem& problem, std::int64_t index) {
    values_ = static_cast<const T*>(problem.values) + index * rows_ * columns_;
    column_of_row_ = problem.column_of_row + index * rows_;
    for (std::int64_t i = 0; i < rows_; ++i) column_of_row_[i] = -1;
    row_of_column_.fill(-1);
    v_.fill(0.0);
    if (problem.prices != nullptr && rows_ == columns_) {
      const double* const prices = problem.prices + index * columns_;
      for (std::int64_t j = 0; j < columns_; ++j) v_[j] = sign_ * prices[j];
    }
  }

  double cost(std::int64_t row, std::int64_t column) const {
    return sign_ * static_cast<double>(widen(values_[row * columns_ + column]));
  }

  void assign(std::int64_t row, std::int64_t column) {
    column_of_row_[row] = column;
    row_of_column_[column] = row;
  }

  // The hash of rows that are known to be zero in every entry; no other has it.
  static constexpr std::uint64_t kHashOfZeros = 0;

  // Hash of a few entries of a row, to tell most rows apart.
  std::uint64_t sampled_hash(std::int64_t row) const {
    std::uint64_t hash = 0;
    for (std::int64_t j = 0; j < columns_; j += columns_ / kSamples + 1) {
      mix(hash, static_cast<double>(widen(values_[row * columns_ + j])));
    }
    return hash | 1;
  }

  // Calls visit(members, count) for groups of rows that are equal in every entry, members ascending. `hashes` are the
  // rows' sampled hashes, or kHashOfZeros, which spares reading them; groups of like hashes for which skip(members,
  // count) holds are left out unread.
  template <class Skip, class Visit>
  void for_equal_rows(const Buffer<std::uint64_t>& hashes, const Skip& skip, const Visit& visit) {
    const auto refine = [this](const std::int64_t* rows, std::int64_t count) {
      for (std::int64_t k = 0; k < count; ++k) {
        const T* const values = values_ + rows[k] * columns_;
        std::uint32_t hash = 0;
        for (std::int64_t j = 0; j < columns_; ++j) hash += bits_of(values[j]) * weight(j);
        refined_[rows[k]] = hash;
      }
    };
    const auto keep_equal = [this](std::int64_t* rows, std::int64_t count) {
      std::int64_t kept = 1;
      const T* const first = values_ + rows[0] * columns_;
      for (std::int64_t k = 1; k < count; ++k) {
        const T* const other = values_ + rows[k] * columns_;
        // Rows that are equal to the bit are the most frequent, and told soon; 0 and -0 are equal too.
        bool equal = true;
        if (std::memcmp(first, other, static_cast<std::size_t>(columns_) * sizeof(T)) != 0) {
          for (std::int64_t j = 0; j < columns_ && equal; ++j) equal = widen(first[j]) == widen(other[j]);
        }
        if (equal) rows[kept++] = rows[k];
      }
      return kept;
    };
    for_equal_groups(rows_, hashes, skip, refine, keep_equal, visit);
  }

  // Rows that are equal in every entry may exchange their columns: they take them in ascending order, so that ties
  // between them do not depend on the way of the search, and equal problems keep their order.
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

  // The same for columns: of columns that are equal in every entry the first ones get a row, in ascending order.
  // Equal columns have equal duals where both have rows, and 0 where one has none.
  void order_equal_columns() {
    hashes_.fill(0);
    for (std::int64_t i = 0; i < rows_; i += rows_ / kSamples + 1) {
      for (std::int64_t j = 0; j < columns_; ++j) {
        mix(hashes_[j], static_cast<double>(widen(values_[i * columns_ + j])));
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
      if (refined) return;  // all columns at once: a column alone is a cache line an entry
      refined = true;
      for (std::int64_t j = 0; j < columns_; ++j) refined_[j] = 0;
      for (std::int64_t i = 0; i < rows_; ++i) {
        const std::uint32_t row_weight = weight(i);
        const T* const values = values_ + i * columns_;
        for (std::int64_t j = 0; j < columns_; ++j) refined_[j] += bits_of(values[j]) * row_weight;
      }
    };
    const auto keep_equal = [this](std::int64_t* columns, std::int64_t count) {
      for (std::int64_t i = 0; i < rows_ && count > 1; ++i) {
        const T* const values = values_ + i * columns_;
        std::int64_t kept = 1;
        for (std::int64_t k = 1; k < count; ++k) {
          columns[kept] = columns[k];
          kept += widen(values[columns[k]]) == widen(values[columns[0]]);
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

  // Writes duals, objective and gap, from least reduced costs in place of the row duals.
  void conclude(const AssignmentProblem& problem, std::int64_t index) const {
    write_proof(problem, index, sign_, v_.data(), [this](std::int64_t i, std::int64_t j) { return cost(i, j); });
  }

  // Entries that are worth a thread of their own.
  static constexpr std::int64_t kEntriesPerThread = 1 << 20;
  // Entries of a row or column that its hash samples.
  static constexpr std::int64_t kSamples = 32;

  std::int64_t rows_, columns_;
  double sign_;
  const T* values_ = nullptr;
  std::int64_t* column_of_row_ = nullptr;
  Buffer<double> v_, u_;
  Buffer<std::int64_t> row_of_column_;

 private:
  // An odd number that is another one for every position.
  static std::uint32_t weight(std::int64_t position) {
    const std::uint32_t mixed = (static_cast<std::uint32_t>(position) + 1u) * 0x9e3779b9u;
    return (mixed ^ (mixed >> 15)) | 1u;
  }

  // The bits of an entry, equal for 0 and -0.
  static std::uint32_t bits_of(T value) {
    if constexpr (sizeof(T) == sizeof(double)) {
      const double wide = widen(value) + 0.0;
      std::uint64_t bits;
      std::memcpy(&bits, &wide, sizeof bits);
      return static_cast<std::uint32_t>(bits ^ (bits >> 32));
    } else {
      return float_to_bits(widen(value) + 0.0f);
    }
  }

  // Lists the items of [0, count) whose hash another one has too, and few others, in order_; returns how many they are.
  // Most items of most problems have hashes of their own, and sorting all took an eighth of a search.
  std::int64_t list_alike(std::int64_t count, const Buffer<std::uint64_t>& hashes) {
    // How often a place is met, up to twice; there are eight places to an item, so that few meet by chance.
    std::uint8_t* const met = reinterpret_cast<std::uint8_t*>(members_.data());
    const std::uint64_t places = 8 * static_cast<std::uint64_t>(count);
    const auto place_of = [&](std::int64_t k) { return ((hashes[k] * 0x9e3779b97f4a7c15u) >> 40) * places >> 24; };
    std::memset(met, 0, places);
    for (std::int64_t k = 0; k < count; ++k) {
      std::uint8_t& times = met[place_of(k)];
      times = times == 0 ? 1 : 2;
    }
    std::int64_t alike = 0;
    for (std::int64_t k = 0; k < count; ++k) {
      order_[alike] = k;
      alike += met[place_of(k)] == 2;
    }
    return alike;
  }

  // Visits groups of equal items in [0, count). `hashes` are compared first; refine(members, count) then writes
  // refined_ for a group, and keep_equal(members, count) leaves those that equal the first at the front.
  template <class Skip, class Refine, class KeepEqual, class Visit>
  void for_equal_groups(std::int64_t count, const Buffer<std::uint64_t>& hashes, const Skip& skip, const Refine& refine,
                        const KeepEqual& keep_equal, const Visit& visit) {
    std::int64_t* const order = order_.data();
    count = list_alike(count, hashes);
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
