// Greedy zip of units into clusters (Stoica et al., "ZipIt!", arXiv 2305.03053, as used by Xu et al., arXiv
// 2403.01753).
//
// Until `remaining` clusters are left, the first largest similarity in row-major order names a pair i < j; j joins i,
// and row and column i become the smaller of those of i and j, times `shrink`.
//
// The kernel never stores these rows and columns: it keeps the list of merges and computes rows when it needs them.
// The row of a cluster is the smaller of its members' rows; each merge in the list then replaces entry i by the smaller
// of entries i and j, times `shrink`. Multiplying by a positive number and rounding keeps the order of numbers, so it
// does not matter which of two rows or columns is joined first: the entries equal those of the plain procedure.
// A merge reads two rows of the input and walks the list. Clusters of more than two units keep their row.
//
// Searching: every row keeps an upper bound of its entries and, where known, the first column that attains it. A merge
// replaces one entry of a row and removes another. If these were not the row's best, the bound stays or rises to the
// new entry; if they were, the bound stays and its column becomes unknown. Bounds therefore always hold, also where
// negative similarities grow by a shrink below one. A row is computed again only when its bound is the largest of all
// and its column is unknown. The first row with the largest bound, once its column is known, is the first largest entry
// of the matrix. The largest bound of all rows is found by maxima of blocks of rows.
// In a symmetric matrix rows hold only the columns behind the diagonal: the first largest entry is one of these.
//
// Memory: the input is not copied if it is symmetric, or else transposed once. Beside it there are a few values a unit,
// the rows of clusters of more than two units, and, where pairs are forbidden, a bit a pair.
// One thread: merges depend on each other, and each is too short to share.
#include "mudsc/zip.hpp"

#include "kernel.hpp"

namespace mudsc::MUDSC_ISA {
namespace {

constexpr std::int64_t kCacheLine = 64;
constexpr std::int64_t kNone = -1;

template <class Real>
constexpr Real infinity = static_cast<Real>(__builtin_inf());

template <class Real>
struct Lanes {
  typedef Real Vector __attribute__((vector_size(kCacheLine)));
  static constexpr std::int64_t count = kCacheLine / static_cast<std::int64_t>(sizeof(Real));
};

// Unsigned integers as wide as a number, and the signed ones for places, so that loops over both vectorize.
template <class Real>
struct Integers {
  using Bits = std::uint32_t;
  using Index = std::int32_t;
  static constexpr Bits exponent = 0x7f800000u;
};
template <>
struct Integers<double> {
  using Bits = std::uint64_t;
  using Index = std::int64_t;
  static constexpr Bits exponent = 0x7ff0000000000000u;
};

constexpr std::int64_t round_up(std::int64_t count, std::int64_t multiple) {
  return (count + multiple - 1) / multiple * multiple;
}
constexpr std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

template <class Real>
struct Entry {
  Real value;
  std::int64_t index;
};

// Largest of min(values, limit) and the first place where it stands; count is a multiple of the vector width.
template <class Real>
Entry<Real> first_largest(const Real* values, const Real* limit, std::int64_t count) {
  using Vector = typename Lanes<Real>::Vector;
  constexpr std::int64_t lanes = Lanes<Real>::count;
  constexpr std::int64_t block = 32 * lanes;  // short enough that searching one again costs little

  Entry<Real> best{-infinity<Real>, 0};
  for (std::int64_t begin = 0; begin < count; begin += block) {
    const std::int64_t end = smaller(begin + block, count);
    Vector largest = Vector{} - infinity<Real>;
    for (std::int64_t k = begin; k < end; k += lanes) {
      const Vector value = *reinterpret_cast<const Vector*>(values + k);
      const Vector most = *reinterpret_cast<const Vector*>(limit + k);
      const Vector masked = value < most ? value : most;
      largest = masked > largest ? masked : largest;
    }
    for (std::int64_t lane = 0; lane < lanes; ++lane) {
      if (largest[lane] > best.value) best = {largest[lane], begin};
    }
  }
  if (count == 0) return best;
  while ((values[best.index] < limit[best.index] ? values[best.index] : limit[best.index]) != best.value) {
    ++best.index;
  }
  return best;
}

// The merges made, in order: cluster `gone` joined cluster `kept`.
struct Merges {
  explicit Merges(std::int64_t capacity) : kept(capacity), gone(capacity) {}
  Buffer<std::int32_t> kept;
  Buffer<std::int32_t> gone;
  std::int64_t count = 0;
};

// Rows of similarities of clusters, computed from those of units. Columns are clusters, by first unit.
template <class Source>
class ClusterRows {
 public:
  using Real = typename ArithmeticOf<Source>::type;

