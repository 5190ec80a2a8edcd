// Dense linear assignment by augmenting row reduction and shortest augmenting paths: for small problems, and for those
// with forbidden pairs.
//
// R. Jonker and A. Volgenant, "A shortest augmenting path algorithm for dense and sparse linear assignment problems",
// Computing 38 (1987), with column minima as first duals of square problems only, so that rectangular ones need no
// padding. Duals are double, in which float32 costs are exact.
//
// Up to 128 columns the choice among equally good assignments is that of D. F. Crouse, "On implementing 2D rectangular
// assignment algorithms", IEEE TAES 52 (2016), and with it scipy's. His order of search takes longer beyond a dozen
// columns, so it is gone through only where it can matter: at once where zeros, equal rows or many ties say so, else
// after the certificate, which lists the pairs that are as good as the chosen ones but for rounding. If exchanges along
// them lead nowhere but to worse assignments, the optimum is the only one.
//
// Memory traffic: the matrix is read once, into a copy in which rows are whole vectors; at the sizes this is for, it
// stays in cache. The certificate reads the copy once, a path search the rows of its tree. A problem with more columns
// is not copied: its rows are widened one at a time. One thread.
#pragma once

#include "assignment_scan.hpp"
#include "assignment_state.hpp"
#include "assignment_vectors.hpp"

namespace mudsc::MUDSC_ISA {
namespace {

// Gives equal rows and equal columns an order of their own; needed only where a problem has several optima.
template <class T>
class EqualsInOrder : private AssignmentState<T> {
  using State = AssignmentState<T>;

 public:
  EqualsInOrder(const AssignmentProblem& problem, std::int64_t index, std::int64_t* row_of_column) : State(problem) {
    State::begin(problem, index);
    for (std::int64_t j = 0; j < problem.columns; ++j) {
      if (row_of_column[j] >= 0) State::assign(row_of_column[j], j);
    }
    Buffer<std::uint64_t> row_hashes(problem.rows);
    for (std::int64_t i = 0; i < problem.rows; ++i) row_hashes[i] = State::sampled_hash(i);
    State::order_equal_rows(row_hashes);
    State::order_equal_columns();
    for (std::int64_t j = 0; j < problem.columns; ++j) row_of_column[j] = State::row_of_column_[j];
  }
};

template <class T>
class DenseSolver {
  using Number = typename ArithmeticOf<T>::type;  // that costs are copied as
  typedef std::int64_t Indices __attribute__((vector_size(kLanes * sizeof(std::int64_t)), may_alias));

 public:
  // Up to this many columns every choice between equally good assignments is made as Crouse's algorithm makes it.
  static constexpr std::int64_t kMaxInOrder = 128;

  explicit DenseSolver(const AssignmentProblem& problem)
      : rows_(problem.rows),
        columns_(problem.columns),
        width_((problem.columns + kPad - 1) / kPad * kPad),
        table_size_(std::int64_t{1} << (65 - __builtin_clzll(static_cast<std::uint64_t>(problem.rows)))),
        copied_(problem.columns <= kMaxCopied),
        sign_(problem.maximize ? Number(-1) : Number(1)) {
    // Counted first, then taken from one block: small problems are solved sooner than a dozen arrays are allocated.
    std::int64_t bytes = 0;
    lay_out([&](auto*& array, std::int64_t count) {
      (void)array;
      bytes += block_bytes(count * static_cast<std::int64_t>(sizeof *array));
    });
    unsigned char* at = near_;
    if (bytes > kNearBytes) {
      far_ = Buffer<unsigned char>(bytes);
      at = far_.data();
    }
    lay_out([&](auto*& array, std::int64_t count) {
      place(array, at);
      at += block_bytes(count * static_cast<std::int64_t>(sizeof *array));
    });
  }
  DenseSolver(const DenseSolver&) = delete;
  DenseSolver& operator=(const DenseSolver&) = delete;

  // `background`: whether most costs are the highest of their row. Column minima are then far from any good duals.
  void solve(const AssignmentProblem& problem, std::int64_t index, bool background = false) {
    begin(problem, index);
    background_ = background;
    problem.status[index] = AssignmentStatus::invalid;
    if (!copy_costs()) return;
    problem.status[index] = AssignmentStatus::infeasible;
    if (columns_ > kMaxInOrder && rows_are_constant()) {
      take_diagonal(problem, index);
    } else if (columns_ <= kAlwaysInOrder || (columns_ <= kMaxInOrder && has_zeros_) || !search()) {
      // Whether there is no assignment, too, is left to Crouse's order, which rounds like scipy.
      if (!solve_in_order(problem, index)) return;
    } else if (!certify(problem, index)) {
      if (columns_ > kMaxInOrder) {
        order_equals(problem, index);
      } else if (!solve_in_order(problem, index)) {
        return;
      }
    }
    conclude(problem, index);
    problem.status[index] = AssignmentStatus::optimal;
  }

