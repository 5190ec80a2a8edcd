// The search of a large assignment on the host, on lists that the device makes: the last bids of the auction, row
// reduction and shortest augmenting paths of csrc/cpu/assignment_{bids,paths}.hpp.
//
// The search looks at a list or two at a time, 2 to 30 MB in all, which is work for a CPU core. A row whose list is not
// sufficient, or a path search that needs other lists, is put off until the rest is done. Then the device makes all
// requested lists at once.
#include <algorithm>
#include <utility>

#define MUDSC_ISA cuda_search
#include "../cpu/assignment_paths.hpp"
#include "mudsc/assignment_cuda.hpp"

namespace mudsc::MUDSC_ISA {
namespace {

// Duals and pairs of the minimized problem.
struct SearchState {
  SearchState(std::int64_t rows, std::int64_t columns)
      : rows_(rows),
        columns_(columns),
        v_(columns, 0.0),
        u_(rows, 0.0),
        column_of_row_(rows, std::int64_t{-1}),
        row_of_column_(columns, std::int64_t{-1}) {}

  void assign(std::int64_t row, std::int64_t column) {
    column_of_row_[row] = column;
    row_of_column_[column] = row;
  }

  std::int64_t rows_, columns_;
  Buffer<double> v_, u_;
  Buffer<std::int64_t> column_of_row_, row_of_column_;
};

class RequestedLists : protected ListState<SearchState, float> {
  using Base = ListState<SearchState, float>;

 protected:
  static constexpr bool kScansNow = false;
  // How much longer a list that ended a search becomes, compared with the first list, or with itself if its entries are
  // still the smallest.
  static constexpr std::int64_t kGrowth = 4;

  // `class_of_row` is the first row that equals each row; `wanted` is the length of the first lists.
  RequestedLists(std::int64_t rows, std::int64_t columns, const std::int32_t* class_of_row, std::int64_t wanted)
      : Base(rows, rows, columns), wanted_(wanted), requested_in_(rows, std::int64_t{0}) {
    Buffer<std::int64_t> last(rows, std::int64_t{-1});
    class_size_.fill(0);
    class_next_.fill(-1);
    for (std::int64_t i = 0; i < rows; ++i) {
      const std::int64_t first = class_of_row[i];
      if (last[first] >= 0) class_next_[last[first]] = i;
      last[first] = i;
      ++class_size_[first];
    }
    for (std::int64_t i = 0; i < rows; ++i) {
      class_of_row_[i] = class_size_[class_of_row[i]] > 1 ? class_of_row[i] : -1;
    }
  }

  void set_v(std::int64_t column, double value) { v_[column] = value; }

  // Equal rows share a list.
  std::int64_t list_for_bid(std::int64_t row) const { return list_of(row); }

  // A matching of tight pairs (Known::first) leaves out rows without a sufficient list instead of requesting it.
  void look_up_bids(const std::int64_t* rows, std::int64_t count, Known known) {
    for (std::int64_t k = 0; k < count; ++k) {
      fetch_list(list_of(rows[k + 2 < count ? k + 2 : k]));
      if (look_up(list_of(rows[k]), known, bids_[k])) continue;
      bids_[k].column = -1;
      if (known == Known::both) request(list_of(rows[k]), 2);
    }
  }

  double min_reduced_cost_or_floor(std::int64_t row) const {
    BestTwo best;
    look_up(row, Known::first, best);
    return std::min(best.first, lists_[row].floor);
  }

  double cost_of(std::int64_t row, std::int64_t column) const {
    const List& list = lists_[list_of(row)];
    std::int64_t k = 0;
    while (list.columns[k] != column) ++k;
    return static_cast<double>(list.costs[k]);
  }

  std::int64_t price_class(std::int64_t first, std::int64_t rank, double* reduced) const {
    const List& list = lists_[first];
    if (list.size <= rank) return 0;
    for (std::int64_t k = 0; k < list.size; ++k) reduced[k] = reduced_cost(list, k);
    return list.size;
  }
  std::int64_t priced_column(std::int64_t first, std::int64_t k) const { return lists_[first].columns[k]; }
  double priced_cost(std::int64_t first, std::int64_t k) const { return static_cast<double>(lists_[first].costs[k]); }

