// Assignment of one matrix of any shape and layout, with or without a threshold, by the kernel for contiguous matrices
// with at least as many columns as rows.
//
// A matrix that is not contiguous, has more rows than columns, or comes with a threshold is copied once; the copy is
// transposed where there are more rows than columns.
//
// A threshold t turns a minimized problem into: pair some rows with some columns so that the sum of cost - t over the
// pairs is as small as possible. Pairs with cost >= t never help, so entries are clipped at t and the clipped matrix is
// assigned completely: its sum differs from that of cost - t by a constant, and a pair at t stands for no pair.
// Clipping is exact, where subtracting t from every entry would round. From the duals u, v of the clipped problem,
// u_i - t + a and v_j - a with a = max v are duals of the problem with a threshold: none is positive, the sum of two is
// at most cost_ij - t, and rows and columns without a partner have 0.
#pragma once

#include <cmath>
#include <cstdint>
#include <memory>
#include <type_traits>

#include "arrays.hpp"
#include "mudsc/assignment.hpp"
#include "mudsc/transpose.hpp"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace mudsc::bindings {

struct AssignmentOptions {
  bool maximize;
  bool has_threshold;
  double threshold;  // finite
  Isa isa;
  int threads;
};

// Where results go. Duals may be null if nobody wants them.
struct AssignmentResult {
  std::int64_t* column_of_row;  // [rows], -1 for a row without a column
  double* row_duals;            // [rows]
  double* column_duals;         // [columns]
  double objective;             // sum of the values of pairs
  double gap;
};

// Uninitialized memory: on the stack up to `kInlineItems` items.
template <class T, std::int64_t kInlineItems>
class Scratch {
 public:
  explicit Scratch(std::int64_t count)
      : heap_block_(count > kInlineItems ? new T[static_cast<std::size_t>(count)] : nullptr) {
#if defined(__linux__)
    // The first touch of a large array costs more than filling it; huge pages are touched 512 times less often.
    constexpr std::uintptr_t kPage = 4096, kLarge = 1 << 22;
    const std::uintptr_t bytes = static_cast<std::uintptr_t>(count) * sizeof(T);
    if (bytes >= kLarge) {
      const std::uintptr_t begin = (reinterpret_cast<std::uintptr_t>(heap_block_.get()) + kPage - 1) / kPage * kPage;
      const std::uintptr_t end = (reinterpret_cast<std::uintptr_t>(heap_block_.get()) + bytes) / kPage * kPage;
      madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
    }
#endif
  }
  T* data() { return heap_block_ ? heap_block_.get() : inline_block_; }

 private:
  std::unique_ptr<T[]> heap_block_;
  T inline_block_[kInlineItems];
};

// Copies a matrix into contiguous rows: copy(value) of each entry.
template <class From, class To, class Copy>
void copy_entries(const MatrixView& matrix, To* to, const Copy& copy) {
  const From* const from = static_cast<const From*>(matrix.values);
  if (matrix.column_stride == 1) {
    for (std::int64_t i = 0; i < matrix.rows; ++i) {
      const From* const row = from + i * matrix.row_stride;
      for (std::int64_t j = 0; j < matrix.columns; ++j) to[i * matrix.columns + j] = copy(row[j]);
    }
    return;
  }
  // In blocks, so that a line of the matrix is still in the cache when its next entry is read.
  constexpr std::int64_t kBlock = 16;
  for (std::int64_t left = 0; left < matrix.columns; left += kBlock) {
    const std::int64_t right = left + kBlock < matrix.columns ? left + kBlock : matrix.columns;
    for (std::int64_t top = 0; top < matrix.rows; top += kBlock) {
      const std::int64_t bottom = top + kBlock < matrix.rows ? top + kBlock : matrix.rows;
      for (std::int64_t i = top; i < bottom; ++i) {
        for (std::int64_t j = left; j < right; ++j) {
          to[i * matrix.columns + j] = copy(from[i * matrix.row_stride + j * matrix.column_stride]);
        }
      }
    }
  }
}

