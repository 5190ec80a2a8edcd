// Lists that are made by scanning rows, of a matrix in memory or computed (assignment_rows.hpp).
//
// Lists hold the costs themselves; sums and duals are double. Scans work in the type of the costs (float for the
// halves) and lower the floor by the possible rounding error. Every cost must be finite.
// Parallel: a team lists or looks up rows in any order, with the same results.
#pragma once

#include "assignment_list_state.hpp"
#include "assignment_rows.hpp"

namespace mudsc::MUDSC_ISA {
namespace {

template <class Rows>
class RowLists : protected ListState<Rows, typename Rows::Scan> {
  using Lists = ListState<Rows, typename Rows::Scan>;

 protected:
  using Lists::bids_;
  using Lists::class_next_;
  using Lists::class_of_row_;
  using Lists::class_size_;
  using Lists::fetch_list;
  using Lists::kWanted;
  using Lists::list_of;
  using Lists::lists_;
  using Lists::look_up;
  using Rows::column_of_row_;
  using Rows::columns_;
  using Rows::panel_rows;
  using Rows::row_of_column_;
  using Rows::row_values;
  using Rows::rows_;
  using Rows::sign_;
  using Rows::v_;
  using typename Lists::BestTwo;
  using typename Lists::Known;
  using typename Lists::List;

  using Scan = typename Rows::Scan;  // type in which rows are scanned

  static constexpr bool kScansNow = true;
  static constexpr std::int64_t kFirstCapacity = 2 * kWanted;
  // Groups of a row for every entry wanted, so that few groups hold two of them.
  static constexpr std::int64_t kGroupsPerEntry = 16;
  // Groups of a row for the certificate, which reads one or two of them.
  static constexpr std::int64_t kCertificateGroups = 128;
  static constexpr int kMaxThreads = 64;
  // Rows that a thread takes at a time to list all rows, and to look up lists. Looking up fewer lists takes less time than
  // waking another thread.
  static constexpr std::int64_t kListGrain = 32;
  static constexpr std::int64_t kLookGrain = 256;
  // Bound on the relative rounding error of a reduced cost of type Scan: two roundings.
  static constexpr Scan kRounding = sizeof(Scan) == 4 ? Scan(1.2e-7) : Scan(2.3e-16);
  static constexpr Scan kMaxMagnitude = sizeof(Scan) == 4 ? Scan(1e35) : Scan(1e300);
  static constexpr Scan kMinMagnitude = sizeof(Scan) == 4 ? Scan(1e-28) : Scan(1e-280);

  // Working memory for listing a row, one for each thread.
  struct Scratch {
    Scratch() = default;
    explicit Scratch(const RowLists& lists)
        : row(lists), panel(lists.panel_rows() * panel_stride(lists.columns_)), scanner(lists.columns_) {}
    void widen(std::int64_t columns) {
      wide_costs = Buffer<double>(columns);
      wide_scanner = RowScanner<double>(columns);
    }
    typename Rows::RowScratch row;
    Buffer<Scan> panel;  // rows that are read together
    RowScanner<Scan> scanner;
    // Allocated when a row must be listed in double for the first time.
    Buffer<double> wide_costs;
    RowScanner<double> wide_scanner;
  };

  explicit RowLists(const typename Rows::Problem& problem)
      : Lists(problem.rows, problem),
        first_columns_(rows_ * kFirstCapacity),
        first_costs_(rows_ * kFirstCapacity),
        scan_v_(sizeof(Scan) < sizeof(double) ? columns_ : 0, Scan(0)),
        row_hashes_(rows_),
        exhausted_(rows_) {}
  ~RowLists() { release_lists(); }

  // Scans use column duals that are rounded up, so that rounding never makes a reduced cost too large.
  void set_v(std::int64_t column, double value) {
    v_[column] = value;
    all_v_are_zero_ &= value == 0.0;
    if constexpr (sizeof(Scan) < sizeof(double)) {
      const Scan rounded = static_cast<Scan>(value);
      const Scan magnitude = rounded < 0 ? -rounded : rounded, before = scan_v_[column];
      scan_v_[column] = static_cast<double>(rounded) < value ? rounded + kRounding * magnitude : rounded;
      if constexpr (Rows::kMayPrune) Rows::price_changed(column, before, scan_v_.data());
    }
  }

