// Exact assignment of a dense matrix through short lists of each row's best entries.
//
// An optimal assignment uses only a few of the best entries of each row. Each row lists some of its smallest reduced
// costs and keeps a floor, a lower bound of the unlisted ones. Column duals only fall, so reduced costs only rise and
// floors stay valid; a row is read again only when the search reaches its floor. The steps:
//   1. List all rows at duals 0 (or those given): the only time the whole matrix is read.
//   2. Match each row to its best column if that is free. If many rows are left, run an auction on the lists at a fixed
//      epsilon, and match again at its duals.
//   3. Augmenting row reduction on the lists (Jonker and Volgenant, Computing 38, 1987), many equal rows at a time.
//   4. Shortest augmenting paths on the lists. "List row i again" is one more event of Dijkstra's search, at the
//      distance where an unlisted entry of the row could matter, so nothing is missed.
//   5. Recompute the row duals: from the list if its floor proves that it holds the row's minimum, else from the row.
// It is related to the look-back auction of Bus and Tvrdik ("Towards auction algorithms for large dense assignment
// problems", Computational Optimization and Applications 43, 2009).
//
// Parallel: listing all rows and the certificate, over rows. Auction and row reduction find the bids of a block of rows
// at the same duals on all threads, and make them one after another; rows that must be listed again for it are a batch.
// Path searches run on one thread. Results do not depend on the number of threads.
#pragma once

#include "assignment_lists.hpp"
#include "assignment_paths.hpp"

namespace mudsc::MUDSC_ISA {
namespace {

// `Rows` is a source of rows (assignment_rows.hpp).
template <class Rows>
class SparseSolver : private ListPaths<RowLists<Rows>> {
  using Paths = ListPaths<RowLists<Rows>>;
  using Problem = typename Rows::Problem;
  using Paths::any_tie_;
  using Paths::auction;
  using Paths::column_of_row_;
  using Paths::columns_;
  using Paths::copy_duals;
  using Paths::find_classes;
  using Paths::find_paths;
  using Paths::in_parallel;
  using Paths::kListGrain;
  using Paths::kMaxThreads;
  using Paths::kWanted;
  using Paths::list_all_rows;
  using Paths::list_of;
  using Paths::match_tight;
  using Paths::min_reduced_cost;
  using Paths::order_classes;
  using Paths::reduce_rows_in_passes;
  using Paths::row_hashes_;
  using Paths::rows_;
  using Paths::scratches_;
  using Paths::team_;
  using Paths::u_;
  using Paths::v_;
  using typename Paths::AuctionResult;
  using typename Paths::Known;
  using typename Paths::Scratch;

 public:
  // Below this many columns reading whole rows is as fast as keeping lists.
  static constexpr std::int64_t kMinColumns = 768;

  explicit SparseSolver(const Problem& problem) : Paths(problem) {}

  // Returns false, with nothing written, if an entry is not finite, or costs are so large or small that sums of the
  // scanning type could leave its range: that is the dense solver's work.
  bool solve(const Problem& problem, std::int64_t index, int threads) {
    Paths::begin(problem, index);
    if (Paths::rows_are_constant()) return solve_constant_rows(problem, index);
    const std::int64_t worth = rows_ * columns_ / Paths::kEntriesPerThread;
    const std::int64_t most = worth < kMaxThreads ? worth : kMaxThreads;
    Team team(threads < most ? threads : static_cast<int>(most));
    team_ = &team;
    for (int member = 0; member < team.size(); ++member) scratches_[member] = Scratch(*this);
    const bool warm = problem.prices != nullptr;
    copy_duals();
    if (!list_all_rows(warm ? kWantedOfWarm : kWanted)) return false;
    std::int64_t free_count = match_tight();
    if (free_count == 0) return accept_tight_matching(problem, index);
    find_classes();
    AuctionResult bids = AuctionResult::skipped;
    if (rows_ == columns_ && free_count > rows_ / (warm ? kFewFreeOfWarm : kFewFree)) {
      bids = auction();
      if (bids == AuctionResult::complete && within(problem.tolerance)) {
        certify(problem, index);
        problem.status[index] = AssignmentStatus::optimal;
        return true;
      }
      free_count = match_tight();
    }
    free_count = reduce_rows_in_passes(free_count);
    if (bids != AuctionResult::skipped && free_count > rows_ / Paths::kManyLeft) {
      // The auction did harm, as where rows outbid one another up to the cost of a forbidden pair: start over without.
      Paths::begin(problem, index);
      copy_duals();
      list_all_rows(warm ? kWantedOfWarm : kWanted);
      free_count = reduce_rows_in_passes(match_tight());
    }
    Paths::begin_paths();
    find_paths(free_count);
    order_classes();
    Paths::order_equal_columns();
    certify(problem, index);
    problem.status[index] = AssignmentStatus::optimal;
    return true;
  }

 private:
  // The same at given duals, at which the search ends sooner.
  static constexpr std::int64_t kWantedOfWarm = 10;
  // The auction is skipped where no more than one in so many rows found its best column taken.
  static constexpr std::int64_t kFewFree = 20;
  // The same where duals were given: if they suit the problem, row reduction keeps more of them than an auction does.
  static constexpr std::int64_t kFewFreeOfWarm = 4;

  // Whether the pairs have a total slack of at most this share of their sum. Never for a share of 0.
  bool within(double share) {
    if (share <= 0.0) return false;
    double total = 0.0, slack = 0.0;
    for (std::int64_t i = 0; i < rows_; ++i) {
      const double matched = Paths::cost(i, column_of_row_[i]);
      total += matched;
      slack += matched - v_[column_of_row_[i]] - Paths::best_two(i, Known::first, scratches_[0], i).first;
    }
    return slack <= share * (total < 0.0 ? -total : total);
  }

  // All assignments are equally good.
  bool solve_constant_rows(const Problem& problem, std::int64_t index) {
    v_.fill(0.0);
    for (std::int64_t i = 0; i < rows_; ++i) {
      Paths::assign(i, i);
      problem.row_duals[index * rows_ + i] = Paths::cost(i, 0);
    }
    Paths::write_result(problem, index);
    problem.status[index] = AssignmentStatus::optimal;
    return true;
  }

  // Every row has a best column of its own: the lists hold each row's least reduced cost, which proves it.
  bool accept_tight_matching(const Problem& problem, std::int64_t index) {
    if (any_tie_) {
      Paths::order_equal_rows(row_hashes_);
      Paths::order_equal_columns();
    }
    for (std::int64_t i = 0; i < rows_; ++i) problem.row_duals[index * rows_ + i] = u_[i];
    Paths::write_result(problem, index);
    problem.status[index] = AssignmentStatus::optimal;
    return true;
  }

  // The certificate of AssignmentState. Where a row's listed entries hold one that is not above the floor, no unlisted
  // one is less: floors are bounds at duals that have only fallen since. Other rows are read again.
  void certify(const Problem& problem, std::int64_t index) {
    double* const min_costs = problem.row_duals + index * rows_;
    in_parallel(rows_, kListGrain, [&](std::int64_t i, Scratch& scratch) {
      if (list_of(i) == i) min_costs[i] = min_reduced_cost(i, scratch);
    });
    for (std::int64_t i = 0; i < rows_; ++i) min_costs[i] = min_costs[list_of(i)];
    Paths::write_result(problem, index);
  }
};

}  // namespace
}  // namespace mudsc::MUDSC_ISA
