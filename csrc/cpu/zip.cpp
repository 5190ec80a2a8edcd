// Greedy zip of units into clusters (Stoica et al., "ZipIt!", arXiv 2305.03053, as used by Xu et al., arXiv
// 2403.01753).
//
// Until `remaining` clusters are left, the first largest similarity in row-major order names a pair i < j; j joins i,
// and row and column i become the smaller of those of i and j, times `shrink`. Each entry is computed by the same
// operations in the same order as in the plain procedure, so the result is the same bit for bit.
//
// Searching: every row keeps an upper bound of its entries and, where known, the first column that attains it. A merge
// replaces one entry of a row and removes another. If these were not the row's best, the bound stays or rises to the
// new entry; if they were, the bound stays and its column becomes unknown. Bounds therefore always hold, also where
// negative similarities grow by a shrink below one. A row is scanned only when its bound is the largest of all and its
// column is unknown: rows that never come up are never scanned again. The first row with the largest bound, once its
// column is known, is the first largest entry of the matrix.
// A scan reads little of the row: for every 64 columns an upper bound is kept from when they were last read, 0 at
// least. It stays one, as an entry only becomes the smaller of two, times a shrink of at most one, which is no larger
// unless it is negative, and never positive then. The group with the largest bound is read until a bound turns out to
// be attained. The largest of all rows' bounds is found by maxima of blocks of rows, of which only those are renewed
// that changed.
//
// Memory: one working copy of the matrix, on huge pages where the system has them. A merge streams rows i and j and
// touches one cache line in every remaining row, or two if the matrix is not symmetric: a symmetric one stays so, and
// column i is then the new row i. These single lines are most of the time. Rows are an odd number of cache lines apart,
// as otherwise the entries of a column would share a few cache sets. Removed columns stay in place, masked by `limit`.
// One thread: merges depend on each other, and each is too short to share.
#include "mudsc/zip.hpp"

#include "kernel.hpp"

namespace mudsc::MUDSC_ISA {
namespace {

constexpr std::int64_t cache_line = 64;
constexpr std::int64_t unknown = -1;

template <class Real>
constexpr Real infinity = static_cast<Real>(__builtin_inf());

template <class Real>
struct Lanes {
  typedef Real Vector __attribute__((vector_size(cache_line)));
  static constexpr std::int64_t count = cache_line / static_cast<std::int64_t>(sizeof(Real));
};

// Entries to the next row: whole cache lines, and an odd number of them.
template <class Real>
std::int64_t padded_stride(std::int64_t units) {
  constexpr std::int64_t lanes = Lanes<Real>::count;
  return ((units + lanes - 1) / lanes | 1) * lanes;
}

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
    const std::int64_t end = begin + block < count ? begin + block : count;
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
  while ((values[best.index] < limit[best.index] ? values[best.index] : limit[best.index]) != best.value) {
    ++best.index;
  }
  return best;
}

// Largest of some numbers and the first place where it stands; count is a multiple of the vector width.
template <class Real>
Entry<Real> first_largest(const Real* values, std::int64_t count) {
  using Vector = typename Lanes<Real>::Vector;
  Vector largest = Vector{} - infinity<Real>;
  for (std::int64_t k = 0; k < count; k += Lanes<Real>::count) {
    const Vector value = *reinterpret_cast<const Vector*>(values + k);
    largest = value > largest ? value : largest;
  }
  Entry<Real> best{-infinity<Real>, 0};
  for (std::int64_t lane = 0; lane < Lanes<Real>::count; ++lane) {
    if (largest[lane] > best.value) best.value = largest[lane];
  }
  while (values[best.index] != best.value) ++best.index;
  return best;
}

template <class Real>
class Zip {
 public:
  explicit Zip(const ZipProblem& problem)
      : units_(problem.units),
        model_units_(problem.units / problem.num_models),
        stride_(padded_stride<Real>(problem.units)),
        severs_(problem.shrink <= 0.0),
        shrinks_(problem.shrink <= 1.0),
        shrink_(static_cast<Real>(problem.shrink)),
        clusters_(problem.units),
        similarity_(problem.units * stride_),
        limit_(stride_, -infinity<Real>),
        bound_(stride_, -infinity<Real>),
        best_(problem.units),
        groups_(padded((stride_ + kGroup - 1) / kGroup)),
        group_bound_(shrinks_ ? problem.units * groups_ : 0, -infinity<Real>),
        block_bound_(padded((problem.units + kBlock - 1) / kBlock), -infinity<Real>),
        is_stale_(block_bound_.size(), true),
        rows_(problem.units),
        parent_(problem.units),
        budget_(problem.num_models, problem.budget) {
    similarity_.prefer_huge_pages();
  }

