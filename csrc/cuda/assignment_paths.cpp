// The end of a large assignment, on the host: shortest augmenting paths on the lists that the device made.
//
// What few rows an auction leaves are matched one after another, by searches that depend on each other and look at a few
// thousand entries: a CPU core's work, on 2 to 30 MB of lists. The method is that of csrc/cpu/assignment_sparse.hpp, but
// that a search which reaches a row's floor, where an unlisted entry could matter, is put off until the device has
// listed anew all rows that such searches met. Searches that were put off change nothing, so that nothing is missed.
#include <algorithm>
#include <limits>

#include "mudsc/assignment_cuda.hpp"

namespace mudsc::cuda {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr std::int64_t kWanted = 32;
constexpr int kReductionPasses = 2;
constexpr std::int64_t kBidsPerRow = 32;
constexpr std::int64_t kStepsPerRow = 4;

// Of a row, or of all rows that are equal.
struct List {
  std::vector<std::int32_t> columns;
  std::vector<float> costs;
  double floor = -kInfinity;         // no unlisted reduced cost is less, now or later, as duals only fall
  std::int64_t wanted = kWanted;
  std::int64_t listed_at = 0;        // how many paths had been found
};

struct BestTwo {
  double first = kInfinity;
  double second = kInfinity;
  std::int32_t column = -1;
};

struct Event {
  double distance;
  std::int64_t what;  // a column, or the number of columns + a row whose floor is reached
};
bool later(const Event& a, const Event& b) { return a.distance > b.distance; }

}  // namespace

class PathSolver::Search {
 public:
  Search(std::int64_t rows, std::int64_t columns, const double* duals, const std::int32_t* class_of_row)
      : rows_(rows),
        columns_(columns),
        v_(duals, duals + columns),
        u_(rows),
        class_of_row_(class_of_row, class_of_row + rows),
        members_(rows, 0),
        column_of_row_(rows, -1),
        row_of_column_(columns, -1),
        lists_(rows),
        distance_(columns),
        parent_(columns),
        seen_(columns, 0),
        closed_(columns, 0),
        row_distance_(rows),
        class_seen_(rows, 0),
        requested_at_(rows, 0) {
    for (const std::int32_t first : class_of_row_) ++members_[first];
  }

  void set_list(std::int64_t row, const std::int32_t* columns, const float* costs, std::int64_t size, double floor) {
    List& list = lists_[row];
    list.columns.assign(columns, columns + size);
    list.costs.assign(costs, costs + size);
    list.floor = floor;
    list.listed_at = paths_;
  }

  // The lists of equal rows begin at different places among their ties: together they hold columns for most of the rows.
  void add_to_class(std::int64_t row, const std::int32_t* columns, const float* costs, std::int64_t size) {
    List& list = lists_[class_of_row_[row]];
    std::vector<char> listed(columns_, 0);
    for (const std::int32_t column : list.columns) listed[column] = 1;
    for (std::int64_t k = 0; k < size; ++k) {
      if (listed[columns[k]]) continue;
      list.columns.push_back(columns[k]);
      list.costs.push_back(costs[k]);
    }
  }

  bool is_first(std::int64_t row) const { return class_of_row_[row] == row; }

  // Takes over the pairs of an auction, to bid on where it ended.
  void continue_auction(const std::int32_t* column_of_row, double epsilon) {
    epsilon_ = epsilon;
    for (std::int64_t i = 0; i < rows_; ++i) {
      if (column_of_row[i] >= 0) assign(i, column_of_row[i]);
    }
  }

  void advance() {
    if (!started_) {
      if (epsilon_ > 0.0) auction();
      start();
    }
    started_ = true;
    requested_.clear();
    ++pass_;
    std::vector<std::int64_t> left;
    for (const std::int64_t row : free_) {
      if (!augment(row)) left.push_back(row);
    }
    free_ = std::move(left);
  }

  std::int64_t wanted() const {
    std::int64_t most = kWanted;
    for (const std::int32_t row : requested_) most = std::max(most, lists_[row].wanted);
    return most;
  }

  const std::vector<std::int32_t>& requested() const { return requested_; }
  const double* duals() const { return v_.data(); }
  const std::int64_t* column_of_row() const { return column_of_row_.data(); }

 private:
  List& list_of(std::int64_t row) { return lists_[class_of_row_[row]]; }
  const List& list_of(std::int64_t row) const { return lists_[class_of_row_[row]]; }

  BestTwo best_two(std::int64_t row) const {
    const List& list = list_of(row);
    BestTwo best;
    for (std::size_t k = 0; k < list.columns.size(); ++k) {
      const double cost = static_cast<double>(list.costs[k]) - v_[list.columns[k]];
      if (cost < best.first) {
        best = {cost, best.first, list.columns[k]};
      } else if (cost < best.second) {
        best.second = cost;
      }
    }
    return best;
  }