 private:
  struct BestTwo {
    double first;
    double second;
    std::int64_t column;
  };

  // A column whose dual may have been lowered, and what it was before.
  struct Lowered {
    std::int64_t column;
    double dual;
  };

  // A column that a path search is done with, and what it was then; in Crouse's order also the column that took its
  // place.
  struct Closed {
    std::int64_t column;
    double distance;
    double dual;
    std::int64_t place;
    std::int64_t successor;
  };

  // Rows are padded to whole vectors of costs.
  static constexpr std::int64_t kPad = 64 / static_cast<std::int64_t>(sizeof(Number));
  // Up to this many columns his order of search is the fastest too.
  static constexpr std::int64_t kAlwaysInOrder = 12;
  // Up to this many columns costs are copied: 16 MB at most.
  static constexpr std::int64_t kMaxCopied = 1448;
  // Steps of row reduction, per row; path searches take the rows that are left. More steps leave fewer, but gain ever
  // less.
  static constexpr std::int64_t kStepsPerRow = 2;
  // Rows whose best columns are looked for together, as registers allow.
  static constexpr std::int64_t kAtOnce = kLanes < 8 ? 2 : 4;
  // Pairs that are as good as chosen ones, per row, beyond which an optimum is taken not to be the only one.
  static constexpr std::int64_t kMaxTiesPerRow = 4;
  // How far rounding can move the cost of an exchange, relative to the largest cost: far more than sums over 128 rows
  // lose in double, far less than what float32 costs differ by.
  static constexpr double kRounding = 1.5e-11;
  static constexpr std::int64_t kNearBytes = 8192;
  static constexpr std::int64_t kWord = 64;

  static std::int64_t block_bytes(std::int64_t bytes) { return (bytes + 63) / 64 * 64; }
  template <class Item>
  static void place(Item*& array, unsigned char* at) {
    array = reinterpret_cast<Item*>(at);
  }

  // Finds Crouse's assignment, or beyond his columns one like it; false if there is none.
  bool solve_in_order(const AssignmentProblem& problem, std::int64_t index) {
    if (!search_in_order()) return false;
    bound_column_duals();
    double* const row_duals = problem.row_duals + index * rows_;
    for (std::int64_t i = 0; i < rows_; ++i) row_duals[i] = least_reduced_cost(row_costs(i));
    if (columns_ > kMaxInOrder) order_equals(problem, index);
    return true;
  }

  void order_equals(const AssignmentProblem& problem, std::int64_t index) {
    EqualsInOrder<T>(problem, index, row_of_column_);
    for (std::int64_t j = 0; j < columns_; ++j) {
      if (row_of_column_[j] >= 0) column_of_row_[row_of_column_[j]] = j;
    }
  }

  // Calls take(array, count) for every array.
  template <class Take>
  void lay_out(const Take& take) {
    take(costs_, copied_ ? rows_ * width_ : width_);
    take(v_, width_);
    take(u_, rows_);
    take(distance_, width_);
    take(parent_, width_ + 1);
    take(row_of_column_, width_);
    take(closed_, rows_);
    take(free_rows_, rows_);
    take(is_free_, (width_ + kWord - 1) / kWord);
    take(moved_, (width_ + kWord - 1) / kWord);
    take(open_, columns_);
    take(places_, columns_);
    take(ties_, (kMaxTiesPerRow + 1) * rows_ + 1);
    take(tie_begin_, rows_ + 2);
    take(tied_into_, rows_ + 1);
    take(sums_, rows_);
    take(classes_, rows_);
    take(class_seen_, rows_);
    take(table_, table_size_);
  }

  void begin(const AssignmentProblem& problem, std::int64_t index) {
    values_ = static_cast<const T*>(problem.values) + index * rows_ * columns_;
    next_ = index + 1 < problem.batch ? values_ + rows_ * columns_ : nullptr;
    column_of_row_ = problem.column_of_row + index * rows_;
    given_ = problem.prices == nullptr || rows_ != columns_ ? nullptr : problem.prices + index * columns_;
  }

  void clear_pairs() {
    for (std::int64_t i = 0; i < rows_; ++i) column_of_row_[i] = -1;
    for (std::int64_t j = 0; j < columns_; ++j) row_of_column_[j] = -1;
    for (std::int64_t k = 0; k * kWord < columns_; ++k) {
      const std::int64_t left = columns_ - k * kWord;
      is_free_[k] = left >= kWord ? ~std::uint64_t{0} : (std::uint64_t{1} << left) - 1;
    }
  }

  bool is_free(std::int64_t column) const { return row_of_column_[column] < 0; }

