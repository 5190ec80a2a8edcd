// Dense linear assignment by augmenting row reduction and shortest augmenting paths.
//
// R. Jonker and A. Volgenant, "A shortest augmenting path algorithm for dense and sparse linear assignment problems",
// Computing 38 (1987), without its column reduction, so that rectangular problems need no padding; the path search is
// that of D. F. Crouse, "On implementing 2D rectangular assignment algorithms", IEEE TAES 52 (2016). Duals are double,
// and exact in float32's sense: every float32 cost is a double.
//
// Memory traffic: one read of the matrix per pass of row reduction and one for the certificate; a path search reads
// the rows of its tree. A row is widened into a buffer of doubles that stays in cache. Parallel over a batch's problems.
#include "mudsc/assignment.hpp"

#include "kernel.hpp"
#include "mudsc/threads.hpp"

namespace mudsc::MUDSC_ISA {
namespace {

constexpr double kInfinity = __builtin_huge_val();
constexpr std::int64_t kLanes = 8;
typedef double Lanes __attribute__((vector_size(kLanes * sizeof(double)), may_alias));

inline std::int64_t padded(std::int64_t count) { return (count + kLanes - 1) / kLanes * kLanes; }

inline double least_lane(const Lanes& lanes) {
  double least = lanes[0];
  for (std::int64_t k = 1; k < kLanes; ++k) least = lanes[k] < least ? lanes[k] : least;
  return least;
}

// The two least reduced costs of a row and the column of the least.
struct BestTwo {
  double first;
  double second;
  std::int64_t column;
};

// One problem and everything that solving it needs. Costs are minimised.
template <class T>
class Solver {
 public:
  Solver(const AssignmentProblem& problem)
      : rows_(problem.rows),
        columns_(problem.columns),
        width_(padded(problem.columns)),
        sign_(problem.maximize ? -1.0 : 1.0),
        costs_(width_, kInfinity),
        v_(width_, 0.0),
        u_(rows_, 0.0),
        distance_(width_, kInfinity),
        parent_(columns_),
        row_of_column_(columns_),
        tree_rows_(rows_),
        tree_distances_(rows_),
        tree_columns_(columns_),
        final_(columns_),
        free_rows_(rows_),
        hashes_(rows_ > columns_ ? rows_ : columns_),
        order_(rows_ > columns_ ? rows_ : columns_),
        open_(columns_),
        place_(columns_) {}

  void solve(const AssignmentProblem& problem, std::int64_t index) {
    values_ = static_cast<const T*>(problem.values) + index * rows_ * columns_;
    column_of_row_ = problem.column_of_row + index * rows_;
    problem.status[index] = AssignmentStatus::invalid;
    if (!valid()) return;
    for (std::int64_t i = 0; i < rows_; ++i) column_of_row_[i] = -1;
    row_of_column_.fill(-1);
    v_.fill(0.0);
    if (problem.prices != nullptr && rows_ == columns_) {
      const double* const prices = problem.prices + index * columns_;
      for (std::int64_t j = 0; j < columns_; ++j) v_[j] = sign_ * prices[j];
    }

    problem.status[index] = AssignmentStatus::infeasible;
    std::int64_t free_count = 0;
    for (std::int64_t i = 0; i < rows_; ++i) free_rows_[free_count++] = i;
    const bool in_order = columns_ <= kMostInOrder;
    for (int pass = 0; pass < kReductionPasses && free_count > 0 && !in_order; ++pass) {
      free_count = reduce_rows(free_count);
    }
    for (std::int64_t k = 0; k < free_count; ++k) {
      if (!augment(free_rows_[k])) return;
    }
    if (!in_order) {
      order_equal_rows();
      order_equal_columns();
    }
    certify(problem, index);
    problem.status[index] = AssignmentStatus::optimal;
  }