  double cost(std::int64_t row, std::int64_t column) const {
    const List& list = list_of(row);
    const auto at = std::find(list.columns.begin(), list.columns.end(), column) - list.columns.begin();
    return static_cast<double>(list.costs[at]);
  }

  void assign(std::int64_t row, std::int64_t column) {
    column_of_row_[row] = column;
    row_of_column_[column] = row;
  }

  // A listed free column of a row at this reduced cost; -1 if there is none.
  std::int64_t free_column_at(std::int64_t row, double reduced) const {
    const List& list = list_of(row);
    for (std::size_t k = 0; k < list.columns.size(); ++k) {
      const std::int64_t column = list.columns[k];
      if (row_of_column_[column] < 0 && static_cast<double>(list.costs[k]) - v_[column] == reduced) return column;
    }
    return -1;
  }

  // Bids of one row after another, on lists: a row whose list does not tell its second best bids no more.
  void auction() {
    std::vector<std::int64_t> bidders;
    for (std::int64_t i = 0; i < rows_; ++i) {
      if (column_of_row_[i] < 0 && is_first(i)) bidders.push_back(i);
    }
    for (std::int64_t bids = kBidsPerRow * rows_; !bidders.empty() && bids > 0; --bids) {
      const std::int64_t row = bidders.back();
      bidders.pop_back();
      const BestTwo best = best_two(row);
      if (best.second > list_of(row).floor) continue;
      v_[best.column] -= best.second - best.first + epsilon_;
      const std::int64_t displaced = row_of_column_[best.column];
      assign(row, best.column);
      if (displaced >= 0) bidders.push_back(displaced);
    }
    std::fill(column_of_row_.begin(), column_of_row_.end(), -1);
    std::fill(row_of_column_.begin(), row_of_column_.end(), -1);
  }

  // Rows take their best columns, then augmenting row reduction (Jonker and Volgenant, Computing 38, 1987).
  void start() {
    for (std::int64_t i = 0; i < rows_; ++i) {
      const BestTwo best = best_two(i);
      u_[i] = std::min(best.first, list_of(i).floor);
      const std::int64_t column = best.first <= list_of(i).floor ? free_column_at(i, best.first) : -1;
      if (column >= 0) {
        assign(i, column);
      } else {
        free_.push_back(i);
      }
    }
    for (int pass = 0; pass < kReductionPasses; ++pass) reduce_rows();
  }

  void reduce_rows() {
    std::int64_t steps = kStepsPerRow * rows_;
    std::vector<std::int64_t> left;
    for (std::int64_t row : free_) {
      while (row >= 0) {
        const BestTwo best = best_two(row);
        const bool lowers = best.first < best.second;
        std::int64_t column = best.column;
        if (!lowers && row_of_column_[column] >= 0) column = free_column_at(row, best.first);
        if (best.second > list_of(row).floor || column < 0 || --steps < 0) {
          u_[row] = std::min(best.first, list_of(row).floor);
          left.push_back(row);
          break;
        }
        if (lowers) v_[column] -= best.second - best.first;
        const std::int64_t displaced = row_of_column_[column];
        assign(row, column);
        u_[row] = cost(row, column) - v_[column];  // as the pair has it, so that it is tight to the last bit
        if (displaced >= 0) column_of_row_[displaced] = -1;
        row = displaced;
      }
    }
    free_ = std::move(left);
  }

  double floor_distance(std::int64_t row) const {
    return row_distance_[row] + std::max(0.0, list_of(row).floor - u_[row]);
  }

  void push(double distance, std::int64_t what) {
    heap_.push_back({distance, what});
    std::push_heap(heap_.begin(), heap_.end(), later);
  }

  // Lowers distances through a row of the tree. Of equal rows only the first one that a search reaches can lower any.
  void relax(std::int64_t row) {
    if (class_seen_[class_of_row_[row]] == search_) return;
    class_seen_[class_of_row_[row]] = search_;
    relaxed_rows_.push_back(row);
    const List& list = list_of(row);
    const double reached = row_distance_[row], offset = reached - u_[row];
    for (std::size_t k = 0; k < list.columns.size(); ++k) {
      const std::int64_t column = list.columns[k];
      // Rounding must not shorten a path.
      const double distance = std::max(reached, offset + (static_cast<double>(list.costs[k]) - v_[column]));
      if (distance >= sink_distance_ || (seen_[column] == search_ && distance >= distance_[column])) continue;
      if (closed_[column] == search_) continue;
      seen_[column] = search_;
      distance_[column] = distance;
      parent_[column] = row;
      if (row_of_column_[column] < 0) {
        sink_distance_ = distance;
        sink_ = column;
      } else {
        push(distance, column);
      }
    }
    const double floor = floor_distance(row);
    if (floor < sink_distance_) push(floor, columns_ + row);
  }

