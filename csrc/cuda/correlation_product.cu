// The product of a correlation by mma.sync, for every device.
//
// For two models, the product of all their units over the samples and, in blocks chosen for it, each unit's sum and sum
// of squares from the same tiles. A block has a tile of 128 x 128 pairs and a range of samples; features pass through
// shared memory in slabs of 128 bytes a unit, in their own layout, two or three in flight by cp.async.
//   float32: operands are split in registers into two TF32 numbers, a = big + small, and the product is
//     big big + big small + small big. The omitted term is 2^-22 of a product, so the result is as accurate as float32.
//   half formats, units whose mean is small relative to their deviation: directly into the tensor core, at full rate.
//   half formats, units far from zero: as float32, since the shifted value needs more digits. Both kernels are launched
//     and each tile is computed by the one that its units' shifts call for, so that the host need not know.
// Tensor cores round sums towards zero. So they sum one slab from zero, and slabs are added with rounding to nearest.
// Floor for C units, T samples: 2 T C^2 operations, for float32 three times that in TF32; from memory 2 T C numbers,
// from L2 2 T C^2 / 128. Bound by tensor cores from a few hundred units on. For pairs (i, i), tiles below the diagonal
// are left out. A block of 8 warps fills a multiprocessor's registers: two accumulators of 64 numbers a thread.
//
// No atomics: results do not depend on the order of blocks.
#include "correlation_product.hpp"

