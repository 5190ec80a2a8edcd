// Assignment where every cost is one of two numbers, by a maximum matching of the pairs with the lower cost.
//
// J. E. Hopcroft and R. M. Karp, "An n^5/2 algorithm for maximum matchings in bipartite graphs", SIAM Journal on
// Computing 2 (1973). Rows and columns that are left are paired in order. The duals come from the smallest vertex cover
// (Koenig's theorem): a column in the cover has dual low - high, other columns 0.
//
// Memory traffic: the matrix is read once. One thread.
#pragma once

#include "assignment_state.hpp"

namespace mudsc::MUDSC_ISA {
namespace {

template <class T>
class TwoValuedSolver : private AssignmentState<T> {
  using State = AssignmentState<T>;
  using State::column_of_row_;
  using State::columns_;
  using State::row_of_column_;
  using State::rows_;
  using State::v_;
  using State::values_;

 public:
  // Up to this share of the pairs may have the lower cost.
  static constexpr std::int64_t kMaxLowShare = 4;

  explicit TwoValuedSolver(const AssignmentProblem& problem)
      : State(problem),
        edge_begin_(rows_ + 1),
        edges_(rows_ * columns_ / kMaxLowShare + columns_),
        next_edge_(rows_),
        depth_(rows_),
        queue_(rows_),
        path_(rows_) {}

  // Returns false, with nothing written, if costs are not two finite numbers, or too many are the lower one.
  bool solve(const AssignmentProblem& problem, std::int64_t index) {
    State::begin(problem, index);
    v_.fill(0.0);
    if (!collect_edges()) return false;
    match_greedily();
    while (find_depths()) {
      for (std::int64_t i = 0; i < rows_; ++i) next_edge_[i] = edge_begin_[i];
      for (std::int64_t i = 0; i < rows_; ++i) {
        if (column_of_row_[i] < 0) augment(i);
      }
    }
    set_column_duals();
    match_rest();
    order_equal_items();
    for (std::int64_t i = 0; i < rows_; ++i) problem.row_duals[index * rows_ + i] = min_reduced_cost(i);
    State::write_result(problem, index);
    problem.status[index] = AssignmentStatus::optimal;
    return true;
  }

 private:
  // Lists the columns of each row's pairs with the lower cost.
  bool collect_edges() {
    if (!find_values()) return false;
    constexpr std::int64_t kChunk = 64;
    const auto sign = static_cast<typename ArithmeticOf<T>::type>(State::sign_);
    const auto low = static_cast<typename ArithmeticOf<T>::type>(low_);
    const auto high = static_cast<typename ArithmeticOf<T>::type>(high_);
    std::int64_t count = 0;
    for (std::int64_t i = 0; i < rows_; ++i) {
      const T* const row = values_ + i * columns_;
      edge_begin_[i] = count;
      if (count > edges_.size() - columns_) return false;
      for (std::int64_t begin = 0; begin < columns_; begin += kChunk) {
        const std::int64_t end = begin + kChunk < columns_ ? begin + kChunk : columns_;
        std::int32_t at_low = 0, at_high = 0;
        for (std::int64_t j = begin; j < end; ++j) {
          const auto cost = sign * widen(row[j]);
          at_low += cost == low;
          at_high += cost == high;
        }
        if (at_low + at_high != end - begin) return false;
        if (at_low == 0) continue;
        for (std::int64_t j = begin; j < end; ++j) {
          edges_[count] = static_cast<std::int32_t>(j);
          count += sign * widen(row[j]) == low;
        }
      }
    }
    edge_begin_[rows_] = count;
    return true;
  }

  // The two numbers, from the first row that is not constant.
  bool find_values() {
    for (std::int64_t i = 0; i < rows_; ++i) {
      low_ = high_ = State::cost(i, 0);
      for (std::int64_t j = 1; j < columns_; ++j) {
        const double cost = State::cost(i, j);
        low_ = cost < low_ ? cost : low_;
        high_ = cost > high_ ? cost : high_;
      }
      if (low_ < high_) return high_ - low_ < kInfinity;
    }
    return false;
  }

  void match_greedily() {
    for (std::int64_t i = 0; i < rows_; ++i) {
      for (std::int64_t k = edge_begin_[i]; k < edge_begin_[i + 1]; ++k) {
        if (row_of_column_[edges_[k]] >= 0) continue;
        State::assign(i, edges_[k]);
        break;
      }
    }
  }

  // Breadth-first search from all free rows: the number of pairs on a shortest alternating path to each row, -1 if there
  // is none. Returns whether a free column can be reached.
  bool find_depths() {
    std::int64_t queued = 0;
    bool found = false;
    for (std::int64_t i = 0; i < rows_; ++i) {
      depth_[i] = column_of_row_[i] < 0 ? 0 : -1;
      if (depth_[i] == 0) queue_[queued++] = i;
    }
    for (std::int64_t front = 0; front < queued; ++front) {
      const std::int64_t row = queue_[front];
      for (std::int64_t k = edge_begin_[row]; k < edge_begin_[row + 1]; ++k) {
        const std::int64_t next = row_of_column_[edges_[k]];
        if (next < 0) {
          found = true;
        } else if (depth_[next] < 0) {
          depth_[next] = depth_[row] + 1;
          queue_[queued++] = next;
        }
      }
    }
    return found;
  }

