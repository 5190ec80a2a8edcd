// Dense linear assignment by augmenting row reduction and shortest augmenting paths: for small problems, and for those
// with forbidden pairs.
//
// R. Jonker and A. Volgenant, "A shortest augmenting path algorithm for dense and sparse linear assignment problems",
// Computing 38 (1987), with column minima as initial duals of square problems only, so that rectangular ones need no
// padding. Duals are double, in which float32 costs are exact.
//
// Up to 128 columns the choice among equally good assignments is that of D. F. Crouse, "On implementing 2D rectangular
// assignment algorithms", IEEE TAES 52 (2016), and so scipy's. Beyond a dozen columns his order of search is slower, so
// it is used only where it can matter: right away if there are zeros, equal rows or many ties, and otherwise if the
// certificate cannot show that the optimum is unique. The certificate lists the pairs that are as good as the chosen
// ones up to rounding; if no cycle of exchanges along them exists, the optimum is unique.
//
// Memory traffic: the certificate reads the copy of the matrix once (see assignment_dense_problem.hpp), a path search
// the rows of its tree. One thread.
#pragma once

#include "assignment_dense_search.hpp"

namespace mudsc::MUDSC_ISA {
namespace {

// Assigns equal rows and equal columns in ascending order; needed only if the optimum is not unique.
template <class T>
class EqualItemsInOrder : private AssignmentState<T> {
  using State = AssignmentState<T>;

 public:
  EqualItemsInOrder(const AssignmentProblem& problem, std::int64_t index, std::int64_t* row_of_column)
      : State(problem) {
    State::begin(problem, index);
    for (std::int64_t j = 0; j < problem.columns; ++j) {
      if (row_of_column[j] >= 0) State::assign(row_of_column[j], j);
    }
    Buffer<std::uint64_t> row_hashes(problem.rows);
    for (std::int64_t i = 0; i < problem.rows; ++i) row_hashes[i] = State::sampled_hash(i);
    State::order_equal_rows(row_hashes);
    State::order_equal_columns();
    for (std::int64_t j = 0; j < problem.columns; ++j) row_of_column[j] = State::row_of_column_[j];
  }
};

template <class T, class Number = typename ArithmeticOf<T>::type>
class DenseSolver : private DenseSearch<T, Number> {
  using Search = DenseSearch<T, Number>;
  using Search::assign;
  using Search::background_;
  using Search::clear_assignment;
  using Search::column_of_row_;
  using Search::columns_;
  using Search::copy_costs;
  using Search::cost;
  using Search::for_each_word;
  using Search::has_zeros_;
  using Search::in_degree_;
  using Search::is_free;
  using Search::kMaxAlwaysInOrder;
  using Search::kMaxTiesPerRow;
  using Search::largest_;
  using Search::parent_;
  using Search::rounding_;
  using Search::row_costs;
  using Search::row_of_column_;
  using Search::rows_;
  using Search::rows_are_constant;
  using Search::search;
  using Search::search_in_order;
  using Search::sign_;
  using Search::tie_begin_;
  using Search::ties_;
  using Search::v_;
  using Search::width_;

 public:
  using Search::kMaxInOrder;

  explicit DenseSolver(const AssignmentProblem& problem) : Search(problem) {}

  // `background`: whether most costs equal the largest of their row. Column minima are then poor initial duals. Costs
  // that `Number` does not hold count as invalid.
  void solve(const AssignmentProblem& problem, std::int64_t index, bool background = false) {
    Search::begin(problem, index);
    background_ = background;
    problem.status[index] = AssignmentStatus::invalid;
    if (!copy_costs()) return;
    problem.status[index] = AssignmentStatus::infeasible;
    if (columns_ > kMaxInOrder && rows_are_constant()) {
      assign_diagonal(problem, index);
    } else if (columns_ <= kMaxAlwaysInOrder || (columns_ <= kMaxInOrder && has_zeros_) || !search()) {
      // Infeasibility is also decided in Crouse's order, which rounds like scipy.
      if (!solve_in_order(problem, index)) return;
    } else if (!certify(problem, index)) {
      if (columns_ > kMaxInOrder) {
        order_equal_items(problem, index);
      } else if (!solve_in_order(problem, index)) {
        return;
      }
    }
    write_result(problem, index);
    problem.status[index] = AssignmentStatus::optimal;
  }

 private:
  // Bound on the rounding error of the cost of an exchange, relative to the largest cost: far above the error of sums
  // over 128 rows in double, far below the spacing of float32 costs.
  static constexpr double kRounding = 1.5e-11;

  // Finds Crouse's assignment (beyond kMaxInOrder columns an equally good one); false if there is none.
  bool solve_in_order(const AssignmentProblem& problem, std::int64_t index) {
    if (!search_in_order()) return false;
    bound_column_duals();
    double* const row_duals = problem.row_duals + index * rows_;
    for (std::int64_t i = 0; i < rows_; ++i) row_duals[i] = min_reduced_cost(row_costs(i));
    if (columns_ > kMaxInOrder) order_equal_items(problem, index);
    return true;
  }