namespace mudsc::cuda {
namespace {

// The simulated tile is smaller, with more than one warp and fragment in each direction if possible.
constexpr int kRowWarps = 2, kColumnWarps = block_threads(4, 2);
constexpr int kRowFragments = block_threads(4, 1), kColumnFragments = block_threads(4, 2);
constexpr int kFragmentRows = 16, kFragmentColumns = 8;
static_assert(kTile == kRowWarps * kRowFragments * kFragmentRows, "tiles are square");
static_assert(kTile == kColumnWarps * kColumnFragments * kFragmentColumns, "tiles are square");
constexpr int kThreads = kWarp * kRowWarps * kColumnWarps;
// Slabs in shared memory: three if a block can have enough (data-center devices), else two.
constexpr int kMaxStages = 3, kMinStages = 2;

struct Products {
  Accumulator of[kRowFragments][kColumnFragments];
};

// Positions of a lane in the fragments of its warp.
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

template <bool kUnitsAdjacent>
__device__ __forceinline__ void multiply_slab(const float* rows, const float* columns, const Lane& lane,
                                              Products& sums) {
  using Place = PaddedLayout<float, kUnitsAdjacent, kTile>;
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
      // Small terms first. No accumulator is used twice in a row, because each addition waits for the previous one.
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
  using Place = PaddedLayout<T, kUnitsAdjacent, kTile>;
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
      load_matrices<kUnitsAdjacent>(
          two, columns + (kUnitsAdjacent ? Place::at(unit, first + low + row) : Place::at(unit + row, first + low)));
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

// One block's tile.
template <class Source, class Stored, bool kUnitsAdjacent>
class ProductTile {
 public:
  using Place = PaddedLayout<Stored, kUnitsAdjacent, kTile>;
  using Feed = Feeder<Source, Place, kThreads>;

  __device__ ProductTile(const Product& problem, const Work& work) : problem_(problem), work_(work) {}

  __device__ void run() {
    const Samples samples{problem_.outer, problem_.inner, work_.end};
    Feed row_feed(work_.rows, samples, work_.begin), column_feed(work_.columns, samples, work_.begin);
    AsyncCopies copies;
    const int ahead = problem_.stages - 1, all = static_cast<int>(work_.end - work_.begin);
    const int slabs = (all + Place::kSamples - 1) / Place::kSamples;
    for (int slab = 0; slab < ahead; ++slab) fetch(row_feed, column_feed, copies, slab < slabs, slab);
    for (int slab = 0, stage = 0; slab < slabs; ++slab, stage = after(stage)) {
      if (problem_.stages == kMaxStages) {
        copies.wait<kMaxStages - 2>();
      } else {
        copies.wait<kMinStages - 2>();
      }
      row_feed.repair(row_tile(stage), all - slab * Place::kSamples);
      column_feed.repair(column_tile(stage), all - slab * Place::kSamples);
      __syncthreads();  // the slab has arrived; nobody reads the previous one, which is overwritten next
      fetch(row_feed, column_feed, copies, slab + ahead < slabs, stage == 0 ? ahead : stage - 1);
      add_slab(row_tile(stage), column_tile(stage));
    }
    copies.wait<0>();
    write();
  }

 private:
  __device__ __forceinline__ int after(int stage) const { return stage + 1 == problem_.stages ? 0 : stage + 1; }
  __device__ static __forceinline__ Stored* row_tile(int stage) {
    return reinterpret_cast<Stored*>(dynamic_shared()) + stage * 2 * Place::kNumbers;
  }
  __device__ static __forceinline__ Stored* column_tile(int stage) { return row_tile(stage) + Place::kNumbers; }

  __device__ __forceinline__ void fetch(Feed& row_feed, Feed& column_feed, AsyncCopies& copies, bool any,
                                        int stage) const {
    if (any) {
      row_feed.fetch(row_tile(stage), copies);
      column_feed.fetch(column_tile(stage), copies);
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
    if (work_.sums_rows) row_sums_.template add<Place>(row_numbers);
    if (work_.sums_columns) column_sums_.template add<Place>(column_numbers);
  }

  __device__ void write() const {
    work_.write_sums(problem_, row_sums_, column_sums_, reinterpret_cast<double*>(dynamic_shared()));
    MUDSC_UNROLL
    for (int m = 0; m < kRowFragments; ++m) {
      MUDSC_UNROLL
      for (int n = 0; n < kColumnFragments; ++n) {
        MUDSC_UNROLL
        for (int k = 0; k < 4; ++k) {
          const int row = lane_.first_row + m * kFragmentRows + lane_.group + k / 2 * 8;
          const int column = lane_.first_column + n * kFragmentColumns + 2 * lane_.within + k % 2;
          work_.write(problem_, row, column, total_.of[m][n].values[k]);
        }
      }
    }
  }

  Product problem_;
  Work work_;
  Lane lane_;
  Products total_{};
  UnitSums<kTile, kThreads> row_sums_, column_sums_;
};

template <class Source, class Stored, bool kUnitsAdjacent>
__global__ void __launch_bounds__(kThreads, 1) correlation_product_kernel(const Product problem) {
  MUDSC_SHARED(float, shifts, 2 * kTile);
  Work work;
  if (!work.find<Source, Stored, kTile, kThreads>(problem, shifts)) return;
  ProductTile<Source, Stored, kUnitsAdjacent>(problem, work).run();
}

// Static shared memory of the product, and the device's reserve per block.
constexpr std::size_t kReservedShared = 4 * 1024;

// How the kernels are launched.
struct MmaSync {
  template <class Source, class Stored, bool kUnitsAdjacent>
  static void launch(Product product, const ProductProblem& problem, Stream stream) {
    using Place = PaddedLayout<Stored, kUnitsAdjacent, kTile>;
    constexpr std::size_t kStageBytes = 2 * sizeof(Stored) * Place::kNumbers;
    const bool fits = kMaxStages * kStageBytes + kReservedShared <= shared_memory_limit("correlation_product", stream);
    product.stages = fits ? kMaxStages : kMinStages;
    cuda::launch("correlation_product", correlation_product_kernel<Source, Stored, kUnitsAdjacent>,
                 {grid_of(problem, kTile), dim3(kThreads), static_cast<std::size_t>(product.stages) * kStageBytes},
                 stream, product);
  }
};

}  // namespace

std::int64_t correlation_tile() { return kTile; }

void correlation_product(const ProductProblem& problem, Stream stream) {
  problem.warpgroups ? launch_warpgroup_product(problem, stream) : launch_product<MmaSync>(problem, stream);
}

}  // namespace mudsc::cuda
