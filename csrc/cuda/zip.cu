// Greedy zip of units into clusters on the device. Makes the same merges as csrc/cpu/zip.cpp, which describes the
// algorithm.
//
// Three launches, without synchronizing with the host in between:
//   1. zip_load, a block per row: a working copy of the matrix and each row's first largest entry;
//   2. zip_symmetry, over tiles: whether the matrix equals its transpose;
//   3. zip_merge, one block for all merges. A merge searches the rows' bounds, reads two rows, and touches one entry
//      in every remaining row: a few thousand independent accesses, which one multiprocessor issues in less time than
//      a barrier across the whole device takes.
// The bounds and their columns are in shared memory if they fit (25,000 units in float32), else in L2.
// Memory traffic: two reads and a write of the matrix, then per merge two rows and a sector in every row: written, and
// if the matrix is not symmetric read as well, twice.
#include <type_traits>

#include "block.hpp"
#include "mudsc/zip_cuda.hpp"

namespace mudsc::cuda {
namespace {

constexpr int kLoadThreads = block_threads(256, 64);
constexpr int kMergeThreads = block_threads(1024, 96);
constexpr int kTile = 32;
constexpr std::int32_t kUnknown = -1;

// A problem with its workspace.
template <class Real>
struct Zip {
  std::int64_t units, model_units, num_models, remaining, budget;
  Real shrink;
  bool severs;               // instead of shrinking
  Real* similarity;          // [units, units]
  Real* first_bound;         // [units]
  std::int64_t* budgets;     // [num_models]
  std::int32_t* first_best;  // [units]
  std::int32_t* parent;      // [units]: the unit that this one was joined to, or itself
  std::int32_t* number;      // [units]
  std::int32_t* different;   // [1]: pairs of entries that break the symmetry
  std::uint8_t* alive;       // [units]
  std::int64_t* cluster_of_unit;
  double* values;
  std::int64_t* merges;

  __device__ Real* row(std::int64_t unit) const { return similarity + unit * units; }
  // Units are counted in 32 bits, because a division is several times cheaper than in 64 bits.
  __device__ std::uint32_t model_of(std::int64_t unit) const {
    return static_cast<std::uint32_t>(unit) / static_cast<std::uint32_t>(model_units);
  }
  // Avoids a division, because it runs for every entry of a merge.
  __device__ bool is_of_model(std::int64_t unit, std::uint32_t model) const {
    const std::uint32_t size = static_cast<std::uint32_t>(model_units);
    return static_cast<std::uint32_t>(unit) - model * size < size;
  }
};

// Data that changes with every merge, in shared memory if it fits.
template <class Real>
struct RowBests {
  Real* bound;         // upper bound of the row's entries; -inf for a removed row
  std::int32_t* best;  // first column whose entry equals the bound, or kUnknown
  std::uint8_t* alive;
};

template <class Real, class Source>
__global__ void __launch_bounds__(kLoadThreads)
    zip_load(const Zip<Real> zip, const Source* __restrict__ source, std::int64_t row_stride) {
  const std::int64_t row = blockIdx.x;
  Real* const entries = zip.row(row);
  Entry<Real> best{-infinity<Real>, 0};
  for (std::int64_t k = threadIdx.x; k < zip.units; k += kLoadThreads) {
    const Real value = k == row ? -infinity<Real> : static_cast<Real>(widen(source[row * row_stride + k]));
    entries[k] = value;
    if (value > best.value) best = {value, static_cast<std::int32_t>(k)};
  }
  best = block_combine(best, FirstLargest(), Entry<Real>{-infinity<Real>, 0});
  if (threadIdx.x == 0) {
    zip.first_bound[row] = best.value;
    zip.first_best[row] = best.index;
    zip.parent[row] = static_cast<std::int32_t>(row);
    if (row == 0) *zip.different = 0;
  }
}

template <class Real>
__global__ void __launch_bounds__(kTile * 8) zip_symmetry(const Zip<Real> zip) {
  MUDSC_SHARED(Real, transposed, kTile * (kTile + 1));
  const std::int64_t top = static_cast<std::int64_t>(blockIdx.y) * kTile;
  const std::int64_t left = static_cast<std::int64_t>(blockIdx.x) * kTile;
  if (left > top) return;
  const int across = threadIdx.x % kTile, down = threadIdx.x / kTile;
  for (int k = down; k < kTile; k += 8) {
    if (left + k < zip.units && top + across < zip.units) {
      transposed[across * (kTile + 1) + k] = zip.row(left + k)[top + across];
    }
  }
  __syncthreads();
  bool differs = false;
  for (int k = down; k < kTile; k += 8) {
    if (top + k < zip.units && left + across < zip.units) {
      differs |= zip.row(top + k)[left + across] != transposed[k * (kTile + 1) + across];
    }
  }
  if (differs) atomicOr(zip.different, 1);
}

// The block's view of one merge after another.
template <class Real>
class Merger {
 public:
  __device__ Merger(const Zip<Real>& zip, const RowBests<Real>& rows)
      : zip_(zip), rows_(rows), symmetric_(*zip.different == 0) {}