  // Out of line: otherwise every small problem would set up a frame for the buffers of this.
  __attribute__((noinline)) void order_equal_items(const AssignmentProblem& problem, std::int64_t index) {
    EqualItemsInOrder<T>(problem, index, row_of_column_);
    for (std::int64_t j = 0; j < columns_; ++j) {
      if (row_of_column_[j] >= 0) column_of_row_[row_of_column_[j]] = j;
    }
  }

  // For constant rows, where all assignments are equally good.
  void assign_diagonal(const AssignmentProblem& problem, std::int64_t index) {
    clear_assignment();
    for (std::int64_t j = 0; j < width_; ++j) v_[j] = 0.0;
    for (std::int64_t i = 0; i < rows_; ++i) {
      assign(i, i);
      problem.row_duals[index * rows_ + i] = cost(i, 0);
    }
  }

  // Computes row duals from column duals over every entry, so that feasibility does not depend on the search. Returns
  // whether the optimum is unique up to rounding.
  bool certify(const AssignmentProblem& problem, std::int64_t index) {
    bound_column_duals();
    double* const row_duals = problem.row_duals + index * rows_;
    rounding_ = kRounding * largest_;
    bool countable = rounding_ < kInfinity;
    tie_begin_[0] = 0;
    for (std::int64_t i = 0; i < rows_; ++i) {
      const Number* const costs = row_costs(i);
      if (countable) countable = list_ties(i, costs, row_duals[i]);
      if (!countable) row_duals[i] = min_reduced_cost(costs);
    }
    return countable && optimum_is_unique();
  }

  void bound_column_duals() {
    if (rows_ == columns_) return;
    for (std::int64_t j = 0; j < columns_; ++j) v_[j] = v_[j] < 0.0 ? v_[j] : 0.0;
  }

  double min_reduced_cost(const Number* costs) const {
    Lanes least = kInfinity - Lanes{};
    for (std::int64_t j = 0; j < width_; j += kLanes) {
      const Lanes reduced = widened(costs + j) - widened(v_ + j);
      least = minimum(reduced, least);
    }
    return broadcast_min(least)[0];
  }

  // Lists the partners of the columns that are as good for this row as its own; `rows_` stands for a free column. False
  // if there are too many. Writes the row's smallest reduced cost.
  bool list_ties(std::int64_t row, const Number* costs, double& least_cost) {
    const std::int64_t matched = column_of_row_[row];
    double least = static_cast<double>(costs[matched]) - v_[matched];
    const double bound = least + rounding_;
    std::int32_t count = tie_begin_[row];
    bool fits = true;
    const auto at = [&](std::int64_t j) { return lanes_at_most(widened(costs + j) - widened(v_ + j), bound); };
    for_each_word(at, [&](std::uint64_t bits, std::int64_t begin) {
      for (; bits != 0 && fits; bits &= bits - 1) {
        const std::int64_t column = begin + __builtin_ctzll(bits);
        if (column == matched) continue;
        fits = count < kMaxTiesPerRow * rows_;
        if (!fits) break;
        const double reduced = static_cast<double>(costs[column]) - v_[column];
        least = reduced < least ? reduced : least;
        ties_[count++] = static_cast<std::int32_t>(is_free(column) ? rows_ : row_of_column_[column]);
      }
      return fits;
    });
    if (!fits) return false;
    tie_begin_[row + 1] = count;
    least_cost = least;
    return true;
  }

  // Whether the graph of listed ties has no cycle: repeatedly removes rows without incoming edges (Kahn's algorithm).
  // The node of the free columns leads to rows whose own column could as well be free.
  bool optimum_is_unique() {
    for (std::int64_t i = 0; i <= rows_; ++i) in_degree_[i] = 0;
    std::int32_t count = tie_begin_[rows_];
    if (rows_ < columns_) {
      for (std::int64_t j = 0; j < columns_ && count < (kMaxTiesPerRow + 1) * rows_; ++j) {
        if (!is_free(j) && v_[j] >= -rounding_) ties_[count++] = static_cast<std::int32_t>(row_of_column_[j]);
      }
    }
    tie_begin_[rows_ + 1] = count;
    for (std::int32_t k = 0; k < count; ++k) ++in_degree_[ties_[k]];
    std::int64_t stacked = 0, left = rows_ + 1;
    std::int64_t* const stack = parent_;
    for (std::int64_t i = 0; i <= rows_; ++i) {
      if (in_degree_[i] == 0) stack[stacked++] = i;
    }
    while (stacked > 0) {
      const std::int64_t row = stack[--stacked];
      --left;
      for (std::int32_t k = tie_begin_[row]; k < tie_begin_[row + 1]; ++k) {
        if (--in_degree_[ties_[k]] == 0) stack[stacked++] = ties_[k];
      }
    }
    return left == 0;
  }

  // Writes the duals, objective and gap in the sense of the problem.
  void write_result(const AssignmentProblem& problem, std::int64_t index) const {
    write_proof(problem, index, static_cast<double>(sign_), v_,
                [this](std::int64_t i, std::int64_t j) { return cost(i, j); });
  }
};

}  // namespace
}  // namespace mudsc::MUDSC_ISA