  void assign(std::int64_t row, std::int64_t column) {
    row_of_column_[column] = row;
    column_of_row_[row] = column;
    is_free_[column / kWord] &= ~(std::uint64_t{1} << (column % kWord));
  }

  double cost(std::int64_t row, std::int64_t column) const {
    return static_cast<double>(copied_ ? costs_[row * width_ + column]
                                       : sign_ * widen(values_[row * columns_ + column]));
  }

  // A row's costs, in whole vectors: behind the last column they are infinite.
  const Number* row_costs(std::int64_t row) {
    if (copied_) return costs_ + row * width_;
    write_costs(row, costs_);
    return costs_;
  }

  void write_costs(std::int64_t row, Number* out) const {
    const T* const values = values_ + row * columns_;
    std::int64_t j = 0;
    if constexpr (sizeof(T) == sizeof(Number)) {
      // In whole vectors to the end, with entries of the next row that are made infinite: what is written piece by
      // piece cannot be read as a vector at once.
      using Vector = typename VectorOf<Number>::Type;
      using Memory = typename VectorOf<Number>::Unaligned;
      using Bits = typename VectorOf<Number>::Bits;
      constexpr std::int64_t kVectorLanes = kVectorBytes / static_cast<std::int64_t>(sizeof(Number));
      const auto costs_at = [&](std::int64_t begin) -> Vector {
        return sign_ * Vector(*reinterpret_cast<const Memory*>(values + begin));
      };
      for (; j + kVectorLanes <= columns_; j += kVectorLanes) *reinterpret_cast<Memory*>(out + j) = costs_at(j);
      if (j < columns_ && row * columns_ + j + kVectorLanes <= rows_ * columns_) {
        Bits lanes;
        for (std::int64_t k = 0; k < kVectorLanes; ++k) lanes[k] = static_cast<std::int32_t>(k);
        const Bits left = static_cast<std::int32_t>(columns_ - j) - Bits{};
        const Vector costs = costs_at(j);
        *reinterpret_cast<Memory*>(out + j) = lanes < left ? costs : static_cast<Number>(kInfinity) - Vector{};
        j += kVectorLanes;
      }
    }
    for (; j < columns_; ++j) out[j] = sign_ * widen(values[j]);
    for (; j < width_; ++j) out[j] = static_cast<Number>(kInfinity);
  }

  // Returns whether no cost is NaN or -inf; notes the largest magnitude and whether there are several rows or columns
  // of zeros, and makes column minima the first duals of a square problem, unless there are, or others are given.
  bool copy_costs() {
    using Vector = typename VectorOf<Number>::Type;
    using Memory = typename VectorOf<Number>::Unaligned;
    constexpr std::int64_t kVectorLanes = kVectorBytes / static_cast<std::int64_t>(sizeof(Number));
    constexpr Number kInfinite = static_cast<Number>(kInfinity);
    Number* const minima = reinterpret_cast<Number*>(distance_);
    for (std::int64_t j = 0; j < width_; ++j) minima[j] = kInfinite;
    Vector most{}, bad{};
    for (std::int64_t i = 0; i < rows_; ++i) {
      Number* const row = copied_ ? costs_ + i * width_ : costs_;
      write_costs(i, row);
      Vector sum{};
      for (std::int64_t j = 0; j < width_; j += kVectorLanes) {
        const Vector costs = *reinterpret_cast<const Memory*>(row + j);
        Memory& least = *reinterpret_cast<Memory*>(minima + j);
        least = costs < least ? costs : least;
        const Vector opposite = -costs;
        const Vector magnitude = costs > opposite ? costs : opposite;
        const Vector finite = magnitude < kInfinite ? magnitude : Vector{};
        most = finite > most ? finite : most;
        sum += finite;
        bad += costs > -kInfinite ? Vector{} : Vector{} + Number(1);  // for NaN and for -inf
      }
      sums_[i] = 0;
      for (std::int64_t k = 0; k < kVectorLanes; ++k) sums_[i] += sum[k];
    }
    largest_ = 0.0;
    double bad_count = 0.0;
    for (std::int64_t k = 0; k < kVectorLanes; ++k) {
      const double candidate = static_cast<double>(most[k]);
      largest_ = candidate > largest_ ? candidate : largest_;
      bad_count += static_cast<double>(bad[k]);
    }
    note_zeros(minima);
    const bool start_at_minima =
        rows_ == columns_ && given_ == nullptr && columns_ > kAlwaysInOrder && !has_zeros_ && !background_;
    for (std::int64_t j = width_; j-- > 0;) {
      const double least = static_cast<double>(minima[j]);
      v_[j] = start_at_minima && least < kInfinity ? least : 0.0;
    }
    if (given_ != nullptr) {
      for (std::int64_t j = 0; j < columns_; ++j) v_[j] = static_cast<double>(sign_) * given_[j];
    }
    return bad_count == 0.0;
  }

