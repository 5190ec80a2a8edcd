// Exact assignment of a dense matrix through short lists of each row's best entries.
//
// An optimal assignment uses only the best few entries of each row. Every row lists some of its least reduced costs,
// and keeps a floor that no unlisted one is below. Column duals only fall, so reduced costs only rise and a floor stays
// valid; a row is read again only when the search reaches its floor. The steps:
//   1. list all rows at duals 0 (or those given): the only time the whole matrix is read;
//   2. match each row to its best column where that is free; if many rows are left, one auction on the lists at a fixed
//      epsilon spreads the duals, and rows are matched again at what they are then;
//   3. augmenting row reduction on the lists (Jonker and Volgenant, Computing 38, 1987), many equal rows at a time;
//   4. shortest augmenting paths on the lists. "List row i again" is one more event of Dijkstra's search, at the
//      distance where an unlisted entry of the row could matter, so nothing is missed and no entry is priced twice;
//   5. the row duals anew, from the lists where a floor proves that they hold the row's least, else from the row.
// It is related to the look-back auction of Bus and Tvrdik ("Towards auction algorithms for large dense assignment
// problems", Computational Optimization and Applications 43, 2009).
//
// Lists hold costs as they are; sums and duals are double. Scans work in the type of the costs (float for the halves)
// and lower the floor by what rounding can have done. Every cost must be finite.
// Parallel: listing all rows and the certificate, over rows. Auction and row reduction find the bids of a block of rows
// at the same duals, by all threads, and make them one after another; rows that must be listed again for it are, so, a
// batch. Path searches are one thread's work on a few megabytes. Results do not depend on the number of threads.
#pragma once

#include "assignment_scan.hpp"
#include "assignment_state.hpp"

namespace mudsc::MUDSC_ISA {
namespace {

// Partially sorts so that the item of rank `rank` (from 0) is returned: Hoare's selection. Items must not be NaN.
template <class Number>
inline Number select_rank(Number* items, std::int64_t count, std::int64_t rank) {
  std::int64_t low = 0, high = count - 1;
  while (low < high) {
    const Number pivot = items[low + (high - low) / 2];
    std::int64_t i = low, j = high;
    while (i <= j) {
      while (items[i] < pivot) ++i;
      while (pivot < items[j]) --j;
      if (i <= j) {
        const Number item = items[i];
        items[i++] = items[j];
        items[j--] = item;
      }
    }
    if (rank <= j) {
      high = j;
    } else if (rank >= i) {
      low = i;
    } else {
      break;
    }
  }
  return items[rank];
}

template <class T>
class SparseSolver : private AssignmentState<T> {
  using State = AssignmentState<T>;
  using State::column_of_row_;
  using State::columns_;
  using State::row_of_column_;
  using State::rows_;
  using State::sign_;
  using State::u_;
  using State::v_;
  using State::values_;

  using Scan = typename ArithmeticOf<T>::type;  // that rows are scanned in

 public:
  // Below this many columns reading whole rows is as fast as keeping lists.
  static constexpr std::int64_t kLeastColumns = 768;

  explicit SparseSolver(const AssignmentProblem& problem)
      : State(problem),
        lists_(rows_),
        first_columns_(rows_ * kFirstCapacity),
        first_costs_(rows_ * kFirstCapacity),
        scan_v_(sizeof(Scan) < sizeof(double) ? columns_ : 0, Scan(0)),
        row_hashes_(rows_),
        class_of_row_(rows_),
        class_size_(rows_),
        class_next_(rows_),
        stack_(rows_),
        class_waits_(rows_),
        reduced_(columns_),
        gaps_(rows_),
        reached_(columns_),
        class_seen_(rows_),
        row_distance_(rows_),
        tree_rows_(rows_),
        tree_columns_(columns_),
        free_column_(columns_),
        heap_(4 * columns_),
        team_(nullptr),
        bids_(rows_),
        exhausted_(rows_) {
    for (std::int64_t i = 0; i < rows_; ++i) lists_[i] = List{};
  }
  SparseSolver(const SparseSolver&) = delete;
  SparseSolver& operator=(const SparseSolver&) = delete;
  ~SparseSolver() { release_lists(); }