  // Matches `root` along a shortest path in reduced costs and moves the duals along; false if lists end before that.
  bool augment(std::int64_t root) {
    ++search_;
    heap_.clear();
    tree_rows_.clear();
    relaxed_rows_.clear();
    tree_columns_.clear();
    sink_distance_ = kInfinity;
    u_[root] = std::min(best_two(root).first, list_of(root).floor);
    row_distance_[root] = 0.0;
    tree_rows_.push_back(root);
    relax(root);
    while (!heap_.empty() && heap_.front().distance < sink_distance_) {
      const Event event = heap_.front();
      std::pop_heap(heap_.begin(), heap_.end(), later);
      heap_.pop_back();
      if (event.what >= columns_) {
        request_lists();
        return false;
      }
      const std::int64_t column = event.what, row = row_of_column_[column];
      if (closed_[column] == search_ || event.distance > distance_[column]) continue;
      closed_[column] = search_;
      tree_columns_.push_back(column);
      row_distance_[row] = event.distance;
      tree_rows_.push_back(row);
      relax(row);
    }
    exchange(root);
    return true;
  }

  // Asks for the lists of all rows of the tree that can end before the nearest free column known. A row that no path
  // was found since it was listed must show more.
  void request_lists() {
    for (const std::int64_t row : relaxed_rows_) {
      const std::int32_t first = class_of_row_[row];
      if (requested_at_[first] == pass_ || floor_distance(row) >= sink_distance_) continue;
      requested_at_[first] = pass_;
      List& list = lists_[first];
      list.wanted = std::max(list.wanted, 2 * members_[first]);
      if (list.listed_at == paths_) list.wanted *= 2;
      requested_.push_back(first);
    }
  }

  void exchange(std::int64_t root) {
    ++paths_;
    for (const std::int64_t row : tree_rows_) u_[row] += sink_distance_ - row_distance_[row];
    for (const std::int64_t column : tree_columns_) v_[column] -= sink_distance_ - distance_[column];
    for (std::int64_t column = sink_;;) {
      const std::int64_t row = parent_[column], next = column_of_row_[row];
      assign(row, column);
      u_[row] = cost(row, column) - v_[column];
      if (row == root) return;
      column = next;
    }
  }

  std::int64_t rows_, columns_;
  std::vector<double> v_, u_;
  std::vector<std::int32_t> class_of_row_;
  std::vector<std::int64_t> members_;  // of the class, at its first row
  std::vector<std::int64_t> column_of_row_, row_of_column_;
  std::vector<List> lists_;
  std::vector<std::int64_t> free_;
  std::vector<std::int32_t> requested_;
  bool started_ = false;
  double epsilon_ = 0.0;  // of an auction to be continued
  std::int64_t paths_ = 0, pass_ = 0, search_ = 0;
  // Of one search; stamps tell what belongs to it.
  std::vector<double> distance_;
  std::vector<std::int64_t> parent_, seen_, closed_;
  std::vector<double> row_distance_;
  std::vector<std::int64_t> class_seen_, requested_at_, tree_rows_, relaxed_rows_, tree_columns_;
  std::vector<Event> heap_;
  std::int64_t sink_ = -1;
  double sink_distance_ = kInfinity;
};

PathSolver::PathSolver(std::int64_t rows, std::int64_t columns, const double* duals, const std::int32_t* class_of_row)
    : search_(std::make_unique<Search>(rows, columns, duals, class_of_row)) {}
PathSolver::~PathSolver() = default;

void PathSolver::set_lists(const std::int32_t* rows, std::int64_t count, std::int64_t capacity,
                           const std::int32_t* columns, const float* costs, const std::int32_t* sizes,
                           const double* floors) {
  for (std::int64_t k = 0; k < count; ++k) {
    const std::int64_t row = rows == nullptr ? k : rows[k];
    if (search_->is_first(row)) {
      search_->set_list(row, columns + k * capacity, costs + k * capacity, sizes[k], floors[k]);
    } else {
      search_->add_to_class(row, columns + k * capacity, costs + k * capacity, sizes[k]);
    }
  }
}

void PathSolver::continue_auction(const std::int32_t* column_of_row, double epsilon) {
  search_->continue_auction(column_of_row, epsilon);
}

const std::vector<std::int32_t>& PathSolver::advance() {
  search_->advance();
  return search_->requested();
}

std::int64_t PathSolver::wanted() const { return search_->wanted(); }
const double* PathSolver::duals() const { return search_->duals(); }
const std::int64_t* PathSolver::column_of_row() const { return search_->column_of_row(); }

}  // namespace mudsc::cuda
