// Bids on lists, on the host: the end of the device's auction, and row reduction. See assignment_bids.cpp.
#pragma once

#include "assignment_matching.hpp"

namespace mudsc::cuda {

// Bids of one row after another, which go on where the device's rounds ended.
class ListAuction {
 public:
  ListAuction(Matching& matching, const std::int32_t* column_of_row, double epsilon);
  // False if lists must be made anew before it can go on.
  bool run();

 private:
  Matching& matching_;
  double epsilon_;
  std::int64_t bids_left_, requests_left_;
  std::vector<std::int32_t> bidders_, waiting_;
};

// Matches rows to their best columns, then augmenting row reduction, many equal rows at a time.
class RowReduction {
 public:
  explicit RowReduction(Matching& matching);
  // False if lists must be made anew before it can go on.
  bool run();
  // The rows without a column.
  std::vector<std::int32_t> left() const;

 private:
  void match_tight();
  void begin_pass();
  bool run_pass();
  void reduce(std::int32_t row);
  void reduce_class(std::int32_t first);
  void leave_columns(std::int32_t first);
  bool price_columns(std::int32_t first);
  void release(std::int32_t row);

  Matching& matching_;
  bool started_ = false;
  int passes_left_, requests_left_;
  std::int64_t steps_left_ = 0, class_steps_left_ = 0;
  // What is to take a step, and what waits for a list.
  std::vector<std::int32_t> free_rows_, waiting_rows_, free_classes_, waiting_classes_;
  std::vector<char> class_is_free_;
  // Of a class that takes a step: columns it had, what those of its list cost, and those below the next best and at it.
  std::vector<std::int32_t> left_columns_;
  std::vector<double> reduced_;
  std::vector<const Entry*> best_, tied_;
};

}  // namespace mudsc::cuda
