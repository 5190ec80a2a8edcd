// Bids on lists: matching rows to their best columns, an auction, and augmenting row reduction.
//
// The bids of a block of rows are found at the same duals and made one after another. In an auction, rows with exhausted
// lists are put off. When there are enough of them, or no other rows are left, all threads list them again together. None
// of this depends on the number of threads, so results do not either. Where lists are requested instead of scanned, rows
// without a sufficient list are put off, and a function that returns false continues when it is called again with new
// lists.
// Sources: D. P. Bertsekas, "The auction algorithm", Annals of Operations Research 14 (1988); R. Jonker and A.
// Volgenant, Computing 38 (1987).
#pragma once

#include "assignment_list_state.hpp"

namespace mudsc::MUDSC_ISA {
namespace {

// `Lists` is a ListState with a source of lists (see there).
template <class Lists>
class ListBids : protected Lists {
 protected:
  using Lists::bids_;
  using Lists::class_next_;
  using Lists::class_of_row_;
  using Lists::class_size_;
  using Lists::column_of_row_;
  using Lists::columns_;
  using Lists::free_column_at;
  using Lists::kScansNow;
  using Lists::list_for_bid;
  using Lists::lists_;
  using Lists::look_up;
  using Lists::look_up_bids;
  using Lists::row_of_column_;
  using Lists::rows_;
  using Lists::set_v;
  using Lists::u_;
  using Lists::v_;
  using typename Lists::BestTwo;
  using typename Lists::Known;
  using typename Lists::List;

  // Epsilon of the auction, as a share of the median difference between a row's best and second best entry: large
  // enough to end soon, small enough that most rows get their final column.
  static constexpr double kEpsilonShare = 0.2;
  static constexpr std::int64_t kBidsPerRow = 100;
  // Listed entries equal to the floor which show that the row has many more.
  static constexpr std::int64_t kTiedEntries = 4;
  static constexpr int kReductionPasses = 2;
  static constexpr std::int64_t kStepsPerRow = 4;
  // Rows whose lists are looked up together. About one bid in a hundred is stale when its turn comes.
  static constexpr std::int64_t kBlock = 64;
  // An auction lists its exhausted rows again when this fraction of all rows has been put off: 1 / kPutOffShare, enough
  // to share among threads. In row reduction, putting rows off would leave more of them unmatched.
  static constexpr std::int64_t kPutOffShare = 32;
  // Classes of this many equal rows take their steps of row reduction together; so many class steps per pass.
  static constexpr std::int64_t kLargeClass = 16;
  static constexpr std::int64_t kClassSteps = 64;
  // After an auction, row reduction leaves at most one row in this many unmatched, unless the auction did harm.
  static constexpr std::int64_t kManyLeft = 32;
  static constexpr std::int64_t kWasOfClass = -2;  // instead of a column's row; -1 for no row must come after it

  // How an auction ended: all rows have a column, or some do not, or it was not worth running.
  enum class AuctionResult { skipped, partial, complete };

  template <class... Arguments>
  explicit ListBids(const Arguments&... arguments)
      : Lists(arguments...),
        class_waits_(rows_),
        stack_(rows_),
        waiting_classes_(rows_),
        put_off_rows_(rows_),
        put_off_classes_(kScansNow ? 0 : rows_),
        columns_of_class_(rows_),
        reduced_(columns_),
        gaps_(columns_) {}

  // Finds the bids of several rows at the current duals.
  void find_bids(const std::int64_t* rows, std::int64_t count, Known known) {
    look_up_bids(rows, count, known);
    if constexpr (kScansNow) Lists::list_exhausted(rows, count, known);
  }

  // Moves a few rows from the end of stack_ to block_, in the order in which they are popped. Returns their number.
  std::int64_t take_block() {
    const std::int64_t count = free_count_ < kBlock ? free_count_ : kBlock;
    for (std::int64_t k = 0; k < count; ++k) block_[k] = stack_[--free_count_];
    return count;
  }

  // Calls bid(row, best) for rows whose bids were looked up, one after another. Rows without a bid are put off. Rows
  // whose lists have become insufficient return to stack_.
  template <class Bid>
  void make_bids(const std::int64_t* rows, std::int64_t count, const Bid& bid) {
    for (std::int64_t k = 0; k < count; ++k) {
      if (bids_[k].column < 0) {
        put_off_rows_[put_off_row_count_++] = rows[k];
      } else if (update(rows[k], bids_[k])) {
        bid(rows[k], bids_[k]);
      } else {
        stack_[free_count_++] = rows[k];
      }
    }
  }