  double reduced_cost(const List& list, std::int64_t k) const {
    return static_cast<double>(list.costs[k]) - v_[list.columns[k]];
  }

  // Whether this many listed entries are still the smallest of the row.
  bool holds(const List& list, std::int64_t count) const {
    for (std::int64_t k = 0; k < list.size && count > 0; ++k) count -= reduced_cost(list, k) <= list.floor;
    return count == 0 || list.size == columns_;
  }

  void clear_requests() {
    requests_.clear();
    ++round_;
  }

  // Requests the list of a row, the first of its class, with at least the `needed` smallest reduced costs.
  void request(std::int64_t row, std::int64_t needed) {
    if (requested_in_[row] == round_) return;
    requested_in_[row] = round_;
    std::int64_t length = wanted_;
    while (length < needed && length < columns_) length *= 2;
    const auto same_length = [&](const cuda::RowsToList& group) { return group.wanted == length; };
    auto group = std::find_if(requests_.begin(), requests_.end(), same_length);
    if (group == requests_.end()) group = requests_.insert(group, {length, {}});
    group->rows.push_back(static_cast<std::int32_t>(row));
  }

  // Requests a list that ended a path search. If its entries are still the smallest, it must list more of them.
  void request_longer(std::int64_t row) {
    const List& list = lists_[row];
    const std::int64_t needed = kGrowth * (holds(list, list.size / 2) ? list.size : wanted_);
    request(row, std::max(needed, 2 * class_size_[row]));
  }

  void request_all() {
    for (std::int64_t i = 0; i < rows_; ++i) {
      if (list_of(i) == i) request(i, 0);
    }
  }

  // Requests the lists that will soon be insufficient: while the device is at work, a few more cost little.
  void request_exhausted() {
    for (std::int64_t i = 0; i < rows_; ++i) {
      if (list_of(i) == i && !holds(lists_[i], wanted_ / 2)) request(i, 0);
    }
  }

  std::int64_t wanted_;
  std::vector<cuda::RowsToList> requests_;
  Buffer<std::int64_t> requested_in_;  // the last round in which a row was requested
  std::int64_t round_ = 1;

 public:
  void set_lists(const cuda::MadeLists& made) {
    std::int64_t room = 0;
    for (std::int64_t k = 0; k < made.count; ++k) {
      room += made.sizes[k] > lists_[made.rows[k]].capacity ? made.sizes[k] : 0;
    }
    if (room > 0) blocks_.push_back({Buffer<std::int32_t>(room), Buffer<float>(room)});
    std::int64_t used = 0;
    for (std::int64_t k = 0; k < made.count; ++k) {
      List& list = lists_[made.rows[k]];
      if (made.sizes[k] > list.capacity) {
        list.columns = blocks_.back().columns.data() + used;
        list.costs = blocks_.back().costs.data() + used;
        list.capacity = made.sizes[k];
        used += made.sizes[k];
      }
      list.size = made.sizes[k];
      list.floor = made.floors[k];
      std::copy_n(made.columns + k * made.capacity, list.size, list.columns);
      std::copy_n(made.costs + k * made.capacity, list.size, list.costs);
    }
  }

  const std::vector<cuda::RowsToList>& requests() const { return requests_; }
  const double* duals() const { return v_.data(); }
  const std::int64_t* column_of_row() const { return column_of_row_.data(); }

 private:
  // Memory of lists, for as long as the search takes.
  struct Block {
    Buffer<std::int32_t> columns;
    Buffer<float> costs;
  };
  std::vector<Block> blocks_;
};

}  // namespace
}  // namespace mudsc::MUDSC_ISA

namespace mudsc::cuda {

class ListSearch::Steps : public MUDSC_ISA::ListPaths<MUDSC_ISA::RequestedLists> {
 public:
  Steps(std::int64_t rows, std::int64_t columns, const double* duals, const std::int32_t* class_of_row,
        std::int64_t wanted)
      : ListPaths(rows, columns, class_of_row, wanted), start_(duals, duals + columns) {
    restart();
  }