  ClusterRows(const Source* source, std::int64_t source_stride, std::int64_t units, Real factor, const Merges& merges)
      : source_(source),
        source_stride_(source_stride),
        units_(units),
        stride_(round_up(units, Lanes<Real>::count)),
        factor_(factor),
        merges_(merges),
        partner_(units),
        slot_(units, kNone),
        age_(units),
        stored_(units / kStoredSize * stride_),
        free_(units / kStoredSize),
        other_(stride_, Real{0}) {
    for (std::int64_t unit = 0; unit < units; ++unit) partner_[unit] = unit;
    for (std::int64_t slot = 0; slot < free_.size(); ++slot) free_[slot] = free_.size() - 1 - slot;
    free_count_ = free_.size();
  }

  // Computes a cluster's row from column `first` on; `row` is padded to whole cache lines.
  void compute(std::int64_t unit, std::int64_t first, Real* row) {
    replay(row, load(unit, first, row), merges_.count);
    row[unit] = -infinity<Real>;
  }

  // Joins `gone` to `kept`, before the merge enters the list, and computes the row of the joined cluster.
  void join(std::int64_t kept, std::int64_t gone, Real* row) {
    if (is_single(kept) && is_single(gone)) {
      partner_[kept] = gone;
      return compute(kept, 0, row);
    }
    const std::int64_t age = load(kept, 0, row), other_age = load(gone, 0, other_.data());
    replay(row, age, other_age);
    replay(other_.data(), other_age, age);
    const Real* const others = other_.data();
    for (std::int64_t k = 0; k < units_; ++k) row[k] = (row[k] < others[k] ? row[k] : others[k]) * factor_;
    replay(row, age < other_age ? other_age : age, merges_.count);
    row[kept] = -infinity<Real>;
    store(kept, gone, row);
  }

 private:
  static constexpr std::int64_t kStoredSize = 3;  // units of the smallest clusters whose rows are kept

  bool is_single(std::int64_t unit) const { return partner_[unit] == unit && slot_[unit] == kNone; }
  const Source* source_row(std::int64_t unit) const { return source_ + unit * source_stride_; }

  // Copies the row of a cluster; returns how many of the merges its columns have seen.
  std::int64_t load(std::int64_t unit, std::int64_t first, Real* row) {
    const std::int64_t begin = first / Lanes<Real>::count * Lanes<Real>::count;
    if (slot_[unit] != kNone) {
      const Real* const stored = stored_.data() + slot_[unit] * stride_;
      for (std::int64_t k = begin; k < units_; ++k) row[k] = stored[k];
      return age_[unit];
    }
    const Source* const one = source_row(unit);
    const Source* const two = source_row(partner_[unit]);
    if (partner_[unit] == unit) {
      for (std::int64_t k = begin; k < units_; ++k) row[k] = widen(one[k]);
    } else {
      for (std::int64_t k = begin; k < units_; ++k) {
        const Real a = widen(one[k]), b = widen(two[k]);
        row[k] = (a < b ? a : b) * factor_;
      }
    }
    return 0;
  }

  void replay(Real* row, std::int64_t begin, std::int64_t end) const {
    const std::int32_t* const kept = merges_.kept.data();
    const std::int32_t* const gone = merges_.gone.data();
    for (std::int64_t merge = begin; merge < end; ++merge) {
      const Real a = row[kept[merge]], b = row[gone[merge]];
      row[kept[merge]] = (a < b ? a : b) * factor_;
    }
  }