 private:
  // Up to this many columns rows are matched in their order by path searches alone, which is as fast, and makes every
  // choice between equally good assignments as Crouse's algorithm does, and with it scipy.
  static constexpr std::int64_t kMostInOrder = 128;
  static constexpr int kReductionPasses = 2;
  // A chain of displaced rows in a pass of row reduction ends after so many steps per row on average; the path search
  // takes what is left, so chains of ever smaller gains cannot go on for ever.
  static constexpr std::int64_t kStepsPerRow = 8;
  // Entries of a row or column that its hash samples.
  static constexpr std::int64_t kSamples = 32;

  double cost(std::int64_t row, std::int64_t column) const {
    return sign_ * static_cast<double>(widen(values_[row * columns_ + column]));
  }

  // Writes a row's costs to costs_; entries behind the last column stay infinite.
  void load_row(std::int64_t row) {
    const T* const values = values_ + row * columns_;
    double* const costs = costs_.data();
    for (std::int64_t j = 0; j < columns_; ++j) costs[j] = sign_ * static_cast<double>(widen(values[j]));
  }

  bool valid() {
    for (std::int64_t i = 0; i < rows_; ++i) {
      load_row(i);
      bool bad = false;
      // False for NaN and for -inf.
      for (std::int64_t j = 0; j < columns_; ++j) bad |= !(costs_[j] > -kInfinity);
      if (bad) return false;
    }
    return true;
  }

  BestTwo best_two(std::int64_t row) {
    load_row(row);
    Lanes first = kInfinity - Lanes{}, second = first;
    for (std::int64_t j = 0; j < width_; j += kLanes) {
      const Lanes reduced = lanes(costs_, j) - lanes(v_, j);
      const Lanes larger = reduced < first ? first : reduced;
      second = larger < second ? larger : second;
      first = reduced < first ? reduced : first;
    }
    BestTwo best{least_lane(first), kInfinity, -1};
    for (std::int64_t j = 0; j < columns_; ++j) {
      if (costs_[j] - v_[j] == best.first) {
        best.column = j;
        break;
      }
    }
    // The second least over all lanes: a lane's second, or the first of a lane other than the best's.
    const std::int64_t best_lane = best.column % kLanes;
    for (std::int64_t k = 0; k < kLanes; ++k) {
      const double candidate = k == best_lane ? second[k] : first[k];
      best.second = candidate < best.second ? candidate : best.second;
    }
    return best;
  }

  // Gives each free row its best column at a price that makes its second best as good; the row displaced goes on.
  // Returns how many rows stay free, listed in free_rows_.
  std::int64_t reduce_rows(std::int64_t free_count) {
    std::int64_t steps = kStepsPerRow * rows_, kept = 0;
    for (std::int64_t k = 0; k < free_count; ++k) {
      std::int64_t row = free_rows_[k];
      for (;;) {
        const BestTwo best = best_two(row);
        const bool lowers = best.second < kInfinity && best.first < best.second;
        std::int64_t column = best.column;
        if (best.first == kInfinity || (!lowers && row_of_column_[column] >= 0)) {
          // No finite second choice, or a tie: another column may be as good and free, which a path search sees.
          if (best.first < kInfinity) column = free_column_at(best.first);
          if (best.first == kInfinity || column < 0) {
            free_rows_[kept++] = row;
            break;
          }
        }
        if (lowers) v_[column] -= best.second - best.first;
        u_[row] = lowers ? best.second : best.first;
        const std::int64_t displaced = row_of_column_[column];
        row_of_column_[column] = row;
        column_of_row_[row] = column;
        if (displaced < 0) break;
        column_of_row_[displaced] = -1;
        if (--steps < 0) {
          free_rows_[kept++] = displaced;
          break;
        }
        row = displaced;
      }
    }
    return kept;
  }

  // First column without a row whose reduced cost, for the row in costs_, is `reduced`; -1 if there is none.
  std::int64_t free_column_at(double reduced) const {
    for (std::int64_t j = 0; j < columns_; ++j) {
      if (row_of_column_[j] < 0 && costs_[j] - v_[j] == reduced) return j;
    }
    return -1;
  }

