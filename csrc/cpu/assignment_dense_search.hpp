// Searches of the dense solver: augmenting row reduction and shortest augmenting paths over whole rows, in vectors.
#pragma once

#include "assignment_dense_problem.hpp"

namespace mudsc::MUDSC_ISA {
namespace {

template <class T, class Number = typename ArithmeticOf<T>::type>
class DenseSearch : protected DenseProblem<T, Number> {
  using Problem = DenseProblem<T, Number>;

 protected:
  using Problem::assign;
  using Problem::bit_of;
  using Problem::class_seen_;
  using Problem::classes_;
  using Problem::clear_assignment;
  using Problem::closed_;
  using Problem::column_of_row_;
  using Problem::columns_;
  using Problem::copied_;
  using Problem::cost;
  using Problem::distance_;
  using Problem::find_classes;
  using Problem::free_rows_;
  using Problem::is_free;
  using Problem::is_free_;
  using Problem::kWord;
  using Problem::moved_;
  using Problem::next_;
  using Problem::open_;
  using Problem::parent_;
  using Problem::places_;
  using Problem::row_costs;
  using Problem::row_of_column_;
  using Problem::rows_;
  using Problem::searches_;
  using Problem::u_;
  using Problem::v_;
  using Problem::width_;
  using Problem::word_of;
  using typename Problem::Closed;
  typedef std::int64_t Indices __attribute__((vector_size(kLanes * sizeof(std::int64_t)), may_alias));

  // Up to this many columns every choice between equally good assignments is made as Crouse's algorithm makes it.
  static constexpr std::int64_t kMaxInOrder = 128;

  explicit DenseSearch(const AssignmentProblem& problem) : Problem(problem) {}

  // Finds an optimal assignment, whichever is found first; false if there is none, or if another one is needed.
  bool search() {
    clear_assignment();
    if (!reduce_rows()) return false;
    std::int64_t free_count = 0;
    for (std::int64_t i = 0; i < rows_; ++i) {
      if (column_of_row_[i] < 0) free_rows_[free_count++] = i;
    }
    if (free_count > 0 && find_classes() > 0 && columns_ <= kMaxInOrder) return false;
    for (std::int64_t k = 0; k < free_count; ++k) {
      if (!augment(free_rows_[k])) return false;
    }
    return true;
  }

  // Finds the assignment that Crouse's algorithm finds: rows are matched in order. False if there is none.
  bool search_in_order() {
    clear_assignment();
    for (std::int64_t j = 0; j < width_; ++j) v_[j] = 0.0;
    for (std::int64_t j = 0; j < columns_; ++j) open_[j] = places_[j] = columns_ - 1 - j;
    for (std::int64_t k = 0; k * kWord < columns_; ++k) moved_[k] = 0;
    for (std::int64_t i = 0; i < rows_; ++i) {
      if (!augment_in_order(i)) return false;
    }
    return true;
  }

  struct BestTwo {
    double first;
    double second;
    std::int64_t column;
  };

  // A column whose dual may have been lowered, and its dual before.
  struct Lowered {
    std::int64_t column;
    double dual;
  };

  // Steps of row reduction per row. More steps leave fewer rows to the path searches, with diminishing returns.
  static constexpr std::int64_t kStepsPerRow = 2;
  // Rows whose best columns are searched together, limited by registers.
  static constexpr std::int64_t kRowsAtOnce = kLanes < 8 ? 2 : 4;

  // The two smallest reduced costs of each lane, and the position of the smallest.
  struct LaneBests {
    Lanes first = kInfinity - Lanes{};
    Lanes second = kInfinity - Lanes{};
    Indices at{};

    void take(const Lanes& reduced, std::int64_t j) {
      at = reduced < first ? j - Indices{} : at;
      second = minimum(second, maximum(reduced, first));
      first = minimum(reduced, first);
    }

    BestTwo overall() const {
      const Lanes least = broadcast_min(first);
      const std::int64_t lane = __builtin_ctzll(lanes_at_most(first, least[0]));
      alignas(64) std::int64_t columns[kLanes];
      *reinterpret_cast<Indices*>(columns) = at;
      // The second smallest over all lanes: the best lane's second, or another lane's first.
      Indices lanes_in_order;
      for (std::int64_t k = 0; k < kLanes; ++k) lanes_in_order[k] = k;
      const Lanes others = lanes_in_order == lane ? second : first;
      return BestTwo{least[0], broadcast_min(others)[0], columns[lane] + lane};
    }
  };

