// Streaming correlation on the device: shifts, products with their sums, joining, and the final quotient.
//
// correlation_shift: an estimate of each unit's mean from a few hundred samples. Subtracted before the product, it
// keeps E[xy] - E[x] E[y] from cancelling; any value near the mean is as good as the mean itself.
//
// correlation_product: for two models, the product of all their units over the samples and, in blocks chosen for it,
// each unit's sum and sum of squares from the same tiles. A block has a tile of 128 x 128 pairs and a range of samples;
// features pass through shared memory in slabs of 128 bytes a unit, in their own layout, two or three under way by
// cp.async.
//   float32: operands are split in registers into two TF32 numbers, a = big + small, and the product is
//     big big + big small + small big. What is left out is 2^-22 of a product: as good as float32.
//   halves, of units whose mean is small against their deviation: straight into the tensor core, at its full rate.
//   halves, of units far from zero: as float32, since the shifted value needs more digits. Both kernels are launched
//     and each tile is computed by the one that its units' shifts call for, so that the host need not know.
// Tensor cores round sums towards zero. So they sum one slab from zero, and slabs are added with rounding to nearest.
// Floor for C units, T samples: 2 T C^2 operations, for float32 three times that in TF32; from memory 2 T C numbers,
// from L2 2 T C^2 / 128. Bound by tensor cores from a few hundred units on. Of pairs (i, i) tiles below the diagonal
// are left out. A block of 8 warps fills a multiprocessor's registers: two accumulators of 64 numbers a thread.
//
// correlation_join: adds products to float64 co-moments; per entry 4 bytes a part and 16 more.
//
// correlation_blend: reads a co-moment (8 bytes) and, for a blend, the other similarity, and writes the solver's input;
// the mirror image is written from the same tile.
//
// No atomics: results do not depend on the order of blocks.
#include <type_traits>

#include "block.hpp"
#include "mudsc/correlation_cuda.hpp"
#include "tensor_core.hpp"

namespace mudsc::cuda {
namespace {

// The simulated tile is smaller, with more than one warp and one fragment in each direction where it can.
constexpr int kRowWarps = 2, kColumnWarps = block_threads(4, 2);
constexpr int kRowFragments = block_threads(4, 1), kColumnFragments = block_threads(4, 2);
constexpr int kFragmentRows = 16, kFragmentColumns = 8;
constexpr int kTile = kRowWarps * kRowFragments * kFragmentRows;
static_assert(kTile == kColumnWarps * kColumnFragments * kFragmentColumns, "tiles are square");
constexpr int kThreads = kWarp * kRowWarps * kColumnWarps;
constexpr int kThreadsPerUnit = kThreads / kTile;
constexpr int kSlabBytes = 128;
// Slabs in shared memory: three where a block can have so much (a data-centre device), else two.
constexpr int kMostStages = 3, kLeastStages = 2;

// Where the numbers of a tile stand in shared memory. Rows are padded so that the lanes of a warp meet different banks.
template <class T, bool kUnitsAdjacent>
struct Layout {
  static constexpr int kSamples = kSlabBytes / static_cast<int>(sizeof(T));
  static constexpr int kRow = kUnitsAdjacent ? kTile : kSamples, kRows = kUnitsAdjacent ? kSamples : kTile;
  static constexpr int kPadBytes = kUnitsAdjacent && sizeof(T) == 4 ? 32 : 16;
  static constexpr int kPad = kPadBytes / static_cast<int>(sizeof(T));
  static constexpr int kStride = kRow + kPad;
  static constexpr int kNumbers = kRows * kStride;
  __device__ static __forceinline__ int at(int unit, int sample) {
    return kUnitsAdjacent ? sample * kStride + unit : unit * kStride + sample;
  }
};

// A tile's side: `kTile` units of one model.
struct Side {
  FeatureView view;
  std::int64_t first_unit, units;
  const float* shift;  // of the tile's units, in shared memory
  bool vectors;        // 16 bytes of adjacent numbers are aligned, and all inside or all outside
};

// The samples that a block sums.
struct Samples {
  std::int64_t outer, inner, end;