  // Grows a shortest path tree from a free row until it meets a free column, then exchanges along the path. Sums are
  // made in Crouse's order, so that what ties for him ties here.
  bool augment(std::int64_t root) {
    u_[root] = 0.0;
    distance_.fill(kInfinity);
    // Open columns, in the order that decides ties.
    for (std::int64_t k = 0; k < columns_; ++k) {
      open_[k] = columns_ - 1 - k;
      place_[columns_ - 1 - k] = k;
    }
    std::int64_t tree_size = 0, row = root, sink = -1;
    double reached = 0.0;
    while (sink < 0) {
      tree_rows_[tree_size] = row;
      tree_distances_[tree_size++] = reached;
      const std::int64_t column = nearest_column(row, reached);
      if (column < 0) return false;
      reached = distance_[column];
      if (row_of_column_[column] < 0) {
        sink = column;
      } else {
        tree_columns_[tree_size - 1] = column;
        final_[tree_size - 1] = reached;
        distance_[column] = -kInfinity;  // closed: no distance is less
        const std::int64_t last = open_[columns_ - tree_size];
        open_[place_[column]] = last;
        place_[last] = place_[column];
        row = row_of_column_[column];
      }
    }
    for (std::int64_t k = 0; k < tree_size; ++k) u_[tree_rows_[k]] += reached - tree_distances_[k];
    for (std::int64_t k = 0; k + 1 < tree_size; ++k) v_[tree_columns_[k]] -= reached - final_[k];
    for (std::int64_t column = sink;;) {
      const std::int64_t path_row = parent_[column], next = column_of_row_[path_row];
      row_of_column_[column] = path_row;
      column_of_row_[path_row] = column;
      if (path_row == root) return true;
      column = next;
    }
  }

  // Lowers the distances of open columns through `row` and returns the nearest; -1 if none can be reached. Of several,
  // the last free one in the order of open_, or else the first.
  std::int64_t nearest_column(std::int64_t row, double reached) {
    load_row(row);
    const double dual = u_[row];
    Lanes least = kInfinity - Lanes{};
    const Lanes infinite = least;
    for (std::int64_t j = 0; j < width_; j += kLanes) {
      const Lanes through = ((reached + lanes(costs_, j)) - dual) - lanes(v_, j);
      const Lanes known = lanes(distance_, j);
      const auto nearer = through < known;
      Lanes updated = known;
      if (any(nearer)) {
        updated = nearer ? through : known;
        store(distance_, j, updated);
        for (std::int64_t k = 0; k < kLanes; ++k) {
          if (nearer[k]) parent_[j + k] = row;
        }
      }
      const Lanes open = updated == -infinite ? infinite : updated;
      least = open < least ? open : least;
    }
    const double nearest = least_lane(least);
    if (nearest == kInfinity) return -1;
    std::int64_t found = -1;
    for (std::int64_t j = 0; j < columns_; ++j) {
      if (distance_[j] != nearest) continue;
      const bool is_free = row_of_column_[j] < 0;
      const bool found_free = found >= 0 && row_of_column_[found] < 0;
      if (found < 0 || (is_free && (!found_free || place_[j] > place_[found])) ||
          (!is_free && !found_free && place_[j] < place_[found])) {
        found = j;
      }
    }
    return found;
  }

  // Rows that are equal in every entry may exchange their columns: they take them in ascending order, so that ties
  // between them do not depend on the way of the search, and equal problems keep their order.
  void order_equal_rows() {
    for (std::int64_t i = 0; i < rows_; ++i) {
      const std::int64_t step = columns_ / kSamples + 1;
      hashes_[i] = 0;
      for (std::int64_t j = 0; j < columns_; j += step) mix(hashes_[i], values_[i * columns_ + j]);
    }
    for_equal_groups(
        rows_, [this](std::int64_t a, std::int64_t b) { return equal_rows(a, b); },
        [this](std::int64_t* group, std::int64_t size) {
          std::int64_t* const columns = tree_columns_.data();
          for (std::int64_t k = 0; k < size; ++k) columns[k] = column_of_row_[group[k]];
          sort(columns, size, [](std::int64_t a, std::int64_t b) { return a < b; });
          for (std::int64_t k = 0; k < size; ++k) assign(group[k], columns[k]);
        });
  }