  // Several rows at a time, for instruction-level parallelism.
  template <std::int64_t kRows>
  void find_best_two(const Number* const* costs, BestTwo* best) const {
    LaneBests bests[kRows];
    for (std::int64_t j = 0; j < width_; j += kLanes) {
      const Lanes duals = widened(v_ + j);
      for (std::int64_t k = 0; k < kRows; ++k) bests[k].take(widened(costs[k] + j) - duals, j);
    }
    for (std::int64_t k = 0; k < kRows; ++k) best[k] = bests[k].overall();
  }

  // Augmenting row reduction: each row takes its best column and lowers its dual until the second best is as good. A
  // displaced row goes to the back of the queue. Returns false when ties are so frequent that Crouse's order will have
  // to decide.
  bool reduce_rows() {
    std::int64_t ties_left = columns_ <= kMaxInOrder ? rows_ / 4 : kStepsPerRow * rows_;
    std::int64_t waiting = rows_, front = 0;
    for (std::int64_t i = 0; i < rows_; ++i) free_rows_[i] = i;
    for (std::int64_t step = 0; step < kStepsPerRow * rows_ && waiting > 0;) {
      const std::int64_t count = copied_ && waiting >= kRowsAtOnce ? kRowsAtOnce : 1;
      std::int64_t rows[kRowsAtOnce];
      const Number* costs[kRowsAtOnce];
      for (std::int64_t k = 0; k < count; ++k) {
        rows[k] = free_rows_[front];
        costs[k] = row_costs(rows[k]);
        front = front + 1 < rows_ ? front + 1 : 0;
        prefetch_next(step++);
      }
      waiting -= count;
      BestTwo best[kRowsAtOnce];
      count == 1 ? find_best_two<1>(costs, best) : find_best_two<kRowsAtOnce>(costs, best);
      Lowered lowered[kRowsAtOnce];
      for (std::int64_t k = 0; k < count; ++k) {
        for (std::int64_t before = 0; before < k; ++before) {
          const Lowered& other = lowered[before];
          if (static_cast<double>(costs[k][other.column]) - other.dual > best[k].second) continue;
          find_best_two<1>(costs + k, best + k);
          break;
        }
        if (best[k].first == best[k].second && --ties_left < 0) return false;
        lowered[k] = Lowered{best[k].column, v_[best[k].column]};
        const std::int64_t displaced = assign_best(rows[k], costs[k], best[k]);
        if (displaced < 0) continue;
        const std::int64_t back = front + waiting++;
        free_rows_[back < rows_ ? back : back - rows_] = displaced;
      }
    }
    return true;
  }

  // Assigns a row its best column. Returns the displaced row, or -1.
  std::int64_t assign_best(std::int64_t row, const Number* costs, const BestTwo& best) {
    if (best.first == kInfinity) return -1;
    const bool lowers = best.second < kInfinity && best.first < best.second;
    std::int64_t column = best.column;
    if (!lowers && !is_free(column)) {
      // A tie, or no finite second choice: another column may be free and as good. If not, a path search decides.
      column = free_column_at(costs, best.first);
      if (column < 0) return -1;
    }
    if (lowers) set_entry(v_, column, v_[column] - (best.second - best.first));
    const std::int64_t displaced = row_of_column_[column];
    assign(row, column);
    if (displaced >= 0) column_of_row_[displaced] = -1;
    return displaced;
  }

  // Prefetches a row of the next problem of a batch.
  void prefetch_next(std::int64_t row) const {
    if (next_ == nullptr || row >= rows_) return;
    constexpr std::int64_t kLine = 64 / static_cast<std::int64_t>(sizeof(T));
    for (std::int64_t j = 0; j < columns_; j += kLine) __builtin_prefetch(next_ + row * columns_ + j, 0, 2);
  }

  // The first free column at `reduced`, the row's smallest reduced cost; -1 if there is none.
  std::int64_t free_column_at(const Number* costs, double reduced) const {
    for (std::int64_t j = 0; j < width_; j += kLanes) {
      const std::uint64_t free = word_of(is_free_, j) >> (j % kWord);
      const std::uint64_t tied = lanes_at_most(widened(costs + j) - widened(v_ + j), reduced) & free;
      if (tied != 0) return j + __builtin_ctzll(tied);
    }
    return -1;
  }

  // Arrays over columns, for loops that write vectors: these may be any object, so members would be loaded again after
  // each.
  struct Columns {
    std::int64_t width;
    const double* duals;
    double* distances;
    std::int64_t* parents;

