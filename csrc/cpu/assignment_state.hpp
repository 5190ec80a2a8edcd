// The state of a problem whose matrix is in memory.
#pragma once

#include "assignment_pairs.hpp"
#include "mudsc/threads.hpp"

namespace mudsc::MUDSC_ISA {
namespace {

template <class T>
class AssignmentState : protected PairState {
 protected:
  explicit AssignmentState(const AssignmentProblem& problem) : PairState(problem) {}

  // Selects problem `index` of the batch: nothing matched, column duals as given or 0.
  void begin(const AssignmentProblem& problem, std::int64_t index) {
    values_ = static_cast<const T*>(problem.values) + index * rows_ * columns_;
    row_stride_ = problem.transposed ? 1 : columns_;
    column_stride_ = problem.transposed ? rows_ : 1;
    PairState::begin(problem, index);
  }

  const T& entry(std::int64_t row, std::int64_t column) const {
    return values_[row * row_stride_ + column * column_stride_];
  }

  double cost(std::int64_t row, std::int64_t column) const {
    return sign_ * static_cast<double>(widen(entry(row, column)));
  }

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

  // Equal rows get their columns in ascending order.
  void order_equal_rows(const Buffer<std::uint64_t>& hashes) {
    order_rows([&](const auto& skip, const auto& visit) { for_equal_rows(hashes, skip, visit); });
  }

  // Of columns that are equal in every entry, the first ones get a row, in ascending order.
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
    order_columns(refine, keep_equal);
  }

  // Writes duals, objective and gap; expects the smallest reduced costs in the row duals.
  void write_result(const AssignmentProblem& problem, std::int64_t index) const {
    write_proof(problem, index, sign_, v_.data(), [this](std::int64_t i, std::int64_t j) { return cost(i, j); });
  }

  const T* values_ = nullptr;
  std::int64_t row_stride_ = 0, column_stride_ = 1;

 private:
  // Writes the hashes of all rows of a transposed matrix to refined_.
  void refine_transposed_rows() {
    for (std::int64_t i = 0; i < rows_; ++i) refined_[i] = 0;
    for (std::int64_t j = 0; j < columns_; ++j) {
      const std::uint32_t column_weight = weight(j);
      const T* const values = &entry(0, j);
      for (std::int64_t i = 0; i < rows_; ++i) refined_[i] += bits_of(values[i]) * column_weight;
    }
  }

  // The bits of an entry, equal for 0 and -0.
  static std::uint32_t bits_of(T value) {
    if constexpr (sizeof(T) == sizeof(double)) {
      const double wide = widen(value) + 0.0;
      std::uint64_t bits;
      std::memcpy(&bits, &wide, sizeof bits);
      return folded(static_cast<std::uint32_t>(bits ^ (bits >> 32)));
    } else {
      return float_bits(widen(value));
    }
  }
};

}  // namespace
}  // namespace mudsc::MUDSC_ISA
