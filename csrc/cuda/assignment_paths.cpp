// The end of a large assignment, on the host: shortest augmenting paths on the lists that the device made.
//
// What few rows are left by bids (assignment_bids.cpp) are matched one after another, by searches that depend on each
// other and look at a few thousand entries. The method is that of csrc/cpu/assignment_paths.hpp, but that a search
// which reaches a row's floor, where an unlisted entry could matter, is put off until the device has listed anew all
// rows that such searches met. Searches that were put off change nothing, so that nothing is missed.
#include <algorithm>
#include <optional>

#include "assignment_bids.hpp"
#include "mudsc/assignment_cuda.hpp"

namespace mudsc::cuda {
namespace {

// How much longer than at first a list is made that ended a search, and how much longer than before if it is not worn.
constexpr std::int64_t kGrowth = 4;
constexpr std::int64_t kRowsInVain = 1;  // for each row
constexpr std::int32_t kFloor = -1;

struct Event {
  double distance;
  std::int32_t what;  // a column; below 0 where a row's floor is reached
};
// At one distance floors come last: it may be that a free column is nearer than what is not listed, or as near.
bool later(const Event& a, const Event& b) {
  return a.distance != b.distance ? a.distance > b.distance : a.what < b.what;
}

// A column in the search that wrote its stamp: twice the search's number, and one more once its distance is final.
struct Reached {
  double distance = 0.0;
  std::int64_t stamp = 0;
  const Entry* entry = nullptr;  // by which it was reached
  std::int32_t parent = -1;      // and from which row
};

class PathSearch {
 public:
  explicit PathSearch(Matching& matching, std::vector<std::int32_t> free_rows)
      : matching_(matching),
        free_rows_(std::move(free_rows)),
        reached_(matching.columns),
        row_distance_(matching.rows),
        class_seen_(matching.rows, 0) {}

  // Matches what the lists allow, as long as searches do not fail one after another: they would meet the same rows.
  void run() {
    std::vector<std::int32_t> left;
    std::int64_t in_vain = 0;  // rows of trees that came to nothing
    for (const std::int32_t row : free_rows_) {
      if (in_vain <= kRowsInVain * matching_.rows && augment(row)) continue;
      left.push_back(row);
      in_vain += static_cast<std::int64_t>(tree_rows_.size());
    }
    free_rows_ = std::move(left);
    if (!free_rows_.empty()) matching_.ask_for_worn_lists();
  }

 private:
  double floor_distance(std::int64_t row) const {
    return row_distance_[row] + std::max(0.0, matching_.list_of(row).floor - matching_.u[row]);
  }

  void push(double distance, std::int32_t what) {
    heap_.push_back({distance, what});
    std::push_heap(heap_.begin(), heap_.end(), later);
  }

  double next_distance() const {
    if (!nearest_.empty()) return reached_[nearest_.back()].distance;
    return heap_.empty() ? kInfinity : heap_.front().distance;
  }

  // What is no farther than the row it was reached from, as in matrices full of ties, comes before all of the heap.
  Event pop() {
    if (!nearest_.empty()) {
      const std::int32_t column = nearest_.back();
      nearest_.pop_back();
      return {reached_[column].distance, column};
    }
    const Event event = heap_.front();
    std::pop_heap(heap_.begin(), heap_.end(), later);
    heap_.pop_back();
    return event;
  }

  // Takes a row into the tree, and lowers distances through it. Of equal rows only the first that a search reaches can
  // lower any.
  void relax(std::int32_t row, double reached) {
    row_distance_[row] = reached;
    tree_rows_.push_back(row);
    std::int64_t& seen = class_seen_[matching_.classes.first(row)];
    if (seen == search_) return;
    seen = search_;
    relaxed_rows_.push_back(row);
    const double offset = reached - matching_.u[row];
    for (const Entry& entry : matching_.list_of(row)) {
      if (offset + entry.least >= sink_distance_) break;
      // Rounding must not shorten a path.
      const double distance = std::max(reached, offset + entry.reduced(matching_.v));
      if (distance >= sink_distance_) continue;
      Reached& column = reached_[entry.column];
      if (column.stamp > 2 * search_ || (column.stamp == 2 * search_ && distance >= column.distance)) continue;
      column = {distance, 2 * search_, &entry, row};
      if (matching_.row_of_column[entry.column] < 0) {
        sink_distance_ = distance;
        sink_ = entry.column;
      } else if (distance == reached) {
        nearest_.push_back(entry.column);
      } else {
        push(distance, entry.column);
      }
    }
    const double floor = floor_distance(row);
    if (floor < sink_distance_) push(floor, kFloor);
  }