  // Depth-first search for a free column along increasing depths. Each edge is tried once for all rows.
  void augment(std::int64_t root) {
    std::int64_t length = 0;
    path_[length++] = root;
    while (length > 0) {
      const std::int64_t row = path_[length - 1];
      if (next_edge_[row] == edge_begin_[row + 1]) {
        if (--length > 0) ++next_edge_[path_[length - 1]];
        continue;
      }
      const std::int64_t next = row_of_column_[edges_[next_edge_[row]]];
      if (next < 0) break;
      if (depth_[next] == depth_[row] + 1) {
        path_[length++] = next;
      } else {
        ++next_edge_[row];
      }
    }
    // Each row of the path takes the column of its current edge.
    while (length-- > 0) State::assign(path_[length], edges_[next_edge_[path_[length]]]);
  }

  // The columns of the cover are those that rows within reach of a free row can take.
  void set_column_duals() {
    for (std::int64_t i = 0; i < rows_; ++i) {
      if (depth_[i] < 0) continue;
      for (std::int64_t k = edge_begin_[i]; k < edge_begin_[i + 1]; ++k) v_[edges_[k]] = low_ - high_;
    }
  }

  void match_rest() {
    std::int64_t column = 0;
    for (std::int64_t i = 0; i < rows_; ++i) {
      if (column_of_row_[i] >= 0) continue;
      while (row_of_column_[column] >= 0) ++column;
      State::assign(i, column);
    }
  }

  // Equal rows get their columns in ascending order; of equal columns the first ones get a row, in ascending order.
  void order_equal_items() {
    for_equal_lists(rows_, edge_begin_, edges_, [this](const std::int64_t* rows, std::int64_t count) {
      State::order_columns_of_rows(rows, count);
    });
    const std::int64_t edge_count = edge_begin_[rows_];
    Buffer<std::int64_t> begin(columns_ + 1, std::int64_t{0}), end(columns_);
    Buffer<std::int32_t> rows_of_columns(edge_count);
    for (std::int64_t k = 0; k < edge_count; ++k) ++begin[edges_[k] + 1];
    for (std::int64_t j = 0; j < columns_; ++j) begin[j + 1] += begin[j];
    for (std::int64_t j = 0; j < columns_; ++j) end[j] = begin[j];
    for (std::int64_t i = 0; i < rows_; ++i) {
      for (std::int64_t k = edge_begin_[i]; k < edge_begin_[i + 1]; ++k) {
        rows_of_columns[end[edges_[k]]++] = static_cast<std::int32_t>(i);
      }
    }
    for_equal_lists(columns_, begin, rows_of_columns, [this](const std::int64_t* columns, std::int64_t size) {
      State::order_rows_of_columns(columns, size);
    });
  }

  // Calls visit(members, count) for groups of [0, count) with equal lists, members ascending.
  template <class Visit>
  void for_equal_lists(std::int64_t count, const Buffer<std::int64_t>& begin, const Buffer<std::int32_t>& entries,
                       const Visit& visit) {
    Buffer<std::uint64_t> hashes(count);
    Buffer<std::int64_t> order(count);
    for (std::int64_t i = 0; i < count; ++i) {
      hashes[i] = 0;
      for (std::int64_t k = begin[i]; k < begin[i + 1]; ++k) mix(hashes[i], static_cast<double>(entries[k] + 1));
      order[i] = i;
    }
    sort(order.data(), count,
         [&](std::int64_t a, std::int64_t b) { return hashes[a] != hashes[b] ? hashes[a] < hashes[b] : a < b; });
    const auto equal = [&](std::int64_t a, std::int64_t b) {
      const std::int64_t length = begin[a + 1] - begin[a];
      return length == begin[b + 1] - begin[b] &&
             std::memcmp(entries.data() + begin[a], entries.data() + begin[b],
                         static_cast<std::size_t>(length) * sizeof(std::int32_t)) == 0;
    };
    for (std::int64_t first = 0, last; first < count; first = last) {
      last = first + 1;
      for (std::int64_t k = last; k < count && hashes[order[k]] == hashes[order[first]]; ++k) {
        if (!equal(order[first], order[k])) continue;  // only the hash is the same
        const std::int64_t item = order[k];
        for (std::int64_t at = k; at > last; --at) order[at] = order[at - 1];
        order[last++] = item;
      }
      if (last - first > 1) visit(order.data() + first, last - first);
    }
  }

  // No pair with the higher cost has a smaller reduced cost than that, as no column dual is positive.
  double min_reduced_cost(std::int64_t row) const {
    double least = high_;
    for (std::int64_t k = edge_begin_[row]; k < edge_begin_[row + 1]; ++k) {
      const double cost = low_ - v_[edges_[k]];
      least = cost < least ? cost : least;
    }
    return least;
  }

  double low_ = 0.0, high_ = 0.0;
  Buffer<std::int64_t> edge_begin_;
  Buffer<std::int32_t> edges_;  // columns
  Buffer<std::int64_t> next_edge_, depth_, queue_, path_;
};

}  // namespace
}  // namespace mudsc::MUDSC_ISA