  // Returns rows that were put off to stack_, as their lists have come.
  void resume_rows() {
    while (put_off_row_count_ > 0) stack_[free_count_++] = put_off_rows_[--put_off_row_count_];
  }

  // Updates a bid after other bids. Costs only rise, so the best column is still the best unless its dual has moved. If
  // the second best has become worse, the bid is lower than it could be, which matters only for ties. Returns false if
  // the list is not sufficient.
  bool update(std::int64_t row, BestTwo& bid) const {
    const bool same_price = v_[bid.column] == bid.price;
    if (same_price && bid.first < bid.second) return true;
    const BestTwo before = bid;
    if (look_up(list_for_bid(row), Known::both, bid)) return true;
    if (same_price) bid = before;
    return same_price;
  }

  // Equal rows get their columns in ascending order.
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
      for (std::int64_t k = begin; k < end; ++k) Lists::assign(stack_[k], columns_of_class_[k]);
    }
  }

  void unassign_all() {
    row_of_column_.fill(-1);
    for (std::int64_t i = 0; i < rows_; ++i) column_of_row_[i] = -1;
  }

  // Matches every row to a best column if one is free. Returns how many rows are left, listed in stack_.
  std::int64_t match_tight() {
    unassign_all();
    for (std::int64_t i = 0; i < rows_; ++i) stack_[i] = i;
    find_bids(stack_.data(), rows_, Known::first);
    std::int64_t free_count = 0;
    any_tie_ = false;
    for (std::int64_t i = 0; i < rows_; ++i) {
      const BestTwo& best = bids_[i];
      std::int64_t column = best.column;
      if (kScansNow || column >= 0) {
        const bool ties = best.first >= best.second || best.first >= lists_[list_for_bid(i)].floor;
        u_[i] = best.first;
        any_tie_ |= ties;
        if (row_of_column_[column] >= 0) column = ties ? free_column_at(list_for_bid(i), best.first) : -1;
      }
      if (column >= 0) {
        Lists::assign(i, column);
      } else {
        stack_[free_count++] = i;
      }
    }
    return free_count;
  }

  // Whether a row seems to end in a background, a cost that many of its pairs share, such as one large cost for all
  // forbidden pairs: entries tie at the floor, or lie farther below it than from each other. Bids would raise the
  // prices of good columns up to that cost.
  bool has_background(std::int64_t row, double smallest) const {
    const List& list = lists_[list_for_bid(row)];
    std::int64_t tied = 0;
    double below = smallest;
    for (std::int64_t k = 0; k < list.size; ++k) {
      const double reduced = static_cast<double>(list.costs[k]) - v_[list.columns[k]];
      tied += reduced == list.floor;
      below = reduced < list.floor && reduced > below ? reduced : below;
    }
    return tied >= kTiedEntries || list.floor - below > below - smallest;
  }

  // Lists the rows that take part in an auction in stack_: of equal rows only the first, as they would outbid one
  // another without end, and a path search finds columns for all of them at once.
  std::int64_t list_bidders() {
    std::int64_t count = 0;
    for (std::int64_t i = rows_; i-- > 0;) {
      if (class_of_row_[i] < 0 || class_of_row_[i] == i) stack_[count++] = i;
    }
    return count;
  }

  // Whether an auction among the rows in stack_ is worth running. Writes the differences between best and second best
  // entry of `gap_count` rows to gaps_. If most rows tie, there is little to gain.
  bool auction_helps(std::int64_t bidders, std::int64_t& gap_count) {
    find_bids(stack_.data(), bidders, Known::both);
    std::int64_t background = 0;
    gap_count = 0;
    for (std::int64_t k = 0; k < bidders; ++k) {
      const double floor = lists_[list_for_bid(stack_[k])].floor;
      if (bids_[k].second > bids_[k].first && bids_[k].second < floor) {
        gaps_[gap_count++] = bids_[k].second - bids_[k].first;
      }
      background += has_background(stack_[k], bids_[k].first);
    }
    return gap_count > bidders / 2 && background <= bidders / 4;
  }