  void continue_auction(const double* duals, const std::int32_t* column_of_row, double epsilon) {
    std::copy_n(duals, columns_, v_.data());
    for (std::int64_t i = 0; i < rows_; ++i) {
      if (column_of_row[i] >= 0) assign(i, column_of_row[i]);
    }
    epsilon_ = epsilon;
    auctioned_ = true;
  }

  // Goes on until lists are requested, or to the end.
  void advance() {
    clear_requests();
    while (step_ != Step::done && requests_.empty()) {
      switch (step_) {
        case Step::list:
          request_all();
          step_ = auctioned_ ? Step::judge_auction : Step::match;
          break;
        case Step::judge_auction: judge_auction(); break;
        case Step::bid: bid(); break;
        case Step::match: match(); break;
        case Step::reduce: reduce(); break;
        case Step::find_paths: match_along_paths(); break;
        case Step::done: break;
      }
    }
  }

  using RequestedLists::column_of_row;
  using RequestedLists::duals;
  using RequestedLists::requests;
  using RequestedLists::set_lists;

 private:
  enum class Step { list, judge_auction, bid, match, reduce, find_paths, done };
  // Requests of the auction and of row reduction. Path searches match what is left.
  static constexpr int kMaxRequests = 8;

  // Without the auction.
  void restart() {
    std::copy(start_.begin(), start_.end(), v_.data());
    unassign_all();
    auctioned_ = false;
    step_ = Step::list;
  }

  // An auction does harm if most pairs share one cost: rows outbid one another up to that cost.
  void judge_auction() {
    std::int64_t gap_count;
    if (!auction_helps(list_bidders(), gap_count)) return restart();
    std::int64_t count = 0;
    for (std::int64_t i = rows_; i-- > 0;) {
      if (column_of_row_[i] < 0 && list_of(i) == i) stack_[count++] = i;
    }
    begin_bids(epsilon_, count);
    requests_left_ = kMaxRequests;
    step_ = Step::bid;
  }

  void bid() {
    if (!run_bids() && requests_left_-- > 0) return request_exhausted();
    step_ = Step::match;
  }

  void match() {
    clear_requests();
    requests_left_ = kMaxRequests;
    passes_left_ = kReductionPasses;
    begin_pass(match_tight());
  }

  void begin_pass(std::int64_t free_count) {
    if (free_count == 0) {
      step_ = Step::done;
    } else if (passes_left_-- > 0) {
      begin_reduction(free_count);
      step_ = Step::reduce;
    } else if (auctioned_ && free_count > rows_ / kManyLeft) {
      restart();
    } else {
      begin_paths();
      left_ = free_count;
      step_ = Step::find_paths;
    }
  }

  void reduce() {
    if (!run_reduction() && requests_left_-- > 0) return request_exhausted();
    clear_requests();
    begin_pass(list_free_rows());
  }

  void match_along_paths() {
    left_ = ListPaths::find_paths(left_);
    if (left_ > 0) {
      request_exhausted();
    } else {
      step_ = Step::done;
    }
  }

  std::vector<double> start_;  // column duals
  bool auctioned_ = false;
  Step step_ = Step::list;
  int requests_left_ = 0, passes_left_ = 0;
  std::int64_t left_ = 0;  // rows in stack_ for path searches
};

ListSearch::ListSearch(std::int64_t rows, std::int64_t columns, const double* duals, const std::int32_t* class_of_row,
                       std::int64_t wanted)
    : steps_(std::make_unique<Steps>(rows, columns, duals, class_of_row, wanted)) {}
ListSearch::~ListSearch() = default;

void ListSearch::continue_auction(const double* duals, const std::int32_t* column_of_row, double epsilon) {
  steps_->continue_auction(duals, column_of_row, epsilon);
}

const std::vector<RowsToList>& ListSearch::advance() {
  steps_->advance();
  return steps_->requests();
}

void ListSearch::set_lists(const MadeLists& lists) { steps_->set_lists(lists); }
const double* ListSearch::duals() const { return steps_->duals(); }
const std::int64_t* ListSearch::column_of_row() const { return steps_->column_of_row(); }

}  // namespace mudsc::cuda
