// Bids on lists: rows that take their best column at once, an auction, and augmenting row reduction.
//
// Bids of a block of rows are found at the same duals, by all threads, and made one after another; rows that must be
// listed again for it are a batch. How large a block is does not depend on the threads, so results do not either.
// Sources: D. P. Bertsekas, "The auction algorithm", Annals of Operations Research 14 (1988); R. Jonker and A. Volgenant,
// Computing 38 (1987).
#pragma once

#include "assignment_lists.hpp"

namespace mudsc::MUDSC_ISA {
namespace {

// Partially sorts so that the item of rank `rank` (from 0) is returned: Hoare's selection. Items must not be NaN.
template <class Number>
inline Number select_rank(Number* items, std::int64_t count, std::int64_t rank) {
  std::int64_t low = 0, high = count - 1;
  while (low < high) {
    const Number pivot = items[low + (high - low) / 2];
    std::int64_t i = low, j = high;
    while (i <= j) {
      while (items[i] < pivot) ++i;
      while (pivot < items[j]) --j;
      if (i <= j) {
        const Number item = items[i];
        items[i++] = items[j];
        items[j--] = item;
      }
    }
    if (rank <= j) {
      high = j;
    } else if (rank >= i) {
      low = i;
    } else {
      break;
    }
  }
  return items[rank];
}

template <class T>
class ListBids : protected RowLists<T> {
  using Lists = RowLists<T>;
  using State = AssignmentState<T>;

 protected:
  using Lists::best_two;
  using Lists::bids_;
  using Lists::class_of_row_;
  using Lists::column_of_row_;
  using Lists::columns_;
  using Lists::find_bids;
  using Lists::free_column_at;
  using Lists::lists_;
  using Lists::look_up;
  using Lists::row_hashes_;
  using Lists::row_of_column_;
  using Lists::rows_;
  using Lists::scratches_;
  using Lists::set_v;
  using Lists::u_;
  using Lists::v_;
  using typename Lists::BestTwo;
  using typename Lists::Known;
  using typename Lists::List;

  // Its epsilon, as a share of the median distance between a row's best and second best entry: large enough to end
  // soon, small enough that most rows then are where they belong.
  static constexpr double kEpsilonShare = 0.2;
  static constexpr std::int64_t kBidsPerRow = 100;
  // Listed entries equal to the floor that show that a row has many more.
  static constexpr std::int64_t kTiedEntries = 4;
  static constexpr int kReductionPasses = 2;
  static constexpr std::int64_t kStepsPerRow = 4;
  // Rows whose bids are found together, at the same duals. One bid in a hundred is then stale when its turn comes.
  static constexpr std::int64_t kBlock = 64;
  // Equal rows that are so many take their steps of row reduction together; so many steps a pass.
  static constexpr std::int64_t kLargeClass = 16;
  static constexpr std::int64_t kClassSteps = 64;
  static constexpr std::int64_t kWasOfClass = -2;  // in place of a column's row; -1 for none comes after it

  // How an auction ended: with a column for every row, or with rows left, or it was no use.
  enum class AuctionResult { skipped, partial, complete };

  explicit ListBids(const AssignmentProblem& problem)
      : Lists(problem),
        class_size_(rows_),
        class_next_(rows_),
        class_waits_(rows_),
        stack_(rows_),
        waiting_(rows_),
        columns_of_class_(rows_),
        reduced_(columns_),
        gaps_(columns_) {}

  // Moves a few rows from the end of stack_ to the beginning of block_, in the order in which they come off, and finds
  // their bids. How many does not depend on the number of threads, so neither does what follows.
  std::int64_t take_block(std::int64_t& free_count) {
    const std::int64_t count = free_count < kBlock ? free_count : kBlock;
    for (std::int64_t k = 0; k < count; ++k) block_[k] = stack_[--free_count];
    find_bids(block_, count, Known::both);
    return count;
  }