  // One phase of Bertsekas' auction: a free row bids its best column's dual down until the second best is better by
  // epsilon.
  AuctionResult auction() {
    const std::int64_t bidders = list_bidders();
    std::int64_t gap_count;
    if (!auction_helps(bidders, gap_count)) return AuctionResult::skipped;
    unassign_all();
    begin_bids(kEpsilonShare * select_rank(gaps_.data(), gap_count, gap_count / 2), bidders);
    run_bids();
    const bool complete = all_bid_ && bidders == rows_ && free_count_ + put_off_row_count_ == 0;
    return complete ? AuctionResult::complete : AuctionResult::partial;
  }

  // Begins the bids of `free_count` rows in stack_.
  void begin_bids(double epsilon, std::int64_t free_count) {
    epsilon_ = epsilon;
    free_count_ = free_count;
    bids_left_ = kBidsPerRow * rows_;
    put_off_row_count_ = 0;
    all_bid_ = true;
  }

  // False if rows wait for lists. The first bid of a block is never stale, so every block makes a bid or puts rows off.
  bool run_bids() {
    resume_rows();
    const auto bid = [&](std::int64_t row, const BestTwo& best) {
      --bids_left_;
      if (best.first >= lists_[list_for_bid(row)].floor) {
        all_bid_ = false;  // it would take one of many columns that are as good
        return;
      }
      set_v(best.column, v_[best.column] - (best.second - best.first) - epsilon_);
      const std::int64_t displaced = row_of_column_[best.column];
      Lists::assign(row, best.column);
      if (displaced >= 0) {
        column_of_row_[displaced] = -1;
        stack_[free_count_++] = displaced;
      }
    };
    while (bids_left_ > 0) {
      if (free_count_ > 0 && (!kScansNow || put_off_row_count_ < rows_ / kPutOffShare)) {
        const std::int64_t count = take_block();
        look_up_bids(block_, count, Known::both);
        make_bids(block_, count, bid);
      } else if (kScansNow && put_off_row_count_ > 0) {
        const std::int64_t count = put_off_row_count_;
        put_off_row_count_ = 0;
        for (std::int64_t k = 0; k < count; ++k) bids_[k].column = -1;
        if constexpr (kScansNow) Lists::list_exhausted(put_off_rows_.data(), count, Known::both);
        make_bids(put_off_rows_.data(), count, bid);
      } else {
        break;
      }
    }
    return put_off_row_count_ == 0 || bids_left_ <= 0;
  }

  bool is_of_large_class(std::int64_t row) const {
    return rows_ == columns_ && class_of_row_[row] >= 0 && class_size_[class_of_row_[row]] >= kLargeClass;
  }

  // Leaves a row without a column, to take a step of its own (in stack_) or with its class (in waiting_classes_).
  void release(std::int64_t row) {
    column_of_row_[row] = -1;
    if (!is_of_large_class(row)) {
      stack_[free_count_++] = row;
    } else if (const std::int64_t first = class_of_row_[row]; !class_waits_[first]) {
      class_waits_[first] = true;
      waiting_classes_[waiting_class_count_++] = first;
    }
  }

  // The step of row reduction for all rows of a class at once (Bertsekas and Castanon, "The auction algorithm for the
  // transportation problem", Annals of Operations Research 20, 1989): k equal rows take the k best columns at the price
  // of the next best one. Rows that lose their columns are released. If the last of the best columns tie, rows of the
  // class may find none.
  void reduce_class(std::int64_t first) {
    const std::int64_t size = class_size_[first], next_best = size < columns_ ? size : columns_ - 1;
    const std::int64_t count = Lists::price_class(first, next_best, reduced_.data());
    for (std::int64_t k = 0; k < count; ++k) gaps_[k] = reduced_[k];
    const double bound = count > 0 ? select_rank(gaps_.data(), count, next_best) : kInfinity;
    if constexpr (!kScansNow) {
      if (count == 0 || bound > lists_[first].floor) {
        Lists::request(first, 2 * size);
        put_off_classes_[put_off_class_count_++] = first;
        return;
      }
    }
    for (std::int64_t row = first; row >= 0; row = class_next_[row]) {
      if (column_of_row_[row] >= 0) row_of_column_[column_of_row_[row]] = kWasOfClass;
      column_of_row_[row] = -1;
    }
    std::int64_t row = first;
    const auto take = [&](std::int64_t k) {
      const std::int64_t column = Lists::priced_column(first, k), displaced = row_of_column_[column];
      if (displaced >= 0) release(displaced);
      Lists::assign(row, column);
      u_[row] = Lists::priced_cost(first, k) - v_[column];
      row = class_next_[row];
    };
    for (std::int64_t k = 0; k < count; ++k) {
      if (reduced_[k] >= bound) continue;
      const std::int64_t column = Lists::priced_column(first, k);
      set_v(column, v_[column] - (bound - reduced_[k]));
      take(k);
    }
    // Its own columns first, then free ones.
    for (std::int64_t state = kWasOfClass; state < 0; ++state) {
      for (std::int64_t k = 0; k < count && row >= 0; ++k) {
        if (reduced_[k] == bound && row_of_column_[Lists::priced_column(first, k)] == state) take(k);
      }
    }
    for (std::int64_t j = 0; j < columns_; ++j) {
      if (row_of_column_[j] == kWasOfClass) row_of_column_[j] = -1;
    }
  }