  template <class Source>
  std::int64_t run(const ZipProblem& problem) {
    load(static_cast<const Source*>(problem.similarity), problem.row_stride);
    symmetric_ = is_symmetric();
    for (std::int64_t model = 0; model < budget_.size(); ++model) {
      if (budget_[model] == 0) separate(model);
    }
    std::int64_t merges = 0;
    while (clusters_ > problem.remaining) {
      const Entry<Real> top = largest_bound();
      if (top.value == -infinity<Real>) break;
      if (best_[top.index] == unknown) {
        scan_again(top.index);
        continue;
      }
      problem.values[merges++] = static_cast<double>(top.value);
      const std::int64_t other = best_[top.index];
      merge(top.index < other ? top.index : other, top.index < other ? other : top.index);
    }
    number_clusters(problem.cluster_of_unit);
    return merges;
  }

 private:
  Real* row(std::int64_t unit) { return similarity_.data() + unit * stride_; }
  std::int64_t model_of(std::int64_t unit) const { return unit / model_units_; }

  template <class Source>
  void load(const Source* source, std::int64_t source_stride) {
    for (std::int64_t i = 0; i < units_; ++i) {
      limit_[i] = infinity<Real>;
      rows_[i] = i;
      parent_[i] = i;
    }
    for (std::int64_t i = 0; i < units_; ++i) {
      Real* const entries = row(i);
      for (std::int64_t k = 0; k < units_; ++k) entries[k] = widen(source[i * source_stride + k]);
      for (std::int64_t k = units_; k < stride_; ++k) entries[k] = -infinity<Real>;
      entries[i] = -infinity<Real>;
      scan(i);
    }
  }

  // Compares tiles that fit into the first cache, as one side is read down its columns.
  bool is_symmetric() {
    constexpr std::int64_t tile = 64;
    for (std::int64_t top = 0; top < units_; top += tile) {
      const std::int64_t bottom = top + tile < units_ ? top + tile : units_;
      for (std::int64_t left = 0; left <= top; left += tile) {
        const std::int64_t right = left + tile < units_ ? left + tile : units_;
        std::int64_t different = 0;
        for (std::int64_t i = top; i < bottom; ++i) {
          for (std::int64_t k = left; k < right; ++k) different += row(i)[k] != row(k)[i];
        }
        if (different != 0) return false;
      }
    }
    return true;
  }

  // Columns whose upper bound is kept together, and rows whose bounds have one maximum.
  static constexpr std::int64_t kGroup = 64;
  static constexpr std::int64_t kBlock = 256;

  static std::int64_t padded(std::int64_t count) {
    return (count + Lanes<Real>::count - 1) / Lanes<Real>::count * Lanes<Real>::count;
  }

  std::int64_t columns_of(std::int64_t group) const {
    return stride_ - group * kGroup < kGroup ? stride_ - group * kGroup : kGroup;
  }

  Real largest_of_group(std::int64_t unit, std::int64_t group) {
    using Vector = typename Lanes<Real>::Vector;
    constexpr std::int64_t lanes = Lanes<Real>::count;
    const std::int64_t begin = group * kGroup, end = begin + columns_of(group);
    const Real* const entries = row(unit);
    Vector largest = Vector{} - infinity<Real>;
    for (std::int64_t k = begin; k < end; k += lanes) {
      const Vector value = *reinterpret_cast<const Vector*>(entries + k);
      const Vector most = *reinterpret_cast<const Vector*>(limit_.data() + k);
      const Vector masked = value < most ? value : most;
      largest = masked > largest ? masked : largest;
    }
    Real parts[lanes];
    std::memcpy(parts, &largest, sizeof parts);
    for (std::int64_t step = lanes / 2; step > 0; step /= 2) {
      for (std::int64_t k = 0; k < step; ++k) parts[k] = parts[k + step] > parts[k] ? parts[k + step] : parts[k];
    }
    return parts[0];
  }