  // The column duals for scans.
  const Scan* scan_duals() const {
    if constexpr (sizeof(Scan) < sizeof(double)) {
      return scan_v_.data();
    } else {
      return v_.data();
    }
  }

  // A lower bound of every exact reduced cost that a scan found to be at least `found`.
  double floor_of(Scan found) const {
    const double floor = static_cast<double>(found);
    if (sizeof(Scan) == sizeof(double) || all_v_are_zero_) return floor;  // exact
    return floor - (floor < 0.0 ? -floor : floor) * static_cast<double>(kRounding);
  }

  void release_lists() {
    for (std::int64_t i = 0; i < rows_; ++i) {
      if (lists_[i].own_block) std::free(lists_[i].columns);
      lists_[i] = List{};
    }
  }

  // Calls body(item, scratch) for every item in [0, count), shared out to the team `grain` at a time.
  template <class Body>
  void in_parallel(std::int64_t count, std::int64_t grain, const Body& body) {
    bool out_of_memory = false;
    auto range = [&](std::int64_t begin, std::int64_t end, int member) {
      try {
        for (std::int64_t item = begin; item < end; ++item) body(item, scratches_[member]);
      } catch (const OutOfMemory&) {
        __atomic_store_n(&out_of_memory, true, __ATOMIC_RELAXED);
      }
    };
    team_->run(count, grain, range);
    if (out_of_memory) throw OutOfMemory{};
  }

  // Copies the column duals for scans.
  void copy_duals() {
    all_v_are_zero_ = true;
    for (std::int64_t j = 0; j < columns_; ++j) set_v(j, v_[j]);
  }

  bool list_all_rows(std::int64_t wanted) {
    release_lists();
    bool finite = true;
    Scan largest = 0;
    // list_entries() makes the list of row i and returns the row's largest magnitude.
    const auto list = [&](std::int64_t i, const auto& list_entries) {
      if (!__atomic_load_n(&finite, __ATOMIC_RELAXED)) return;
      lists_[i] = List{first_columns_.data() + i * kFirstCapacity,
                       first_costs_.data() + i * kFirstCapacity,
                       0,
                       kFirstCapacity,
                       kInfinity,
                       0,
                       false};
      const Scan most = list_entries();
      if (!(most < kMaxMagnitude)) __atomic_store_n(&finite, false, __ATOMIC_RELAXED);  // NaN too
      atomic_max(largest, most);
      row_hashes_[i] = most == 0 ? Rows::kHashOfZeros : hash_listed(i);
    };
    if (const std::int64_t height = panel_rows(); height > 0) {
      in_parallel((rows_ + height - 1) / height, 1, [&](std::int64_t panel, Scratch& scratch) {
        const std::int64_t begin = panel * height, end = begin + height < rows_ ? begin + height : rows_;
        Scan* const rows = scratch.panel.data();
        Rows::read_panel(begin, end, rows, panel_stride(columns_));
        for (std::int64_t i = begin; i < end; ++i) {
          const Scan* const row = rows + (i - begin) * panel_stride(columns_);
          list(i, [&] { return list_values(i, row, wanted, scratch, row); });
        }
      });
    } else {
      in_parallel(rows_, kListGrain, [&](std::int64_t i, Scratch& scratch) {
        list(i, [&] { return list_row(i, wanted, scratch, i + 1 < rows_ ? i + 1 : i); });
      });
    }
    return finite && (largest > kMinMagnitude || largest == 0);
  }