  // Returns false, with nothing written, if an entry is not finite, or costs are so large or small that sums of the
  // scanning type could leave its range: that is the dense solver's work.
  bool solve(const AssignmentProblem& problem, std::int64_t index, int threads) {
    State::begin(problem, index);
    if (rows_are_constant()) return conclude_diagonal(problem, index);
    const std::int64_t worth = rows_ * columns_ / State::kEntriesPerThread;
    const std::int64_t most = worth < kMostThreads ? worth : kMostThreads;
    Team team(threads < most ? threads : static_cast<int>(most));
    team_ = &team;
    for (int member = 0; member < team.size(); ++member) scratches_[member] = Scratch(columns_);
    const bool warm = problem.prices != nullptr;
    copy_duals();
    if (!list_all_rows(warm ? kWantedOfWarm : kWanted)) return false;
    std::int64_t free_count = match_tight();
    if (free_count == 0) return conclude_at_once(problem, index);
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
    if (bids != AuctionResult::skipped && free_count > rows_ / kManyLeft) {
      // The auction did harm, as where rows outbid one another up to the cost of a forbidden pair: start over without.
      State::begin(problem, index);
      copy_duals();
      list_all_rows(warm ? kWantedOfWarm : kWanted);
      free_count = reduce_rows_in_passes(match_tight());
    }
    stamp_ = 0;
    reached_.fill(Reached{0.0, -1, 0});
    class_seen_.fill(0);
    list_free_columns();
    for (std::int64_t k = 0; k < free_count; ++k) augment(stack_[k]);
    order_classes();
    State::order_equal_columns();
    certify(problem, index);
    problem.status[index] = AssignmentStatus::optimal;
    return true;
  }

 private:
  // Entries that a row lists at first. Fewer are read again too often, more cost time at every bid.
  static constexpr std::int64_t kWanted = 16;
  static constexpr std::int64_t kFirstCapacity = 2 * kWanted;
  // The same at given duals, at which the search ends sooner.
  static constexpr std::int64_t kWantedOfWarm = 10;
  // Groups that a row is divided into for every entry wanted: then few groups hold two of them.
  static constexpr std::int64_t kGroupsPerEntry = 16;
  // Groups of a row for the certificate, which looks into one or two of them.
  static constexpr std::int64_t kCertificateGroups = 128;
  // The auction is skipped where no more than one in so many rows found its best column taken.
  static constexpr std::int64_t kFewFree = 20;
  // The same where duals were given: if they suit the problem, row reduction keeps more of them than an auction does.
  static constexpr std::int64_t kFewFreeOfWarm = 4;
  // Its epsilon, as a share of the median distance between a row's best and second best entry: large enough to end
  // soon, small enough that most rows then are where they belong.
  static constexpr double kEpsilonShare = 0.2;
  static constexpr std::int64_t kBidsPerRow = 100;
  // Listed entries equal to the floor that show that a row has many more.
  static constexpr std::int64_t kTiedEntries = 4;
  // After an auction, row reduction leaves no more than one in so many rows, but for one in hundreds, unless it failed.
  static constexpr std::int64_t kManyLeft = 32;
  static constexpr int kReductionPasses = 2;
  static constexpr std::int64_t kStepsPerRow = 4;
  // Rows whose bids are found together, at the same duals. One bid in a hundred is then stale when its turn comes.
  static constexpr std::int64_t kBlock = 64;
  // Equal rows that are so many take their steps of row reduction together; so many steps a pass.
  static constexpr std::int64_t kLargeClass = 16;
  static constexpr std::int64_t kClassSteps = 64;
  static constexpr std::int64_t kWasOfClass = -2;  // in place of a column's row; -1 for none comes after it
  // Free columns that a path search looks at before it lists a row again.
  static constexpr std::int64_t kProbes = 8;
  static constexpr int kMostThreads = 64;
  // Rows that a thread takes at a time, to list them all, and to look into their lists.
  static constexpr std::int64_t kListGrain = 32;
  static constexpr std::int64_t kLookGrain = 8;
  // How far rounding can move a reduced cost of type Scan, relative to the numbers it is made of: two roundings.
  static constexpr Scan kRounding = sizeof(Scan) == 4 ? Scan(1.2e-7) : Scan(2.3e-16);

