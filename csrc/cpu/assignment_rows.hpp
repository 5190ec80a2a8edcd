// Rows of a matrix in memory, as lists read them (assignment_lists.hpp).
//
// A source of rows is a state (assignment_pairs.hpp) that also defines:
//   Problem, Scan                     the problem it reads, and the type in which rows are scanned
//   RowScratch                        working memory of a thread to read rows
//   cost(row, column)                 one cost
//   row_values(row, scratch)          the values of a row, in memory or in the scratch
//   panel_rows()                      rows that are read together to list all, or 0 if each is where it is
//   read_panel(begin, end, out, stride)   writes rows, `stride` entries apart
//   address_of(row)                   where a row that may be prefetched begins, or null
//   before_rereading(in_parallel)     called before rows are read again
//   kMayPrune                         whether rows may be pruned (see PairwiseRows)
//   rows_are_constant()               whether each row repeats one finite number
//   sampled_hash(row), for_equal_rows(hashes, skip, visit), order_equal_rows(hashes), order_equal_columns()
//   begin(problem, index), write_result(problem, index)
#pragma once

#include "assignment_state.hpp"
#include "mudsc/transpose.hpp"

namespace mudsc::MUDSC_ISA {
namespace {

// Distance of the rows of a panel: not a multiple of a page, or all of them would compete for the same cache lines.
constexpr std::int64_t panel_stride(std::int64_t columns) { return (columns + 15) / 16 * 16 + 16; }

template <class T>
class MatrixRows : protected AssignmentState<T> {
  using State = AssignmentState<T>;

 public:
  using Problem = AssignmentProblem;
  using Scan = typename ArithmeticOf<T>::type;

 protected:
  using State::column_stride_;
  using State::columns_;
  using State::cost;
  using State::entry;
  using State::row_stride_;
  using State::rows_;
  using State::values_;

  static constexpr std::int64_t kPanelRows = 32;
  static constexpr bool kMayPrune = false;

  struct RowScratch {
    RowScratch() = default;
    explicit RowScratch(const MatrixRows& rows)
        : row(sizeof(T) == sizeof(Scan) && !rows.is_transposed() ? 0 : rows.columns_) {}
    Buffer<Scan> row;  // a row that is not in memory as scans need it
  };

  explicit MatrixRows(const Problem& problem) : State(problem) {}

  void begin(const Problem& problem, std::int64_t index) {
    State::begin(problem, index);
    gathered_rows_ = 0;
  }

  // Whether the matrix in memory is the transpose of the problem's.
  bool is_transposed() const { return column_stride_ != 1; }

  std::int64_t panel_rows() const { return is_transposed() ? kPanelRows : 0; }

  const void* address_of(std::int64_t row) const { return is_transposed() ? nullptr : &entry(row, 0); }

  // Copies the rows [begin, end) of a transposed matrix to `out`, `stride` entries apart.
  template <class Out>
  void read_panel(std::int64_t begin, std::int64_t end, Out* out, std::int64_t stride) const {
    constexpr std::int64_t kSquare = 16 / static_cast<std::int64_t>(sizeof(Out));
    std::int64_t j = 0;
    if constexpr (sizeof(T) == sizeof(Out) && sizeof(T) >= sizeof(float)) {
      // Far enough ahead to hide the latency of memory: these lines are too far apart for the processor to foresee.
      constexpr std::int64_t kAhead = 16;
      const T* const last = &entry(begin, columns_ - 1);
      for (; end - begin == kPanelRows && j + kSquare <= columns_; j += kSquare) {
        for (std::int64_t k = 0; k < kSquare; ++k) {
          const T* const ahead = &entry(begin, 0) + (j + k + kAhead) * column_stride_;
          for (std::int64_t i = 0; i < kPanelRows && ahead <= last; i += 16 * kSquare / 4) {
            __builtin_prefetch(ahead + i);
          }
        }
        for (std::int64_t i = 0; i < kPanelRows; i += kSquare) {
          transpose_square(&entry(begin + i, j), column_stride_, out + i * stride + j, stride);
        }
      }
    }
    for (; j < columns_; ++j) {
      for (std::int64_t i = begin; i < end; ++i) out[(i - begin) * stride + j] = Out(widen(entry(i, j)));
    }
  }

  // Rows of a transposed matrix are read again one by one, at a cache line an entry. If many are, a copy of the whole
  // matrix is faster. in_parallel(count, body) calls body(item) for every item in [0, count).
  template <class InParallel>
  void before_rereading(const InParallel& in_parallel) {
    constexpr std::int64_t kShare = 8;
    if (!is_transposed() || gathered_rows_ <= rows_ / kShare) return;
    copy_ = Buffer<T>(rows_ * columns_);
    copy_.prefer_huge_pages();
    in_parallel((rows_ + kPanelRows - 1) / kPanelRows, [&](std::int64_t panel) {
      const std::int64_t begin = panel * kPanelRows, end = begin + kPanelRows < rows_ ? begin + kPanelRows : rows_;
      T* const out = copy_.data() + begin * columns_;
      if constexpr (sizeof(T) >= sizeof(float)) {
        read_panel(begin, end, out, columns_);
      } else {
        for (std::int64_t j = 0; j < columns_; ++j) {
          for (std::int64_t i = begin; i < end; ++i) out[(i - begin) * columns_ + j] = entry(i, j);
        }
      }
    });
    values_ = copy_.data();
    row_stride_ = columns_;
    column_stride_ = 1;
  }

  // A row's values in the scanning type.
  const Scan* row_values(std::int64_t row, RowScratch& scratch) const {
    const T* const values = &entry(row, 0);
    Scan* const out = scratch.row.data();
    if (is_transposed()) {
      __atomic_fetch_add(&gathered_rows_, 1, __ATOMIC_RELAXED);
      for (std::int64_t j = 0; j < columns_; ++j) out[j] = widen(values[j * column_stride_]);
      return out;
    }
    if constexpr (sizeof(T) == sizeof(Scan)) {
      return reinterpret_cast<const Scan*>(values);
    } else {
      for (std::int64_t j = 0; j < columns_; ++j) out[j] = widen(values[j]);
      return out;
    }
  }

  // Whether each row repeats one finite number. Usually decided after the first row.
  bool rows_are_constant() const {
    const std::size_t overlap = static_cast<std::size_t>(columns_ - 1) * sizeof(T);
    if (is_transposed()) {
      const std::size_t bytes = static_cast<std::size_t>(rows_) * sizeof(T);
      for (std::int64_t j = 1; j < columns_; ++j) {
        if (std::memcmp(&entry(0, 0), &entry(0, j), bytes) != 0) return false;
      }
    }
    for (std::int64_t i = 0; i < rows_; ++i) {
      const T* const values = &entry(i, 0);
      const bool repeats = is_transposed() || std::memcmp(values, values + 1, overlap) == 0;
      if (!repeats || cost(i, 0) - cost(i, 0) != 0.0) return false;
    }
    return true;
  }

 private:
  Buffer<T> copy_;  // of a transposed matrix
  mutable std::int64_t gathered_rows_ = 0;
};

}  // namespace
}  // namespace mudsc::MUDSC_ISA