// Copies a matrix with row_stride == 1 into contiguous rows, three times as fast as entry by entry.
template <class Value>
void transpose_entries(const MatrixView& matrix, Value* to) {
  constexpr std::int64_t kSquare = 16 / static_cast<std::int64_t>(sizeof(Value)), kBlock = 16;
  const Value* const from = static_cast<const Value*>(matrix.values);
  const std::int64_t rows = matrix.rows / kBlock * kBlock, columns = matrix.columns / kBlock * kBlock;
  for (std::int64_t left = 0; left < columns; left += kBlock) {
    for (std::int64_t top = 0; top < rows; top += kBlock) {
      for (std::int64_t i = top; i < top + kBlock; i += kSquare) {
        for (std::int64_t j = left; j < left + kBlock; j += kSquare) {
          transpose_square(from + j * matrix.column_stride + i, matrix.column_stride, to + i * matrix.columns + j,
                           matrix.columns);
        }
      }
    }
  }
  for (std::int64_t i = 0; i < matrix.rows; ++i) {
    for (std::int64_t j = i < rows ? columns : 0; j < matrix.columns; ++j) {
      to[i * matrix.columns + j] = from[j * matrix.column_stride + i];
    }
  }
}

// Copies a matrix and clips its entries at the threshold, if there is one. NaN stays NaN, for the kernel to find.
template <class From, class To>
void copy_matrix(const MatrixView& matrix, const AssignmentOptions& options, To* to) {
  if (!options.has_threshold) {
    if constexpr (std::is_same_v<From, To>) {
      if (matrix.row_stride == 1 && matrix.column_stride != 1) return transpose_entries(matrix, to);
    }
    return copy_entries<From>(matrix, to, [](From value) { return static_cast<To>(value); });
  }
  const To threshold = static_cast<To>(options.threshold);
  if (options.maximize) {
    copy_entries<From>(matrix, to, [threshold](From value) {
      const To wide = static_cast<To>(value);
      return wide <= threshold ? threshold : wide;
    });
  } else {
    copy_entries<From>(matrix, to, [threshold](From value) {
      const To wide = static_cast<To>(value);
      return wide >= threshold ? threshold : wide;
    });
  }
}

// Calls the kernel for contiguous values with rows <= columns, or their transpose in memory.
inline AssignmentStatus call_kernel(const void* values, ScalarType type, std::int64_t rows, std::int64_t columns,
                                    bool transposed, const AssignmentOptions& options, AssignmentResult& result) {
  AssignmentStatus status;
  const AssignmentProblem problem{values,
                                  type,
                                  1,
                                  rows,
                                  columns,
                                  transposed,
                                  options.maximize,
                                  0.0,
                                  options.threads,
                                  nullptr,
                                  result.column_of_row,
                                  result.row_duals,
                                  result.column_duals,
                                  &result.objective,
                                  &result.gap,
                                  &status};
  MUDSC_CALL_KERNEL(options.isa, linear_assignment, problem);
  return status;
}

// Turns the solution of a clipped problem, rows <= columns, into that of the problem with a threshold.
template <class Value>
void take_threshold(const Value* clipped, std::int64_t rows, std::int64_t columns, const AssignmentOptions& options,
                    AssignmentResult& result) {
  const double sign = options.maximize ? -1.0 : 1.0, threshold = sign * options.threshold;
  double* const u = result.row_duals;
  double* const v = result.column_duals;
  // With more columns than rows some have no row and dual 0, which is the maximum but for rounding.
  double shift = rows < columns ? 0.0 : sign * v[0];
  for (std::int64_t j = 1; j < columns && rows == columns; ++j) shift = sign * v[j] > shift ? sign * v[j] : shift;
  for (std::int64_t j = 0; j < columns; ++j) {
    const double dual = sign * v[j] - shift;
    v[j] = sign * (dual < 0.0 ? dual : 0.0) + 0.0;
  }
  double objective = 0.0, gap = 0.0;
  for (std::int64_t i = 0; i < rows; ++i) {
    const std::int64_t column = result.column_of_row[i];
    const double cost = sign * static_cast<double>(clipped[i * columns + column]);
    if (cost >= threshold) {
      result.column_of_row[i] = -1;
      u[i] = v[column] = 0.0;
      continue;
    }
    const double dual = (sign * u[i] - threshold) + shift, bounded = dual < 0.0 ? dual : 0.0;
    objective += cost;
    gap += ((cost - threshold) - sign * v[column]) - bounded;
    u[i] = sign * bounded + 0.0;
  }
  result.objective = sign * objective + 0.0;
  result.gap = gap > 0.0 ? gap : 0.0;
}

