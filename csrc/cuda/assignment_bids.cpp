// Bids on the lists that the device made, on the host: one row after another, a few thousand chains that each look at a
// list or two, a CPU core's work on 2 to 30 MB. A row whose list does not tell what to bid waits until all others are
// done too; then the device lists all that wait anew at once.
#include "assignment_bids.hpp"

#include <utility>

namespace mudsc::cuda {
namespace {

constexpr std::int64_t kBidsPerRow = 32;
constexpr int kReductionPasses = 2;
constexpr std::int64_t kStepsPerRow = 4;
// Equal rows that are so many take their steps together; so many steps a pass.
constexpr std::int64_t kLargeClass = 16;
constexpr std::int64_t kClassSteps = 64;
// Requests of the auction, and of row reduction. Path searches find what is left.
constexpr std::int64_t kMaxRequests = 8;
constexpr std::int32_t kWasOfClass = -2;  // in place of a column's row

}  // namespace

ListAuction::ListAuction(Matching& matching, const std::int32_t* column_of_row, double epsilon)
    : matching_(matching),
      epsilon_(epsilon),
      bids_left_(epsilon > 0.0 ? kBidsPerRow * matching.rows : 0),
      requests_left_(kMaxRequests) {
  for (std::int32_t i = 0; i < matching_.rows; ++i) {
    if (column_of_row[i] >= 0) {
      matching_.assign(i, column_of_row[i]);
    } else if (matching_.classes.is_first(i)) {
      bidders_.push_back(i);
    }
  }
}

// Of equal rows only the first bids: they would outbid one another without end.
bool ListAuction::run() {
  bidders_.insert(bidders_.end(), waiting_.rbegin(), waiting_.rend());
  waiting_.clear();
  for (; !bidders_.empty() && bids_left_ > 0; --bids_left_) {
    const std::int32_t row = bidders_.back();
    bidders_.pop_back();
    const BestTwo best = matching_.best_two(row);
    if (best.second > matching_.list_of(row).floor) {
      waiting_.push_back(row);
      continue;
    }
    const std::int32_t column = best.entry->column, displaced = matching_.row_of_column[column];
    matching_.v[column] -= best.second - best.first + epsilon_;
    matching_.assign(row, column);
    if (displaced >= 0) bidders_.push_back(displaced);
  }
  if (!waiting_.empty() && bids_left_ > 0 && requests_left_-- > 0) {
    for (const std::int32_t row : waiting_) matching_.ask(row, 2);
    matching_.ask_for_worn_lists();
    return false;
  }
  matching_.unassign_all();
  return true;
}

RowReduction::RowReduction(Matching& matching)
    : matching_(matching),
      passes_left_(kReductionPasses),
      requests_left_(kMaxRequests),
      class_is_free_(matching.rows, 0) {}

bool RowReduction::run() {
  if (!started_) {
    match_tight();
    begin_pass();
    started_ = true;
  }
  while (passes_left_ > 0) {
    if (!run_pass()) return false;
    if (--passes_left_ > 0) begin_pass();
  }
  return true;
}

std::vector<std::int32_t> RowReduction::left() const {
  std::vector<std::int32_t> rows;
  for (std::int32_t i = 0; i < matching_.rows; ++i) {
    if (matching_.column_of_row[i] < 0) rows.push_back(i);
  }
  return rows;
}

// Every row takes a best column while there are free ones.
void RowReduction::match_tight() {
  for (std::int32_t i = 0; i < matching_.rows; ++i) {
    const BestTwo best = matching_.best_two(i);
    const double floor = matching_.list_of(i).floor;
    matching_.u[i] = std::min(best.first, floor);
    if (best.first > floor) continue;
    const Entry* entry = best.entry;
    if (matching_.row_of_column[entry->column] >= 0) entry = matching_.free_entry_at(i, best.first);
    if (entry != nullptr) matching_.assign(i, entry->column);
  }
}

void RowReduction::begin_pass() {
  steps_left_ = kStepsPerRow * matching_.rows;
  class_steps_left_ = kClassSteps;
  for (const std::int32_t row : left()) release(row);
}

// Single rows first: what equal rows do at once they do to many others.
bool RowReduction::run_pass() {
  while (!free_rows_.empty() || !free_classes_.empty()) {
    if (!free_rows_.empty()) {
      const std::int32_t row = free_rows_.back();
      free_rows_.pop_back();
      reduce(row);
    } else {
      const std::int32_t first = free_classes_.back();
      free_classes_.pop_back();
      class_is_free_[first] = 0;
      if (class_steps_left_-- > 0) reduce_class(first);
    }
  }
  free_rows_.swap(waiting_rows_);
  free_classes_.swap(waiting_classes_);
  if (free_rows_.empty() && free_classes_.empty()) return true;
  if (requests_left_-- > 0) {
    for (const std::int32_t row : free_rows_) matching_.ask(row, 2);
    for (const std::int32_t first : free_classes_) matching_.ask(first, 2 * matching_.classes.size(first));
    matching_.ask_for_worn_lists();
    return false;
  }
  free_rows_.clear();
  free_classes_.clear();
  return true;
}

// Leaves a row to take a step of its own, or one with its class.
void RowReduction::release(std::int32_t row) {
  matching_.column_of_row[row] = -1;
  const std::int32_t first = matching_.classes.first(row);
  if (matching_.rows < matching_.columns || matching_.classes.size(first) < kLargeClass) {
    free_rows_.push_back(row);
  } else if (!class_is_free_[first]) {
    class_is_free_[first] = 1;
    free_classes_.push_back(first);
  }
}

void RowReduction::reduce(std::int32_t row) {
  const BestTwo best = matching_.best_two(row);
  const double floor = matching_.list_of(row).floor;
  matching_.u[row] = std::min(best.first, floor);
  if (best.second > floor) {
    waiting_rows_.push_back(row);
    return;
  }
  const bool lowers = best.first < best.second;
  const Entry* entry = best.entry;
  if (!lowers && matching_.row_of_column[entry->column] >= 0) entry = matching_.free_entry_at(row, best.first);
  if (entry == nullptr || --steps_left_ < 0) return;
  if (lowers) matching_.v[entry->column] -= best.second - best.first;
  const std::int32_t displaced = matching_.row_of_column[entry->column];
  matching_.assign_tight(row, *entry);
  if (displaced >= 0) release(displaced);
}

// The step of row reduction for all rows of a class at once (Bertsekas and Castanon, "The auction algorithm for the
// transportation problem", Annals of Operations Research 20, 1989): k equal rows take the k best columns, which become
// as dear as the next best one. Rows that lose their columns are released; where the last of the best columns tie, rows
// of the class may find none.
void RowReduction::reduce_class(std::int32_t first) {
  if (!price_columns(first)) {
    waiting_classes_.push_back(first);
    return;
  }
  leave_columns(first);
  std::int32_t row = first;
  const auto take = [&](const Entry& entry) {
    const std::int32_t displaced = matching_.row_of_column[entry.column];
    matching_.assign_tight(row, entry);
    row = matching_.classes.next(row);
    if (displaced >= 0) release(displaced);
  };
  for (const Entry* const entry : best_) take(*entry);
  // Its own columns first, then free ones.
  for (const std::int32_t state : {kWasOfClass, -1}) {
    for (const Entry* const entry : tied_) {
      if (row >= 0 && matching_.row_of_column[entry->column] == state) take(*entry);
    }
  }
  for (const std::int32_t column : left_columns_) {
    if (matching_.row_of_column[column] == kWasOfClass) matching_.row_of_column[column] = -1;
  }
}

// Finds the columns that rows of a class take, and lowers their duals. False if the list does not tell.
bool RowReduction::price_columns(std::int32_t first) {
  const List& list = matching_.lists[first];
  const std::int64_t size = matching_.classes.size(first), next_best = std::min(size, matching_.columns - 1);
  if (list.size <= next_best) return false;
  reduced_.clear();
  for (const Entry& entry : list) reduced_.push_back(entry.reduced(matching_.v));
  std::nth_element(reduced_.begin(), reduced_.begin() + next_best, reduced_.end());
  const double bound = reduced_[next_best];
  if (bound > list.floor) return false;
  best_.clear();
  tied_.clear();
  for (const Entry& entry : list) {
    const double reduced = entry.reduced(matching_.v);
    if (reduced < bound) {
      best_.push_back(&entry);
      matching_.v[entry.column] -= bound - reduced;
    } else if (reduced == bound) {
      tied_.push_back(&entry);
    }
  }
  return true;
}

void RowReduction::leave_columns(std::int32_t first) {
  left_columns_.clear();
  for (std::int32_t row = first; row >= 0; row = matching_.classes.next(row)) {
    std::int64_t& column = matching_.column_of_row[row];
    if (column < 0) continue;
    left_columns_.push_back(static_cast<std::int32_t>(column));
    matching_.row_of_column[column] = kWasOfClass;
    column = -1;
  }
}

}  // namespace mudsc::cuda