  // Notes whether there are several rows of zeros, or as it seems columns, beside better ones. They can exchange their
  // partners, so that the optimum is not the only one, and column minima would make all columns as dear as theirs.
  void note_zeros(const Number* minima) {
    std::int64_t zero_rows = 0, zero_columns = 0, better_columns = 0;
    for (std::int64_t i = 0; i < rows_; ++i) zero_rows += sums_[i] == 0;
    for (std::int64_t j = 0; j < columns_; ++j) {
      zero_columns += minima[j] == 0;
      better_columns += minima[j] < 0;
    }
    has_zeros_ = zero_rows > 1 || (rows_ == columns_ && zero_columns > 1 && better_columns > 0);
  }

  // Whether every row is one finite cost, over and over: a look at the first row unless it is.
  bool rows_are_constant() const {
    if (!copied_) return false;
    const std::size_t overlap = static_cast<std::size_t>(columns_ - 1) * sizeof(Number);
    for (std::int64_t i = 0; i < rows_; ++i) {
      const Number* const costs = costs_ + i * width_;
      if (std::memcmp(costs, costs + 1, overlap) != 0 || !(costs[0] < static_cast<Number>(kInfinity))) return false;
    }
    return true;
  }

  // All assignments are equally good.
  void take_diagonal(const AssignmentProblem& problem, std::int64_t index) {
    clear_pairs();
    for (std::int64_t j = 0; j < width_; ++j) v_[j] = 0.0;
    for (std::int64_t i = 0; i < rows_; ++i) {
      assign(i, i);
      problem.row_duals[index * rows_ + i] = cost(i, 0);
    }
  }

  // Numbers rows by the first row that is equal in every entry, found by the sum of the row, and returns how many are
  // not the first. What is left out, as where rows are not copied, only takes longer.
  std::int64_t find_classes() {
    std::int64_t repeated = 0;
    for (std::int64_t i = 0; i < rows_; ++i) {
      classes_[i] = static_cast<std::int32_t>(i);
      class_seen_[i] = 0;
    }
    searches_ = 0;
    if (!copied_) return 0;
    for (std::int64_t k = 0; k < table_size_; ++k) table_[k] = -1;
    for (std::int64_t i = 0; i < rows_; ++i) {
      const double sum = static_cast<double>(sums_[i]);
      std::uint64_t bits;
      std::memcpy(&bits, &sum, sizeof bits);
      const std::uint64_t hash = (bits * 0x9e3779b97f4a7c15u) >> 32;
      for (std::int64_t at = static_cast<std::int64_t>(hash) & (table_size_ - 1);; at = (at + 1) & (table_size_ - 1)) {
        const std::int32_t other = table_[at];
        if (other < 0) {
          table_[at] = static_cast<std::int32_t>(i);
          break;
        }
        const std::size_t bytes = static_cast<std::size_t>(columns_) * sizeof(Number);
        if (sums_[i] == sums_[other] && std::memcmp(costs_ + i * width_, costs_ + other * width_, bytes) == 0) {
          classes_[i] = other;
          ++repeated;
          break;
        }
      }
    }
    return repeated;
  }

  // Finds an optimal assignment, whichever is found first; false if there is none, or if another will be wanted.
  bool search() {
    clear_pairs();
    if (!reduce_rows()) return false;
    std::int64_t free_count = 0;
    for (std::int64_t i = 0; i < rows_; ++i) {
      if (column_of_row_[i] < 0) free_rows_[free_count++] = i;
    }
    if (free_count > 0 && find_classes() > 0 && columns_ <= kMaxInOrder) return false;
    for (std::int64_t k = 0; k < free_count; ++k) {
      if (!augment(free_rows_[k])) return false;
    }
    return true;
  }

  // Finds the optimal assignment that Crouse's algorithm finds: rows are matched in their order.
  bool search_in_order() {
    clear_pairs();
    for (std::int64_t j = 0; j < width_; ++j) v_[j] = 0.0;
    for (std::int64_t j = 0; j < columns_; ++j) open_[j] = places_[j] = columns_ - 1 - j;
    for (std::int64_t k = 0; k * kWord < columns_; ++k) moved_[k] = 0;
    for (std::int64_t i = 0; i < rows_; ++i) {
      if (!augment_in_order(i)) return false;
    }
    return true;
  }

  // The least two reduced costs of each lane, and where the least is.
  struct LaneBests {
    Lanes first = kInfinity - Lanes{};
    Lanes second = kInfinity - Lanes{};
    Indices at{};

    void take(const Lanes& reduced, std::int64_t j) {
      at = reduced < first ? j - Indices{} : at;
      second = lesser(second, greater(reduced, first));
      first = lesser(reduced, first);
    }