template <class From, class To>
AssignmentStatus solve_copy(const MatrixView& matrix, const AssignmentOptions& options, AssignmentResult& result) {
  constexpr ScalarType kType = sizeof(To) == sizeof(double) ? ScalarType::float64 : ScalarType::float32;
  Scratch<To, 256> copy(matrix.rows * matrix.columns);
  copy_matrix<From>(matrix, options, copy.data());
  const AssignmentStatus status = call_kernel(copy.data(), kType, matrix.rows, matrix.columns, false, options, result);
  if (options.has_threshold && status == AssignmentStatus::optimal) {
    take_threshold(copy.data(), matrix.rows, matrix.columns, options, result);
  }
  return status;
}

// Solves a matrix with rows <= columns.
inline AssignmentStatus solve_wide(const MatrixView& matrix, const AssignmentOptions& options,
                                   AssignmentResult& result) {
  if (!options.has_threshold && matrix.is_contiguous()) {
    return call_kernel(matrix.values, matrix.type, matrix.rows, matrix.columns, false, options, result);
  }
  // Below this size a copy takes less time than reading rows with a stride. A square matrix has more rows read again.
  constexpr std::int64_t kMinColumns = 1024;
  const bool by_columns = matrix.row_stride == 1 && matrix.column_stride == matrix.rows;
  if (!options.has_threshold && by_columns && matrix.rows < matrix.columns && matrix.columns >= kMinColumns) {
    return call_kernel(matrix.values, matrix.type, matrix.rows, matrix.columns, true, options, result);
  }
  if (matrix.type == ScalarType::float64) return solve_copy<double, double>(matrix, options, result);
  // A threshold that float32 cannot hold would be another one.
  const bool fits = static_cast<double>(static_cast<float>(options.threshold)) == options.threshold;
  return options.has_threshold && !fits ? solve_copy<float, double>(matrix, options, result)
                                        : solve_copy<float, float>(matrix, options, result);
}

// Solves a matrix of any shape.
inline AssignmentStatus solve_matrix(const MatrixView& matrix, const AssignmentOptions& options,
                                     AssignmentResult& result) {
  const bool needs_duals = result.row_duals == nullptr;
  Scratch<double, 128> duals(needs_duals ? matrix.rows + matrix.columns : 0);
  // Field by field: GCC copies the struct by `rep movs`, which takes a twentieth of a small call.
  AssignmentResult full{result.column_of_row, needs_duals ? duals.data() : result.row_duals,
                        needs_duals ? duals.data() + matrix.rows : result.column_duals, 0.0, 0.0};
  AssignmentStatus status;
  if (matrix.rows <= matrix.columns) {
    status = solve_wide(matrix, options, full);
  } else {
    Scratch<std::int64_t, 128> row_of_column(matrix.columns);
    AssignmentResult wide{row_of_column.data(), full.column_duals, full.row_duals, 0.0, 0.0};
    status = solve_wide(matrix.transposed(), options, wide);
    full.objective = wide.objective;
    full.gap = wide.gap;
    for (std::int64_t i = 0; i < matrix.rows; ++i) full.column_of_row[i] = -1;
    for (std::int64_t j = 0; j < matrix.columns && status == AssignmentStatus::optimal; ++j) {
      if (row_of_column.data()[j] >= 0) full.column_of_row[row_of_column.data()[j]] = j;
    }
  }
  result.objective = full.objective;
  result.gap = full.gap;
  return status;
}

}  // namespace mudsc::bindings