  __device__ __forceinline__ std::int64_t offset(const FeatureView& view, std::int64_t sample) const {
    if (outer == 1) return sample * view.inner_stride;
    const std::uint32_t run = static_cast<std::uint32_t>(sample) / static_cast<std::uint32_t>(inner);
    return run * view.outer_stride + (sample - run * inner) * view.inner_stride;
  }
};

// NaN has a magnitude above infinity's: the addition carries it into the sign's place.
template <class T>
__device__ __forceinline__ std::uint32_t without_nan(std::uint32_t two_halves);
template <class T, std::uint32_t kAboveInfinity>
__device__ __forceinline__ std::uint32_t zero_where_nan(std::uint32_t two_halves) {
  const std::uint32_t nan = ((two_halves & 0x7fff7fffu) + kAboveInfinity) & 0x80008000u;
  return two_halves & ~((nan >> 15) * 0xffffu);
}
template <>
__device__ __forceinline__ std::uint32_t without_nan<BFloat16>(std::uint32_t two_halves) {
  return zero_where_nan<BFloat16, 0x007f007fu>(two_halves);
}
template <>
__device__ __forceinline__ std::uint32_t without_nan<Half>(std::uint32_t two_halves) {
  return zero_where_nan<Half, 0x03ff03ffu>(two_halves);
}

// Brings slabs of one side into shared memory. A thread repairs the numbers that it copied itself, so that this needs
// no barrier: NaN becomes 0, shifts are subtracted, and what lies outside is 0.
template <class Source, class Stored, bool kUnitsAdjacent>
class Feeder {
 public:
  using Place = Layout<Stored, kUnitsAdjacent>;
  static constexpr int kVector = 16 / static_cast<int>(sizeof(Stored));
  static constexpr bool kAsIs = std::is_same_v<Source, Stored>;

  __device__ Feeder(const Side& side, const Samples& samples) : side_(side), samples_(samples) {}

  __device__ __forceinline__ void fetch(Stored* tile, std::int64_t first_sample, AsyncCopies& copies) const {
    if (kAsIs && side_.vectors) {
      for_each<kVector>([&](int unit, int sample) {
        copies.copy<16>(tile + Place::at(unit, sample), address(unit, first_sample + sample),
                        inside(unit, first_sample + sample));
      });
    } else {
      for_each<1>([&](int unit, int sample) {
        const bool is_inside = inside(unit, first_sample + sample);
        const Source* const from = address(unit, first_sample + sample);
        Stored* const to = tile + Place::at(unit, sample);
        if constexpr (kAsIs && sizeof(Source) == 4) {
          copies.copy<4>(to, from, is_inside);
        } else if constexpr (kAsIs) {
          *to = is_inside ? *from : Stored{0};
        } else {
          *to = is_inside ? widen(*from) : 0.0f;
        }
      });
    }
  }

  __device__ __forceinline__ void repair(Stored* tile, std::int64_t first_sample) const {
    if (kAsIs && side_.vectors) {
      for_each<kVector>([&](int unit, int sample) { repair_numbers<kVector>(tile, unit, sample, first_sample); });
    } else {
      for_each<1>([&](int unit, int sample) { repair_numbers<1>(tile, unit, sample, first_sample); });
    }
  }

 private:
  template <int kNumbers, class Body>
  __device__ static __forceinline__ void for_each(const Body& body) {
    constexpr int kAlong = Place::kRow / kNumbers;
    for (int place = static_cast<int>(threadIdx.x); place < kAlong * Place::kRows; place += kThreads) {
      const int along = place % kAlong * kNumbers, across = place / kAlong;
      body(kUnitsAdjacent ? along : across, kUnitsAdjacent ? across : along);
    }
  }

  __device__ __forceinline__ bool inside(int unit, std::int64_t sample) const {
    return side_.first_unit + unit < side_.units && sample < samples_.end;
  }
  // Some address that may be named, if outside.
  __device__ __forceinline__ const Source* address(int unit, std::int64_t sample) const {
    const Source* const values = static_cast<const Source*>(side_.view.values);
    if (!inside(unit, sample)) return values;
    return values + samples_.offset(side_.view, sample) + (side_.first_unit + unit) * side_.view.unit_stride;
  }

