// Shortest augmenting paths on lists (Dijkstra), on one thread: a search reads a few megabytes at most.
//
// "Row i reaches its floor" is one more event of the search, at the distance where an unlisted entry of the row could
// matter, so nothing is missed. Where rows can be scanned, the row is listed again and the search goes on. Otherwise
// the search requests the lists of all rows that can reach their floor, and is put off. It has changed nothing by then.
#pragma once

#include "assignment_bids.hpp"

namespace mudsc::MUDSC_ISA {
namespace {

template <class Lists>
class ListPaths : protected ListBids<Lists> {
  using Bids = ListBids<Lists>;

 protected:
  using Bids::class_of_row_;
  using Bids::column_of_row_;
  using Bids::columns_;
  using Bids::fetch_list;
  using Bids::kScansNow;
  using Bids::list_of;
  using Bids::lists_;
  using Bids::row_of_column_;
  using Bids::rows_;
  using Bids::set_v;
  using Bids::stack_;
  using Bids::u_;
  using Bids::v_;
  using typename Bids::List;

  // Free columns that a path search probes before it lists a row again. Each probe is a cache miss: after this many in
  // vain, over all searches since the last hit, searches stop probing.
  static constexpr std::int64_t kProbes = 64;
  static constexpr std::int64_t kMaxProbesInVain = 192;

  struct Event {
    double distance;
    std::int64_t what;  // a column, or columns_ + a row that reaches its floor
  };

  // A column in the path search that wrote its stamp: twice the number of the search, plus one once its distance is
  // final. One struct, so that reading it is one memory access.
  struct Reached {
    double distance;
    std::int32_t parent;  // the row from which it was reached
    std::int32_t stamp;
  };

  template <class... Arguments>
  explicit ListPaths(const Arguments&... arguments)
      : Bids(arguments...),
        reached_(columns_),
        class_seen_(rows_),
        row_distance_(rows_),
        tree_rows_(rows_),
        tree_columns_(columns_),
        free_column_(columns_),
        heap_(4 * columns_) {}

  void begin_paths() {
    stamp_ = 0;
    reached_.fill(Reached{0.0, -1, 0});
    class_seen_.fill(0);
    probes_in_vain_ = 0;
    list_free_columns();
  }

  // Matches the rows in stack_. Returns how many were put off and are still there. Ends early if searches keep failing:
  // they would request the same lists.
  std::int64_t find_paths(std::int64_t free_count) {
    std::int64_t left = 0, rows_in_vain = 0;
    for (std::int64_t k = 0; k < free_count; ++k) {
      if (rows_in_vain <= rows_ && augment(stack_[k])) continue;
      stack_[left++] = stack_[k];
      rows_in_vain += tree_size_;
    }
    return left;
  }

 private:
  // Where reaching a floor ends the search, it comes last of equal distances: a free column may be as near.
  bool is_before(const Event& a, const Event& b) const {
    if (kScansNow || a.distance != b.distance) return a.distance < b.distance;
    return a.what < columns_ && b.what >= columns_;
  }

  void push(double distance, std::int64_t what) {
    if (heap_size_ == heap_.size()) {
      Buffer<Event> larger(2 * heap_size_);
      for (std::int64_t k = 0; k < heap_size_; ++k) larger[k] = heap_[k];
      heap_ = static_cast<Buffer<Event>&&>(larger);
    }
    const Event event{distance, what};
    std::int64_t at = heap_size_++;
    for (; at > 0; at = (at - 1) / 2) {
      const Event& above = heap_[(at - 1) / 2];
      if (!is_before(event, above)) break;
      heap_[at] = above;
    }
    heap_[at] = event;
  }

  Event pop() {
    const Event top = heap_[0], last = heap_[--heap_size_];
    std::int64_t at = 0;
    for (;;) {
      std::int64_t child = 2 * at + 1;
      if (child >= heap_size_) break;
      if (child + 1 < heap_size_ && is_before(heap_[child + 1], heap_[child])) ++child;
      if (!is_before(heap_[child], last)) break;
      heap_[at] = heap_[child];
      at = child;
    }
    heap_[at] = last;
    return top;
  }

  // Distance at which an unlisted entry of a tree row could lower the distance of a column.
  double floor_distance(std::int64_t row) const {
    const double above = lists_[list_of(row)].floor - u_[row];
    return row_distance_[row] + (above > 0.0 ? above : 0.0);
  }

  // Lowers distances through a tree row. Of equal rows, only the first one reached can lower a distance.
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
      const double floor = floor_distance(row);
      if (floor < sink_distance_) push(floor, columns_ + row);
    }
  }

