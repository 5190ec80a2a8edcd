// Dense linear assignment by augmenting row reduction and shortest augmenting paths: for small problems, and for those
// with forbidden pairs.
//
// R. Jonker and A. Volgenant, "A shortest augmenting path algorithm for dense and sparse linear assignment problems",
// Computing 38 (1987), without its column reduction, so that rectangular problems need no padding; the path search is
// that of D. F. Crouse, "On implementing 2D rectangular assignment algorithms", IEEE TAES 52 (2016). Duals are double,
// in which float32 costs are exact.
//
// Memory traffic: one read of the matrix per pass of row reduction and one for the certificate; a path search reads
// the rows of its tree. A row is widened into a buffer of doubles that stays in cache. One thread.
#pragma once

#include "assignment_state.hpp"

namespace mudsc::MUDSC_ISA {
namespace {

template <class T>
class DenseSolver : private AssignmentState<T> {
  using State = AssignmentState<T>;
  using State::column_of_row_;
  using State::columns_;
  using State::row_of_column_;
  using State::rows_;
  using State::u_;
  using State::v_;
  using State::values_;
  using State::width_;

 public:
  explicit DenseSolver(const AssignmentProblem& problem)
      : State(problem),
        costs_(width_, kInfinity),
        distance_(width_, kInfinity),
        tree_distances_(rows_),
        final_(columns_),
        parent_(width_),
        tree_rows_(rows_),
        tree_columns_(columns_),
        free_rows_(rows_),
        open_(columns_),
        place_(columns_),
        row_hashes_(rows_) {}

  void solve(const AssignmentProblem& problem, std::int64_t index) {
    State::begin(problem, index);
    problem.status[index] = AssignmentStatus::invalid;
    if (!valid()) return;
    problem.status[index] = AssignmentStatus::infeasible;
    std::int64_t free_count = 0;
    for (std::int64_t i = 0; i < rows_; ++i) free_rows_[free_count++] = i;
    const bool in_order = columns_ <= kMostInOrder;
    for (int pass = 0; pass < kReductionPasses && free_count > 0 && !in_order; ++pass) {
      free_count = reduce_rows(free_count);
    }
    for (std::int64_t k = 0; k < free_count; ++k) {
      if (!augment(free_rows_[k])) return;
    }
    if (!in_order) {
      State::order_equal_rows(row_hashes_);
      State::order_equal_columns();
    }
    State::certify(problem, index, 1);
    problem.status[index] = AssignmentStatus::optimal;
  }

 private:
  // The two least reduced costs of a row and the column of the least.
  struct BestTwo {
    double first;
    double second;
    std::int64_t column;
  };

  // Up to this many columns rows are matched in their order by path searches alone, which is as fast, and makes every
  // choice between equally good assignments as Crouse's algorithm does, and with it scipy.
  static constexpr std::int64_t kMostInOrder = 128;
  static constexpr int kReductionPasses = 2;
  // A chain of displaced rows in a pass of row reduction ends after so many steps per row on average; the path search
  // takes what is left, so chains of ever smaller gains cannot go on for ever.
  static constexpr std::int64_t kStepsPerRow = 8;

  // Returns whether no cost is NaN or -inf, and hashes the rows.
  bool valid() {
    for (std::int64_t i = 0; i < rows_; ++i) {
      State::load_row(i, costs_);
      bool bad = false;
      // False for NaN and for -inf.
      for (std::int64_t j = 0; j < columns_; ++j) bad |= !(costs_[j] > -kInfinity);
      if (bad) return false;
      row_hashes_[i] = State::sampled_hash(i);
    }
    return true;
  }

  BestTwo best_two(std::int64_t row) {
    State::load_row(row, costs_);
    Lanes first = kInfinity - Lanes{}, second = first;
    for (std::int64_t j = 0; j < width_; j += kLanes) {
      const Lanes reduced = lanes(costs_, j) - lanes(v_, j);
      const Lanes larger = reduced < first ? first : reduced;
      second = larger < second ? larger : second;
      first = reduced < first ? reduced : first;
    }
    BestTwo best{least_lane(first), kInfinity, -1};
    for (std::int64_t j = 0; j < columns_; ++j) {
      if (costs_[j] - v_[j] == best.first) {
        best.column = j;
        break;
      }
    }
    // The second least over all lanes: a lane's second, or the first of a lane other than the best's.
    const std::int64_t best_lane = best.column % kLanes;
    for (std::int64_t k = 0; k < kLanes; ++k) {
      const double candidate = k == best_lane ? second[k] : first[k];
      best.second = candidate < best.second ? candidate : best.second;
    }
    return best;
  }