  template <int kNumbers>
  __device__ __forceinline__ void repair_numbers(Stored* tile, int unit, int sample, std::int64_t first_sample) const {
    Stored* const numbers = tile + Place::at(unit, sample);
    if constexpr (sizeof(Stored) == 4) {
      // Shifts of units outside are 0.
      const bool is_inside = first_sample + sample < samples_.end;
      MUDSC_UNROLL
      for (int k = 0; k < kNumbers; ++k) {
        const float value = numbers[k] == numbers[k] ? numbers[k] : 0.0f;
        numbers[k] = is_inside ? value - side_.shift[kUnitsAdjacent ? unit + k : unit] : 0.0f;
      }
    } else if constexpr (kNumbers == 1) {
      numbers->bits = static_cast<std::uint16_t>(without_nan<Stored>(numbers->bits));
    } else {
      std::uint32_t* const words = reinterpret_cast<std::uint32_t*>(numbers);
      MUDSC_UNROLL
      for (int k = 0; k < kNumbers / 2; ++k) words[k] = without_nan<Stored>(words[k]);
    }
  }

  Side side_;
  Samples samples_;
};

struct Products {
  Accumulator of[kRowFragments][kColumnFragments];
};

// Places of a lane in the fragments of its warp.
struct Lane {
  int group, within, first_row, first_column;

  __device__ Lane() {
    const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
    group = lane / 4;
    within = lane % 4;
    first_row = warp / kColumnWarps * kRowFragments * kFragmentRows;
    first_column = warp % kColumnWarps * kColumnFragments * kFragmentColumns;
  }
};

__device__ __forceinline__ std::uint32_t round_to_tf32(float value) {
  return (__float_as_uint(value) + 0x1000u) & 0xffffe000u;
}

// big + small is the value but for 2^-22 of it; both are TF32.
template <int kRegisters>
struct Split {
  std::uint32_t big[kRegisters], small[kRegisters];

  __device__ __forceinline__ void set(int k, float value) {
    big[k] = round_to_tf32(value);
    small[k] = round_to_tf32(value - __uint_as_float(big[k]));
  }
};

template <bool kUnitsAdjacent>
__device__ __forceinline__ void multiply_slab(const float* rows, const float* columns, const Lane& lane,
                                              Products& sums) {
  using Place = Layout<float, kUnitsAdjacent>;
  constexpr int kDepth = 8;
  MUDSC_UNROLL
  for (int first = 0; first < Place::kSamples; first += kDepth) {
    Split<2> b[kColumnFragments];
    MUDSC_UNROLL
    for (int n = 0; n < kColumnFragments; ++n) {
      const int unit = lane.first_column + n * kFragmentColumns + lane.group;
      MUDSC_UNROLL
      for (int k = 0; k < 2; ++k) b[n].set(k, columns[Place::at(unit, first + lane.within + 4 * k)]);
    }
    MUDSC_UNROLL
    for (int m = 0; m < kRowFragments; ++m) {
      Split<4> a;
      const int unit = lane.first_row + m * kFragmentRows + lane.group;
      MUDSC_UNROLL
      for (int k = 0; k < 4; ++k) a.set(k, rows[Place::at(unit + k % 2 * 8, first + lane.within + k / 2 * 4)]);
      // Small terms first; the same accumulator not twice in a row, for each addition waits for the last.
      MUDSC_UNROLL
      for (int n = 0; n < kColumnFragments; ++n) multiply_tf32(sums.of[m][n], a.small, b[n].big);
      MUDSC_UNROLL
      for (int n = 0; n < kColumnFragments; ++n) multiply_tf32(sums.of[m][n], a.big, b[n].small);
      MUDSC_UNROLL
      for (int n = 0; n < kColumnFragments; ++n) multiply_tf32(sums.of[m][n], a.big, b[n].big);
    }
  }
}

template <bool kUnitsAdjacent, class T>
__device__ __forceinline__ void multiply_slab(const T* rows, const T* columns, const Lane& lane, Products& sums) {
  using Place = Layout<T, kUnitsAdjacent>;
  constexpr int kDepth = 16;
  const int index = static_cast<int>(threadIdx.x) % kWarp;
  const int row = index % 8, low = index / 8 % 2 * 8, high = index / 16 * 8;
  MUDSC_UNROLL
  for (int first = 0; first < Place::kSamples; first += kDepth) {
    std::uint32_t b[kColumnFragments][2];
    MUDSC_UNROLL
    for (int n = 0; n < kColumnFragments; n += 2) {
      const int unit = lane.first_column + n * kFragmentColumns + high;
      std::uint32_t two[4];
      load_matrices<kUnitsAdjacent>(two, columns + (kUnitsAdjacent ? Place::at(unit, first + low + row)
                                                                   : Place::at(unit + row, first + low)));
      b[n][0] = two[0], b[n][1] = two[1], b[n + 1][0] = two[2], b[n + 1][1] = two[3];
    }
    MUDSC_UNROLL
    for (int m = 0; m < kRowFragments; ++m) {
      const int unit = lane.first_row + m * kFragmentRows + low;
      std::uint32_t a[4];
      load_matrices<kUnitsAdjacent>(
          a, rows + (kUnitsAdjacent ? Place::at(unit, first + high + row) : Place::at(unit + row, first + high)));
      MUDSC_UNROLL
      for (int n = 0; n < kColumnFragments; ++n) multiply_halves<T>(sums.of[m][n], a, b[n]);
    }
  }
}

// A thread's share of the sums of one unit of a side.
struct UnitSums {
  double sum = 0, squares = 0;