  // Lists the free columns, those with the highest duals first.
  void list_free_columns() {
    free_columns_ = 0;
    for (std::int64_t j = 0; j < columns_; ++j) {
      if (row_of_column_[j] < 0) free_column_[free_columns_++] = j;
    }
    sort(free_column_.data(), free_columns_,
         [this](std::int64_t a, std::int64_t b) { return v_[a] != v_[b] ? v_[a] > v_[b] : a < b; });
  }

  // If a row's entries tie at its floor, such as one large cost for forbidden pairs, a free column is likely to be
  // among them, and ends the search without listing the row again.
  void probe_free_columns(std::int64_t row) {
    if (probes_in_vain_ >= kMaxProbesInVain) return;
    const std::int64_t count = free_columns_ < kProbes ? free_columns_ : kProbes;
    probes_in_vain_ += count;
    for (std::int64_t k = 0; k < count; ++k) {
      const std::int64_t column = free_column_[k];
      double distance = row_distance_[row] + ((Lists::cost_of(row, column) - v_[column]) - u_[row]);
      if (distance < row_distance_[row]) distance = row_distance_[row];
      if (distance >= sink_distance_) continue;
      probes_in_vain_ = 0;
      reached_[column] = Reached{distance, static_cast<std::int32_t>(row), static_cast<std::int32_t>(2 * stamp_)};
      sink_distance_ = distance;
      sink_ = column;
    }
  }

  // Lists a row again that reaches its floor. False if a free column at that distance ends the search.
  bool relist(std::int64_t row, double distance) {
    if (floor_distance(row) > distance) return true;  // has been listed again since
    probe_free_columns(row);
    if (sink_distance_ <= distance) return false;
    // Listing a row twice in one search must list more of it.
    List& list = lists_[list_of(row)];
    Lists::relist(list_of(row), list.search == stamp_ ? 2 * list.size : list.size);
    list.search = stamp_;
    relax(row, true);
    return true;
  }

  // Requests the lists of all tree rows that reach their floor before the nearest free column known.
  void request_lists() {
    for (std::int64_t k = 0; k < tree_size_; ++k) {
      if (floor_distance(tree_rows_[k]) < sink_distance_) Lists::request_longer(list_of(tree_rows_[k]));
    }
  }

  void take_free_column(std::int64_t column) {
    std::int64_t at = 0;
    while (free_column_[at] != column) ++at;
    for (--free_columns_; at < free_columns_; ++at) free_column_[at] = free_column_[at + 1];
  }

  // Matches `root` along a shortest path in reduced costs (Dijkstra) and updates the duals. False if the search is put
  // off because lists are requested.
  bool augment(std::int64_t root) {
    ++stamp_;
    heap_size_ = 0;
    sink_ = -1;
    sink_distance_ = kInfinity;
    u_[root] = Lists::min_reduced_cost_or_floor(list_of(root));
    std::int64_t closed_count = 0;
    tree_size_ = 0;
    row_distance_[root] = 0.0;
    tree_rows_[tree_size_++] = root;
    relax(root, false);
    while (heap_size_ > 0 && heap_[0].distance < sink_distance_) {
      const Event event = pop();
      if (heap_size_ > 0 && heap_[0].what < columns_) fetch_list(list_of(row_of_column_[heap_[0].what]));
      if (event.what >= columns_) {
        const std::int64_t row = event.what - columns_;
        if constexpr (kScansNow) {
          if (!relist(row, event.distance)) break;
          continue;
        } else {
          request_lists();
          return false;
        }
      }
      const std::int64_t column = event.what;
      Reached& reached_column = reached_[column];
      if (reached_column.stamp > 2 * stamp_ || event.distance > reached_column.distance) continue;
      ++reached_column.stamp;
      tree_columns_[closed_count++] = column;
      const std::int64_t row = row_of_column_[column];
      row_distance_[row] = event.distance;
      tree_rows_[tree_size_++] = row;
      relax(row, false);
    }
    for (std::int64_t k = 0; k < tree_size_; ++k) u_[tree_rows_[k]] += sink_distance_ - row_distance_[tree_rows_[k]];
    for (std::int64_t k = 0; k < closed_count; ++k) {
      const std::int64_t column = tree_columns_[k];
      set_v(column, v_[column] - (sink_distance_ - reached_[column].distance));
    }
    take_free_column(sink_);
    for (std::int64_t column = sink_;;) {
      const std::int64_t row = reached_[column].parent, next = column_of_row_[row];
      Lists::assign(row, column);
      u_[row] = Lists::cost_of(row, column) - v_[column];
      if (row == root) return true;
      column = next;
    }
  }

  // State of the current search, recognized by its stamps.
  std::int64_t stamp_ = 0, tree_size_ = 0;
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