  void begin(std::int32_t root) {
    ++search_;
    heap_.clear();
    nearest_.clear();
    tree_rows_.clear();
    relaxed_rows_.clear();
    tree_columns_.clear();
    sink_distance_ = kInfinity;
    matching_.u[root] = std::min(matching_.best_two(root).first, matching_.list_of(root).floor);
    relax(root, 0.0);
  }

  // Matches `root` along a shortest path in reduced costs (Dijkstra) and moves the duals along; false if lists end
  // before that.
  bool augment(std::int32_t root) {
    begin(root);
    while (next_distance() < sink_distance_) {
      const Event event = pop();
      if (event.what == kFloor) {
        ask_for_lists();
        return false;
      }
      Reached& column = reached_[event.what];
      if (column.stamp > 2 * search_ || event.distance > column.distance) continue;
      ++column.stamp;
      tree_columns_.push_back(event.what);
      relax(matching_.row_of_column[event.what], event.distance);
    }
    exchange(root);
    return true;
  }

  // Asks for the lists of all rows of the tree that can end before the nearest free column known. A list that would be
  // much the same must show more.
  void ask_for_lists() {
    for (const std::int32_t row : relaxed_rows_) {
      if (floor_distance(row) >= sink_distance_) continue;
      const List& list = matching_.list_of(row);
      const std::int64_t needed =
          list.tells(list.size / 2, matching_.v) ? kGrowth * list.size : kGrowth * matching_.wanted;
      matching_.ask(row, std::max(needed, 2 * matching_.classes.size(matching_.classes.first(row))));
    }
  }

  void exchange(std::int32_t root) {
    for (const std::int32_t row : tree_rows_) matching_.u[row] += sink_distance_ - row_distance_[row];
    for (const std::int32_t column : tree_columns_) matching_.v[column] -= sink_distance_ - reached_[column].distance;
    for (std::int64_t column = sink_;;) {
      const Reached& reached = reached_[column];
      const std::int64_t next = matching_.column_of_row[reached.parent];
      matching_.assign_tight(reached.parent, *reached.entry);
      if (reached.parent == root) return;
      column = next;
    }
  }

  Matching& matching_;
  std::vector<std::int32_t> free_rows_;
  std::int64_t search_ = 0;
  // Of one search; stamps tell what belongs to it.
  std::vector<Reached> reached_;
  std::vector<double> row_distance_;
  std::vector<std::int64_t> class_seen_;
  std::vector<std::int32_t> tree_rows_, relaxed_rows_, tree_columns_;
  std::vector<Event> heap_;
  std::vector<std::int32_t> nearest_;  // columns
  std::int32_t sink_ = -1;
  double sink_distance_ = kInfinity;
};

}  // namespace

class PathSolver::Steps {
 public:
  Steps(std::int64_t rows, std::int64_t columns, const double* duals, const std::int32_t* class_of_row,
        std::int64_t wanted)
      : matching(rows, columns, duals, class_of_row, wanted), reduction_(matching) {}

  void continue_auction(const std::int32_t* column_of_row, double epsilon) {
    auction_.emplace(matching, column_of_row, epsilon);
  }

  void advance() {
    matching.requests.clear();
    if (!listed_) {
      for (std::int32_t i = 0; i < matching.rows; ++i) {
        if (matching.classes.is_first(i)) matching.ask(i, 0);
      }
      listed_ = true;
      return;
    }
    if (auction_ && auction_->run()) auction_.reset();
    if (!auction_ && !paths_ && reduction_.run()) paths_.emplace(matching, reduction_.left());
    if (paths_) paths_->run();
  }

  Matching matching;

 private:
  bool listed_ = false;
  std::optional<ListAuction> auction_;
  RowReduction reduction_;
  std::optional<PathSearch> paths_;
};

PathSolver::PathSolver(std::int64_t rows, std::int64_t columns, const double* duals, const std::int32_t* class_of_row,
                       std::int64_t wanted)
    : steps_(std::make_unique<Steps>(rows, columns, duals, class_of_row, wanted)) {}
PathSolver::~PathSolver() = default;

void PathSolver::continue_auction(const std::int32_t* column_of_row, double epsilon) {
  steps_->continue_auction(column_of_row, epsilon);
}

const std::vector<RowsToList>& PathSolver::advance() {
  steps_->advance();
  return requests();
}

const std::vector<RowsToList>& PathSolver::requests() const { return steps_->matching.requests.groups(); }

void PathSolver::set_lists(const std::int32_t* rows, std::int64_t count, std::int64_t capacity,
                           const std::int32_t* columns, const float* costs, const std::int32_t* sizes,
                           const double* floors) {
  Matching& matching = steps_->matching;
  matching.lists.set(rows, count, capacity, columns, costs, sizes, floors, matching.v);
}

const double* PathSolver::duals() const { return steps_->matching.v.data(); }
const std::int64_t* PathSolver::column_of_row() const { return steps_->matching.column_of_row.data(); }

}  // namespace mudsc::cuda