  void store(std::int64_t kept, std::int64_t gone, const Real* row) {
    if (slot_[kept] == kNone) {
      slot_[kept] = slot_[gone] != kNone ? slot_[gone] : free_[--free_count_];
    } else if (slot_[gone] != kNone) {
      free_[free_count_++] = slot_[gone];
    }
    age_[kept] = merges_.count + 1;
    Real* const stored = stored_.data() + slot_[kept] * stride_;
    for (std::int64_t k = 0; k < units_; ++k) stored[k] = row[k];
  }

  const Source* source_;
  std::int64_t source_stride_;
  std::int64_t units_;
  std::int64_t stride_;
  Real factor_;
  const Merges& merges_;
  Buffer<std::int64_t> partner_;  // [units]: the second unit of a cluster of two, or the unit itself
  Buffer<std::int64_t> slot_;     // [units]: where the row of a larger cluster is stored, or none
  Buffer<std::int64_t> age_;      // [units]: how many merges the columns of a stored row have seen
  Buffer<Real> stored_;           // [slots, stride]; untouched pages cost nothing
  Buffer<std::int64_t> free_;     // the slots that are free
  std::int64_t free_count_;
  Buffer<Real> other_;  // [stride]
};

// Pairs of clusters that must not merge: a bit a pair, from the first that is forbidden on.
class ForbiddenPairs {
 public:
  explicit ForbiddenPairs(std::int64_t units) : units_(units), words_(round_up(units, 64) / 64) {}

  bool any() const { return bits_.size() > 0; }

  // Forbids clusters of units [begin, end) to merge with a cluster.
  void forbid(std::int64_t unit, std::int64_t begin, std::int64_t end) {
    if (!any()) bits_ = Buffer<std::uint64_t>(units_ * words_, 0);
    std::uint64_t* const row = row_of(unit);
    for (std::int64_t k = begin; k < end; ++k) row[k / 64] |= std::uint64_t{1} << (k % 64);
  }

  // What is forbidden to either is forbidden to the joined cluster.
  void join(std::int64_t kept, std::int64_t gone) {
    std::uint64_t* const row = row_of(kept);
    const std::uint64_t* const other = row_of(gone);
    for (std::int64_t word = 0; word < words_; ++word) row[word] |= other[word];
  }

  // Enters a row's bits into its column.
  void mirror(std::int64_t unit) {
    const std::uint64_t* const row = row_of(unit);
    const std::uint64_t bit = std::uint64_t{1} << (unit % 64);
    for (std::int64_t word = 0; word < words_; ++word) {
      for (std::uint64_t left = row[word]; left != 0; left &= left - 1) {
        row_of(word * 64 + __builtin_ctzll(left))[unit / 64] |= bit;
      }
    }
  }

  // Replaces forbidden entries of a row by -inf, from column `first` on.
  template <class Real>
  void apply(std::int64_t unit, std::int64_t first, Real* entries) const {
    using Bits = typename Integers<Real>::Bits;
    const std::uint64_t* const row = bits_.data() + unit * words_;
    for (std::int64_t word = first / 64; word < words_; ++word) {
      if (row[word] == 0) continue;
      Real* const part = entries + word * 64;
      const std::int64_t count = smaller(units_ - word * 64, 64);
      for (std::int64_t k = 0; k < count; ++k) {
        part[k] = (static_cast<Bits>(row[word] >> k) & 1) != 0 ? -infinity<Real> : part[k];
      }
    }
  }

 private:
  std::uint64_t* row_of(std::int64_t unit) { return bits_.data() + unit * words_; }

  std::int64_t units_;
  std::int64_t words_;
  Buffer<std::uint64_t> bits_;  // [units, words]
};

template <class Source>
class Zip {
 public:
  using Real = typename ArithmeticOf<Source>::type;
  using Index = typename Integers<Real>::Index;