    BestTwo overall() const {
      const Lanes least = spread_least(first);
      const std::int64_t lane = __builtin_ctzll(lanes_at_most(first, least[0]));
      alignas(64) std::int64_t columns[kLanes];
      *reinterpret_cast<Indices*>(columns) = at;
      // The second least over all lanes: a lane's second, or the first of a lane other than the best's.
      Indices lanes_in_order;
      for (std::int64_t k = 0; k < kLanes; ++k) lanes_in_order[k] = k;
      const Lanes others = lanes_in_order == lane ? second : first;
      return BestTwo{least[0], spread_least(others)[0], columns[lane] + lane};
    }
  };

  // Several rows at a time, so that one need not wait for the other.
  template <std::int64_t kRows>
  void find_best_two(const Number* const* costs, BestTwo* best) const {
    LaneBests bests[kRows];
    for (std::int64_t j = 0; j < width_; j += kLanes) {
      const Lanes duals = widened(v_ + j);
      for (std::int64_t k = 0; k < kRows; ++k) bests[k].take(widened(costs[k] + j) - duals, j);
    }
    for (std::int64_t k = 0; k < kRows; ++k) best[k] = bests[k].overall();
  }

  // Rows in turn take their best column at a price that makes their second best as good; a row displaced waits for
  // another turn. False once so many rows had several best columns that there will be a choice to make in Crouse's
  // order.
  bool reduce_rows() {
    std::int64_t ties_left = columns_ <= kMaxInOrder ? rows_ / 4 : kStepsPerRow * rows_;
    std::int64_t waiting = rows_, front = 0;
    for (std::int64_t i = 0; i < rows_; ++i) free_rows_[i] = i;
    for (std::int64_t step = 0; step < kStepsPerRow * rows_ && waiting > 0;) {
      const std::int64_t count = copied_ && waiting >= kAtOnce ? kAtOnce : 1;
      std::int64_t rows[kAtOnce];
      const Number* costs[kAtOnce];
      for (std::int64_t k = 0; k < count; ++k) {
        rows[k] = free_rows_[front];
        costs[k] = row_costs(rows[k]);
        front = front + 1 < rows_ ? front + 1 : 0;
        prefetch_next(step++);
      }
      waiting -= count;
      BestTwo best[kAtOnce];
      count == 1 ? find_best_two<1>(costs, best) : find_best_two<kAtOnce>(costs, best);
      Lowered lowered[kAtOnce];
      for (std::int64_t k = 0; k < count; ++k) {
        for (std::int64_t before = 0; before < k; ++before) {
          const Lowered& other = lowered[before];
          if (static_cast<double>(costs[k][other.column]) - other.dual > best[k].second) continue;
          find_best_two<1>(costs + k, best + k);
          break;
        }
        if (best[k].first == best[k].second && --ties_left < 0) return false;
        lowered[k] = Lowered{best[k].column, v_[best[k].column]};
        const std::int64_t displaced = take_best(rows[k], costs[k], best[k]);
        if (displaced < 0) continue;
        const std::int64_t back = front + waiting++;
        free_rows_[back < rows_ ? back : back - rows_] = displaced;
      }
    }
    return true;
  }

  // Gives a row its best column. Returns the row that had it, or -1.
  std::int64_t take_best(std::int64_t row, const Number* costs, const BestTwo& best) {
    if (best.first == kInfinity) return -1;
    const bool lowers = best.second < kInfinity && best.first < best.second;
    std::int64_t column = best.column;
    if (!lowers && !is_free(column)) {
      // No finite second choice, or a tie: another column may be as good and free, which a path search sees.
      column = free_column_at(costs, best.first);
      if (column < 0) return -1;
    }
    if (lowers) set_entry(v_, column, v_[column] - (best.second - best.first));
    const std::int64_t displaced = row_of_column_[column];
    assign(row, column);
    if (displaced >= 0) column_of_row_[displaced] = -1;
    return displaced;
  }

  // Fetches a row of the next problem of a batch, which the search need not wait for.
  void prefetch_next(std::int64_t row) const {
    if (next_ == nullptr || row >= rows_) return;
    constexpr std::int64_t kLine = 64 / static_cast<std::int64_t>(sizeof(T));
    for (std::int64_t j = 0; j < columns_; j += kLine) __builtin_prefetch(next_ + row * columns_ + j, 0, 2);
  }

  // First column without a row whose reduced cost is `reduced`, the row's least; -1 if there is none.
  std::int64_t free_column_at(const Number* costs, double reduced) const {
    for (std::int64_t j = 0; j < width_; j += kLanes) {
      const std::uint64_t free = is_free_[j / kWord] >> (j % kWord);
      const std::uint64_t tied = lanes_at_most(widened(costs + j) - widened(v_ + j), reduced) & free;
      if (tied != 0) return j + __builtin_ctzll(tied);
    }
    return -1;
  }