  // Sets a row's best entry to the first largest of a group.
  void set_best_of_group(std::int64_t unit, std::int64_t group) {
    const std::int64_t begin = group * kGroup;
    const Entry<Real> largest = first_largest(row(unit) + begin, limit_.data() + begin, columns_of(group));
    set_best(unit, {largest.value, begin + largest.index});
  }

  void set_best(std::int64_t unit, const Entry<Real>& best) {
    bound_[unit] = best.value;
    best_[unit] = best.index;
    is_stale_[unit / kBlock] = true;
  }

  // Finds a row's first largest entry by reading all of it.
  void scan(std::int64_t unit) {
    if (!shrinks_) return set_best(unit, first_largest(row(unit), limit_.data(), stride_));
    Real* const bounds = group_bound_.data() + unit * groups_;
    Entry<Real> best{-infinity<Real>, 0};
    for (std::int64_t group = 0; group * kGroup < stride_; ++group) {
      const Real largest = largest_of_group(unit, group);
      bounds[group] = largest > 0 ? largest : 0;
      if (largest > best.value) best = {largest, group};
    }
    set_best_of_group(unit, best.index);
  }

  // The same by reading groups that may hold it: the largest bound, once it is attained, is the largest entry.
  void scan_again(std::int64_t unit) {
    if (!shrinks_) return scan(unit);
    Real* const bounds = group_bound_.data() + unit * groups_;
    for (;;) {
      const Entry<Real> top = first_largest(bounds, groups_);
      if (!(top.value > 0)) return scan(unit);
      const Real largest = largest_of_group(unit, top.index);
      if (largest == top.value) return set_best_of_group(unit, top.index);
      bounds[top.index] = largest > 0 ? largest : 0;
    }
  }

  // The largest bound of a row that is left, and the first row that has it.
  Entry<Real> largest_bound() {
    const auto of_block = [&](std::int64_t block) {
      const std::int64_t begin = block * kBlock, count = stride_ - begin < kBlock ? stride_ - begin : kBlock;
      return first_largest(bound_.data() + begin, limit_.data() + begin, count);
    };
    for (std::int64_t block = 0; block * kBlock < units_; ++block) {
      if (!is_stale_[block]) continue;
      block_bound_[block] = of_block(block).value;
      is_stale_[block] = false;
    }
    const Entry<Real> top = first_largest(block_bound_.data(), block_bound_.size());
    return {top.value, top.index * kBlock + of_block(top.index).index};
  }

  void merge(std::int64_t kept, std::int64_t gone) {
    limit_[gone] = -infinity<Real>;
    is_stale_[gone / kBlock] = true;
    parent_[gone] = kept;
    --clusters_;
    join_rows(kept, gone);
    join_columns(kept, gone);
    const std::int64_t model = model_of(kept);
    if (model == model_of(gone) && --budget_[model] == 0) separate(model);
  }

  void join_rows(std::int64_t kept, std::int64_t gone) {
    Real* const entries = row(kept);
    const Real* const others = row(gone);
    const Real factor = severs_ ? Real{1} : shrink_;
    for (std::int64_t k = 0; k < stride_; ++k) {
      entries[k] = (entries[k] < others[k] ? entries[k] : others[k]) * factor;
    }
    if (severs_) {
      sever(entries, model_of(kept));
      sever(entries, model_of(gone));
    }
    scan(kept);
  }

  // Entries (unit, kept) of the remaining rows. The row step does not touch what this reads, nor this what it reads:
  // their order is free, and entry (kept, kept) is -inf before and after both.
  void join_columns(std::int64_t kept, std::int64_t gone) {
    constexpr std::int64_t ahead = 16;  // rows whose cache lines are fetched early
    const std::int64_t last = clusters_;
    std::int64_t count = 0;
    for (std::int64_t position = 0; position <= last; ++position) {
      const std::int64_t unit = rows_[position];
      const Real* const later = row(rows_[position + ahead < last ? position + ahead : last]);
      __builtin_prefetch(later + kept, 1);
      if (!symmetric_) __builtin_prefetch(later + gone);
      if (unit == gone) continue;
      rows_[count++] = unit;
      if (unit == kept) continue;
      Real* const entries = row(unit);
      const Real joined = symmetric_ ? row(kept)[unit] : join_entry(unit, kept, gone);
      entries[kept] = joined;
      note_entry(unit, kept, gone, joined);
    }
  }

