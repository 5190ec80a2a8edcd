// The product of a correlation by wgmma, for devices of compute capability 9.0 (code for 9.0a).
//
// It computes the same as correlation_product.cu, with the same rounding. A block of two warpgroups has a tile of 128 x
// 128 pairs, 64 rows each. wgmma reads both operands from swizzled shared memory (SwizzledLayout) while its threads go
// on: a slab is multiplied while the next one is prepared and two more are copied.
//   float32 (and half formats that are shifted): TF32 operands must be contiguous along the samples. Threads read what
//     was copied, in its own layout, repair it, split it, and store both parts swizzled; two pairs of such tiles
//     alternate.
//   half formats: copied to where wgmma reads them, units adjacent or samples, and repaired there; four slabs
//     alternate.
// Two accumulators of 64 numbers a thread and one block a multiprocessor, as in correlation_product.cu. A tile of
// 128 x 256 is out of reach: its two accumulators would be all registers of a multiprocessor.
//
// Shared memory traffic of a float32 slab: 32 kB arrive, 32 kB are read, 64 kB stored and 144 kB read by wgmma, in 1536
// cycles of tensor cores at their nominal rate; of a slab of halves 32 kB arrive and are read, and 48 kB are read by
// wgmma, in 512. Instructions issued: docs/correlation.md.
#include "correlation_product.hpp"

namespace mudsc::cuda {
namespace {

constexpr int kUnits = 128, kThreads = 256;
static_assert(kUnits % kTile == 0,
              "entries of a symmetric product that correlation_join reads are in tiles that are written");
// Slabs in flight by cp.async.
constexpr int kAhead = 2;

// Common to both kinds of stages: the work, and shared memory from the start of the swizzle pattern.
class StageMemory {
 public:
  __device__ explicit StageMemory(const Work& work)
      : all_(static_cast<int>(work.end - work.begin)),
        sums_rows_(work.sums_rows),
        sums_columns_(work.sums_columns),
        first_(static_cast<int>(SwizzledLayout<float, false, kUnits>::first_pattern(dynamic_shared()) -
                                dynamic_shared())) {}

 protected:
  template <class T>
  __device__ __forceinline__ T* numbers(int byte) const {
    return reinterpret_cast<T*>(dynamic_shared() + first_ + byte);
  }

  int all_;  // samples
  bool sums_rows_, sums_columns_;
  int first_;
};

// Half formats: features are copied to where wgmma reads them.
template <class Source, class Stored, bool kUnitsAdjacent>
class Stages : StageMemory {
 public:
  using Operands = SwizzledLayout<Stored, kUnitsAdjacent, kUnits>;
  using Sums = WarpgroupSums<Stored, kUnitsAdjacent>;
  using Feed = Feeder<Source, Operands, kThreads>;
  // The slab being multiplied, the previous one, and those being copied.
  static constexpr int kStages = kAhead + 2;
  static constexpr int kTileBytes = sizeof(Stored) * Operands::kNumbers;
  static constexpr std::size_t kBytes = Operands::kPatternBytes + kStages * 2 * kTileBytes;

  __device__ Stages(const Work& work, const Samples& samples)
      : StageMemory(work), row_feed_(work.rows, samples, work.begin), column_feed_(work.columns, samples, work.begin) {}

  __device__ __forceinline__ void fetch(int slab) {
    if (slab * Operands::kSamples < all_) {
      row_feed_.fetch(rows(slab), copies_);
      column_feed_.fetch(columns(slab), copies_);
    }
    copies_.close_group();  // also without copies, so that groups count slabs
  }

  // Waits until the slab can be multiplied. In this thread, products of slabs before the last must have finished.
  __device__ __forceinline__ void prepare(int slab) {
    copies_.wait<kAhead - 1>();
    const int inside = all_ - slab * Operands::kSamples;
    row_feed_.repair(rows(slab), inside);
    column_feed_.repair(columns(slab), inside);
    fence_writes();
    __syncthreads();  // the slab has arrived, and the one to be overwritten has been multiplied
    fetch(slab + kAhead);
    if (sums_rows_) row_sums_.template add<Operands>(rows(slab));
    if (sums_columns_) column_sums_.template add<Operands>(columns(slab));
  }

  __device__ __forceinline__ void multiply(int slab, int first_row, Sums& sums) const {
    const std::uint64_t a = Operands::operand(rows(slab), first_row), b = Operands::operand(columns(slab), 0);
    MUDSC_UNROLL
    for (int step = 0; step < Operands::kSamples / Sums::kDepth; ++step) {
      sums.multiply(a + step * Operands::kOperandStep, b + step * Operands::kOperandStep, step == 0);
    }
  }

  __device__ void write_sums(const Work& work, const Product& problem) {
    copies_.wait<0>();
    work.write_sums(problem, row_sums_, column_sums_, reinterpret_cast<double*>(dynamic_shared()));
  }