  // Hash of a row's sample and of its smallest reduced cost as just listed, which equal rows share.
  std::uint64_t hash_listed(std::int64_t row) const {
    const List& list = lists_[row];
    const Scan* const duals = scan_duals();
    Scan least = list.size > 0 ? list.costs[0] - duals[list.columns[0]] : Scan(0);
    for (std::int64_t k = 1; k < list.size; ++k) {
      const Scan cost = list.costs[k] - duals[list.columns[k]];
      least = cost < least ? cost : least;
    }
    std::uint64_t hash = Rows::sampled_hash(row);
    mix(hash, static_cast<double>(least));
    return hash | 1;
  }

  // Raises the shared `value` to `candidate` if that is larger.
  static void atomic_max(Scan& value, Scan candidate) {
    Scan known;
    __atomic_load(&value, &known, __ATOMIC_RELAXED);
    while (candidate > known &&
           !__atomic_compare_exchange(&value, &known, &candidate, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
  }

  // Lists about `wanted` of the smallest reduced costs of a row, as many as the list has room for, and prefetches the
  // row `next_row`. Returns the row's largest magnitude; if that is not below kMaxMagnitude, nothing is listed.
  Scan list_row(std::int64_t row, std::int64_t wanted, Scratch& scratch, std::int64_t next_row) {
    if constexpr (Rows::kMayPrune) {
      if (Rows::is_pruned() && lists_[row].capacity < columns_) return list_near(row, wanted, scratch);
    }
    const Scan* const values = row_values(row, scratch.row);
    return list_values(row, values, wanted, scratch, next_row == row ? nullptr : Rows::address_of(next_row));
  }

  // The same where only some entries of the row are computed.
  Scan list_near(std::int64_t row, std::int64_t wanted, Scratch& scratch) {
    List& list = lists_[row];
    const auto near = Rows::gather_near(row, scan_duals(), wanted, scratch.row);
    const Scan* const values = scratch.row.row.data();
    scratch.scanner.set_columns(near.count);
    scratch.scanner.read(values, static_cast<Scan>(sign_), scratch.row.prices.data(), kGroupsPerEntry * wanted,
                         nullptr);
    list.size = 0;
    const Scan floor = scratch.scanner.list_smallest(
        wanted, list.capacity, start_of(row), [&](std::int64_t k) { append(list, scratch.row.columns[k], values[k]); });
    scratch.scanner.set_columns(columns_);
    list.floor = floor_of(floor < near.bound ? floor : near.bound);
    return Rows::largest_magnitude(row);
  }

  // The same for a row of these values; prefetches another at `next`, if that is not null.
  Scan list_values(std::int64_t row, const Scan* values, std::int64_t wanted, Scratch& scratch, const void* next) {
    List& list = lists_[row];
    scratch.scanner.read(values, static_cast<Scan>(sign_), scan_duals(), kGroupsPerEntry * wanted, next);
    list.size = 0;
    list.floor = kInfinity;
    const Scan largest = scratch.scanner.largest_magnitude();
    if (!(largest < kMaxMagnitude)) return largest;
    const auto add = [&](std::int64_t column) { append(list, column, values[column]); };
    if (list.capacity >= columns_) {
      for (std::int64_t j = 0; j < columns_; ++j) add(j);
    } else {
      list.floor = floor_of(scratch.scanner.list_smallest(wanted, list.capacity, start_of(row), add));
    }
    return largest;
  }

  // Rows start at different positions, so that rows full of ties do not all list the same columns.
  double start_of(std::int64_t row) const { return static_cast<double>(row) / static_cast<double>(rows_); }

  // Lists a row again in double: scans in float cannot tell which of several nearly equal entries are the smallest.
  void relist_in_double(std::int64_t row, std::int64_t wanted, Scratch& scratch) {
    if (sizeof(Scan) == sizeof(double)) return relist(row, wanted, scratch, row);
    List& list = lists_[row];
    make_room(list, wanted);
    if (scratch.wide_costs.size() == 0) scratch.widen(columns_);
    double* const costs = scratch.wide_costs.data();
    const Scan* const values = row_values(row, scratch.row);
    for (std::int64_t j = 0; j < columns_; ++j) costs[j] = sign_ * static_cast<double>(values[j]);
    scratch.wide_scanner.read(costs, 1.0, v_.data(), kGroupsPerEntry * wanted, nullptr);
    list.size = 0;
    list.floor = kInfinity;
    const auto add = [&](std::int64_t column) { append(list, column, values[column]); };
    if (list.capacity >= columns_) {
      for (std::int64_t j = 0; j < columns_; ++j) add(j);
    } else {
      list.floor = scratch.wide_scanner.list_smallest(wanted, list.capacity, start_of(row), add);
    }
  }

  // The smallest reduced cost of a row, from its list if the floor proves it. Otherwise the row is scanned: scans never
  // overestimate, so only groups with a scanned minimum up to the best known cost can hold a smaller one, and their few
  // entries are computed in double.
  double min_reduced_cost(std::int64_t row, Scratch& scratch) const {
    const List& list = lists_[row];
    double least = Rows::cost(row, column_of_row_[row]) - v_[column_of_row_[row]];
    for (std::int64_t k = 0; k < list.size; ++k) {
      const double cost = static_cast<double>(list.costs[k]) - v_[list.columns[k]];
      least = cost < least ? cost : least;
    }
    if (least <= list.floor || list.size == columns_) return least;
    // Not below `least`, whatever the conversion rounds.
    const Scan rounded = static_cast<Scan>(least);
    const Scan bound = rounded + (rounded < 0 ? -rounded : rounded) * kRounding + kMinMagnitude * kRounding;
    if constexpr (Rows::kMayPrune) {
      if (Rows::is_pruned()) {
        const std::int64_t count = Rows::gather_up_to(row, scan_duals(), bound, scratch.row);
        for (std::int64_t k = 0; k < count; ++k) {
          const double cost = sign_ * static_cast<double>(scratch.row.row[k]) - v_[scratch.row.columns[k]];
          least = cost < least ? cost : least;
        }
        return least;
      }
    }
    const Scan* const values = row_values(row, scratch.row);
    scratch.scanner.read(values, static_cast<Scan>(sign_), scan_duals(), kCertificateGroups, nullptr);
    scratch.scanner.visit(bound, 0.0, [&](std::int64_t column) {
      const double cost = sign_ * static_cast<double>(values[column]) - v_[column];
      least = cost < least ? cost : least;
      return true;
    });
    return least;
  }

  void append(List& list, std::int64_t column, Scan value) const {
    list.columns[list.size] = static_cast<std::int32_t>(column);
    list.costs[list.size++] = static_cast<Scan>(sign_) * value;
  }

  void make_room(List& list, std::int64_t wanted) const {
    const std::int64_t room = 4 * wanted >= columns_ ? columns_ : 2 * wanted;
    if (room <= list.capacity) return;
    // Costs follow the columns, an even number of them so that costs are aligned.
    const std::int64_t aligned_room = room + (room & 1);
    void* const block = std::malloc(static_cast<std::size_t>(aligned_room) * (sizeof(std::int32_t) + sizeof(Scan)));
    if (block == nullptr) throw OutOfMemory{};
    if (list.own_block) std::free(list.columns);
    list.columns = static_cast<std::int32_t*>(block);
    list.costs = reinterpret_cast<Scan*>(list.columns + aligned_room);
    list.capacity = room;
    list.own_block = true;
  }

  // Lists a row again at the current duals, with room for at least `wanted` entries, and prefetches the row `next_row`.
  void relist(std::int64_t row, std::int64_t wanted, Scratch& scratch, std::int64_t next_row) {
    make_room(lists_[row], wanted);
    list_row(row, wanted, scratch, next_row);
  }

  void before_rereading() {
    Rows::before_rereading([this](std::int64_t count, const auto& body) {
      this->in_parallel(count, 1, [&body](std::int64_t item, Scratch&) { body(item); });
    });
  }

  void relist(std::int64_t row, std::int64_t wanted) {
    before_rereading();
    relist(row, wanted, scratches_[0], row);
  }

  // The two smallest reduced costs of a row, which is listed again if its list does not hold them.
  BestTwo best_two(std::int64_t row, Known known, Scratch& scratch, std::int64_t next_row) {
    BestTwo best;
    if (look_up(row, known, best)) return best;
    relist(row, kWanted, scratch, next_row);
    if (look_up(row, known, best)) return best;
    for (std::int64_t wanted = kWanted;; wanted *= 4) {
      relist_in_double(row, wanted, scratch);
      if (look_up(row, known, best)) return best;
      const double floor = lists_[row].floor;
      if (best.first > floor) continue;                         // more ties than the list has room for
      best.second = best.second < floor ? best.second : floor;  // an unlisted entry attains the floor
      return best;
    }
  }

  // Each row bids on a list of its own, equal rows too.
  std::int64_t list_for_bid(std::int64_t row) const { return row; }

  double min_reduced_cost_or_floor(std::int64_t row) { return best_two(row, Known::first, scratches_[0], row).first; }

  double cost_of(std::int64_t row, std::int64_t column) const { return Rows::cost(row, column); }

  // Equal rows bid together at the reduced costs of all columns.
  std::int64_t price_class(std::int64_t first, std::int64_t, double* reduced) {
    const Scan* const values = row_values(first, scratches_[0].row);
    for (std::int64_t j = 0; j < columns_; ++j) reduced[j] = sign_ * static_cast<double>(values[j]) - v_[j];
    return columns_;
  }
  std::int64_t priced_column(std::int64_t, std::int64_t k) const { return k; }
  double priced_cost(std::int64_t first, std::int64_t k) const { return Rows::cost(first, k); }

  // Sets the classes of equal rows.
  void find_classes() {
    class_of_row_.fill(-1);
    const auto skip_none = [](const std::int64_t*, std::int64_t) { return false; };
    Rows::for_equal_rows(row_hashes_, skip_none, [this](const std::int64_t* rows, std::int64_t count) {
      for (std::int64_t k = 0; k < count; ++k) {
        class_of_row_[rows[k]] = rows[0];
        class_next_[rows[k]] = k + 1 < count ? rows[k + 1] : -1;
      }
      class_size_[rows[0]] = count;
    });
  }

  // Looks up the bids of several rows in their lists, at the current duals.
  void look_up_bids(const std::int64_t* rows, std::int64_t count, Known known) {
    in_parallel(count, kLookGrain, [&](std::int64_t k, Scratch&) {
      __builtin_prefetch(&lists_[rows[k + 4 < count ? k + 4 : k]]);
      fetch_list(rows[k + 2 < count ? k + 2 : k]);
      if (!look_up(rows[k], known, bids_[k])) bids_[k].column = -1;
    });
  }

  // Lists rows without a bid again and finds their bids. Each thread prefetches the row that it will most likely take
  // next.
  void list_exhausted(const std::int64_t* rows, std::int64_t count, Known known) {
    before_rereading();
    std::int64_t exhausted = 0;
    for (std::int64_t k = 0; k < count; ++k) {
      if (bids_[k].column < 0) exhausted_[exhausted++] = k;
    }
    in_parallel(exhausted, 1, [&](std::int64_t item, Scratch& scratch) {
      const std::int64_t k = exhausted_[item], later = item + team_->size();
      bids_[k] = best_two(rows[k], known, scratch, rows[exhausted_[later < exhausted ? later : item]]);
    });
  }

  Buffer<std::int32_t> first_columns_;
  Buffer<Scan> first_costs_;
  Buffer<Scan> scan_v_;  // v, rounded up for scans in float
  bool all_v_are_zero_ = true;
  Buffer<std::uint64_t> row_hashes_;
  // Threads of the problem being solved, and their working memory.
  Team* team_ = nullptr;
  Scratch scratches_[kMaxThreads];
  Buffer<std::int64_t> exhausted_;  // places of the bids whose lists are exhausted
};

}  // namespace
}  // namespace mudsc::MUDSC_ISA
