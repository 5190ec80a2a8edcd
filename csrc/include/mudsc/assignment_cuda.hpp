// Contract of the assignment op on a CUDA device.
//
// Small problems are solved whole by assignment_batch. A large one passes through the parts below it, in this order:
// assignment_inspect and assignment_bid on the device, assignment_list there and ListSearch on the host in turns,
// assignment_certify on the device. python/mudsc_fast/kernels/cuda/assignment.py connects them.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "mudsc/assignment.hpp"
#include "mudsc/cuda.hpp"

namespace mudsc::cuda {

// Whether assignment_batch can solve problems of this shape on the stream's device.
bool assignment_batch_fits(const AssignmentProblem& problem, Stream stream);

// Solves every problem of the batch, exactly, one block each. All pointers are on the device; does not wait for it.
void assignment_batch(const AssignmentProblem& problem, Stream stream);

// One problem of [rows, columns] contiguous values on the device, minimized: cost = value, or -value to maximize.
// Values are float16, bfloat16 or float32.
struct LargeProblem {
  const void* values;
  ScalarType type;
  std::int64_t rows;
  std::int64_t columns;
  bool maximize;
};

// What is asked of every row at first: the distance between its least and second least cost, at the given prices of
// columns, the largest magnitude of a value (+inf if one is not finite), and a hash that equal rows share.
struct Inspection {
  const float* prices;   // [columns]
  float* gaps;           // [rows]
  float* magnitudes;     // [rows]
  std::int64_t* hashes;  // [rows]
};
void assignment_inspect(const LargeProblem& problem, const Inspection& inspection, Stream stream);

// Makes rows that differ from the row they are said to equal, in any entry, equal to themselves alone.
void assignment_check_classes(const LargeProblem& problem, std::int32_t* class_of_row, Stream stream);

struct Auction {
  const float* epsilon;              // [1] on the device; nobody bids unless it is positive
  std::int64_t stop;                 // ends when so few rows are left
  std::int64_t max_rounds;           // or after so many rounds
  std::int64_t max_bids;             // or bids
  const std::int32_t* class_of_row;  // [rows]: the first row that equals this one; of equal rows only the first bids
  float* prices;                     // [columns]: where they start, and where they end
  std::int32_t* column_of_row;       // [rows]: -1 for a row that is left
  std::int64_t* counts;              // [2]: rounds, and bids made in them
};
std::int64_t assignment_bid_workspace_bytes(const LargeProblem& problem);
// Rounds of bids by all rows without a column, for square problems.
void assignment_bid(const LargeProblem& problem, const Auction& auction, void* workspace, Stream stream);

// The least few reduced costs, cost - dual, of rows.
struct ListRequest {
  const std::int32_t* rows;  // [count], or null for all rows
  std::int64_t count;
  const double* duals;    // [columns]
  std::int64_t wanted;    // at least so many entries a row
  std::int64_t capacity;  // and at most so many: twice `wanted`, or all columns
  std::int32_t* columns;  // [count, capacity]
  float* costs;           // [count, capacity]
  std::int32_t* sizes;    // [count]
  double* floors;         // [count]: no unlisted reduced cost is less
};
void assignment_list(const LargeProblem& problem, const ListRequest& request, Stream stream);

// Each row's least reduced cost over all columns, and the cost of its pair.
void assignment_certify(const LargeProblem& problem, const double* duals, const std::int64_t* column_of_row,
                        double* least, double* paired, Stream stream);

// Rows, each the first of its equals, and the smallest number of entries that their lists should have.
struct RowsToList {
  std::int64_t wanted;
  std::vector<std::int32_t> rows;
};

// Lists of `count` rows that assignment_list made, on the host.
struct MadeLists {
  std::int64_t count;
  std::int64_t capacity;
  const std::int32_t* rows;     // [count]
  const std::int32_t* columns;  // [count, capacity]
  const float* costs;           // [count, capacity]
  const std::int32_t* sizes;    // [count]
  const double* floors;         // [count]
};

// The last bids and shortest augmenting paths on lists, on the host; see assignment_search.cpp.
class ListSearch {
 public:
  // `duals` are the initial duals of the columns; 0 for problems with more columns than rows. `class_of_row` is the
  // first row that equals each row in every entry. `wanted` is the length of the first lists.
  ListSearch(std::int64_t rows, std::int64_t columns, const double* duals, const std::int32_t* class_of_row,
             std::int64_t wanted);
  ~ListSearch();

  // Takes over the column duals and pairs of an auction (-1 for a row without a column), for square problems.
  void continue_auction(const double* duals, const std::int32_t* column_of_row, double epsilon);

  // Matches what the lists allow. Returns the rows whose lists must be made at the current duals before it can go on;
  // none when done.
  const std::vector<RowsToList>& advance();
  void set_lists(const MadeLists& lists);
  const double* duals() const;
  const std::int64_t* column_of_row() const;

 private:
  class Steps;
  std::unique_ptr<Steps> steps_;
};

}  // namespace mudsc::cuda