  // Calls bid(row, best) for the rows of a block, one after another; those whose lists do not tell wait again in
  // stack_.
  template <class Bid>
  void take_bids(std::int64_t& free_count, const Bid& bid) {
    const std::int64_t size = take_block(free_count);
    for (std::int64_t k = 0; k < size; ++k) {
      if (renew(block_[k], bids_[k])) {
        bid(block_[k], bids_[k]);
      } else {
        stack_[free_count++] = block_[k];
      }
    }
  }

  // Brings up to date a bid that others have come before. Costs only rise, so that the best column is still the best
  // unless its dual has moved; that the second best may have become worse makes a bid a lower one than it could be,
  // which matters to none but ties. Returns false if the list does not tell.
  bool renew(std::int64_t row, BestTwo& bid) const {
    const bool same_price = v_[bid.column] == bid.price;
    if (same_price && bid.first < bid.second) return true;
    const BestTwo before = bid;
    if (look_up(row, Known::both, bid)) return true;
    if (same_price) bid = before;
    return same_price;
  }

  // Numbers the rows that have equals by their first equal; -1 for the others.
  void find_classes() {
    class_of_row_.fill(-1);
    const auto none = [](const std::int64_t*, std::int64_t) { return false; };
    State::for_equal_rows(row_hashes_, none, [this](const std::int64_t* rows, std::int64_t count) {
      for (std::int64_t k = 0; k < count; ++k) {
        class_of_row_[rows[k]] = rows[0];
        class_next_[rows[k]] = k + 1 < count ? rows[k + 1] : -1;
      }
      class_size_[rows[0]] = count;
    });
  }

  // As order_equal_rows, by the classes that are known.
  void order_classes() {
    std::int64_t count = 0;
    for (std::int64_t i = 0; i < rows_; ++i) {
      if (class_of_row_[i] >= 0) stack_[count++] = i;
    }
    sort(stack_.data(), count, [this](std::int64_t a, std::int64_t b) {
      return class_of_row_[a] != class_of_row_[b] ? class_of_row_[a] < class_of_row_[b] : a < b;
    });
    for (std::int64_t begin = 0, end; begin < count; begin = end) {
      for (end = begin; end < count && class_of_row_[stack_[end]] == class_of_row_[stack_[begin]]; ++end) {
        columns_of_class_[end] = column_of_row_[stack_[end]];
      }
      sort_ascending(columns_of_class_.data() + begin, end - begin);
      for (std::int64_t k = begin; k < end; ++k) State::assign(stack_[k], columns_of_class_[k]);
    }
  }

  // Matches every row to a best column while there are free ones; returns how many rows are left, listed in stack_.
  std::int64_t match_tight() {
    for (std::int64_t i = 0; i < rows_; ++i) {
      column_of_row_[i] = -1;
      stack_[i] = i;
    }
    row_of_column_.fill(-1);
    find_bids(stack_.data(), rows_, Known::first);
    std::int64_t free_count = 0;
    any_tie_ = false;
    for (std::int64_t i = 0; i < rows_; ++i) {
      const BestTwo& best = bids_[i];
      const bool ties = best.first >= best.second || best.first >= lists_[i].floor;
      u_[i] = best.first;
      any_tie_ |= ties;
      std::int64_t column = best.column;
      if (row_of_column_[column] >= 0) column = ties ? free_column_at(i, best.first) : -1;
      if (column >= 0) {
        State::assign(i, column);
      } else {
        stack_[free_count++] = i;
      }
    }
    return free_count;
  }

  // Whether a row ends in a class of entries that many pairs share, so far as its list shows, as where one large cost
  // stands for all forbidden pairs: entries tie at the floor, or lie farther below it than from each other. Bids would
  // raise the prices of good columns up to it.
  bool has_background(std::int64_t row, double least) const {
    const List& list = lists_[row];
    std::int64_t tied = 0;
    double below = least;
    for (std::int64_t k = 0; k < list.size; ++k) {
      const double reduced = static_cast<double>(list.costs[k]) - v_[list.columns[k]];
      tied += reduced == list.floor;
      below = reduced < list.floor && reduced > below ? reduced : below;
    }
    return tied >= kTiedEntries || list.floor - below > below - least;
  }