  template <class T, bool kUnitsAdjacent>
  __device__ __forceinline__ void add(const T* tile) {
    using Place = Layout<T, kUnitsAdjacent>;
    constexpr int kShare = Place::kSamples / kThreadsPerUnit;
    const int unit = static_cast<int>(threadIdx.x) % kTile, begin = static_cast<int>(threadIdx.x) / kTile * kShare;
    float slab_sum = 0, slab_squares = 0;
    MUDSC_UNROLL_4
    for (int k = 0; k < kShare; ++k) {
      // Units eight apart begin at different samples: their rows begin in the same bank.
      const float value = widen(tile[Place::at(unit, begin + (k + unit / 8) % kShare)]);
      slab_sum += value;
      slab_squares += value * value;
    }
    sum += static_cast<double>(slab_sum);
    squares += static_cast<double>(slab_squares);
  }

  // Writes the block's sums to [2, units]; `shares` is [2, kThreads] in shared memory. All threads call it.
  __device__ void write(double* sums, const Side& side, double* shares) const {
    __syncthreads();
    shares[threadIdx.x] = sum;
    shares[kThreads + threadIdx.x] = squares;
    __syncthreads();
    const int unit = static_cast<int>(threadIdx.x);
    if (unit >= kTile || side.first_unit + unit >= side.units) return;
    for (int which = 0; which < 2; ++which) {
      double total = 0;
      for (int share = 0; share < kThreadsPerUnit; ++share) total += shares[which * kThreads + share * kTile + unit];
      sums[which * side.units + side.first_unit + unit] = total;
    }
  }
};

// A problem as the kernel takes it.
struct Product {
  FeatureView rows, columns;
  std::int64_t outer, units, inner, samples_per_part;
  float* products;
  double* row_sums;
  double* column_sums;
  int stages;
  bool symmetric, row_vectors, column_vectors;
};

// One block's tile.
template <class Source, class Stored, bool kUnitsAdjacent>
class ProductTile {
 public:
  using Place = Layout<Stored, kUnitsAdjacent>;
  using Feed = Feeder<Source, Stored, kUnitsAdjacent>;

  __device__ ProductTile(const Product& problem, const Side& rows, const Side& columns)
      : problem_(problem), rows_(rows), columns_(columns) {
    const std::int64_t samples = problem.outer * problem.inner;
    begin_ = blockIdx.z * problem.samples_per_part;
    end_ = begin_ + problem.samples_per_part < samples ? begin_ + problem.samples_per_part : samples;
    sums_rows_ = problem.row_sums != nullptr && blockIdx.x == (problem.symmetric ? blockIdx.y : 0);
    sums_columns_ = problem.column_sums != nullptr && blockIdx.y == 0;
  }

