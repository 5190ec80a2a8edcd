// Lists of the least few reduced costs of every row, for searches that need no more.
//
// A list has a floor that no unlisted reduced cost is below. Column duals only fall, so reduced costs only rise and
// floors stay valid. Lists hold costs as they are; sums and duals are double. Scans work in the type of the costs (float
// for the halves) and lower the floor by what rounding can have done. Every cost must be finite.
// Parallel: all rows are listed, or looked up, by the members of a team, in any order with the same results.
#pragma once

#include "assignment_scan.hpp"
#include "assignment_state.hpp"

namespace mudsc::MUDSC_ISA {
namespace {

template <class T>
class RowLists : protected AssignmentState<T> {
  using State = AssignmentState<T>;

 protected:
  using State::column_of_row_;
  using State::columns_;
  using State::row_of_column_;
  using State::rows_;
  using State::sign_;
  using State::v_;
  using State::values_;

  using Scan = typename ArithmeticOf<T>::type;  // that rows are scanned in

  // Entries that a row lists at first. Fewer are read again too often, more cost time at every bid.
  static constexpr std::int64_t kWanted = 16;
  static constexpr std::int64_t kFirstCapacity = 2 * kWanted;
  // Groups that a row is divided into for every entry wanted: then few groups hold two of them.
  static constexpr std::int64_t kGroupsPerEntry = 16;
  // Groups of a row for the certificate, which looks into one or two of them.
  static constexpr std::int64_t kCertificateGroups = 128;
  static constexpr int kMaxThreads = 64;
  // Rows that a thread takes at a time, to list them all, and to look into their lists.
  static constexpr std::int64_t kListGrain = 32;
  static constexpr std::int64_t kLookGrain = 8;
  // How far rounding can move a reduced cost of type Scan, relative to the numbers it is made of: two roundings.
  static constexpr Scan kRounding = sizeof(Scan) == 4 ? Scan(1.2e-7) : Scan(2.3e-16);
  static constexpr Scan kMaxMagnitude = sizeof(Scan) == 4 ? Scan(1e35) : Scan(1e300);
  static constexpr Scan kMinMagnitude = sizeof(Scan) == 4 ? Scan(1e-28) : Scan(1e-280);

  struct List {
    std::int32_t* columns;
    Scan* costs;
    std::int64_t size;
    std::int64_t capacity;
    double floor;         // no unlisted reduced cost is less, now or later
    std::int64_t search;  // the path search that listed the row last
    bool own_block;       // whether the arrays were allocated for this list alone
  };

  struct BestTwo {
    double first;
    double second;
    std::int64_t column;
    double price;  // the column's dual when this was found
  };

  // What must be known of a row: its least reduced cost, or the second one too.
  enum class Known { first, both };

  // What listing a row needs besides the row; one for each thread.
  struct Scratch {
    Scratch() = default;
    explicit Scratch(std::int64_t columns) : widened(sizeof(T) == sizeof(Scan) ? 0 : columns), scanner(columns) {}
    void widen(std::int64_t columns) {
      wide_costs = Buffer<double>(columns);
      wide_scanner = RowScanner<double>(columns);
    }
    Buffer<Scan> widened;
    RowScanner<Scan> scanner;
    // Made where a row must be listed in double first.
    Buffer<double> wide_costs;
    RowScanner<double> wide_scanner;
  };

  explicit RowLists(const AssignmentProblem& problem)
      : State(problem),
        lists_(rows_),
        first_columns_(rows_ * kFirstCapacity),
        first_costs_(rows_ * kFirstCapacity),
        scan_v_(sizeof(Scan) < sizeof(double) ? columns_ : 0, Scan(0)),
        row_hashes_(rows_),
        class_of_row_(rows_),
        bids_(rows_),
        exhausted_(rows_) {
    for (std::int64_t i = 0; i < rows_; ++i) lists_[i] = List{};
  }
  RowLists(const RowLists&) = delete;
  RowLists& operator=(const RowLists&) = delete;
  ~RowLists() { release_lists(); }