 private:
  __device__ __forceinline__ Stored* rows(int slab) const { return numbers<Stored>(slab % kStages * 2 * kTileBytes); }
  __device__ __forceinline__ Stored* columns(int slab) const { return rows(slab) + Operands::kNumbers; }

  Feed row_feed_, column_feed_;
  AsyncCopies copies_;
  UnitSums<kUnits, kThreads> row_sums_, column_sums_;
};

// Float32: copied in its own layout, then split.
template <class Source, bool kUnitsAdjacent>
class Stages<Source, float, kUnitsAdjacent> : StageMemory {
 public:
  using Copied = PaddedLayout<float, kUnitsAdjacent, kUnits>;
  using Operands = SwizzledLayout<float, false, kUnits>;
  using Sums = WarpgroupSums<float, false>;
  using Feed = Feeder<Source, Copied, kThreads>;
  static constexpr int kSplitTiles = 4;  // big and small of rows, then of columns
  static constexpr int kSplitBytes = kSplitTiles * sizeof(float) * Operands::kNumbers;
  static constexpr int kCopiedBytes = 2 * sizeof(float) * Copied::kNumbers;
  static constexpr std::size_t kBytes = Operands::kPatternBytes + 2 * kSplitBytes + kAhead * kCopiedBytes;

  __device__ Stages(const Work& work, const Samples& samples)
      : StageMemory(work),
        row_feed_(work.rows, samples, work.begin),
        column_feed_(work.columns, samples, work.begin),
        row_shift_(work.rows.shift[threadIdx.x % kUnits]),
        column_shift_(work.columns.shift[threadIdx.x % kUnits]) {}

  __device__ __forceinline__ void fetch(int slab) {
    if (slab * Operands::kSamples < all_) {
      row_feed_.fetch(copied_rows(slab), copies_);
      column_feed_.fetch(copied_rows(slab) + Copied::kNumbers, copies_);
    }
    copies_.close_group();
  }

  __device__ __forceinline__ void prepare(int slab) {
    copies_.wait<kAhead - 1>();
    __syncthreads();  // the slab has arrived, and the one to be overwritten has been multiplied
    const int inside = all_ - slab * Operands::kSamples;
    split(copied_rows(slab), rows(slab), inside, row_shift_, sums_rows_, row_sums_);
    split(copied_rows(slab) + Copied::kNumbers, rows(slab) + 2 * Operands::kNumbers, inside, column_shift_,
          sums_columns_, column_sums_);
    fence_writes();
    __syncthreads();  // all of it is split
    fetch(slab + kAhead);
  }

  // Small terms first.
  __device__ __forceinline__ void multiply(int slab, int first_row, Sums& sums) const {
    const std::uint64_t big_rows = Operands::operand(rows(slab), first_row);
    const std::uint64_t big_columns = Operands::operand(rows(slab) + 2 * Operands::kNumbers, 0);
    constexpr std::uint64_t kToSmall = Operands::kNumbers * sizeof(float) / 16;
    multiply(big_rows + kToSmall, big_columns, true, sums);
    multiply(big_rows, big_columns + kToSmall, false, sums);
    multiply(big_rows, big_columns, false, sums);
  }

  __device__ void write_sums(const Work& work, const Product& problem) {
    copies_.wait<0>();
    work.write_sums(problem, row_sums_, column_sums_, reinterpret_cast<double*>(dynamic_shared()));
  }

 private:
  __device__ static __forceinline__ void multiply(std::uint64_t a, std::uint64_t b, bool from_zero, Sums& sums) {
    MUDSC_UNROLL
    for (int step = 0; step < Operands::kSamples / Sums::kDepth; ++step) {
      sums.multiply(a + step * Operands::kOperandStep, b + step * Operands::kOperandStep, from_zero && step == 0);
    }
  }

  __device__ __forceinline__ void split(const float* from, float* big, int inside, float shift, bool sums_wanted,
                                        UnitSums<kUnits, kThreads>& sums) const {
    if (inside >= Operands::kSamples && !sums_wanted) {
      split_slab<true>(from, big, inside, shift, sums);
    } else {
      split_slab<false>(from, big, inside, shift, sums);
    }
  }