  __device__ void run() {
    const Samples samples{problem_.outer, problem_.inner, end_};
    const Feed row_feed(rows_, samples), column_feed(columns_, samples);
    AsyncCopies copies;
    const int ahead = problem_.stages - 1, slabs = slabs_of(end_ - begin_);
    for (int slab = 0; slab < ahead; ++slab) fetch(row_feed, column_feed, copies, slab, slab);
    for (int slab = 0, stage = 0; slab < slabs; ++slab, stage = after(stage)) {
      if (problem_.stages == kMostStages) {
        copies.wait<kMostStages - 2>();
      } else {
        copies.wait<kLeastStages - 2>();
      }
      row_feed.repair(row_tile(stage), first_sample(slab));
      column_feed.repair(column_tile(stage), first_sample(slab));
      __syncthreads();  // the slab is there, and nobody reads the one before it, which the next copies overwrite
      fetch(row_feed, column_feed, copies, slab + ahead, stage == 0 ? ahead : stage - 1);
      add_slab(row_tile(stage), column_tile(stage));
    }
    copies.wait<0>();
    write();
  }

 private:
  __device__ __forceinline__ std::int64_t first_sample(int slab) const {
    return begin_ + static_cast<std::int64_t>(slab) * Place::kSamples;
  }
  __device__ static __forceinline__ int slabs_of(std::int64_t samples) {
    return static_cast<int>((samples + Place::kSamples - 1) / Place::kSamples);
  }
  __device__ __forceinline__ int after(int stage) const { return stage + 1 == problem_.stages ? 0 : stage + 1; }
  __device__ static __forceinline__ Stored* row_tile(int stage) {
    return reinterpret_cast<Stored*>(dynamic_shared()) + stage * 2 * Place::kNumbers;
  }
  __device__ static __forceinline__ Stored* column_tile(int stage) { return row_tile(stage) + Place::kNumbers; }

  __device__ __forceinline__ void fetch(const Feed& row_feed, const Feed& column_feed, AsyncCopies& copies,
                                        int slab, int stage) const {
    if (first_sample(slab) < end_) {
      row_feed.fetch(row_tile(stage), first_sample(slab), copies);
      column_feed.fetch(column_tile(stage), first_sample(slab), copies);
    }
    copies.close_group();  // also without copies, so that groups count slabs
  }

  __device__ __forceinline__ void add_slab(const Stored* row_numbers, const Stored* column_numbers) {
    Products slab{};
    multiply_slab<kUnitsAdjacent>(row_numbers, column_numbers, lane_, slab);
    MUDSC_UNROLL
    for (int m = 0; m < kRowFragments; ++m) {
      MUDSC_UNROLL
      for (int n = 0; n < kColumnFragments; ++n) {
        MUDSC_UNROLL
        for (int k = 0; k < 4; ++k) total_.of[m][n].values[k] += slab.of[m][n].values[k];
      }
    }
    if (sums_rows_) row_sums_.template add<Stored, kUnitsAdjacent>(row_numbers);
    if (sums_columns_) column_sums_.template add<Stored, kUnitsAdjacent>(column_numbers);
  }

  __device__ void write() const {
    double* const shares = reinterpret_cast<double*>(dynamic_shared());
    const std::int64_t part = blockIdx.z, units = problem_.units;
    if (sums_rows_) row_sums_.write(problem_.row_sums + part * 2 * units, rows_, shares);
    if (sums_columns_) column_sums_.write(problem_.column_sums + part * 2 * units, columns_, shares);
    float* const products = problem_.products + part * units * units;
    MUDSC_UNROLL
    for (int m = 0; m < kRowFragments; ++m) {
      MUDSC_UNROLL
      for (int n = 0; n < kColumnFragments; ++n) {
        MUDSC_UNROLL
        for (int k = 0; k < 4; ++k) {
          const std::int64_t row = rows_.first_unit + lane_.first_row + m * kFragmentRows + lane_.group + k / 2 * 8;
          const std::int64_t column =
              columns_.first_unit + lane_.first_column + n * kFragmentColumns + 2 * lane_.within + k % 2;
          if (row < units && column < units) products[row * units + column] = total_.of[m][n].values[k];
        }
      }
    }
  }