  // Scans use column duals that are rounded up, so that rounding never makes a reduced cost too large.
  void set_v(std::int64_t column, double value) {
    v_[column] = value;
    all_v_are_zero_ &= value == 0.0;
    if constexpr (sizeof(Scan) < sizeof(double)) {
      const Scan rounded = static_cast<Scan>(value);
      const Scan magnitude = rounded < 0 ? -rounded : rounded;
      scan_v_[column] = static_cast<double>(rounded) < value ? rounded + kRounding * magnitude : rounded;
    }
  }

  // The column duals that rows are scanned with.
  const Scan* scan_duals() const {
    if constexpr (sizeof(Scan) < sizeof(double)) {
      return scan_v_.data();
    } else {
      return v_.data();
    }
  }

  // A bound below every reduced cost in double that a scan found to be at least `found`.
  double floor_of(Scan found) const {
    const double floor = static_cast<double>(found);
    if (sizeof(Scan) == sizeof(double) || all_v_are_zero_) return floor;  // computed alike
    return floor - (floor < 0.0 ? -floor : floor) * static_cast<double>(kRounding);
  }

  void release_lists() {
    for (std::int64_t i = 0; i < rows_; ++i) {
      if (lists_[i].own_block) std::free(lists_[i].columns);
      lists_[i] = List{};
    }
  }

