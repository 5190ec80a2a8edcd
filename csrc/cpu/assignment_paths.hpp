// Shortest augmenting paths on lists (Dijkstra), one thread's work on a few megabytes.
//
// "List row i again" is one more event of the search, at the distance where an unlisted entry of the row could matter, so
// nothing is missed and no entry is priced twice.
#pragma once

#include "assignment_bids.hpp"

namespace mudsc::MUDSC_ISA {
namespace {

template <class T>
class ListPaths : protected ListBids<T> {
  using Bids = ListBids<T>;
  using State = AssignmentState<T>;

 protected:
  using Bids::best_two;
  using Bids::class_of_row_;
  using Bids::column_of_row_;
  using Bids::columns_;
  using Bids::fetch_list;
  using Bids::list_of;
  using Bids::lists_;
  using Bids::relist;
  using Bids::row_of_column_;
  using Bids::rows_;
  using Bids::scratches_;
  using Bids::set_v;
  using Bids::stack_;
  using Bids::u_;
  using Bids::v_;
  using typename Bids::Known;
  using typename Bids::List;

  // Free columns that a path search looks at before it lists a row again, and how many in vain, all searches together,
  // since one was found: each is a cache miss.
  static constexpr std::int64_t kProbes = 64;
  static constexpr std::int64_t kMaxProbesInVain = 192;

  struct Event {
    double distance;
    std::int64_t what;  // a column, or columns_ + a row that is to be listed again
  };

  // A column in the path search that wrote its stamp: twice the number of the search, and one more once its distance is
  // final. All of it is one access to memory.
  struct Reached {
    double distance;
    std::int32_t parent;  // the row that it was reached from
    std::int32_t stamp;
  };

  explicit ListPaths(const AssignmentProblem& problem)
      : Bids(problem),
        reached_(columns_),
        class_seen_(rows_),
        row_distance_(rows_),
        tree_rows_(rows_),
        tree_columns_(columns_),
        free_column_(columns_),
        heap_(4 * columns_) {}

  // Matches the rows that stack_ lists.
  void find_paths(std::int64_t free_count) {
    stamp_ = 0;
    reached_.fill(Reached{0.0, -1, 0});
    class_seen_.fill(0);
    list_free_columns();
    probes_in_vain_ = 0;
    for (std::int64_t k = 0; k < free_count; ++k) augment(stack_[k]);
  }

 private:
  void push(double distance, std::int64_t what) {
    if (heap_size_ == heap_.size()) {
      Buffer<Event> larger(2 * heap_size_);
      for (std::int64_t k = 0; k < heap_size_; ++k) larger[k] = heap_[k];
      heap_ = static_cast<Buffer<Event>&&>(larger);
    }
    std::int64_t at = heap_size_++;
    for (; at > 0; at = (at - 1) / 2) {
      const Event& above = heap_[(at - 1) / 2];
      if (above.distance <= distance) break;
      heap_[at] = above;
    }
    heap_[at] = Event{distance, what};
  }

  Event pop() {
    const Event top = heap_[0], last = heap_[--heap_size_];
    std::int64_t at = 0;
    for (;;) {
      std::int64_t child = 2 * at + 1;
      if (child >= heap_size_) break;
      if (child + 1 < heap_size_ && heap_[child + 1].distance < heap_[child].distance) ++child;
      if (heap_[child].distance >= last.distance) break;
      heap_[at] = heap_[child];
      at = child;
    }
    heap_[at] = last;
    return top;
  }

  // Distance at which an unlisted entry of a tree row could lower the distance of a column.
  double relist_distance(std::int64_t row) const {
    const double above = lists_[list_of(row)].floor - u_[row];
    return row_distance_[row] + (above > 0.0 ? above : 0.0);
  }

  // Lowers distances through a tree row. Of equal rows only the first one that a search reaches can lower any.
  void relax(std::int64_t row, bool listed_again) {
    const std::int64_t row_class = class_of_row_[row];
    if (row_class >= 0 && !listed_again) {
      if (class_seen_[row_class] == stamp_) return;
      class_seen_[row_class] = stamp_;
    }
    const List& list = lists_[list_of(row)];
    const double reached = row_distance_[row], offset = reached - u_[row];
    for (std::int64_t k = 0; k < list.size; ++k) {
      const std::int64_t column = list.columns[k];
      double distance = offset + (static_cast<double>(list.costs[k]) - v_[column]);
      if (distance < reached) distance = reached;  // rounding must not shorten a path
      if (distance >= sink_distance_) continue;
      Reached& reached_column = reached_[column];
      if (reached_column.stamp > 2 * stamp_) continue;
      if (reached_column.stamp == 2 * stamp_ && distance >= reached_column.distance) continue;
      reached_column = Reached{distance, static_cast<std::int32_t>(row), static_cast<std::int32_t>(2 * stamp_)};
      const std::int64_t paired = row_of_column_[column];
      if (paired < 0) {
        sink_distance_ = distance;
        sink_ = column;
      } else {
        __builtin_prefetch(&lists_[paired]);
        push(distance, column);
      }
    }
    if (list.size < columns_) {
      const double again = relist_distance(row);
      if (again < sink_distance_) push(again, columns_ + row);
    }
  }