  // One phase of Bertsekas' auction: a free row bids its best column's dual down until the second best is better by
  // epsilon. Of equal rows only the first takes part: they would outbid one another without end, and a path search
  // finds columns for all of them at once. Where most rows tie there is little to spread.
  AuctionResult auction() {
    std::int64_t free_count = 0;
    for (std::int64_t i = rows_; i-- > 0;) {
      if (class_of_row_[i] < 0 || class_of_row_[i] == i) stack_[free_count++] = i;
    }
    find_bids(stack_.data(), free_count, Known::both);
    std::int64_t count = 0, background = 0;
    for (std::int64_t k = 0; k < free_count; ++k) {
      const double floor = lists_[stack_[k]].floor;
      if (bids_[k].second > bids_[k].first && bids_[k].second < floor)
        gaps_[count++] = bids_[k].second - bids_[k].first;
      background += has_background(stack_[k], bids_[k].first);
    }
    if (count <= free_count / 2 || background > free_count / 4) return AuctionResult::skipped;
    const double epsilon = kEpsilonShare * select_rank(gaps_.data(), count, count / 2);
    row_of_column_.fill(-1);
    for (std::int64_t i = 0; i < rows_; ++i) column_of_row_[i] = -1;
    bool all_bid = free_count == rows_;
    // The first bid of a block is never stale: every block makes one.
    for (std::int64_t bids = kBidsPerRow * rows_; free_count > 0 && bids > 0;) {
      take_bids(free_count, [&](std::int64_t row, const BestTwo& best) {
        --bids;
        if (best.first >= lists_[row].floor) {
          all_bid = false;  // it would take one of many columns that are as good
          return;
        }
        set_v(best.column, v_[best.column] - (best.second - best.first) - epsilon);
        const std::int64_t displaced = row_of_column_[best.column];
        State::assign(row, best.column);
        if (displaced >= 0) {
          column_of_row_[displaced] = -1;
          stack_[free_count++] = displaced;
        }
      });
    }
    return all_bid && free_count == 0 ? AuctionResult::complete : AuctionResult::partial;
  }

  // Whether the pairs of now lack no more to the dual bound than this share of their sum. Never for a share of 0.
  bool within(double share) {
    if (share <= 0.0) return false;
    double total = 0.0, slack = 0.0;
    for (std::int64_t i = 0; i < rows_; ++i) {
      const double matched = State::cost(i, column_of_row_[i]);
      total += matched;
      slack += matched - v_[column_of_row_[i]] - best_two(i, Known::first, scratches_[0], i).first;
    }
    return slack <= share * (total < 0.0 ? -total : total);
  }

  bool is_of_large_class(std::int64_t row) const {
    return rows_ == columns_ && class_of_row_[row] >= 0 && class_size_[class_of_row_[row]] >= kLargeClass;
  }

  // Leaves a row without a column: to take a step of its own, on stack_, or one with its class, on waiting_.
  void release(std::int64_t row, std::int64_t& free_count) {
    column_of_row_[row] = -1;
    if (!is_of_large_class(row)) {
      stack_[free_count++] = row;
    } else if (const std::int64_t first = class_of_row_[row]; !class_waits_[first]) {
      class_waits_[first] = true;
      waiting_[classes_waiting_++] = first;
    }
  }