  // Gives each free row its best column at a price that makes its second best as good; the row displaced goes on.
  // Returns how many rows stay free, listed in free_rows_.
  std::int64_t reduce_rows(std::int64_t free_count) {
    std::int64_t steps = kStepsPerRow * rows_, kept = 0;
    for (std::int64_t k = 0; k < free_count; ++k) {
      std::int64_t row = free_rows_[k];
      for (;;) {
        const BestTwo best = best_two(row);
        const bool lowers = best.second < kInfinity && best.first < best.second;
        std::int64_t column = best.column;
        if (best.first == kInfinity || (!lowers && row_of_column_[column] >= 0)) {
          // No finite second choice, or a tie: another column may be as good and free, which a path search sees.
          if (best.first < kInfinity) column = free_column_at(best.first);
          if (best.first == kInfinity || column < 0) {
            free_rows_[kept++] = row;
            break;
          }
        }
        if (lowers) v_[column] -= best.second - best.first;
        u_[row] = lowers ? best.second : best.first;
        const std::int64_t displaced = row_of_column_[column];
        row_of_column_[column] = row;
        column_of_row_[row] = column;
        if (displaced < 0) break;
        column_of_row_[displaced] = -1;
        if (--steps < 0) {
          free_rows_[kept++] = displaced;
          break;
        }
        row = displaced;
      }
    }
    return kept;
  }

  // First column without a row whose reduced cost, for the row in costs_, is `reduced`; -1 if there is none.
  std::int64_t free_column_at(double reduced) const {
    for (std::int64_t j = 0; j < columns_; ++j) {
      if (row_of_column_[j] < 0 && costs_[j] - v_[j] == reduced) return j;
    }
    return -1;
  }

  // Grows a shortest path tree from a free row until it meets a free column, then exchanges along the path. Sums are
  // made in Crouse's order, so that what ties for him ties here.
  bool augment(std::int64_t root) {
    u_[root] = 0.0;
    distance_.fill(kInfinity);
    // Open columns, in the order that decides ties.
    for (std::int64_t k = 0; k < columns_; ++k) {
      open_[k] = columns_ - 1 - k;
      place_[columns_ - 1 - k] = k;
    }
    std::int64_t tree_size = 0, row = root, sink = -1;
    double reached = 0.0;
    while (sink < 0) {
      tree_rows_[tree_size] = row;
      tree_distances_[tree_size++] = reached;
      const std::int64_t column = nearest_column(row, reached);
      if (column < 0) return false;
      reached = distance_[column];
      if (row_of_column_[column] < 0) {
        sink = column;
      } else {
        tree_columns_[tree_size - 1] = column;
        final_[tree_size - 1] = reached;
        distance_[column] = -kInfinity;  // closed: no distance is less
        const std::int64_t last = open_[columns_ - tree_size];
        open_[place_[column]] = last;
        place_[last] = place_[column];
        row = row_of_column_[column];
      }
    }
    for (std::int64_t k = 0; k < tree_size; ++k) u_[tree_rows_[k]] += reached - tree_distances_[k];
    for (std::int64_t k = 0; k + 1 < tree_size; ++k) v_[tree_columns_[k]] -= reached - final_[k];
    for (std::int64_t column = sink;;) {
      const std::int64_t path_row = parent_[column], next = column_of_row_[path_row];
      row_of_column_[column] = path_row;
      column_of_row_[path_row] = column;
      if (path_row == root) return true;
      column = next;
    }
  }

  // Lowers the distances of open columns through `row` and returns the nearest; -1 if none can be reached. Of several,
  // the last free one in the order of open_, or else the first.
  std::int64_t nearest_column(std::int64_t row, double reached) {
    State::load_row(row, costs_);
    const double dual = u_[row];
    Lanes least = kInfinity - Lanes{};
    const Lanes infinite = least;
    for (std::int64_t j = 0; j < width_; j += kLanes) {
      const Lanes through = ((reached + lanes(costs_, j)) - dual) - lanes(v_, j);
      const Lanes known = lanes(distance_, j);
      const auto nearer = through < known;
      Lanes updated = known;
      if (any(nearer)) {
        updated = nearer ? through : known;
        store(distance_, j, updated);
        for (std::int64_t k = 0; k < kLanes; ++k) {
          if (nearer[k]) parent_[j + k] = row;
        }
      }
      const Lanes open = updated == -infinite ? infinite : updated;
      least = open < least ? open : least;
    }
    const double nearest = least_lane(least);
    if (nearest == kInfinity) return -1;
    std::int64_t found = -1;
    for (std::int64_t j = 0; j < columns_; ++j) {
      if (distance_[j] != nearest) continue;
      const bool is_free = row_of_column_[j] < 0;
      const bool found_free = found >= 0 && row_of_column_[found] < 0;
      if (found < 0 || (is_free && (!found_free || place_[j] > place_[found])) ||
          (!is_free && !found_free && place_[j] < place_[found])) {
        found = j;
      }
    }
    return found;
  }

  template <class Mask>
  static bool any(const Mask& mask) {
    std::int64_t found = 0;
    for (std::int64_t k = 0; k < kLanes; ++k) found |= mask[k];
    return found != 0;
  }

  Buffer<double> costs_, distance_;  // padded with infinity to whole vectors
  Buffer<double> tree_distances_, final_;
  Buffer<std::int64_t> parent_, tree_rows_, tree_columns_, free_rows_, open_, place_;
  Buffer<std::uint64_t> row_hashes_;
};

}  // namespace
}  // namespace mudsc::MUDSC_ISA
