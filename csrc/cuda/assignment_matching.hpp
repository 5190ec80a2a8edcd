// What the steps of the host's search share: duals and pairs so far, lists, equal rows, and what the device is asked
// for.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "assignment_lists.hpp"
#include "mudsc/assignment_cuda.hpp"

namespace mudsc::cuda {

// Rows that are equal in every entry, by the first of them.
class Classes {
 public:
  Classes(std::int64_t rows, const std::int32_t* class_of_row)
      : first_(class_of_row, class_of_row + rows), next_(rows, -1), size_(rows, 0) {
    std::vector<std::int32_t> last(rows, -1);
    for (std::int32_t i = 0; i < rows; ++i) {
      std::int32_t& before = last[first_[i]];
      if (before >= 0) next_[before] = i;
      before = i;
      ++size_[first_[i]];
    }
  }

  std::int32_t first(std::int64_t row) const { return first_[row]; }
  bool is_first(std::int64_t row) const { return first_[row] == row; }
  std::int64_t size(std::int64_t first) const { return size_[first]; }
  std::int32_t next(std::int64_t row) const { return next_[row]; }  // -1 after the last

 private:
  std::vector<std::int32_t> first_, next_, size_;
};

// Requests for lists, those of one length together. A row is asked for once until the requests are served.
class Requests {
 public:
  explicit Requests(std::int64_t rows) : asked_in_(rows, 0) {}

  void clear() {
    groups_.clear();
    ++round_;
  }

  void add(std::int32_t row, std::int64_t wanted) {
    if (asked_in_[row] == round_) return;
    asked_in_[row] = round_;
    for (RowsToList& group : groups_) {
      if (group.wanted == wanted) return group.rows.push_back(row);
    }
    groups_.push_back({wanted, {row}});
  }

  const std::vector<RowsToList>& groups() const { return groups_; }

 private:
  std::vector<RowsToList> groups_;
  std::vector<std::int64_t> asked_in_;
  std::int64_t round_ = 1;
};

struct Matching {
  Matching(std::int64_t row_count, std::int64_t column_count, const double* duals, const std::int32_t* class_of_row,
           std::int64_t entries)
      : rows(row_count),
        columns(column_count),
        wanted(entries),
        v(duals, duals + column_count),
        u(row_count),
        column_of_row(row_count, -1),
        row_of_column(column_count, -1),
        classes(row_count, class_of_row),
        lists(row_count),
        requests(row_count) {}

  const List& list_of(std::int64_t row) const { return lists[classes.first(row)]; }
  BestTwo best_two(std::int64_t row) const { return list_of(row).best_two(v); }

  void assign(std::int64_t row, std::int64_t column) {
    column_of_row[row] = column;
    row_of_column[column] = static_cast<std::int32_t>(row);
  }

  // Pairs a row with a listed column. The row's dual is as the pair has it, so that the pair is tight to the last bit.
  void assign_tight(std::int64_t row, const Entry& entry) {
    assign(row, entry.column);
    u[row] = entry.reduced(v);
  }

  void unassign_all() {
    std::fill(column_of_row.begin(), column_of_row.end(), -1);
    std::fill(row_of_column.begin(), row_of_column.end(), -1);
  }

  // A listed free column of a row at this reduced cost, the row's least; null if there is none.
  const Entry* free_entry_at(std::int64_t row, double reduced) const {
    for (const Entry& entry : list_of(row)) {
      if (entry.least > reduced) break;
      if (row_of_column[entry.column] < 0 && entry.reduced(v) == reduced) return &entry;
    }
    return nullptr;
  }

  // Asks for the list of a row and its equals anew, which must tell the `needed` least reduced costs.
  void ask(std::int64_t row, std::int64_t needed) {
    std::int64_t length = wanted;
    while (length < needed && length < columns) length *= 2;
    requests.add(classes.first(row), length);
  }

  // Asks for all lists that will soon tell no more.
  void ask_for_worn_lists() {
    for (std::int32_t i = 0; i < rows; ++i) {
      if (classes.is_first(i) && !lists[i].tells(wanted / 2, v)) ask(i, 0);
    }
  }

  std::int64_t rows, columns;
  std::int64_t wanted;  // entries of a list at least
  std::vector<double> v, u;
  std::vector<std::int64_t> column_of_row;
  std::vector<std::int32_t> row_of_column;
  Classes classes;
  Lists lists;
  Requests requests;
};

}  // namespace mudsc::cuda