  // Lowers the distances of open columns to through(costs, duals), where that is less, with `row` as their parent.
  // Returns the least distance. Closed columns have a dual of -inf, which no path can go through.
  template <class Through>
  double relax(std::int64_t row, const Through& through) {
    const Number* const costs = row_costs(row);
    const Indices parent = row - Indices{};
    // Two of them, so that one need not wait for the other.
    Lanes least[2] = {kInfinity - Lanes{}, kInfinity - Lanes{}};
    const auto take = [&](std::int64_t j, int part) {
      const Lanes candidate = through(widened(costs + j), widened(v_ + j));
      const Lanes known = widened(distance_ + j);
      Indices& parents = *reinterpret_cast<Indices*>(parent_ + j);
      parents = candidate < known ? parent : parents;
      const Lanes updated = lesser(candidate, known);
      *reinterpret_cast<Lanes*>(distance_ + j) = updated;
      least[part] = lesser(updated, least[part]);
    };
    std::int64_t j = 0;
    for (; j + 2 * kLanes <= width_; j += 2 * kLanes) {
      take(j, 0);
      take(j + kLanes, 1);
    }
    if (j < width_) take(j, 0);
    return spread_least(lesser(least[0], least[1]))[0];
  }

  // The first of them: distances of all columns from the row that a search begins at.
  double reach_from(std::int64_t root) {
    const Number* const costs = row_costs(root);
    const Indices parent = root - Indices{};
    Lanes least = kInfinity - Lanes{};
    for (std::int64_t j = 0; j < width_; j += kLanes) {
      const Lanes reduced = widened(costs + j) - widened(v_ + j);
      *reinterpret_cast<Lanes*>(distance_ + j) = reduced;
      *reinterpret_cast<Indices*>(parent_ + j) = parent;
      least = lesser(reduced, least);
    }
    return spread_least(least)[0];
  }

  double least_distance() const {
    Lanes least = kInfinity - Lanes{};
    for (std::int64_t j = 0; j < width_; j += kLanes) least = lesser(widened(distance_ + j), least);
    return spread_least(least)[0];
  }

  // Calls visit(bits, begin) for each 64 columns from `begin` of which some bits are set, until it returns false. at(j)
  // gives the bits of as many columns as there are lanes.
  template <class At, class Visit>
  void for_words(const At& at, const Visit& visit) const {
    std::int64_t begin = 0;
    for (; begin + kWord <= width_; begin += kWord) {
      std::uint64_t bits = 0;
#pragma GCC unroll 32
      for (std::int64_t k = 0; k < kWord; k += kLanes) bits |= at(begin + k) << k;
      if (bits != 0 && !visit(bits, begin)) return;
    }
    std::uint64_t bits = 0;
    for (std::int64_t j = begin; j < width_; j += kLanes) bits |= at(j) << (j - begin);
    if (bits != 0) visit(bits, begin);
  }

  template <class Visit>
  void for_columns_at(double distance, const Visit& visit) const {
    for_words([&](std::int64_t j) { return lanes_at_most(widened(distance_ + j), distance); }, visit);
  }

  void close(std::int64_t column, double distance, std::int64_t count) {
    closed_[count].column = column;
    closed_[count].distance = distance;
    closed_[count].dual = v_[column];
    set_entry(v_, column, -kInfinity);
    set_entry(distance_, column, kInfinity);
  }

  // Gives closed columns their duals back: as they were, or lowered by what they were nearer than `reached`.
  void reopen(std::int64_t count, double reached) {
    for (std::int64_t k = 0; k < count; ++k) {
      const double nearer = reached < kInfinity ? reached - closed_[k].distance : 0.0;
      v_[closed_[k].column] = closed_[k].dual - nearer;
    }
  }

  // Exchanges columns along the path from `root` to `sink`.
  void exchange(std::int64_t root, std::int64_t sink) {
    for (std::int64_t column = sink;;) {
      const std::int64_t row = parent_[column], next = column_of_row_[row];
      assign(row, column);
      if (row == root) return;
      column = next;
    }
  }

  // Grows a shortest path tree from a free row until it meets a free column, then exchanges along the path.
  bool augment(std::int64_t root) {
    class_seen_[classes_[root]] = ++searches_;
    double least = reach_from(root), reached = -kInfinity;
    std::int64_t closed_count = 0;
    while (least < kInfinity) {
      reached = least > reached ? least : reached;  // rounding must not shorten a path
      const std::int64_t column = any_column_at(least);
      if (is_free(column)) {
        reopen(closed_count, reached);
        exchange(root, column);
        return true;
      }
      const std::int64_t row = row_of_column_[column];
      const double offset = reached - (cost(row, column) - v_[column]);
      close(column, reached, closed_count++);
      // Of equal rows only the first one that a search reaches can lower any distance.
      std::int32_t& seen = class_seen_[classes_[row]];
      least = seen == searches_
                  ? least_distance()
                  : relax(row, [&](const Lanes& costs, const Lanes& duals) { return (costs - duals) + offset; });
      seen = searches_;
    }
    reopen(closed_count, kInfinity);
    return false;
  }