  explicit Zip(const ZipProblem& problem)
      : source_(static_cast<const Source*>(problem.similarity)),
        source_stride_(problem.row_stride),
        units_(problem.units),
        model_units_(problem.units / problem.num_models),
        stride_(round_up(problem.units, Lanes<Real>::count)),
        transposed_stride_((round_up(problem.units, kSourceLanes) / kSourceLanes | 1) * kSourceLanes),
        severs_(problem.shrink <= 0.0),
        factor_(severs_ ? Real{1} : static_cast<Real>(problem.shrink)),
        clusters_(problem.units),
        merges_(problem.units - problem.remaining),
        forbidden_(problem.units),
        row_(stride_, Real{0}),
        column_(stride_, Real{0}),
        limit_(stride_, -infinity<Real>),
        bound_(stride_, -infinity<Real>),
        best_(stride_, kNone),
        block_bound_(round_up((stride_ + kBlock - 1) / kBlock, Lanes<Real>::count), -infinity<Real>),
        is_stale_(block_bound_.size(), true),
        parent_(problem.units),
        budget_(problem.num_models, problem.budget) {
    for (std::int64_t unit = 0; unit < units_; ++unit) {
      limit_[unit] = infinity<Real>;
      parent_[unit] = unit;
    }
    for (std::int64_t k = units_; k < stride_; ++k) row_[k] = column_[k] = -infinity<Real>;
  }

  std::int64_t run(const ZipProblem& problem) {
    if (!read()) return kZipNotFinite;
    Buffer<Source> transposed = is_symmetric_ ? Buffer<Source>() : transpose();
    ClusterRows<Source> rows(source_, source_stride_, units_, factor_, merges_);
    ClusterRows<Source> columns(transposed.data(), transposed_stride_, is_symmetric_ ? 0 : units_, factor_, merges_);
    for (std::int64_t model = 0; model < budget_.size(); ++model) {
      if (budget_[model] == 0) separate(model);
    }
    for (std::int64_t unit = 0; unit < units_; ++unit) {
      if (is_symmetric_ && !forbidden_.any()) {
        find_column(unit);
      } else {
        scan_again(rows, unit);
      }
    }
    while (clusters_ > problem.remaining) {
      const Entry<Real> top = largest_bound();
      if (top.value == -infinity<Real>) break;
      const std::int64_t other = best_[top.index];
      if (other == kNone) {
        scan_again(rows, top.index);
        continue;
      }
      problem.values[merges_.count] = static_cast<double>(top.value);
      merge(rows, columns, smaller(top.index, other), top.index < other ? other : top.index);
    }
    number_clusters(problem.cluster_of_unit);
    return merges_.count;
  }

 private:
  static constexpr std::int64_t kTile = 64;  // rows and columns that are read together: two tiles fit into L1
  static constexpr std::int64_t kSourceLanes = kCacheLine / sizeof(Source);
  static constexpr std::int64_t kBlock = 256;  // rows whose bounds have one maximum

  struct Tile {
    alignas(kCacheLine) Real entries[kTile][kTile + Lanes<Real>::count];  // padded: columns are read, too
  };

  std::int64_t model_of(std::int64_t unit) const { return unit / model_units_; }
  std::int64_t first_column(std::int64_t unit) const { return is_symmetric_ ? unit + 1 : 0; }

  // Checks that entries are finite, and whether the matrix is symmetric; finds the largest entry behind the diagonal
  // in each row. Each entry is read once: a tile goes together with its mirror image.
  bool read() {
    Tile lower, upper;
    for (std::int64_t top = 0; top < units_; top += kTile) {
      for (std::int64_t left = 0; left <= top; left += kTile) {
        if (!load_tile(lower, top, left)) return false;
        if (left < top && !load_tile(upper, left, top)) return false;
        if (!is_symmetric_) continue;
        Tile& mirrored = left < top ? upper : lower;
        is_symmetric_ = mirrors(lower, mirrored, smaller(units_ - top, kTile), smaller(units_ - left, kTile));
        note_tile(mirrored, left, top);
      }
    }
    return true;
  }