  __device__ void run() {
    for (std::int64_t k = threadIdx.x; k < zip_.units; k += kMergeThreads) {
      rows_.bound[k] = zip_.first_bound[k];
      rows_.best[k] = zip_.first_best[k];
      rows_.alive[k] = 1;
    }
    for (std::int64_t model = threadIdx.x; model < zip_.num_models; model += kMergeThreads) {
      zip_.budgets[model] = zip_.budget;
    }
    __syncthreads();
    for (std::int64_t model = 0; model < zip_.num_models && zip_.budget == 0; ++model) separate(model);
    std::int64_t merges = 0;
    while (zip_.units - merges > zip_.remaining) {
      const Entry<Real> top = largest_bound();
      if (top.value == -infinity<Real>) break;
      const std::int32_t other = rows_.best[top.index];
      if (other == kUnknown) {
        scan(top.index);
        continue;
      }
      if (threadIdx.x == 0) zip_.values[merges] = static_cast<double>(top.value);
      ++merges;
      merge(top.index < other ? top.index : other, top.index < other ? other : top.index);
    }
    if (threadIdx.x == 0) *zip_.merges = merges;
    number_clusters();
  }

 private:
  __device__ Entry<Real> largest_bound() const {
    Entry<Real> best{-infinity<Real>, 0};
    for (std::int64_t k = threadIdx.x; k < zip_.units; k += kMergeThreads) {
      if (rows_.bound[k] > best.value) best = {rows_.bound[k], static_cast<std::int32_t>(k)};
    }
    return block_combine(best, FirstLargest(), Entry<Real>{-infinity<Real>, 0});
  }

  __device__ void scan(std::int32_t unit) {
    const Real* const entries = zip_.row(unit);
    Entry<Real> best{-infinity<Real>, 0};
    for (std::int64_t k = threadIdx.x; k < zip_.units; k += kMergeThreads) {
      if (rows_.alive[k] && entries[k] > best.value) best = {entries[k], static_cast<std::int32_t>(k)};
    }
    set_best(unit, best);
  }

  __device__ void set_best(std::int32_t unit, Entry<Real> best) {
    best = block_combine(best, FirstLargest(), Entry<Real>{-infinity<Real>, 0});
    if (threadIdx.x == 0) {
      rows_.bound[unit] = best.value;
      rows_.best[unit] = best.index;
    }
    __syncthreads();
  }

  __device__ void merge(std::int32_t kept, std::int32_t gone) {
    const Entry<Real> best = zip_.severs ? join_rows<true>(kept, gone) : join_rows<false>(kept, gone);
    set_best(kept, best);
    const std::uint32_t model = zip_.model_of(kept);
    if (zip_.is_of_model(gone, model)) spend(model);
  }

  // Each thread joins its entries of the two rows, then the same entries of the two columns, so no thread reads another
  // thread's writes before the end. Returns the largest of its entries in the kept row.
  template <bool kSevers>
  __device__ Entry<Real> join_rows(std::int32_t kept, std::int32_t gone) {
    Real* const entries = zip_.row(kept);
    const Real* const others = zip_.row(gone);
    Entry<Real> best{-infinity<Real>, 0};
    __syncthreads();  // all threads have read the bounds of this merge
    for (std::int64_t k = threadIdx.x; k < zip_.units; k += kMergeThreads) {
      if (!rows_.alive[k]) continue;
      if (k == gone) {
        rows_.alive[k] = 0;
        rows_.bound[k] = -infinity<Real>;
        zip_.parent[k] = kept;
        continue;
      }
      const bool severed =
          kSevers && (zip_.is_of_model(k, zip_.model_of(kept)) || zip_.is_of_model(k, zip_.model_of(gone)));
      const Real across = join<kSevers>(entries[k], others[k], severed);
      Real* const column = zip_.row(k);
      if (k != kept) {
        const Real down = symmetric_ ? across : join<kSevers>(column[kept], column[gone], severed);
        column[kept] = down;
        note_entry(static_cast<std::int32_t>(k), kept, gone, down);
      }
      entries[k] = across;
      if (across > best.value) best = {across, static_cast<std::int32_t>(k)};
    }
    return best;
  }