  // A thread takes four samples of a unit at a time: the lanes of a warp read and store adjacent units. kWhole: all
  // samples are inside, and sums are not asked for.
  template <bool kWhole>
  __device__ __forceinline__ void split_slab(const float* from, float* big, int inside, float shift,
                                             UnitSums<kUnits, kThreads>& sums) const {
    const int unit = static_cast<int>(threadIdx.x) % kUnits;
    float slab_sum = 0, slab_squares = 0;
    MUDSC_UNROLL
    for (int turn = 0; turn < Operands::kSamples * kUnits / (4 * kThreads); ++turn) {
      const int first = 4 * (turn * (kThreads / kUnits) + static_cast<int>(threadIdx.x) / kUnits);
      Quad numbers, bigs, smalls;
      if constexpr (kUnitsAdjacent) {
        MUDSC_UNROLL
        for (int k = 0; k < 4; ++k) numbers.of[k] = from[Copied::at(unit, first + k)];
      } else {
        numbers = read_16<Quad>(from + Copied::at(unit, first));
      }
      Split<4> parts;
      MUDSC_UNROLL
      for (int k = 0; k < 4; ++k) {
        const float value = numbers.of[k] == numbers.of[k] ? numbers.of[k] : 0.0f;
        const float repaired = kWhole || first + k < inside ? value - shift : 0.0f;
        if constexpr (!kWhole) {
          slab_sum += repaired;
          slab_squares += repaired * repaired;
        }
        parts.set(k, repaired);
        bigs.of[k] = __uint_as_float(parts.big[k]);
        smalls.of[k] = __uint_as_float(parts.small[k]);
      }
      float* const to = big + Operands::at(unit, first);
      write_16(to, bigs);
      write_16(to + Operands::kNumbers, smalls);
    }
    if constexpr (!kWhole) sums.add(slab_sum, slab_squares);
  }

  __device__ __forceinline__ float* rows(int slab) const { return numbers<float>(slab % 2 * kSplitBytes); }
  __device__ __forceinline__ float* copied_rows(int slab) const {
    return numbers<float>(2 * kSplitBytes + slab % kAhead * kCopiedBytes);
  }

  Feed row_feed_, column_feed_;
  AsyncCopies copies_;
  float row_shift_, column_shift_;  // of the unit that this thread splits
  UnitSums<kUnits, kThreads> row_sums_, column_sums_;
};

template <class Stages>
__device__ __forceinline__ void multiply_tile(const Product& problem, const Work& work) {
  using Sums = typename Stages::Sums;
  static_assert(Sums::kColumns == kUnits && Sums::kRows * kThreads / Sums::kThreads == kUnits,
                "warpgroups fill the tile");
  constexpr int kSamples = Stages::Operands::kSamples;
  // The same in all lanes, so that descriptors can be kept in uniform registers.
  const int first_row = __shfl_sync(kWholeWarp, static_cast<int>(threadIdx.x) / Sums::kThreads, 0) * Sums::kRows;
  const int slabs = static_cast<int>((work.end - work.begin + kSamples - 1) / kSamples);
  Stages stages(work, {problem.outer, problem.inner, work.end});
  Sums sums;
  float total[Sums::kNumbers] = {};
  for (int slab = 0; slab < kAhead; ++slab) stages.fetch(slab);
  for (int slab = 0; slab < slabs; ++slab) {
    stages.prepare(slab);
    sums.wait();
    MUDSC_UNROLL
    for (int k = 0; k < Sums::kNumbers; ++k) total[k] += sums.values[k];
    sums.begin();
    stages.multiply(slab, first_row, sums);
    sums.close_group();
  }
  sums.wait();
  stages.write_sums(work, problem);
  MUDSC_UNROLL
  for (int k = 0; k < Sums::kNumbers; ++k) {
    work.write(problem, first_row + Sums::row(k), Sums::column(k), total[k] + sums.values[k]);
  }
}

template <class Source, class Stored, bool kUnitsAdjacent>
__global__ void __launch_bounds__(kThreads, 1) correlation_wgmma_kernel(const Product problem) {
#if MUDSC_HAS_WGMMA
  MUDSC_SHARED(float, shifts, 2 * kUnits);
  Work work;
  if (!work.find<Source, Stored, kUnits, kThreads>(problem, shifts)) return;
  multiply_tile<Stages<Source, Stored, kUnitsAdjacent>>(problem, work);
#else
  // NaN, so that nobody takes it for a result.
  const std::int64_t units = problem.units, row = static_cast<std::int64_t>(blockIdx.y) * kUnits + threadIdx.x % kUnits;
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * kUnits;
  for (std::int64_t column = first + threadIdx.x / kUnits; column < first + kUnits; column += kThreads / kUnits) {
    if (row < units && column < units) problem.products[(blockIdx.z * units + row) * units + column] = nanf("");
  }
#endif
}

struct Wgmma {
  template <class Source, class Stored, bool kUnitsAdjacent>
  static void launch(const Product& product, const ProductProblem& problem, Stream stream) {
    cuda::launch("correlation_wgmma", correlation_wgmma_kernel<Source, Stored, kUnitsAdjacent>,
                 {grid_of(problem, kUnits), dim3(kThreads), Stages<Source, Stored, kUnitsAdjacent>::kBytes}, stream,
                 product);
  }
};

}  // namespace

void launch_warpgroup_product(const ProductProblem& problem, Stream stream) { launch_product<Wgmma>(problem, stream); }

}  // namespace mudsc::cuda