  // Returns whether all entries are finite. Columns behind the matrix are -inf.
  bool load_tile(Tile& tile, std::int64_t top, std::int64_t left) const {
    using Bits = typename Integers<Real>::Bits;
    const std::int64_t rows = smaller(units_ - top, kTile), columns = smaller(units_ - left, kTile);
    Bits largest = 0;
    for (std::int64_t i = 0; i < rows; ++i) {
      const Source* const source = source_ + (top + i) * source_stride_ + left;
      Real* const entries = tile.entries[i];
      for (std::int64_t k = 0; k < columns; ++k) {
        const Real value = widen(source[k]);
        entries[k] = value;
        Bits bits;
        std::memcpy(&bits, &value, sizeof bits);
        bits &= ~Bits{0} >> 1;
        largest = bits > largest ? bits : largest;
      }
      for (std::int64_t k = columns; k < kTile; ++k) entries[k] = -infinity<Real>;
    }
    return largest < Integers<Real>::exponent;
  }

  static bool mirrors(const Tile& lower, const Tile& upper, std::int64_t rows, std::int64_t columns) {
    std::int64_t different = 0;
    for (std::int64_t i = 0; i < rows; ++i) {
      for (std::int64_t k = 0; k < columns; ++k) different += lower.entries[i][k] != upper.entries[k][i];
    }
    return different == 0;
  }

  // Raises the bounds of rows [top, top + kTile) to entries of a tile; the column becomes that of the tile.
  void note_tile(Tile& tile, std::int64_t top, std::int64_t left) {
    using Vector = typename Lanes<Real>::Vector;
    constexpr std::int64_t lanes = Lanes<Real>::count;
    for (std::int64_t i = 0; i < smaller(units_ - top, kTile); ++i) {
      Real* const entries = tile.entries[i];
      for (std::int64_t k = 0; top == left && k <= i; ++k) entries[k] = -infinity<Real>;
      Vector largest = *reinterpret_cast<const Vector*>(entries);
      for (std::int64_t k = lanes; k < kTile; k += lanes) {
        const Vector value = *reinterpret_cast<const Vector*>(entries + k);
        largest = value > largest ? value : largest;
      }
      Real parts[lanes];
      std::memcpy(parts, &largest, sizeof parts);
      for (std::int64_t step = lanes / 2; step > 0; step /= 2) {
        for (std::int64_t k = 0; k < step; ++k) parts[k] = parts[k + step] > parts[k] ? parts[k + step] : parts[k];
      }
      if (parts[0] > bound_[top + i]) set_best(top + i, {parts[0], left});
    }
  }

  // Finds the first column of a row's largest entry in the tile that holds it.
  void find_column(std::int64_t unit) {
    if (bound_[unit] == -infinity<Real>) return;
    const Source* const source = source_ + unit * source_stride_;
    std::int64_t column = best_[unit] > unit ? best_[unit] : unit + 1;
    while (widen(source[column]) != bound_[unit]) ++column;
    best_[unit] = static_cast<Index>(column);
  }

  // Goes through a padded tile, so that both the matrix and its copy are accessed by rows.
  Buffer<Source> transpose() const {
    Buffer<Source> transposed(units_ * transposed_stride_);
    transposed.prefer_huge_pages();
    Source tile[kTile][kTile + kSourceLanes];
    for (std::int64_t top = 0; top < units_; top += kTile) {
      for (std::int64_t left = 0; left < units_; left += kTile) {
        const std::int64_t rows = smaller(units_ - top, kTile), columns = smaller(units_ - left, kTile);
        for (std::int64_t i = 0; i < rows; ++i) {
          const Source* const source = source_ + (top + i) * source_stride_ + left;
          for (std::int64_t k = 0; k < columns; ++k) tile[i][k] = source[k];
        }
        for (std::int64_t k = 0; k < columns; ++k) {
          Source* const entries = transposed.data() + (left + k) * transposed_stride_ + top;
          for (std::int64_t i = 0; i < rows; ++i) entries[i] = tile[i][k];
        }
      }
    }
    return transposed;
  }