    Indices& parents_at(std::int64_t j) const { return *reinterpret_cast<Indices*>(parents + j); }
    Lanes& distances_at(std::int64_t j) const { return *reinterpret_cast<Lanes*>(distances + j); }
  };
  Columns column_arrays() const { return {width_, v_, distance_, parent_}; }

  // Lowers the distances of open columns to through(costs, duals) where that is smaller, with `row` as parent. Returns
  // the smallest distance. Closed columns have a dual of -inf, so no path goes through them.
  template <class Through>
  double relax(std::int64_t row, const Through& through) {
    const Number* const costs = row_costs(row);
    const Columns columns = column_arrays();
    const Indices parent = row - Indices{};
    // Two accumulators, for instruction-level parallelism.
    Lanes least[2] = {kInfinity - Lanes{}, kInfinity - Lanes{}};
    const auto take = [&](std::int64_t j, int part) {
      const Lanes candidate = through(widened(costs + j), widened(columns.duals + j));
      const Lanes known = columns.distances_at(j);
      Indices& parents = columns.parents_at(j);
      parents = candidate < known ? parent : parents;
      const Lanes updated = minimum(candidate, known);
      columns.distances_at(j) = updated;
      least[part] = minimum(updated, least[part]);
    };
    std::int64_t j = 0;
    for (; j + 2 * kLanes <= columns.width; j += 2 * kLanes) {
      take(j, 0);
      take(j + kLanes, 1);
    }
    if (j < columns.width) take(j, 0);
    return broadcast_min(minimum(least[0], least[1]))[0];
  }

  // Sets the distances of all columns from the root of a search, and returns the smallest.
  double init_distances(std::int64_t root) {
    const Number* const costs = row_costs(root);
    const Columns columns = column_arrays();
    const Indices parent = root - Indices{};
    Lanes least = kInfinity - Lanes{};
    for (std::int64_t j = 0; j < columns.width; j += kLanes) {
      const Lanes reduced = widened(costs + j) - widened(columns.duals + j);
      columns.distances_at(j) = reduced;
      columns.parents_at(j) = parent;
      least = minimum(reduced, least);
    }
    return broadcast_min(least)[0];
  }

  double min_distance() const {
    Lanes least = kInfinity - Lanes{};
    for (std::int64_t j = 0; j < width_; j += kLanes) least = minimum(widened(distance_ + j), least);
    return broadcast_min(least)[0];
  }

  // Calls visit(bits, begin) for each group of 64 columns, starting at `begin`, with a bit set, until it returns false.
  // at(j) returns the bits of one vector of columns.
  template <class At, class Visit>
  void for_each_word(const At& at, const Visit& visit) const {
    std::int64_t begin = 0;
    for (; begin + kWord <= width_; begin += kWord) {
      std::uint64_t bits = 0;
#pragma GCC unroll 32
      for (std::int64_t k = 0; k < kWord; k += kLanes) bits |= at(begin + k) << k;
      if (bits != 0 && !visit(bits, begin)) return;
    }
    std::uint64_t bits = 0;
    for (std::int64_t j = begin; j < width_; j += kLanes) bits |= at(j) << (j - begin);
    if (bits != 0) visit(bits, begin);
  }

  template <class Visit>
  void for_each_column_within(double distance, const Visit& visit) const {
    for_each_word([&](std::int64_t j) { return lanes_at_most(widened(distance_ + j), distance); }, visit);
  }

  void close(std::int64_t column, double distance, std::int64_t count) {
    closed_[count].column = column;
    closed_[count].distance = distance;
    closed_[count].dual = v_[column];
    set_entry(v_, column, -kInfinity);
    set_entry(distance_, column, kInfinity);
  }

  // Restores the duals of closed columns, lowered by how much nearer than `reached` they were (unchanged if infinite).
  void reopen(std::int64_t count, double reached) {
    for (std::int64_t k = 0; k < count; ++k) {
      const double nearer = reached < kInfinity ? reached - closed_[k].distance : 0.0;
      v_[closed_[k].column] = closed_[k].dual - nearer;
    }
  }

  // Flips the pairs along the path from `root` to `sink`.
  void exchange(std::int64_t root, std::int64_t sink) {
    for (std::int64_t column = sink;;) {
      const std::int64_t row = parent_[column], next = column_of_row_[row];
      assign(row, column);
      if (row == root) return;
      column = next;
    }
  }

