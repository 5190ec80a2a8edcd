// Lists of the smallest reduced costs of each row, as the searches read them (assignment_bids.hpp,
// assignment_paths.hpp).
//
// A list has a floor: a lower bound of the row's unlisted reduced costs. Column duals only fall, so reduced costs only
// rise and floors stay valid. A search that reaches a floor needs the row listed again. Where lists come from is up to
// the derived class, which is the base of the searches: RowLists (assignment_lists.hpp) scans the row in memory at
// once; RequestedLists (csrc/cuda/assignment_search.cpp) requests the list from the device, and the search is put off.
// The derived class defines:
//   kScansNow                         whether rows are listed again at once
//   list_for_bid(row)                 the row whose list holds the bids of `row`
//   look_up_bids(rows, count, known)  writes bids_; column -1 for a row whose list is not sufficient
//   min_reduced_cost_or_floor(row)    the smallest reduced cost, or the floor if the list does not hold it
//   cost_of(row, column)              the cost of a listed entry
//   price_class(first, rank, out)     reduced costs of a row, more than `rank` of the smallest; returns their number, or
//                                     0 if the list does not hold them
//   priced_column(first, k), priced_cost(first, k)    column and cost of the k-th of these
//   set_v(column, value)              lowers a column dual
// and, if kScansNow, relist(row, wanted) and list_exhausted(rows, count, known), which writes the bids of rows with column
// -1; otherwise request(row, needed) and request_longer(row).
#pragma once

#include "assignment_sorting.hpp"
#include "assignment_two_smallest.hpp"

namespace mudsc::MUDSC_ISA {
namespace {

// `State` holds duals and pairs: rows_, columns_, u_, v_, row_of_column_, column_of_row_ and assign(row, column).
template <class State, class Cost>
class ListState : protected State {
 protected:
  using State::columns_;
  using State::row_of_column_;
  using State::rows_;
  using State::v_;

  // Entries that a row lists at first. Fewer are read again too often, more take longer at every bid.
  static constexpr std::int64_t kWanted = 16;

  struct List {
    std::int32_t* columns;
    Cost* costs;
    std::int64_t size;
    std::int64_t capacity;
    double floor;         // no unlisted reduced cost is smaller, now or later
    std::int64_t search;  // the path search that listed the row last
    bool own_block;       // whether the arrays were allocated for this list alone
  };

  struct BestTwo {
    double first;
    double second;
    std::int64_t column;
    double price;  // the column's dual when this was found
  };

  // What must be known of a row: its smallest reduced cost, or the second smallest too.
  enum class Known { first, both };

  template <class... Arguments>
  explicit ListState(std::int64_t rows, const Arguments&... arguments)
      : State(arguments...), lists_(rows), class_of_row_(rows, -1), class_size_(rows), class_next_(rows), bids_(rows) {
    for (std::int64_t i = 0; i < rows; ++i) lists_[i] = List{};
  }
  ListState(const ListState&) = delete;
  ListState& operator=(const ListState&) = delete;

  // Prefetches a list that will be looked up soon.
  void fetch_list(std::int64_t row) const {
    const List& list = lists_[row];
    for (std::int64_t k = 0; k < 2 * kWanted; k += 16) {
      __builtin_prefetch(list.columns + k);
      __builtin_prefetch(list.costs + k);
    }
  }

  // Finds the two smallest reduced costs in a row's list. Returns whether they are known to be the row's.
  bool look_up(std::int64_t row, Known known, BestTwo& best) const {
    const List& list = lists_[row];
    const std::int64_t place = two_smallest(list.costs, list.columns, list.size, v_.data(), best.first, best.second);
    best.column = place >= 0 ? list.columns[place] : -1;
    best.price = place >= 0 ? v_[best.column] : 0.0;
    return (known == Known::both ? best.second : best.first) <= list.floor || list.size == columns_;
  }

  // A listed free column of a row at this reduced cost; -1 if there is none.
  std::int64_t free_column_at(std::int64_t row, double reduced_cost) const {
    const List& list = lists_[row];
    for (std::int64_t k = 0; k < list.size; ++k) {
      const std::int64_t column = list.columns[k];
      if (row_of_column_[column] < 0 && static_cast<double>(list.costs[k]) - v_[column] == reduced_cost) return column;
    }
    return -1;
  }

  // The row whose list the path searches use for this one: equal rows share a list, which may grow long if they tie.
  std::int64_t list_of(std::int64_t row) const { return class_of_row_[row] < 0 ? row : class_of_row_[row]; }

  Buffer<List> lists_;
  // Equal rows: the first row of each row's class (-1 for a row without equals), its size, and each row's successor in
  // the class (-1 for the last).
  Buffer<std::int64_t> class_of_row_, class_size_, class_next_;
  Buffer<BestTwo> bids_;  // of the rows that were looked up last
};

}  // namespace
}  // namespace mudsc::MUDSC_ISA