  void set_best(std::int64_t unit, const Entry<Real>& best) {
    bound_[unit] = best.value;
    best_[unit] = static_cast<Index>(best.index);
    is_stale_[unit / kBlock] = true;
  }

  void scan_again(ClusterRows<Source>& rows, std::int64_t unit) {
    rows.compute(unit, first_column(unit), row_.data());
    if (forbidden_.any()) forbidden_.apply(unit, first_column(unit), row_.data());
    scan(unit);
  }

  // Finds the best of the entries in `row_`.
  void scan(std::int64_t unit) {
    const std::int64_t first = first_column(unit), begin = first / Lanes<Real>::count * Lanes<Real>::count;
    for (std::int64_t k = begin; k < smaller(first, stride_); ++k) row_[k] = -infinity<Real>;
    if (begin >= stride_) return set_best(unit, {-infinity<Real>, 0});
    const Entry<Real> largest = first_largest(row_.data() + begin, limit_.data() + begin, stride_ - begin);
    set_best(unit, {largest.value, begin + largest.index});
  }

  // The largest bound of a row that is left, and the first row that has it.
  Entry<Real> largest_bound() {
    const auto of_block = [&](std::int64_t block) {
      const std::int64_t begin = block * kBlock;
      return first_largest(bound_.data() + begin, limit_.data() + begin, smaller(stride_ - begin, kBlock));
    };
    std::int64_t top = 0;
    for (std::int64_t block = 0; block * kBlock < units_; ++block) {
      if (is_stale_[block]) {
        block_bound_[block] = of_block(block).value;
        is_stale_[block] = false;
      }
      if (block_bound_[block] > block_bound_[top]) top = block;
    }
    const Entry<Real> largest = of_block(top);
    return {largest.value, top * kBlock + largest.index};
  }

  void merge(ClusterRows<Source>& rows, ClusterRows<Source>& columns, std::int64_t kept, std::int64_t gone) {
    rows.join(kept, gone, row_.data());
    if (!is_symmetric_) columns.join(kept, gone, column_.data());
    merges_.kept[merges_.count] = static_cast<std::int32_t>(kept);
    merges_.gone[merges_.count++] = static_cast<std::int32_t>(gone);
    limit_[gone] = -infinity<Real>;
    is_stale_[gone / kBlock] = true;
    parent_[gone] = kept;
    --clusters_;
    if (forbidden_.any() || severs_) forbid_joined(kept, gone);
    if (is_symmetric_) {
      note_entries(row_.data(), 0, kept, kept, gone);
      forget_column(kept + 1, gone, gone);
    } else {
      note_entries(column_.data(), 0, units_, kept, gone);
    }
    scan(kept);
    const std::int64_t model = model_of(kept);
    if (model == model_of(gone) && --budget_[model] == 0) separate(model);
  }

  // Marks what the joined cluster must not merge with. One that may merge with no other is no longer searched.
  void forbid_joined(std::int64_t kept, std::int64_t gone) {
    if (severs_) {
      forbid_model(kept, model_of(kept));
      forbid_model(kept, model_of(gone));
    }
    forbidden_.join(kept, gone);
    forbidden_.apply(kept, 0, row_.data());
    bool is_alone = first_largest(row_.data(), limit_.data(), stride_).value == -infinity<Real>;
    if (!is_symmetric_) {
      forbidden_.apply(kept, 0, column_.data());
      is_alone = is_alone && first_largest(column_.data(), limit_.data(), stride_).value == -infinity<Real>;
    }
    if (is_alone) {
      limit_[kept] = -infinity<Real>;
      is_stale_[kept / kBlock] = true;
    } else {
      forbidden_.mirror(kept);
    }
  }

  void forbid_model(std::int64_t unit, std::int64_t model) {
    forbidden_.forbid(unit, model * model_units_, (model + 1) * model_units_);
  }