  template <bool kSevers>
  __device__ Real join(Real a, Real b, bool severed) const {
    const Real smaller = a < b ? a : b;
    if constexpr (kSevers) return severed ? -infinity<Real> : smaller;
    return smaller * zip_.shrink;
  }

  // Row `unit` lost its entry in column `gone` and got a new one in column `kept`, kept < gone.
  __device__ void note_entry(std::int32_t unit, std::int32_t kept, std::int32_t gone, Real value) {
    const Real bound = rows_.bound[unit];
    const std::int32_t best = rows_.best[unit];
    if (value > bound) {
      rows_.bound[unit] = value;
      rows_.best[unit] = kept;
    } else if (best == kept || best == gone) {
      rows_.best[unit] = value == bound ? kept : kUnknown;
    } else if (value == bound && kept < best) {
      rows_.best[unit] = kept;
    }
  }

  __device__ void spend(std::int64_t model) {
    const std::int64_t left = zip_.budgets[model] - 1;
    __syncthreads();
    if (threadIdx.x == 0) zip_.budgets[model] = left;
    __syncthreads();
    if (left == 0) separate(model);
  }

  // The model's budget is spent: forbid further merges within the model.
  __device__ void separate(std::int64_t model) {
    const std::int64_t begin = model * zip_.model_units, end = begin + zip_.model_units;
    for (std::int64_t unit = begin; unit < end; ++unit) {
      if (!rows_.alive[unit]) continue;
      for (std::int64_t k = begin + threadIdx.x; k < end; k += kMergeThreads) zip_.row(unit)[k] = -infinity<Real>;
    }
    for (std::int64_t unit = begin + threadIdx.x; unit < end; unit += kMergeThreads) {
      const std::int32_t best = rows_.best[unit];
      if (best != kUnknown && zip_.is_of_model(best, static_cast<std::uint32_t>(model))) rows_.best[unit] = kUnknown;
    }
    __syncthreads();
  }

  // A unit joins one of lower index, so a cluster's first unit is its root. Each thread numbers the roots of a range,
  // then all units look up their root's number.
  __device__ void number_clusters() {
    MUDSC_SHARED(std::int32_t, first_number, kMergeThreads);
    const std::int64_t share = (zip_.units + kMergeThreads - 1) / kMergeThreads;
    const std::int64_t begin = threadIdx.x * share;
    const std::int64_t end = begin + share < zip_.units ? begin + share : zip_.units;
    std::int32_t roots = 0;
    for (std::int64_t unit = begin; unit < end; ++unit) roots += zip_.parent[unit] == unit;
    first_number[threadIdx.x] = roots;
    __syncthreads();
    for (int distance = 1; distance < kMergeThreads; distance *= 2) {
      const std::int32_t before = static_cast<int>(threadIdx.x) >= distance ? first_number[threadIdx.x - distance] : 0;
      __syncthreads();
      first_number[threadIdx.x] += before;
      __syncthreads();
    }
    std::int32_t next = first_number[threadIdx.x] - roots;
    for (std::int64_t unit = begin; unit < end; ++unit) {
      if (zip_.parent[unit] == unit) zip_.number[unit] = next++;
    }
    __syncthreads();
    for (std::int64_t unit = threadIdx.x; unit < zip_.units; unit += kMergeThreads) {
      std::int32_t root = static_cast<std::int32_t>(unit);
      while (zip_.parent[root] != root) root = zip_.parent[root];
      zip_.cluster_of_unit[unit] = zip_.number[root];
    }
  }