  // The same for columns: of columns that are equal in every entry the first ones get a row, in ascending order.
  void order_equal_columns() {
    for (std::int64_t j = 0; j < columns_; ++j) hashes_[j] = 0;
    for (std::int64_t i = 0; i < rows_; i += rows_ / kSamples + 1) {
      for (std::int64_t j = 0; j < columns_; ++j) mix(hashes_[j], values_[i * columns_ + j]);
    }
    for_equal_groups(
        columns_, [this](std::int64_t a, std::int64_t b) { return equal_columns(a, b); },
        [this](std::int64_t* group, std::int64_t size) {
          std::int64_t* const rows = tree_rows_.data();
          std::int64_t count = 0;
          for (std::int64_t k = 0; k < size; ++k) {
            if (row_of_column_[group[k]] >= 0) rows[count++] = row_of_column_[group[k]];
            row_of_column_[group[k]] = -1;
          }
          sort(rows, count, [](std::int64_t a, std::int64_t b) { return a < b; });
          // Equal columns have equal duals where both have rows, and 0 where one has none.
          for (std::int64_t k = 0; k < count; ++k) assign(rows[k], group[k]);
        });
  }

  void assign(std::int64_t row, std::int64_t column) {
    column_of_row_[row] = column;
    row_of_column_[column] = row;
  }

  // Calls visit(members, count) for every group of equal items among [0, count) by hashes_, members ascending.
  template <class Equal, class Visit>
  void for_equal_groups(std::int64_t count, const Equal& equal, const Visit& visit) {
    std::int64_t* const order = order_.data();
    for (std::int64_t k = 0; k < count; ++k) order[k] = k;
    sort(order, count, [this](std::int64_t a, std::int64_t b) {
      return hashes_[a] != hashes_[b] ? hashes_[a] < hashes_[b] : a < b;
    });
    for (std::int64_t begin = 0; begin < count;) {
      std::int64_t end = begin + 1;
      while (end < count && hashes_[order[end]] == hashes_[order[begin]] && equal(order[begin], order[end])) ++end;
      if (end - begin > 1) visit(order + begin, end - begin);
      begin = end;
    }
  }

  bool equal_rows(std::int64_t a, std::int64_t b) const {
    const T *const left = values_ + a * columns_, *const right = values_ + b * columns_;
    for (std::int64_t j = 0; j < columns_; ++j) {
      if (widen(left[j]) != widen(right[j])) return false;
    }
    return true;
  }

  bool equal_columns(std::int64_t a, std::int64_t b) const {
    for (std::int64_t i = 0; i < rows_; ++i) {
      if (widen(values_[i * columns_ + a]) != widen(values_[i * columns_ + b])) return false;
    }
    return true;
  }

  static void mix(std::uint64_t& hash, T value) {
    const double wide = static_cast<double>(widen(value)) + 0.0;  // -0 and 0 are equal
    std::uint64_t bits;
    std::memcpy(&bits, &wide, sizeof bits);
    hash = (hash ^ bits) * 0x9e3779b97f4a7c15u;
    hash ^= hash >> 29;
  }

  // Heap sort: no recursion, no extra memory, bounded by n log n.
  template <class Less>
  static void sort(std::int64_t* items, std::int64_t count, const Less& less) {
    const auto sift = [&](std::int64_t root, std::int64_t end) {
      for (;;) {
        std::int64_t child = 2 * root + 1;
        if (child >= end) return;
        if (child + 1 < end && less(items[child], items[child + 1])) ++child;
        if (!less(items[root], items[child])) return;
        const std::int64_t item = items[root];
        items[root] = items[child];
        items[child] = item;
        root = child;
      }
    };
    for (std::int64_t root = count / 2; root-- > 0;) sift(root, count);
    for (std::int64_t end = count; end-- > 1;) {
      const std::int64_t item = items[0];
      items[0] = items[end];
      items[end] = item;
      sift(0, end);
    }
  }