  // Rows lost their entry in column `gone` and got a new one, `values`, in column `kept`, kept < gone.
  void note_entries(const Real* values, std::int64_t begin, std::int64_t end, std::int64_t kept, std::int64_t gone) {
    for (std::int64_t block = begin; block < end; block += kBlock) {
      const bool rises =
          note_block(values, block, smaller(block + kBlock, end), static_cast<Index>(kept), static_cast<Index>(gone));
      if (rises) is_stale_[block / kBlock] = true;
    }
  }

  // Returns whether a bound rose.
  bool note_block(const Real* values, std::int64_t begin, std::int64_t end, Index kept, Index gone) {
    Real* const bounds = bound_.data();
    Index* const best = best_.data();
    Index any = 0;
    for (std::int64_t unit = begin; unit < end; ++unit) {
      const Real value = values[unit], bound = bounds[unit];
      const Index column = best[unit];
      const Index other = column == kept || column == gone ? static_cast<Index>(kNone) : column;
      const Index tied = other == kNone && column != other ? kept : (kept < other ? kept : other);
      const Index stays = value == bound ? tied : other;
      best[unit] = value > bound ? kept : stays;
      bounds[unit] = value > bound ? value : bound;
      any |= value > bound ? 1 : 0;
    }
    return any != 0;
  }

  void forget_column(std::int64_t begin, std::int64_t end, std::int64_t gone) {
    Index* const best = best_.data();
    const Index column = static_cast<Index>(gone);
    for (std::int64_t unit = begin; unit < end; ++unit) best[unit] = best[unit] == column ? kNone : best[unit];
  }

  // The model's budget is spent: no further merges between clusters of its own.
  void separate(std::int64_t model) {
    for (std::int64_t unit = model * model_units_; unit < (model + 1) * model_units_; ++unit) {
      if (parent_[unit] != unit) continue;
      forbid_model(unit, model);
      if (best_[unit] != kNone && model_of(best_[unit]) == model) best_[unit] = kNone;
    }
  }

  // A unit joins one of lower index, so a cluster's first unit is its root and comes before the others.
  void number_clusters(std::int64_t* cluster_of_unit) const {
    std::int64_t next = 0;
    for (std::int64_t i = 0; i < units_; ++i) {
      cluster_of_unit[i] = parent_[i] == i ? next++ : cluster_of_unit[parent_[i]];
    }
  }

  const Source* source_;
  std::int64_t source_stride_;
  std::int64_t units_;
  std::int64_t model_units_;
  std::int64_t stride_;
  std::int64_t transposed_stride_;  // an odd number of cache lines, as else a column falls into a few cache sets
  bool severs_;                     // instead of shrinking
  bool is_symmetric_ = true;
  Real factor_;
  std::int64_t clusters_;  // left
  Merges merges_;
  ForbiddenPairs forbidden_;
  Buffer<Real> row_;             // [stride]: of the joined cluster, or the row that is scanned
  Buffer<Real> column_;          // [stride]: of the joined cluster, if the matrix is not symmetric
  Buffer<Real> limit_;           // [stride]: inf where a cluster is left, -inf elsewhere
  Buffer<Real> bound_;           // [stride]: no entry of the row exceeds it
  Buffer<Index> best_;           // [stride]: first column whose entry equals the bound, or none
  Buffer<Real> block_bound_;     // largest bound of each block of rows
  Buffer<bool> is_stale_;        // whether it must be found again
  Buffer<std::int64_t> parent_;  // [units]: the unit that this one was joined to, or itself
  Buffer<std::int64_t> budget_;  // [models]: merges left inside each model
};

}  // namespace

std::int64_t zip_units(const ZipProblem& problem) {
  if (problem.units == 0) return 0;
  switch (problem.type) {
    case ScalarType::float16: return Zip<Half>(problem).run(problem);
    case ScalarType::bfloat16: return Zip<BFloat16>(problem).run(problem);
    case ScalarType::float32: return Zip<float>(problem).run(problem);
    case ScalarType::float64: return Zip<double>(problem).run(problem);
  }
  __builtin_unreachable();
}

}  // namespace mudsc::MUDSC_ISA