  // The step of row reduction for all rows of a class at once (Bertsekas and Castanon, "The auction algorithm for the
  // transportation problem", Annals of Operations Research 20, 1989): k equal rows take the k best columns, which
  // become as dear as the next best one. Rows that lose their columns are released; where the last of the best columns
  // tie, rows of the class may find none.
  void reduce_class(std::int64_t first, std::int64_t& free_count) {
    const std::int64_t size = class_size_[first];
    for (std::int64_t row = first; row >= 0; row = class_next_[row]) {
      if (column_of_row_[row] >= 0) row_of_column_[column_of_row_[row]] = kWasOfClass;
      column_of_row_[row] = -1;
    }
    for (std::int64_t j = 0; j < columns_; ++j) gaps_[j] = reduced_[j] = State::cost(first, j) - v_[j];
    const double bound = select_rank(gaps_.data(), columns_, size < columns_ ? size : columns_ - 1);
    std::int64_t row = first;
    const auto take = [&](std::int64_t column) {
      const std::int64_t displaced = row_of_column_[column];
      if (displaced >= 0) release(displaced, free_count);
      State::assign(row, column);
      u_[row] = State::cost(row, column) - v_[column];
      row = class_next_[row];
    };
    for (std::int64_t j = 0; j < columns_; ++j) {
      if (reduced_[j] >= bound) continue;
      set_v(j, v_[j] - (bound - reduced_[j]));
      take(j);
    }
    // Its own columns first, then free ones.
    for (std::int64_t state = kWasOfClass; state < 0; ++state) {
      for (std::int64_t j = 0; j < columns_ && row >= 0; ++j) {
        if (reduced_[j] == bound && row_of_column_[j] == state) take(j);
      }
    }
    for (std::int64_t j = 0; j < columns_; ++j) {
      if (row_of_column_[j] == kWasOfClass) row_of_column_[j] = -1;
    }
  }

  std::int64_t reduce_rows_in_passes(std::int64_t free_count) {
    for (int pass = 0; pass < kReductionPasses && free_count > 0; ++pass) free_count = reduce_rows(free_count);
    return free_count;
  }

  // As in the dense solver, on lists. Rows that are left are again listed in stack_.
  std::int64_t reduce_rows(std::int64_t free_count) {
    std::int64_t steps = kStepsPerRow * rows_, class_steps = kClassSteps;
    class_waits_.fill(false);
    classes_waiting_ = 0;
    const std::int64_t all = free_count;
    free_count = 0;
    for (std::int64_t k = 0; k < all; ++k) release(stack_[k], free_count);
    while (free_count > 0 || classes_waiting_ > 0) {
      if (free_count == 0) {
        const std::int64_t first = waiting_[--classes_waiting_];
        class_waits_[first] = false;
        if (--class_steps >= 0) reduce_class(first, free_count);
        continue;
      }
      take_bids(free_count, [&](std::int64_t row, const BestTwo& best) {
        const bool lowers = best.first < best.second;
        std::int64_t column = best.column;
        if (!lowers && row_of_column_[column] >= 0) column = free_column_at(row, best.first);
        if (column < 0 || --steps < 0) return;
        if (lowers) set_v(column, v_[column] - (best.second - best.first));
        const std::int64_t displaced = row_of_column_[column];
        State::assign(row, column);
        // The dual as the pair has it, so that the pair is tight to the last bit.
        u_[row] = State::cost(row, column) - v_[column];
        if (displaced >= 0) release(displaced, free_count);
      });
    }
    for (std::int64_t i = 0; i < rows_; ++i) {
      if (column_of_row_[i] < 0) stack_[free_count++] = i;
    }
    return free_count;
  }

  // Of a class: how many rows there are, and each row's successor in it, -1 for the last.
  Buffer<std::int64_t> class_size_, class_next_;
  Buffer<bool> class_waits_;  // for its step; those that do are in waiting_
  Buffer<std::int64_t> stack_, waiting_, columns_of_class_;
  std::int64_t classes_waiting_ = 0;
  Buffer<double> reduced_;  // a row's reduced costs, when its class bids
  Buffer<double> gaps_;
  std::int64_t block_[kBlock];
  bool any_tie_ = false;  // whether a row had two best columns when it was matched
};

}  // namespace
}  // namespace mudsc::MUDSC_ISA