  std::int64_t reduce_rows_in_passes(std::int64_t free_count) {
    for (int pass = 0; pass < kReductionPasses && free_count > 0; ++pass) {
      begin_reduction(free_count);
      run_reduction();
      free_count = list_free_rows();
    }
    return free_count;
  }

  // Begins a pass of augmenting row reduction of the rows in stack_.
  void begin_reduction(std::int64_t free_count) {
    steps_left_ = kStepsPerRow * rows_;
    class_steps_left_ = kClassSteps;
    class_waits_.fill(false);
    waiting_class_count_ = 0;
    free_count_ = put_off_row_count_ = put_off_class_count_ = 0;
    for (std::int64_t k = 0; k < free_count; ++k) release(stack_[k]);
  }

  // Single rows first: a step of a class affects many others. False if rows or classes wait for lists.
  bool run_reduction() {
    resume_rows();
    while (put_off_class_count_ > 0)
      waiting_classes_[waiting_class_count_++] = put_off_classes_[--put_off_class_count_];
    const auto bid = [&](std::int64_t row, const BestTwo& best) {
      const bool lowers = best.first < best.second;
      std::int64_t column = best.column;
      if (!lowers && row_of_column_[column] >= 0) column = free_column_at(list_for_bid(row), best.first);
      if (column < 0 || --steps_left_ < 0) return;
      if (lowers) set_v(column, v_[column] - (best.second - best.first));
      const std::int64_t displaced = row_of_column_[column];
      Lists::assign(row, column);
      // Computed from the pair, so that the pair is tight to the last bit.
      u_[row] = Lists::cost_of(row, column) - v_[column];
      if (displaced >= 0) release(displaced);
    };
    while (free_count_ > 0 || waiting_class_count_ > 0) {
      if (free_count_ == 0) {
        const std::int64_t first = waiting_classes_[--waiting_class_count_];
        class_waits_[first] = false;
        if (--class_steps_left_ >= 0) reduce_class(first);
        continue;
      }
      const std::int64_t count = take_block();
      find_bids(block_, count, Known::both);
      make_bids(block_, count, bid);
    }
    return put_off_row_count_ == 0 && put_off_class_count_ == 0;
  }

  // Lists the rows without a column in stack_.
  std::int64_t list_free_rows() {
    std::int64_t count = 0;
    for (std::int64_t i = 0; i < rows_; ++i) {
      if (column_of_row_[i] < 0) stack_[count++] = i;
    }
    return count;
  }

  Buffer<bool> class_waits_;  // for its step, in waiting_classes_
  Buffer<std::int64_t> stack_, waiting_classes_;
  std::int64_t free_count_ = 0,
               waiting_class_count_ = 0;  // of stack_ and of waiting_classes_
  // Rows and classes that wait for new lists.
  Buffer<std::int64_t> put_off_rows_, put_off_classes_;
  std::int64_t put_off_row_count_ = 0, put_off_class_count_ = 0;
  double epsilon_ = 0.0;
  std::int64_t bids_left_ = 0, steps_left_ = 0, class_steps_left_ = 0;
  bool all_bid_ = true;  // whether no row left the auction because of a tie
  Buffer<std::int64_t> columns_of_class_;
  Buffer<double> reduced_;  // reduced costs of a class
  Buffer<double> gaps_;
  std::int64_t block_[kBlock];
  bool any_tie_ = false;  // whether a row had two best columns when it was matched
};

}  // namespace
}  // namespace mudsc::MUDSC_ISA