  Zip<Real> zip_;
  RowBests<Real> rows_;
  bool symmetric_;
};

template <class Real>
__global__ void __launch_bounds__(kMergeThreads) zip_merge(const Zip<Real> zip, bool in_shared_memory) {
  RowBests<Real> rows{zip.first_bound, zip.first_best, zip.alive};
  if (in_shared_memory) {
    rows.bound = reinterpret_cast<Real*>(dynamic_shared());
    rows.best = reinterpret_cast<std::int32_t*>(rows.bound + zip.units);
    rows.alive = reinterpret_cast<std::uint8_t*>(rows.best + zip.units);
  }
  Merger<Real>(zip, rows).run();
}

// Static shared memory of zip_merge, which reduces the space for the row maxima.
constexpr std::size_t kReservedShared = 8 * 1024;

template <class Real>
std::size_t bytes_per_row_best() {
  return sizeof(Real) + sizeof(std::int32_t) + sizeof(std::uint8_t);
}

// Lays out the arrays one after another, widest types first; returns their total size in bytes.
template <class Real>
std::int64_t lay_out(Zip<Real>& zip, unsigned char* memory) {
  unsigned char* next = memory;
  const auto place = [&next](auto& array, std::int64_t count) {
    using Item = std::remove_reference_t<decltype(*array)>;
    array = reinterpret_cast<Item*>(next);
    next += count * static_cast<std::int64_t>(sizeof(Item));
  };
  place(zip.budgets, zip.num_models);
  place(zip.similarity, zip.units * zip.units + (zip.units & 1));
  place(zip.first_bound, zip.units + (zip.units & 1));
  place(zip.first_best, zip.units);
  place(zip.parent, zip.units);
  place(zip.number, zip.units);
  place(zip.different, 1);
  place(zip.alive, zip.units);
  return next - memory;
}

template <class Real>
Zip<Real> describe(const ZipProblem& problem, std::int64_t* merges) {
  Zip<Real> zip{};
  zip.units = problem.units;
  zip.num_models = problem.num_models;
  zip.model_units = problem.units / problem.num_models;
  zip.remaining = problem.remaining;
  zip.budget = problem.budget;
  zip.shrink = static_cast<Real>(problem.shrink);
  zip.severs = problem.shrink <= 0.0;
  zip.cluster_of_unit = problem.cluster_of_unit;
  zip.values = problem.values;
  zip.merges = merges;
  return zip;
}

template <class Real, class Source>
void run(const ZipProblem& problem, void* workspace, std::int64_t* merges, Stream stream) {
  Zip<Real> zip = describe<Real>(problem, merges);
  lay_out(zip, static_cast<unsigned char*>(workspace));
  const unsigned units = static_cast<unsigned>(problem.units), tiles = (units + kTile - 1) / kTile;
  launch("zip_load", zip_load<Real, Source>, {dim3(units), dim3(kLoadThreads), 0}, stream, zip,
         static_cast<const Source*>(problem.similarity), problem.row_stride);
  launch("zip_symmetry", zip_symmetry<Real>, {dim3(tiles, tiles), dim3(kTile * 8), 0}, stream, zip);
  const std::size_t bytes = bytes_per_row_best<Real>() * units;
  const bool in_shared_memory = bytes + kReservedShared <= shared_memory_limit("zip_merge", stream);
  launch("zip_merge", zip_merge<Real>, {dim3(1), dim3(kMergeThreads), in_shared_memory ? bytes : 0}, stream, zip,
         in_shared_memory);
}

}  // namespace

std::int64_t zip_workspace_bytes(const ZipProblem& problem) {
  if (problem.type == ScalarType::float64) {
    Zip<double> zip = describe<double>(problem, nullptr);
    return lay_out(zip, nullptr);
  }
  Zip<float> zip = describe<float>(problem, nullptr);
  return lay_out(zip, nullptr);
}

void zip_units(const ZipProblem& problem, void* workspace, std::int64_t* merges, Stream stream) {
  switch (problem.type) {
    case ScalarType::float16: return run<float, Half>(problem, workspace, merges, stream);
    case ScalarType::bfloat16: return run<float, BFloat16>(problem, workspace, merges, stream);
    case ScalarType::float32: return run<float, float>(problem, workspace, merges, stream);
    case ScalarType::float64: return run<double, double>(problem, workspace, merges, stream);
  }
}

}  // namespace mudsc::cuda