  // A row's values in the scanning type.
  const Scan* scan_values(std::int64_t row, Scratch& scratch) const {
    const T* const values = values_ + row * columns_;
    if constexpr (sizeof(T) == sizeof(Scan)) {
      return reinterpret_cast<const Scan*>(values);
    } else {
      Scan* const out = scratch.widened.data();
      for (std::int64_t j = 0; j < columns_; ++j) out[j] = widen(values[j]);
      return out;
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

  // Column duals as scans take them.
  void copy_duals() {
    all_v_are_zero_ = true;
    for (std::int64_t j = 0; j < columns_; ++j) set_v(j, v_[j]);
  }

  bool list_all_rows(std::int64_t wanted) {
    release_lists();
    bool finite = true;
    Scan largest = 0;
    in_parallel(rows_, kListGrain, [&](std::int64_t i, Scratch& scratch) {
      if (!__atomic_load_n(&finite, __ATOMIC_RELAXED)) return;
      lists_[i] = List{first_columns_.data() + i * kFirstCapacity,
                       first_costs_.data() + i * kFirstCapacity,
                       0,
                       kFirstCapacity,
                       kInfinity,
                       0,
                       false};
      const Scan most = list_row(i, wanted, scratch, i + 1 < rows_ ? i + 1 : i);
      if (!(most < kMaxMagnitude)) __atomic_store_n(&finite, false, __ATOMIC_RELAXED);  // NaN too
      atomic_max(largest, most);
      row_hashes_[i] = most == 0 ? State::kHashOfZeros : hash_listed(i);
    });
    return finite && (largest > kMinMagnitude || largest == 0);
  }

  // A row's sampled hash and its least reduced cost as it was just listed, which equal rows share.
  std::uint64_t hash_listed(std::int64_t row) const {
    const List& list = lists_[row];
    const Scan* const duals = scan_duals();
    Scan least = list.size > 0 ? list.costs[0] - duals[list.columns[0]] : Scan(0);
    for (std::int64_t k = 1; k < list.size; ++k) {
      const Scan cost = list.costs[k] - duals[list.columns[k]];
      least = cost < least ? cost : least;
    }
    std::uint64_t hash = State::sampled_hash(row);
    mix(hash, static_cast<double>(least));
    return hash | 1;
  }

  // Raises the shared `value` to `candidate` if that is larger, whatever other threads do.
  static void atomic_max(Scan& value, Scan candidate) {
    Scan known;
    __atomic_load(&value, &known, __ATOMIC_RELAXED);
    while (candidate > known &&
           !__atomic_compare_exchange(&value, &known, &candidate, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
  }

  // Lists about the `wanted` least reduced costs of a row, as many as the list has room for, while the row `upcoming`
  // is fetched. Returns the row's largest magnitude, or something not less than kMaxMagnitude, with nothing listed, if the
  // row cannot be.
  Scan list_row(std::int64_t row, std::int64_t wanted, Scratch& scratch, std::int64_t next_row) {
    List& list = lists_[row];
    const Scan* const values = scan_values(row, scratch);
    scratch.scanner.read(values, static_cast<Scan>(sign_), scan_duals(), kGroupsPerEntry * wanted,
                         values_ + next_row * columns_);
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

  // Rows begin at different places, so that rows full of ties do not all list the same columns.
  double start_of(std::int64_t row) const { return static_cast<double>(row) / static_cast<double>(rows_); }

  // Lists a row again in double: where entries tie, or nearly, scans in float cannot tell which ones are the least.
  void relist_in_double(std::int64_t row, std::int64_t wanted, Scratch& scratch) {
    if (sizeof(Scan) == sizeof(double)) return relist(row, wanted, scratch, row);
    List& list = lists_[row];
    make_room(list, wanted);
    if (scratch.wide_costs.size() == 0) scratch.widen(columns_);
    const T* const values = values_ + row * columns_;
    double* const costs = scratch.wide_costs.data();
    for (std::int64_t j = 0; j < columns_; ++j) costs[j] = sign_ * static_cast<double>(widen(values[j]));
    scratch.wide_scanner.read(costs, 1.0, v_.data(), kGroupsPerEntry * wanted, costs);
    list.size = 0;
    list.floor = kInfinity;
    const auto add = [&](std::int64_t column) { append(list, column, widen(values[column])); };
    if (list.capacity >= columns_) {
      for (std::int64_t j = 0; j < columns_; ++j) add(j);
    } else {
      list.floor = scratch.wide_scanner.list_smallest(wanted, list.capacity, start_of(row), add);
    }
  }

  // A scan finds no entry dearer than it is: only groups in which it finds one as good as the best that is known can
  // hold a better one, and these few entries are priced in double.
  double min_reduced_cost(std::int64_t row, Scratch& scratch) const {
    const List& list = lists_[row];
    double least = State::cost(row, column_of_row_[row]) - v_[column_of_row_[row]];
    for (std::int64_t k = 0; k < list.size; ++k) {
      const double cost = static_cast<double>(list.costs[k]) - v_[list.columns[k]];
      least = cost < least ? cost : least;
    }
    if (least <= list.floor || list.size == columns_) return least;
    const Scan* const values = scan_values(row, scratch);
    scratch.scanner.read(values, static_cast<Scan>(sign_), scan_duals(), kCertificateGroups, values);
    // Not less than `least`, whatever the conversion rounds.
    const Scan rounded = static_cast<Scan>(least);
    const Scan bound = rounded + (rounded < 0 ? -rounded : rounded) * kRounding + kMinMagnitude * kRounding;
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
    // Costs lie behind the columns, an even number of these so that costs are aligned.
    const std::int64_t aligned_room = room + (room & 1);
    void* const block = std::malloc(static_cast<std::size_t>(aligned_room) * (sizeof(std::int32_t) + sizeof(Scan)));
    if (block == nullptr) throw OutOfMemory{};
    if (list.own_block) std::free(list.columns);
    list.columns = static_cast<std::int32_t*>(block);
    list.costs = reinterpret_cast<Scan*>(list.columns + aligned_room);
    list.capacity = room;
    list.own_block = true;
  }

  // Lists a row again at the duals of now, with room for `wanted` entries at least, while the row `upcoming` is
  // fetched.
  void relist(std::int64_t row, std::int64_t wanted, Scratch& scratch, std::int64_t next_row) {
    make_room(lists_[row], wanted);
    list_row(row, wanted, scratch, next_row);
  }

  // Fetches a list that will soon be looked into, the place of which is known or comes fast.
  void fetch_list(std::int64_t row) const {
    const List& list = lists_[row];
    for (std::int64_t k = 0; k < kFirstCapacity; k += 16) {
      __builtin_prefetch(list.columns + k);
      __builtin_prefetch(list.costs + k);
    }
  }

  // The least two reduced costs in a row's list. Returns whether they are known to be the row's.
  bool look_up(std::int64_t row, Known known, BestTwo& best) const {
    const List& list = lists_[row];
    best = BestTwo{kInfinity, kInfinity, -1, 0.0};
    for (std::int64_t k = 0; k < list.size; ++k) {
      const double cost = static_cast<double>(list.costs[k]) - v_[list.columns[k]];
      if (cost < best.second) {
        if (cost < best.first) {
          best.second = best.first;
          best.first = cost;
          best.column = list.columns[k];
        } else {
          best.second = cost;
        }
      }
    }
    if (best.column >= 0) best.price = v_[best.column];
    return (known == Known::both ? best.second : best.first) <= list.floor || list.size == columns_;
  }

  // The same, listing the row again if they are not known.
  BestTwo best_two(std::int64_t row, Known known, Scratch& scratch, std::int64_t next_row) {
    BestTwo best;
    if (look_up(row, known, best)) return best;
    relist(row, kWanted, scratch, next_row);
    if (look_up(row, known, best)) return best;
    for (std::int64_t wanted = kWanted;; wanted *= 4) {
      relist_in_double(row, wanted, scratch);
      if (look_up(row, known, best)) return best;
      const double floor = lists_[row].floor;
      if (best.first > floor) continue;                         // there were more ties than could be listed
      best.second = best.second < floor ? best.second : floor;  // which an unlisted entry attains
      return best;
    }
  }

  // Finds the bids of several rows at the duals of now. Rows whose lists do not tell are listed again together, by all
  // threads, each while the one that its thread will most likely take next is fetched.
  void find_bids(const std::int64_t* rows, std::int64_t count, Known known) {
    in_parallel(count, kLookGrain, [&](std::int64_t k, Scratch&) {
      __builtin_prefetch(&lists_[rows[k + 4 < count ? k + 4 : k]]);
      fetch_list(rows[k + 2 < count ? k + 2 : k]);
      if (!look_up(rows[k], known, bids_[k])) bids_[k].column = -1;
    });
    std::int64_t exhausted = 0;
    for (std::int64_t k = 0; k < count; ++k) {
      if (bids_[k].column < 0) exhausted_[exhausted++] = k;
    }
    in_parallel(exhausted, 1, [&](std::int64_t item, Scratch& scratch) {
      const std::int64_t k = exhausted_[item], later = item + team_->size();
      bids_[k] = best_two(rows[k], known, scratch, rows[exhausted_[later < exhausted ? later : item]]);
    });
  }

  // A listed free column of a row at this reduced cost; -1 if there is none.
  std::int64_t free_column_at(std::int64_t row, double reduced_cost) const {
    const List& list = lists_[row];
    for (std::int64_t k = 0; k < list.size; ++k) {
      const std::int64_t column = list.columns[k];
      if (row_of_column_[column] < 0 && static_cast<double>(list.costs[k]) - v_[column] == reduced_cost) return column;
    }
    return -1;
  }

  // The row whose list a path search uses for this one: equal rows share one, which may grow long where they tie.
  std::int64_t list_of(std::int64_t row) const { return class_of_row_[row] < 0 ? row : class_of_row_[row]; }

  Buffer<List> lists_;
  Buffer<std::int32_t> first_columns_;
  Buffer<Scan> first_costs_;
  Buffer<Scan> scan_v_;  // v as scans in float take it
  bool all_v_are_zero_ = true;
  Buffer<std::uint64_t> row_hashes_;
  Buffer<std::int64_t> class_of_row_;  // by its first row; -1 for a row without equals
  // Threads of the problem being solved, and what each of them needs.
  Team* team_ = nullptr;
  Scratch scratches_[kMaxThreads];
  // What find_bids found, and those whose lists were exhausted.
  Buffer<BestTwo> bids_;
  Buffer<std::int64_t> exhausted_;
};

}  // namespace
}  // namespace mudsc::MUDSC_ISA