  // A column at the least distance, one without a row if there is one.
  std::int64_t any_column_at(double least) const {
    std::int64_t found = -1;
    for_columns_at(least, [&](std::uint64_t bits, std::int64_t begin) {
      const std::uint64_t free = bits & is_free_[begin / kWord];
      if (found < 0 || free != 0) found = begin + __builtin_ctzll(free != 0 ? free : bits);
      return free == 0;
    });
    return found;
  }

  // The same with sums and choices in Crouse's order, so that what ties for him ties here.
  bool augment_in_order(std::int64_t root) {
    u_[root] = 0.0;
    double reached = reach_from(root);
    if (reached == kInfinity) return false;
    std::int64_t column = ordered_column_at(reached), closed_count = 0;
    for (; !is_free(column); ++closed_count) {
      close_in_order(column, reached, closed_count);
      const std::int64_t row = row_of_column_[column];
      const double dual = u_[row], start = reached;
      reached = relax(row, [&](const Lanes& costs, const Lanes& duals) { return ((start + costs) - dual) - duals; });
      if (reached == kInfinity) return false;
      column = ordered_column_at(reached);
    }
    u_[root] += reached;
    for (std::int64_t k = 0; k < closed_count; ++k) {
      u_[row_of_column_[closed_[k].column]] += reached - closed_[k].distance;
    }
    reopen(closed_count, reached);
    restore_order(closed_count);
    exchange(root, column);
    return true;
  }

  // Open columns are in Crouse's order: from the last to the first, a closed one replaced by the one at the end.
  void close_in_order(std::int64_t column, double distance, std::int64_t count) {
    const std::int64_t last = open_[columns_ - 1 - count], place = places_[column];
    open_[place] = last;
    places_[last] = place;
    moved_[last / kWord] |= std::uint64_t{1} << (last % kWord);
    closed_[count].place = place;
    closed_[count].successor = last;
    close(column, distance, count);
  }

  void restore_order(std::int64_t closed_count) {
    for (std::int64_t k = 0; k < closed_count; ++k) {
      const std::int64_t place = closed_[k].place, successor = closed_[k].successor;
      open_[place] = columns_ - 1 - place;
      places_[successor] = columns_ - 1 - successor;
      moved_[successor / kWord] = 0;
    }
  }

  // Of the columns at the least distance the last without a row, or else the first, in the order of open columns. Those
  // that have not moved stand there from the last column to the first.
  std::int64_t ordered_column_at(double least) const {
    std::int64_t found = -1, first_free = -1, last_taken = -1;
    const auto consider = [&](std::int64_t j) {
      const bool free = is_free(j);
      const bool better = found < 0 || (free != is_free(found) ? free : free == (places_[j] > places_[found]));
      found = better ? j : found;
    };
    for_columns_at(least, [&](std::uint64_t bits, std::int64_t begin) {
      const std::uint64_t moved = moved_[begin / kWord], unmatched = is_free_[begin / kWord];
      const std::uint64_t free = bits & ~moved & unmatched, taken = bits & ~moved & ~unmatched;
      if (free != 0 && first_free < 0) first_free = begin + __builtin_ctzll(free);
      if (taken != 0) last_taken = begin + kWord - 1 - __builtin_clzll(taken);
      for (std::uint64_t rest = bits & moved; rest != 0; rest &= rest - 1) consider(begin + __builtin_ctzll(rest));
      return true;
    });
    if (first_free >= 0) consider(first_free);
    if (last_taken >= 0) consider(last_taken);
    return found;
  }

  // Writes row duals from column duals, over every entry, so that feasibility does not rest on the search. Returns
  // whether no other assignment is as good, but for rounding.
  bool certify(const AssignmentProblem& problem, std::int64_t index) {
    bound_column_duals();
    double* const row_duals = problem.row_duals + index * rows_;
    rounding_ = kRounding * largest_;
    bool countable = rounding_ < kInfinity;
    tie_begin_[0] = 0;
    for (std::int64_t i = 0; i < rows_; ++i) {
      const Number* const costs = row_costs(i);
      if (countable) countable = list_ties(i, costs, row_duals[i]);
      if (!countable) row_duals[i] = least_reduced_cost(costs);
    }
    return countable && ties_lead_nowhere();
  }