  Product problem_;
  Side rows_, columns_;
  std::int64_t begin_, end_;
  bool sums_rows_, sums_columns_;
  Lane lane_;
  Products total_{};
  UnitSums row_sums_, column_sums_;
};

template <class Source, class Stored, bool kUnitsAdjacent>
__global__ void __launch_bounds__(kThreads, 1) correlation_product_kernel(const Product problem) {
  if (problem.symmetric && blockIdx.x < blockIdx.y) return;
  MUDSC_SHARED(float, shifts, 2 * kTile);
  const std::int64_t first_row = static_cast<std::int64_t>(blockIdx.y) * kTile;
  const std::int64_t first_column = static_cast<std::int64_t>(blockIdx.x) * kTile;
  bool is_shifted = false;
  for (int k = static_cast<int>(threadIdx.x); k < 2 * kTile; k += kThreads) {
    const FeatureView& view = k < kTile ? problem.rows : problem.columns;
    const std::int64_t unit = k < kTile ? first_row + k : first_column + k - kTile;
    shifts[k] = unit < problem.units ? view.shift[unit] : 0.0f;
    is_shifted |= shifts[k] != 0.0f;
  }
  const bool any_shifted = __syncthreads_count(is_shifted) > 0;
  // Of halves, one of two kernels takes the tile.
  if (sizeof(Source) == 2 && any_shifted == std::is_same_v<Source, Stored>) return;
  const Side rows{problem.rows, first_row, problem.units, shifts, problem.row_vectors};
  const Side columns{problem.columns, first_column, problem.units, shifts + kTile, problem.column_vectors};
  ProductTile<Source, Stored, kUnitsAdjacent>(problem, rows, columns).run();
}

// Samples that a shift is estimated from: at least so many, if there are, and less than twice as many.
constexpr std::int64_t kShiftSamples = 256;
constexpr int kShiftUnits = 32, kShiftThreads = block_threads(256, 64), kShiftShares = kShiftThreads / kShiftUnits;
// A half unit is shifted if its mean is more than so many deviations from zero. Below, what cancels is a few bits of a
// float32 sum, and unshifted halves are three times as fast.
constexpr double kUnshiftedDeviations = 2;

template <class Source>
__global__ void __launch_bounds__(kShiftThreads) correlation_shift_kernel(const ShiftProblem problem) {
  MUDSC_SHARED(double, sums, kShiftThreads);
  MUDSC_SHARED(double, squares, kShiftThreads);
  const int share = static_cast<int>(threadIdx.x) / kShiftUnits;
  const std::int64_t unit = static_cast<std::int64_t>(blockIdx.x) * kShiftUnits + threadIdx.x % kShiftUnits;
  const Samples samples{problem.outer, problem.inner, problem.outer * problem.inner};
  const std::int64_t step = samples.end > kShiftSamples ? samples.end / kShiftSamples : 1;
  const Source* const values = static_cast<const Source*>(problem.features.values);
  double sum = 0, square = 0;
  if (unit < problem.units) {
    for (std::int64_t sample = share * step; sample < samples.end; sample += kShiftShares * step) {
      const float value = widen(values[samples.offset(problem.features, sample) + unit * problem.features.unit_stride]);
      const double number = value == value ? static_cast<double>(value) : 0.0;
      sum += number;
      square += number * number;
    }
  }
  sums[threadIdx.x] = sum;
  squares[threadIdx.x] = square;
  __syncthreads();
  if (share != 0 || unit >= problem.units) return;
  for (int k = 1; k < kShiftShares; ++k) {
    sum += sums[k * kShiftUnits + threadIdx.x];
    square += squares[k * kShiftUnits + threadIdx.x];
  }
  const double count = static_cast<double>((samples.end + step - 1) / step), mean = sum / count;
  const double variance = square / count - mean * mean;
  const bool near_zero = mean * mean <= kUnshiftedDeviations * kUnshiftedDeviations * variance;
  problem.features.shift[unit] = sizeof(Source) == 2 && near_zero ? 0.0f : static_cast<float>(mean);
}

constexpr int kJoinThreads = block_threads(256, 64);

template <class T>
__global__ void __launch_bounds__(kJoinThreads) correlation_join_kernel(const JoinProblem problem) {
  const std::int64_t row = blockIdx.x, units = problem.units;
  const double first = problem.rows[row], second = problem.rows[units + row];
  const T* const products = static_cast<const T*>(problem.products) + row * units;
  double* const comoments = problem.comoment + row * units;
  const std::int64_t begin = problem.symmetric ? row / kTile * kTile : 0;
  for (std::int64_t k = begin + threadIdx.x; k < units; k += kJoinThreads) {
    double sum = static_cast<double>(products[k]);
    for (std::int64_t part = 1; part < problem.parts; ++part) {
      sum += static_cast<double>(products[part * units * units + k]);
    }
    comoments[k] += (sum + first * problem.columns[k]) + second * problem.columns[units + k];
  }
}

constexpr int kBlendTile = 32, kBlendRows = block_threads(8, 2);

// torch.lerp's formula, exact at both ends.
template <class Real>
__device__ __forceinline__ Real blend(Real other, Real quotient, Real balance) {
  return balance < Real(0.5) ? other + balance * (quotient - other)
                             : quotient - (quotient - other) * (Real(1) - balance);
}

template <class T>
__global__ void __launch_bounds__(kBlendTile* kBlendRows) correlation_blend_kernel(const CorrelateProblem p) {
  using Real = typename ArithmeticOf<T>::type;
  MUDSC_SHARED(T, transposed, kBlendTile*(kBlendTile + 1));
  const bool symmetric = p.out == p.mirror;
  if (symmetric && blockIdx.x < blockIdx.y) return;
  const int across = static_cast<int>(threadIdx.x) % kBlendTile, down = static_cast<int>(threadIdx.x) / kBlendTile;
  const std::int64_t top = static_cast<std::int64_t>(blockIdx.y) * kBlendTile;
  const std::int64_t left = static_cast<std::int64_t>(blockIdx.x) * kBlendTile;
  const std::int64_t column = left + across;
  for (int k = down; k < kBlendTile; k += kBlendRows) {
    const std::int64_t row = top + k;
    if (row >= p.units || column >= p.units || (symmetric && row > column)) continue;
    const double deviations = p.row_deviation[row] * p.column_deviation[column];
    const double quotient = p.comoment[row * p.units + column] / (p.count * (deviations > p.eps ? deviations : p.eps));
    T result;
    if (p.other == nullptr) {
      narrow(quotient, result);
    } else {
      const T other = static_cast<const T*>(p.other)[row * p.other_stride + column];
      narrow(static_cast<double>(
                 blend(widen(other), static_cast<Real>(quotient), static_cast<Real>(p.balance))),
             result);
    }
    static_cast<T*>(p.out)[row * p.row_stride + column] = result;
    transposed[across * (kBlendTile + 1) + k] = result;
  }
  if (p.mirror == nullptr) return;
  __syncthreads();
  T* const mirror = static_cast<T*>(p.mirror);
  for (int k = down; k < kBlendTile; k += kBlendRows) {
    const std::int64_t row = left + k, mirrored = top + across;
    if (row >= p.units || mirrored >= p.units || (symmetric && row <= mirrored)) continue;
    mirror[row * p.row_stride + mirrored] = transposed[k * (kBlendTile + 1) + across];
  }
}

unsigned count_of(std::int64_t items, std::int64_t each) { return static_cast<unsigned>((items + each - 1) / each); }

bool aligned(std::int64_t stride, std::int64_t extent, std::int64_t numbers) {
  return extent == 1 || stride % numbers == 0;
}

// Static shared memory of the product, and what the device keeps of a block's.
constexpr std::size_t kReservedShared = 4 * 1024;

// Whether 16 bytes along the tile's rows can be copied at once.
bool in_vectors(const FeatureView& view, const ProductProblem& problem, bool units_adjacent, std::int64_t numbers) {
  if (reinterpret_cast<std::uintptr_t>(view.values) % 16 != 0) return false;
  if (!aligned(view.outer_stride, problem.outer, numbers)) return false;
  if (units_adjacent) {
    return view.unit_stride == 1 && problem.units % numbers == 0 && aligned(view.inner_stride, problem.inner, numbers);
  }
  return view.inner_stride == 1 && problem.inner % numbers == 0 && aligned(view.unit_stride, problem.units, numbers);
}

template <class Source, class Stored, bool kUnitsAdjacent>
void launch_product(const ProductProblem& problem, Stream stream) {
  constexpr std::int64_t kNumbers = 16 / static_cast<std::int64_t>(sizeof(Source));
  constexpr std::size_t kStageBytes = 2 * sizeof(Stored) * Layout<Stored, kUnitsAdjacent>::kNumbers;
  const bool most = kMostStages * kStageBytes + kReservedShared <= shared_memory_limit(stream);
  const int stages = most ? kMostStages : kLeastStages;
  const Product product{problem.rows,
                        problem.columns,
                        problem.outer,
                        problem.units,
                        problem.inner,
                        problem.samples_per_part,
                        problem.products,
                        problem.row_sums,
                        problem.column_sums,
                        stages,
                        problem.symmetric,
                        in_vectors(problem.rows, problem, kUnitsAdjacent, kNumbers),
                        in_vectors(problem.columns, problem, kUnitsAdjacent, kNumbers)};
  const unsigned tiles = count_of(problem.units, kTile);
  launch("correlation_product", correlation_product_kernel<Source, Stored, kUnitsAdjacent>,
         {dim3(tiles, tiles, static_cast<unsigned>(problem.parts)), dim3(kThreads),
          static_cast<std::size_t>(stages) * kStageBytes},
         stream, product);
}

template <class Source>
void run_product(const ProductProblem& problem, Stream stream) {
  const bool units_adjacent = problem.rows.unit_stride == 1;
  if constexpr (sizeof(Source) == 2) {
    units_adjacent ? launch_product<Source, Source, true>(problem, stream)
                   : launch_product<Source, Source, false>(problem, stream);
  }
  units_adjacent ? launch_product<Source, float, true>(problem, stream)
                 : launch_product<Source, float, false>(problem, stream);
}

template <class Source>
void run_shift(const ShiftProblem& problem, Stream stream) {
  launch("correlation_shift", correlation_shift_kernel<Source>,
         {dim3(count_of(problem.units, kShiftUnits)), dim3(kShiftThreads), 0}, stream, problem);
}

template <class T>
void run_join(const JoinProblem& problem, Stream stream) {
  launch("correlation_join", correlation_join_kernel<T>,
         {dim3(static_cast<unsigned>(problem.units)), dim3(kJoinThreads), 0}, stream, problem);
}

template <class T>
void run_blend(const CorrelateProblem& problem, Stream stream) {
  const unsigned tiles = count_of(problem.units, kBlendTile);
  launch("correlation_blend", correlation_blend_kernel<T>, {dim3(tiles, tiles), dim3(kBlendTile * kBlendRows), 0},
         stream, problem);
}

}  // namespace

std::int64_t correlation_tile() { return kTile; }

void correlation_shift(const ShiftProblem& problem, Stream stream) {
  switch (problem.dtype) {
    case ScalarType::float16: return run_shift<Half>(problem, stream);
    case ScalarType::bfloat16: return run_shift<BFloat16>(problem, stream);
    default: return run_shift<float>(problem, stream);
  }
}

void correlation_product(const ProductProblem& problem, Stream stream) {
  switch (problem.dtype) {
    case ScalarType::float16: return run_product<Half>(problem, stream);
    case ScalarType::bfloat16: return run_product<BFloat16>(problem, stream);
    default: return run_product<float>(problem, stream);
  }
}

void correlation_join(const JoinProblem& problem, Stream stream) {
  problem.product_dtype == ScalarType::float64 ? run_join<double>(problem, stream) : run_join<float>(problem, stream);
}

void correlation_blend(const CorrelateProblem& problem, Stream stream) {
  switch (problem.dtype) {
    case ScalarType::float16: return run_blend<Half>(problem, stream);
    case ScalarType::bfloat16: return run_blend<BFloat16>(problem, stream);
    case ScalarType::float32: return run_blend<float>(problem, stream);
    case ScalarType::float64: return run_blend<double>(problem, stream);
  }
}

}  // namespace mudsc::cuda