  // Lists the columns without a row, those with the highest duals first.
  void list_free_columns() {
    free_columns_ = 0;
    for (std::int64_t j = 0; j < columns_; ++j) {
      if (row_of_column_[j] < 0) free_column_[free_columns_++] = j;
    }
    sort(free_column_.data(), free_columns_,
         [this](std::int64_t a, std::int64_t b) { return v_[a] != v_[b] ? v_[a] > v_[b] : a < b; });
  }

  // Where a row's entries tie at its floor, as where most pairs are forbidden by one large cost, a free column is
  // likely to be among them, and ends the search without listing the row again.
  void probe_free_columns(std::int64_t row) {
    if (probes_in_vain_ >= kMaxProbesInVain) return;
    const std::int64_t count = free_columns_ < kProbes ? free_columns_ : kProbes;
    probes_in_vain_ += count;
    for (std::int64_t k = 0; k < count; ++k) {
      const std::int64_t column = free_column_[k];
      double distance = row_distance_[row] + ((State::cost(row, column) - v_[column]) - u_[row]);
      if (distance < row_distance_[row]) distance = row_distance_[row];
      if (distance >= sink_distance_) continue;
      reached_[column] = Reached{distance, static_cast<std::int32_t>(row), static_cast<std::int32_t>(2 * stamp_)};
      sink_distance_ = distance;
      sink_ = column;
      probes_in_vain_ = 0;
    }
  }

  void take_free_column(std::int64_t column) {
    std::int64_t at = 0;
    while (free_column_[at] != column) ++at;
    for (--free_columns_; at < free_columns_; ++at) free_column_[at] = free_column_[at + 1];
  }

  // Matches `root` along a shortest path in reduced costs (Dijkstra) and moves the duals along.
  void augment(std::int64_t root) {
    ++stamp_;
    heap_size_ = 0;
    sink_ = -1;
    sink_distance_ = kInfinity;
    u_[root] = best_two(list_of(root), Known::first, scratches_[0], root).first;
    std::int64_t tree_size = 0, closed_count = 0;
    row_distance_[root] = 0.0;
    tree_rows_[tree_size++] = root;
    relax(root, false);
    while (heap_size_ > 0 && heap_[0].distance < sink_distance_) {
      const Event event = pop();
      if (heap_size_ > 0 && heap_[0].what < columns_) fetch_list(list_of(row_of_column_[heap_[0].what]));
      if (event.what >= columns_) {
        const std::int64_t row = event.what - columns_;
        if (relist_distance(row) > event.distance) continue;  // has been listed again since
        probe_free_columns(row);
        if (sink_distance_ <= event.distance) break;
        // Listing a row twice in one search must show more of it.
        const std::int64_t listed = list_of(row);
        const List& list = lists_[listed];
        relist(listed, list.search == stamp_ ? 2 * list.size : list.size, scratches_[0], listed);
        lists_[listed].search = stamp_;
        relax(row, true);
        continue;
      }
      const std::int64_t column = event.what;
      Reached& reached_column = reached_[column];
      if (reached_column.stamp > 2 * stamp_ || event.distance > reached_column.distance) continue;
      ++reached_column.stamp;
      tree_columns_[closed_count++] = column;
      const std::int64_t row = row_of_column_[column];
      row_distance_[row] = event.distance;
      tree_rows_[tree_size++] = row;
      relax(row, false);
    }
    for (std::int64_t k = 0; k < tree_size; ++k) u_[tree_rows_[k]] += sink_distance_ - row_distance_[tree_rows_[k]];
    for (std::int64_t k = 0; k < closed_count; ++k) {
      const std::int64_t column = tree_columns_[k];
      set_v(column, v_[column] - (sink_distance_ - reached_[column].distance));
    }
    take_free_column(sink_);
    for (std::int64_t column = sink_;;) {
      const std::int64_t row = reached_[column].parent, next = column_of_row_[row];
      State::assign(row, column);
      u_[row] = State::cost(row, column) - v_[column];
      if (row == root) return;
      column = next;
    }
  }

  // The search: stamps tell what belongs to the path being searched.
  std::int64_t stamp_ = 0;
  Buffer<Reached> reached_;
  Buffer<std::int64_t> class_seen_;
  Buffer<double> row_distance_;
  Buffer<std::int64_t> tree_rows_, tree_columns_, free_column_;
  std::int64_t free_columns_ = 0, probes_in_vain_ = 0;
  Buffer<Event> heap_;
  std::int64_t heap_size_ = 0;
  std::int64_t sink_ = -1;
  double sink_distance_ = kInfinity;
};

}  // namespace
}  // namespace mudsc::MUDSC_ISA