  Real join_entry(std::int64_t unit, std::int64_t kept, std::int64_t gone) {
    const Real* const entries = row(unit);
    const Real smaller = entries[kept] < entries[gone] ? entries[kept] : entries[gone];
    if (!severs_) return smaller * shrink_;
    const std::int64_t model = model_of(unit);
    return model == model_of(kept) || model == model_of(gone) ? -infinity<Real> : smaller;
  }

  // Row `unit` lost its entry in column `gone` and got a new one in column `kept`, kept < gone.
  void note_entry(std::int64_t unit, std::int64_t kept, std::int64_t gone, Real value) {
    if (value > bound_[unit]) {
      set_best(unit, {value, kept});
    } else if (best_[unit] == kept || best_[unit] == gone) {
      best_[unit] = value == bound_[unit] ? kept : unknown;
    } else if (value == bound_[unit] && kept < best_[unit]) {
      best_[unit] = kept;
    }
  }

  void sever(Real* entries, std::int64_t model) {
    for (std::int64_t k = model * model_units_; k < (model + 1) * model_units_; ++k) entries[k] = -infinity<Real>;
  }

  // The model's budget is spent: no further merges between clusters of its own.
  void separate(std::int64_t model) {
    for (std::int64_t position = 0; position < clusters_; ++position) {
      const std::int64_t unit = rows_[position];
      if (model_of(unit) != model) continue;
      sever(row(unit), model);
      if (best_[unit] != unknown && model_of(best_[unit]) == model) best_[unit] = unknown;
    }
  }

  // A unit joins one of lower index, so a cluster's first unit is its root and comes before the others.
  void number_clusters(std::int64_t* cluster_of_unit) const {
    std::int64_t next = 0;
    for (std::int64_t i = 0; i < units_; ++i) {
      cluster_of_unit[i] = parent_[i] == i ? next++ : cluster_of_unit[parent_[i]];
    }
  }

  std::int64_t units_;
  std::int64_t model_units_;
  std::int64_t stride_;
  bool severs_;   // instead of shrinking
  bool shrinks_;  // so that upper bounds of groups stay valid
  bool symmetric_ = false;
  Real shrink_;
  std::int64_t clusters_;        // left
  Buffer<Real> similarity_;      // [units, stride]
  Buffer<Real> limit_;           // [stride]: inf where a cluster is left, -inf elsewhere
  Buffer<Real> bound_;           // [stride]: no entry of the row exceeds it
  Buffer<std::int64_t> best_;    // [units]: first column whose entry equals the bound, or unknown
  std::int64_t groups_;          // of columns, padded to whole vectors
  Buffer<Real> group_bound_;     // [units, groups]: no entry of these columns exceeds it
  Buffer<Real> block_bound_;     // largest bound of each block of rows
  Buffer<bool> is_stale_;        // whether it must be found anew
  Buffer<std::int64_t> rows_;    // [units]: the clusters left, ascending, by first unit
  Buffer<std::int64_t> parent_;  // [units]: the unit that this one was joined to, or itself
  Buffer<std::int64_t> budget_;  // [models]: merges left inside each model
};

}  // namespace

std::int64_t zip_units(const ZipProblem& problem) {
  if (problem.units == 0) return 0;
  switch (problem.type) {
    case ScalarType::float16: return Zip<float>(problem).run<Half>(problem);
    case ScalarType::bfloat16: return Zip<float>(problem).run<BFloat16>(problem);
    case ScalarType::float32: return Zip<float>(problem).run<float>(problem);
    case ScalarType::float64: return Zip<double>(problem).run<double>(problem);
  }
  __builtin_unreachable();
}

}  // namespace mudsc::MUDSC_ISA