  // Recomputes the row duals from the column duals over every entry, so that feasibility does not rest on the search.
  void certify(const AssignmentProblem& problem, std::int64_t index) {
    double objective = 0.0, slack = 0.0;
    double* const row_duals = problem.row_duals + index * rows_;
    double* const column_duals = problem.column_duals + index * columns_;
    for (std::int64_t i = 0; i < rows_; ++i) {
      load_row(i);
      Lanes least = kInfinity - Lanes{};
      for (std::int64_t j = 0; j < width_; j += kLanes) {
        const Lanes reduced = lanes(costs_, j) - lanes(v_, j);
        least = reduced < least ? reduced : least;
      }
      const double dual = least_lane(least);
      const std::int64_t column = column_of_row_[i];
      row_duals[i] = sign_ * dual;
      objective += costs_[column];
      slack += costs_[column] - v_[column] - dual;
    }
    for (std::int64_t j = 0; j < columns_; ++j) column_duals[j] = sign_ * v_[j] + 0.0;
    problem.objective[index] = sign_ * objective;
    problem.gap[index] = slack;
  }

  // Buffers are aligned to 64 bytes and padded to whole vectors.
  static const Lanes& lanes(const Buffer<double>& buffer, std::int64_t at) {
    return *reinterpret_cast<const Lanes*>(buffer.data() + at);
  }
  static void store(Buffer<double>& buffer, std::int64_t at, const Lanes& value) {
    *reinterpret_cast<Lanes*>(buffer.data() + at) = value;
  }
  template <class Mask>
  static bool any(const Mask& mask) {
    std::int64_t found = 0;
    for (std::int64_t k = 0; k < kLanes; ++k) found |= mask[k];
    return found != 0;
  }

  std::int64_t rows_, columns_, width_;
  double sign_;
  const T* values_ = nullptr;
  std::int64_t* column_of_row_ = nullptr;
  Buffer<double> costs_, v_, u_, distance_;
  Buffer<std::int64_t> parent_, row_of_column_, tree_rows_;
  Buffer<double> tree_distances_;
  Buffer<std::int64_t> tree_columns_;
  Buffer<double> final_;  // distances of the tree's columns
  Buffer<std::int64_t> free_rows_;
  Buffer<std::uint64_t> hashes_;
  Buffer<std::int64_t> order_, open_, place_;
};

template <class T>
void solve_batch(const AssignmentProblem& problem) {
  bool out_of_memory = false;
  auto body = [&](std::int64_t begin, std::int64_t end) {
    try {
      Solver<T> solver(problem);
      for (std::int64_t index = begin; index < end; ++index) solver.solve(problem, index);
    } catch (const OutOfMemory&) {
      __atomic_store_n(&out_of_memory, true, __ATOMIC_RELAXED);
    }
  };
  // A thread is worth starting for about a million entries.
  const std::int64_t entries = problem.rows * problem.columns;
  parallel_for(problem.threads, problem.batch, (1 << 20) / (entries + 1) + 1, body);
  if (out_of_memory) throw OutOfMemory{};
}

}  // namespace

void linear_assignment(const AssignmentProblem& problem) {
  switch (problem.type) {
    case ScalarType::float16:
      return solve_batch<Half>(problem);
    case ScalarType::bfloat16:
      return solve_batch<BFloat16>(problem);
    case ScalarType::float32:
      return solve_batch<float>(problem);
    case ScalarType::float64:
      return solve_batch<double>(problem);
  }
}

}  // namespace mudsc::MUDSC_ISA