  static constexpr Scan kLargest = sizeof(Scan) == 4 ? Scan(1e35) : Scan(1e300);
  static constexpr Scan kSmallest = sizeof(Scan) == 4 ? Scan(1e-28) : Scan(1e-280);

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

  // How an auction ended: with a column for every row, or with rows left, or it was no use.
  enum class AuctionResult { skipped, partial, complete };

  // What must be known of a row: its least reduced cost, or the second one too.
  enum class Known { first, both };

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
      if (!(most < kLargest)) __atomic_store_n(&finite, false, __ATOMIC_RELAXED);  // NaN too
      raise(largest, most);
      row_hashes_[i] = most == 0 ? State::kHashOfZeros : hash_listed(i);
    });
    return finite && (largest > kSmallest || largest == 0);
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
  static void raise(Scan& value, Scan candidate) {
    Scan known;
    __atomic_load(&value, &known, __ATOMIC_RELAXED);
    while (candidate > known &&
           !__atomic_compare_exchange(&value, &known, &candidate, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
  }

  // Lists about the `wanted` least reduced costs of a row, as many as the list has room for, while the row `upcoming`
  // is fetched. Returns the row's largest magnitude, or something not less than kLargest, with nothing listed, if the
  // row cannot be.
  Scan list_row(std::int64_t row, std::int64_t wanted, Scratch& scratch, std::int64_t upcoming) {
    List& list = lists_[row];
    const Scan* const values = scan_values(row, scratch);
    scratch.scanner.read(values, static_cast<Scan>(sign_), scan_duals(), kGroupsPerEntry * wanted,
                         values_ + upcoming * columns_);
    list.size = 0;
    list.floor = kInfinity;
    const Scan largest = scratch.scanner.largest_magnitude();
    if (!(largest < kLargest)) return largest;
    const auto add = [&](std::int64_t column) { append(list, column, values[column]); };
    if (list.capacity >= columns_) {
      for (std::int64_t j = 0; j < columns_; ++j) add(j);
    } else {
      list.floor = floor_of(scratch.scanner.list_least(wanted, list.capacity, start_of(row), add));
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
      list.floor = scratch.wide_scanner.list_least(wanted, list.capacity, start_of(row), add);
    }
  }

  // Whether every row is one finite number, over and over: a look at the first row unless it is.
  bool rows_are_constant() const {
    const std::size_t overlap = static_cast<std::size_t>(columns_ - 1) * sizeof(T);
    for (std::int64_t i = 0; i < rows_; ++i) {
      const T* const values = values_ + i * columns_;
      if (std::memcmp(values, values + 1, overlap) != 0 || State::cost(i, 0) - State::cost(i, 0) != 0.0) return false;
    }
    return true;
  }

  // All assignments are equally good.
  bool conclude_diagonal(const AssignmentProblem& problem, std::int64_t index) {
    v_.fill(0.0);
    for (std::int64_t i = 0; i < rows_; ++i) {
      State::assign(i, i);
      problem.row_duals[index * rows_ + i] = State::cost(i, 0);
    }
    State::conclude(problem, index);
    problem.status[index] = AssignmentStatus::optimal;
    return true;
  }

  // Every row has a best column of its own: the lists hold each row's least reduced cost, which proves it.
  bool conclude_at_once(const AssignmentProblem& problem, std::int64_t index) {
    if (any_tie_) {
      State::order_equal_rows(row_hashes_);
      State::order_equal_columns();
    }
    for (std::int64_t i = 0; i < rows_; ++i) problem.row_duals[index * rows_ + i] = u_[i];
    State::conclude(problem, index);
    problem.status[index] = AssignmentStatus::optimal;
    return true;
  }

  // The certificate of AssignmentState. Where a row's listed entries hold one that is not above the floor, no unlisted
  // one is less: floors are bounds at duals that have only fallen since. Other rows are read again.
  void certify(const AssignmentProblem& problem, std::int64_t index) {
    double* const least_costs = problem.row_duals + index * rows_;
    in_parallel(rows_, kListGrain, [&](std::int64_t i, Scratch& scratch) {
      if (list_of(i) == i) least_costs[i] = least_reduced_cost(i, scratch);
    });
    for (std::int64_t i = 0; i < rows_; ++i) least_costs[i] = least_costs[list_of(i)];
    State::conclude(problem, index);
  }

  // A scan finds no entry dearer than it is: only groups in which it finds one as good as the best that is known can
  // hold a better one, and these few entries are priced in double.
  double least_reduced_cost(std::int64_t row, Scratch& scratch) const {
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
    const Scan bound = rounded + (rounded < 0 ? -rounded : rounded) * kRounding + kSmallest * kRounding;
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
  void relist(std::int64_t row, std::int64_t wanted, Scratch& scratch, std::int64_t upcoming) {
    make_room(lists_[row], wanted);
    list_row(row, wanted, scratch, upcoming);
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
  BestTwo best_two(std::int64_t row, Known known, Scratch& scratch, std::int64_t upcoming) {
    BestTwo best;
    if (look_up(row, known, best)) return best;
    relist(row, kWanted, scratch, upcoming);
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

  // Moves a few rows from the end of stack_ to the beginning of block_, in the order in which they come off, and finds
  // their bids. How many does not depend on the number of threads, so neither does what follows.
  std::int64_t take_block(std::int64_t& free_count) {
    const std::int64_t count = free_count < kBlock ? free_count : kBlock;
    for (std::int64_t k = 0; k < count; ++k) block_[k] = stack_[--free_count];
    find_bids(block_, count, Known::both);
    return count;
  }

  // Calls bid(row, best) for the rows of a block, one after another; those whose lists do not tell wait again in
  // stack_.
  template <class Bid>
  void take_bids(std::int64_t& free_count, const Bid& bid) {
    const std::int64_t size = take_block(free_count);
    for (std::int64_t k = 0; k < size; ++k) {
      if (renew(block_[k], bids_[k])) {
        bid(block_[k], bids_[k]);
      } else {
        stack_[free_count++] = block_[k];
      }
    }
  }

  // Brings up to date a bid that others have come before. Costs only rise, so that the best column is still the best
  // unless its dual has moved; that the second best may have become worse makes a bid a lower one than it could be,
  // which matters to none but ties. Returns false if the list does not tell.
  bool renew(std::int64_t row, BestTwo& bid) const {
    const bool same_price = v_[bid.column] == bid.price;
    if (same_price && bid.first < bid.second) return true;
    const BestTwo before = bid;
    if (look_up(row, Known::both, bid)) return true;
    if (same_price) bid = before;
    return same_price;
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

  // Numbers the rows that have equals by their first equal; -1 for the others.
  void find_classes() {
    class_of_row_.fill(-1);
    const auto none = [](const std::int64_t*, std::int64_t) { return false; };
    State::for_equal_rows(row_hashes_, none, [this](const std::int64_t* rows, std::int64_t count) {
      for (std::int64_t k = 0; k < count; ++k) {
        class_of_row_[rows[k]] = rows[0];
        class_next_[rows[k]] = k + 1 < count ? rows[k + 1] : -1;
      }
      class_size_[rows[0]] = count;
    });
  }

  // As order_equal_rows, by the classes that are known.
  void order_classes() {
    std::int64_t count = 0;
    for (std::int64_t i = 0; i < rows_; ++i) {
      if (class_of_row_[i] >= 0) stack_[count++] = i;
    }
    sort(stack_.data(), count, [this](std::int64_t a, std::int64_t b) {
      return class_of_row_[a] != class_of_row_[b] ? class_of_row_[a] < class_of_row_[b] : a < b;
    });
    for (std::int64_t begin = 0, end; begin < count; begin = end) {
      for (end = begin; end < count && class_of_row_[stack_[end]] == class_of_row_[stack_[begin]]; ++end) {
        tree_columns_[end] = column_of_row_[stack_[end]];
      }
      sort_ascending(tree_columns_.data() + begin, end - begin);
      for (std::int64_t k = begin; k < end; ++k) State::assign(stack_[k], tree_columns_[k]);
    }
  }

  // Matches every row to a best column while there are free ones; returns how many rows are left, listed in stack_.
  std::int64_t match_tight() {
    for (std::int64_t i = 0; i < rows_; ++i) {
      column_of_row_[i] = -1;
      stack_[i] = i;
    }
    row_of_column_.fill(-1);
    find_bids(stack_.data(), rows_, Known::first);
    std::int64_t free_count = 0;
    any_tie_ = false;
    for (std::int64_t i = 0; i < rows_; ++i) {
      const BestTwo& best = bids_[i];
      const bool ties = best.first >= best.second || best.first >= lists_[i].floor;
      u_[i] = best.first;
      any_tie_ |= ties;
      std::int64_t column = best.column;
      if (row_of_column_[column] >= 0) column = ties ? free_column_at(i, best.first) : -1;
      if (column >= 0) {
        State::assign(i, column);
      } else {
        stack_[free_count++] = i;
      }
    }
    return free_count;
  }

  // Whether a row ends in a class of entries that many pairs share, so far as its list shows, as where one large cost
  // stands for all forbidden pairs: entries tie at the floor, or lie farther below it than from each other. Bids would
  // raise the prices of good columns up to it.
  bool has_background(std::int64_t row, double least) const {
    const List& list = lists_[row];
    std::int64_t tied = 0;
    double below = least;
    for (std::int64_t k = 0; k < list.size; ++k) {
      const double reduced = static_cast<double>(list.costs[k]) - v_[list.columns[k]];
      tied += reduced == list.floor;
      below = reduced < list.floor && reduced > below ? reduced : below;
    }
    return tied >= kTiedEntries || list.floor - below > below - least;
  }

  // One phase of Bertsekas' auction: a free row bids its best column's dual down until the second best is better by
  // epsilon. Of equal rows only the first takes part: they would outbid one another without end, and a path search
  // finds columns for all of them at once. Where most rows tie there is little to spread.
  AuctionResult auction() {
    std::int64_t free_count = 0;
    for (std::int64_t i = rows_; i-- > 0;) {
      if (class_of_row_[i] < 0 || class_of_row_[i] == i) stack_[free_count++] = i;
    }
    find_bids(stack_.data(), free_count, Known::both);
    std::int64_t count = 0, background = 0;
    for (std::int64_t k = 0; k < free_count; ++k) {
      const double floor = lists_[stack_[k]].floor;
      if (bids_[k].second > bids_[k].first && bids_[k].second < floor)
        gaps_[count++] = bids_[k].second - bids_[k].first;
      background += has_background(stack_[k], bids_[k].first);
    }
    if (count <= free_count / 2 || background > free_count / 4) return AuctionResult::skipped;
    const double epsilon = kEpsilonShare * select_rank(gaps_.data(), count, count / 2);
    row_of_column_.fill(-1);
    for (std::int64_t i = 0; i < rows_; ++i) column_of_row_[i] = -1;
    bool all_bid = free_count == rows_;
    // The first bid of a block is never stale: every block makes one.
    for (std::int64_t bids = kBidsPerRow * rows_; free_count > 0 && bids > 0;) {
      take_bids(free_count, [&](std::int64_t row, const BestTwo& best) {
        --bids;
        if (best.first >= lists_[row].floor) {
          all_bid = false;  // it would take one of many columns that are as good
          return;
        }
        set_v(best.column, v_[best.column] - (best.second - best.first) - epsilon);
        const std::int64_t displaced = row_of_column_[best.column];
        State::assign(row, best.column);
        if (displaced >= 0) {
          column_of_row_[displaced] = -1;
          stack_[free_count++] = displaced;
        }
      });
    }
    return all_bid && free_count == 0 ? AuctionResult::complete : AuctionResult::partial;
  }

  // Whether the pairs of now lack no more to the dual bound than this share of their sum. Never for a share of 0.
  bool within(double share) {
    if (share <= 0.0) return false;
    double total = 0.0, slack = 0.0;
    for (std::int64_t i = 0; i < rows_; ++i) {
      const double matched = State::cost(i, column_of_row_[i]);
      total += matched;
      slack += matched - v_[column_of_row_[i]] - best_two(i, Known::first, scratches_[0], i).first;
    }
    return slack <= share * (total < 0.0 ? -total : total);
  }

  bool is_of_large_class(std::int64_t row) const {
    return rows_ == columns_ && class_of_row_[row] >= 0 && class_size_[class_of_row_[row]] >= kLargeClass;
  }

  // Leaves a row without a column: to take a step of its own, on stack_, or one with its class, on tree_rows_.
  void release(std::int64_t row, std::int64_t& free_count) {
    column_of_row_[row] = -1;
    if (!is_of_large_class(row)) {
      stack_[free_count++] = row;
    } else if (const std::int64_t first = class_of_row_[row]; !class_waits_[first]) {
      class_waits_[first] = true;
      tree_rows_[classes_waiting_++] = first;
    }
  }

  // The step of row reduction for all rows of a class at once (Bertsekas and Castanon, "The auction algorithm for the
  // transportation problem", Annals of Operations Research 20, 1989): k equal rows take the k best columns, which
  // become as dear as the next best one. Rows that lose their columns are released; where the last of the best columns
  // tie, rows of the class may find none.
  void reduce_class(std::int64_t first, std::int64_t& free_count) {
    const std::int64_t size = class_size_[first];
    for (std::int64_t row = first; row >= 0; row = class_next_[row]) {
      if (column_of_row_[row] >= 0) row_of_column_[column_of_row_[row]] = kWasOfClass;
      column_of_row_[row] = -1;
    }
    for (std::int64_t j = 0; j < columns_; ++j) gaps_[j] = reduced_[j] = State::cost(first, j) - v_[j];
    const double bound = select_rank(gaps_.data(), columns_, size < columns_ ? size : columns_ - 1);
    std::int64_t row = first;
    const auto take = [&](std::int64_t column) {
      const std::int64_t displaced = row_of_column_[column];
      if (displaced >= 0) release(displaced, free_count);
      State::assign(row, column);
      u_[row] = State::cost(row, column) - v_[column];
      row = class_next_[row];
    };
    for (std::int64_t j = 0; j < columns_; ++j) {
      if (reduced_[j] >= bound) continue;
      set_v(j, v_[j] - (bound - reduced_[j]));
      take(j);
    }
    // Its own columns first, then free ones.
    for (std::int64_t state = kWasOfClass; state < 0; ++state) {
      for (std::int64_t j = 0; j < columns_ && row >= 0; ++j) {
        if (reduced_[j] == bound && row_of_column_[j] == state) take(j);
      }
    }
    for (std::int64_t j = 0; j < columns_; ++j) {
      if (row_of_column_[j] == kWasOfClass) row_of_column_[j] = -1;
    }
  }

  std::int64_t reduce_rows_in_passes(std::int64_t free_count) {
    for (int pass = 0; pass < kReductionPasses && free_count > 0; ++pass) free_count = reduce_rows(free_count);
    return free_count;
  }

  // As in the dense solver, on lists. Rows that are left are again listed in stack_.
  std::int64_t reduce_rows(std::int64_t free_count) {
    std::int64_t steps = kStepsPerRow * rows_, class_steps = kClassSteps;
    class_waits_.fill(false);
    classes_waiting_ = 0;
    const std::int64_t all = free_count;
    free_count = 0;
    for (std::int64_t k = 0; k < all; ++k) release(stack_[k], free_count);
    while (free_count > 0 || classes_waiting_ > 0) {
      if (free_count == 0) {
        const std::int64_t first = tree_rows_[--classes_waiting_];
        class_waits_[first] = false;
        if (--class_steps >= 0) reduce_class(first, free_count);
        continue;
      }
      take_bids(free_count, [&](std::int64_t row, const BestTwo& best) {
        const bool lowers = best.first < best.second;
        std::int64_t column = best.column;
        if (!lowers && row_of_column_[column] >= 0) column = free_column_at(row, best.first);
        if (column < 0 || --steps < 0) return;
        if (lowers) set_v(column, v_[column] - (best.second - best.first));
        const std::int64_t displaced = row_of_column_[column];
        State::assign(row, column);
        // The dual as the pair has it, so that the pair is tight to the last bit.
        u_[row] = State::cost(row, column) - v_[column];
        if (displaced >= 0) release(displaced, free_count);
      });
    }
    for (std::int64_t i = 0; i < rows_; ++i) {
      if (column_of_row_[i] < 0) stack_[free_count++] = i;
    }
    return free_count;
  }

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

  // The row whose list a path search uses for this one: equal rows share one, which may grow long where they tie.
  std::int64_t list_of(std::int64_t row) const { return class_of_row_[row] < 0 ? row : class_of_row_[row]; }

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
    const std::int64_t count = free_columns_ < kProbes ? free_columns_ : kProbes;
    for (std::int64_t k = 0; k < count; ++k) {
      const std::int64_t column = free_column_[k];
      double distance = row_distance_[row] + ((State::cost(row, column) - v_[column]) - u_[row]);
      if (distance < row_distance_[row]) distance = row_distance_[row];
      if (distance >= sink_distance_) continue;
      reached_[column] = Reached{distance, static_cast<std::int32_t>(row), static_cast<std::int32_t>(2 * stamp_)};
      sink_distance_ = distance;
      sink_ = column;
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

  Buffer<List> lists_;
  Buffer<std::int32_t> first_columns_;
  Buffer<Scan> first_costs_;
  Buffer<Scan> scan_v_;  // v as scans in float take it
  bool all_v_are_zero_ = true;
  Buffer<std::uint64_t> row_hashes_;
  // A class by its first row: how many there are, and each row's successor in it, -1 for the last.
  Buffer<std::int64_t> class_of_row_, class_size_, class_next_, stack_;
  Buffer<bool> class_waits_;  // for its step; those that do are in tree_rows_
  std::int64_t classes_waiting_ = 0;
  Buffer<double> reduced_;  // a row's reduced costs, when its class bids
  Buffer<double> gaps_;
  bool any_tie_ = false;  // whether a row had two best columns when it was matched
  // The search: stamps tell what belongs to the path being searched.
  std::int64_t stamp_ = 0;
  Buffer<Reached> reached_;
  Buffer<std::int64_t> class_seen_;
  Buffer<double> row_distance_;
  Buffer<std::int64_t> tree_rows_, tree_columns_, free_column_;
  std::int64_t free_columns_ = 0;
  Buffer<Event> heap_;
  std::int64_t heap_size_ = 0;
  std::int64_t sink_ = -1;
  double sink_distance_ = kInfinity;
  // Threads of the problem being solved, and what each of them needs.
  Team* team_;
  Scratch scratches_[kMostThreads];
  // Bids of a block of rows, and those of them whose lists did not tell.
  std::int64_t block_[kBlock];
  Buffer<BestTwo> bids_;
  Buffer<std::int64_t> exhausted_;
};

}  // namespace
}  // namespace mudsc::MUDSC_ISA