  void bound_column_duals() {
    if (rows_ == columns_) return;
    for (std::int64_t j = 0; j < columns_; ++j) v_[j] = v_[j] < 0.0 ? v_[j] : 0.0;
  }

  double least_reduced_cost(const Number* costs) const {
    Lanes least = kInfinity - Lanes{};
    for (std::int64_t j = 0; j < width_; j += kLanes) {
      const Lanes reduced = widened(costs + j) - widened(v_ + j);
      least = lesser(reduced, least);
    }
    return spread_least(least)[0];
  }

  // Lists the rows that have the columns that a row could as well have, row `rows_` standing for none; false if there
  // are too many. Writes the row's least reduced cost.
  bool list_ties(std::int64_t row, const Number* costs, double& least_cost) {
    const std::int64_t matched = column_of_row_[row];
    double least = static_cast<double>(costs[matched]) - v_[matched];
    const double bound = least + rounding_;
    std::int32_t count = tie_begin_[row];
    bool fits = true;
    const auto at = [&](std::int64_t j) { return lanes_at_most(widened(costs + j) - widened(v_ + j), bound); };
    for_words(at, [&](std::uint64_t bits, std::int64_t begin) {
      for (; bits != 0 && fits; bits &= bits - 1) {
        const std::int64_t column = begin + __builtin_ctzll(bits);
        if (column == matched) continue;
        fits = count < kMaxTiesPerRow * rows_;
        if (!fits) break;
        const double reduced = static_cast<double>(costs[column]) - v_[column];
        least = reduced < least ? reduced : least;
        ties_[count++] = static_cast<std::int32_t>(is_free(column) ? rows_ : row_of_column_[column]);
      }
      return fits;
    });
    if (!fits) return false;
    tie_begin_[row + 1] = count;
    least_cost = least;
    return true;
  }

  // Whether no exchange of columns along listed ties comes round to where it began: rows that nothing leads to are
  // taken away, with the ties from them, until none are left. A free column leads on to rows whose own one is as good
  // free.
  bool ties_lead_nowhere() {
    for (std::int64_t i = 0; i <= rows_; ++i) tied_into_[i] = 0;
    std::int32_t count = tie_begin_[rows_];
    if (rows_ < columns_) {
      for (std::int64_t j = 0; j < columns_ && count < (kMaxTiesPerRow + 1) * rows_; ++j) {
        if (!is_free(j) && v_[j] >= -rounding_) ties_[count++] = static_cast<std::int32_t>(row_of_column_[j]);
      }
    }
    tie_begin_[rows_ + 1] = count;
    for (std::int32_t k = 0; k < count; ++k) ++tied_into_[ties_[k]];
    std::int64_t stacked = 0, left = rows_ + 1;
    std::int64_t* const stack = parent_;
    for (std::int64_t i = 0; i <= rows_; ++i) {
      if (tied_into_[i] == 0) stack[stacked++] = i;
    }
    while (stacked > 0) {
      const std::int64_t row = stack[--stacked];
      --left;
      for (std::int32_t k = tie_begin_[row]; k < tie_begin_[row + 1]; ++k) {
        if (--tied_into_[ties_[k]] == 0) stack[stacked++] = ties_[k];
      }
    }
    return left == 0;
  }

  // Writes the signs of duals, the objective and the gap.
  void conclude(const AssignmentProblem& problem, std::int64_t index) const {
    write_proof(problem, index, static_cast<double>(sign_), v_,
                [this](std::int64_t i, std::int64_t j) { return cost(i, j); });
  }

  std::int64_t rows_, columns_, width_;
  std::int64_t table_size_;  // a power of 2, at least twice the rows
  bool copied_;
  bool background_ = false;
  bool has_zeros_ = false;  // several rows or columns of nothing else
  Number sign_;
  const T* values_ = nullptr;
  const T* next_ = nullptr;  // values of the next problem
  const double* given_ = nullptr;
  std::int64_t* column_of_row_ = nullptr;
  double largest_ = 0.0, rounding_ = 0.0;
  // Arrays over columns are whole vectors; duals and costs behind the last column are 0 and infinite.
  Number* costs_;
  double *v_, *u_, *distance_;
  std::int64_t *parent_, *row_of_column_, *free_rows_, *open_, *places_;
  Closed* closed_;
  std::uint64_t *is_free_, *moved_;
  std::int32_t *ties_, *tie_begin_, *tied_into_;
  Number* sums_;  // of the magnitudes of a row's costs
  // Equal rows: the class of a row, the last search that reached a class, and a hash table of rows.
  std::int32_t *classes_, *class_seen_, *table_;
  std::int32_t searches_ = 0;
  Buffer<unsigned char> far_;
  alignas(64) unsigned char near_[kNearBytes];
};

}  // namespace
}  // namespace mudsc::MUDSC_ISA