  // Grows a shortest path tree from a free row until it reaches a free column, then flips the pairs along the path.
  bool augment(std::int64_t root) {
    class_seen_[classes_[root]] = ++searches_;
    double least = init_distances(root), reached = -kInfinity;
    std::int64_t closed_count = 0;
    while (least < kInfinity) {
      reached = least > reached ? least : reached;  // rounding must not shorten a path
      const std::int64_t column = nearest_column(least);
      if (is_free(column)) {
        reopen(closed_count, reached);
        exchange(root, column);
        return true;
      }
      const std::int64_t row = row_of_column_[column];
      const double offset = reached - (cost(row, column) - v_[column]);
      close(column, reached, closed_count++);
      // Of equal rows, only the first one reached can lower a distance.
      std::int32_t& seen = class_seen_[classes_[row]];
      least = seen == searches_
                  ? min_distance()
                  : relax(row, [&](const Lanes& costs, const Lanes& duals) { return (costs - duals) + offset; });
      seen = searches_;
    }
    reopen(closed_count, kInfinity);
    return false;
  }

  // A column at the smallest distance, a free one if possible.
  std::int64_t nearest_column(double least) const {
    std::int64_t found = -1;
    for_each_column_within(least, [&](std::uint64_t bits, std::int64_t begin) {
      const std::uint64_t free = bits & word_of(is_free_, begin);
      if (found < 0 || free != 0) found = begin + __builtin_ctzll(free != 0 ? free : bits);
      return free == 0;
    });
    return found;
  }

  // The same with sums and choices in Crouse's order, so that ties are the same as in his algorithm.
  bool augment_in_order(std::int64_t root) {
    u_[root] = 0.0;
    double reached = init_distances(root);
    if (reached == kInfinity) return false;
    std::int64_t column = nearest_column_in_order(reached), closed_count = 0;
    for (; !is_free(column); ++closed_count) {
      close_in_order(column, reached, closed_count);
      const std::int64_t row = row_of_column_[column];
      const double dual = u_[row], start = reached;
      reached = relax(row, [&](const Lanes& costs, const Lanes& duals) { return ((start + costs) - dual) - duals; });
      if (reached == kInfinity) return false;
      column = nearest_column_in_order(reached);
    }
    u_[root] += reached;
    for (std::int64_t k = 0; k < closed_count; ++k) {
      u_[row_of_column_[closed_[k].column]] += reached - closed_[k].distance;
    }
    reopen(closed_count, reached);
    restore_order(closed_count);
    exchange(root, column);
    return true;
  }

  // Open columns are kept in Crouse's order: from last to first; the one at the end replaces a closed column.
  void close_in_order(std::int64_t column, double distance, std::int64_t count) {
    const std::int64_t last = open_[columns_ - 1 - count], place = places_[column];
    open_[place] = last;
    places_[last] = place;
    word_of(moved_, last) |= bit_of(last);
    closed_[count].place = place;
    closed_[count].successor = last;
    close(column, distance, count);
  }

  void restore_order(std::int64_t closed_count) {
    for (std::int64_t k = 0; k < closed_count; ++k) {
      const std::int64_t place = closed_[k].place, successor = closed_[k].successor;
      open_[place] = columns_ - 1 - place;
      places_[successor] = columns_ - 1 - successor;
      word_of(moved_, successor) = 0;
    }
  }

  // Of the columns at the smallest distance, the last free one in the order of open columns, or else the first one.
  // Columns that have not moved are in that order from last to first.
  std::int64_t nearest_column_in_order(double least) const {
    std::int64_t found = -1, first_free = -1, last_taken = -1;
    const auto consider = [&](std::int64_t j) {
      const bool free = is_free(j);
      const bool better = found < 0 || (free != is_free(found) ? free : free == (places_[j] > places_[found]));
      found = better ? j : found;
    };
    for_each_column_within(least, [&](std::uint64_t bits, std::int64_t begin) {
      const std::uint64_t moved = word_of(moved_, begin), unmatched = word_of(is_free_, begin);
      const std::uint64_t free = bits & ~moved & unmatched, taken = bits & ~moved & ~unmatched;
      if (free != 0 && first_free < 0) first_free = begin + __builtin_ctzll(free);
      if (taken != 0) last_taken = begin + kWord - 1 - __builtin_clzll(taken);
      for (std::uint64_t rest = bits & moved; rest != 0; rest &= rest - 1) consider(begin + __builtin_ctzll(rest));
      return true;
    });
    if (first_free >= 0) consider(first_free);
    if (last_taken >= 0) consider(last_taken);
    return found;
  }
};

}  // namespace
}  // namespace mudsc::MUDSC_ISA
