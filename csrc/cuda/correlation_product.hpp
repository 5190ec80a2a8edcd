// What both kernels of the product (correlation_product.cu, correlation_wgmma.cu) are made of: what a block computes,
// how features come into shared memory, sums beside the product, and the split of float32 into TF32.
#pragma once

#include <type_traits>

#include "block.hpp"
#include "mudsc/correlation_cuda.hpp"
#include "tensor_core.hpp"

namespace mudsc::cuda {

// Units of a tile's side. In the simulator fewer, so that small problems have several tiles.
constexpr int kTile = block_threads(128, 32);
constexpr int kSlabBytes = 128;  // of each unit: 32 or 64 samples

// Where the numbers of a tile stand in shared memory. Rows are padded so that the lanes of a warp meet different banks.
template <class T, bool kUnitsAreAdjacent, int kUnits>
struct PaddedLayout {
  using Number = T;
  static constexpr bool kUnitsAdjacent = kUnitsAreAdjacent;
  static constexpr int kSamples = kSlabBytes / static_cast<int>(sizeof(T));
  static constexpr int kRow = kUnitsAdjacent ? kUnits : kSamples, kRows = kUnitsAdjacent ? kSamples : kUnits;
  static constexpr int kPadBytes = kUnitsAdjacent && sizeof(T) == 4 ? 32 : 16;
  static constexpr int kPad = kPadBytes / static_cast<int>(sizeof(T));
  static constexpr int kStride = kRow + kPad;
  static constexpr int kNumbers = kRows * kStride;
  __device__ static __forceinline__ int at(int unit, int sample) {
    return kUnitsAdjacent ? sample * kStride + unit : unit * kStride + sample;
  }
};

// A tile's side: units of one model.
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
    if (outer == 1 && view.outer_index == nullptr) return sample * view.inner_stride;
    const std::uint32_t run = static_cast<std::uint32_t>(sample) / static_cast<std::uint32_t>(inner);
    const std::int64_t place = view.outer_index == nullptr ? run : view.outer_index[run];
    return place * view.outer_stride + (sample - run * inner) * view.inner_stride;
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
template <class Source, class Place, int kThreads>
class Feeder {
 public:
  using Stored = typename Place::Number;
  static constexpr bool kUnitsAdjacent = Place::kUnitsAdjacent;
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
          note_write(to, sizeof(Stored));
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
    note_write(numbers, kNumbers * sizeof(Stored));
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

// A thread's share of the sums of one unit of a side.
template <int kUnits, int kThreads>
struct UnitSums {
  static constexpr int kThreadsPerUnit = kThreads / kUnits;
  double sum = 0, squares = 0;

  __device__ __forceinline__ void add(float slab_sum, float slab_squares) {
    sum += static_cast<double>(slab_sum);
    squares += static_cast<double>(slab_squares);
  }

  template <class Place>
  __device__ __forceinline__ void add(const typename Place::Number* tile) {
    constexpr int kShare = Place::kSamples / kThreadsPerUnit;
    const int unit = static_cast<int>(threadIdx.x) % kUnits, begin = static_cast<int>(threadIdx.x) / kUnits * kShare;
    float slab_sum = 0, slab_squares = 0;
    MUDSC_UNROLL_4
    for (int k = 0; k < kShare; ++k) {
      // Units eight apart begin at different samples: their rows begin in the same bank.
      const float value = widen(tile[Place::at(unit, begin + (k + unit / 8) % kShare)]);
      slab_sum += value;
      slab_squares += value * value;
    }
    add(slab_sum, slab_squares);
  }

  // Writes the block's sums to [2, units]; `shares` is [2, kThreads] in shared memory. All threads call it.
  __device__ void write(double* sums, const Side& side, double* shares) const {
    __syncthreads();
    shares[threadIdx.x] = sum;
    shares[kThreads + threadIdx.x] = squares;
    __syncthreads();
    const int unit = static_cast<int>(threadIdx.x);
    if (unit >= kUnits || side.first_unit + unit >= side.units) return;
    for (int which = 0; which < 2; ++which) {
      double total = 0;
      for (int share = 0; share < kThreadsPerUnit; ++share) total += shares[which * kThreads + share * kUnits + unit];
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
// What one block computes: the products of two sides over its samples and, if it was chosen for them, a side's sums.
struct Work {
  Side rows, columns;
  std::int64_t begin, end;
  bool sums_rows, sums_columns;

  // `shifts` is [2, kUnits] in shared memory. All threads call it; false if this kernel has nothing to do for the tile.
  template <class Source, class Stored, int kUnits, int kThreads>
  __device__ bool find(const Product& problem, float* shifts) {
    if (problem.symmetric && blockIdx.x < blockIdx.y) return false;
    const std::int64_t first_row = static_cast<std::int64_t>(blockIdx.y) * kUnits;
    const std::int64_t first_column = static_cast<std::int64_t>(blockIdx.x) * kUnits;
    bool is_shifted = false;
    for (int k = static_cast<int>(threadIdx.x); k < 2 * kUnits; k += kThreads) {
      const FeatureView& view = k < kUnits ? problem.rows : problem.columns;
      const std::int64_t unit = k < kUnits ? first_row + k : first_column + k - kUnits;
      shifts[k] = unit < problem.units ? view.shift[unit] : 0.0f;
      is_shifted |= shifts[k] != 0.0f;
    }
    const bool any_shifted = __syncthreads_count(is_shifted) > 0;
    // Of halves, one of two kernels takes the tile.
    if (sizeof(Source) == 2 && any_shifted == std::is_same_v<Source, Stored>) return false;
    rows = {problem.rows, first_row, problem.units, shifts, problem.row_vectors};
    columns = {problem.columns, first_column, problem.units, shifts + kUnits, problem.column_vectors};
    const std::int64_t samples = problem.outer * problem.inner;
    begin = blockIdx.z * problem.samples_per_part;
    end = begin + problem.samples_per_part < samples ? begin + problem.samples_per_part : samples;
    sums_rows = problem.row_sums != nullptr && blockIdx.x == (problem.symmetric ? blockIdx.y : 0);
    sums_columns = problem.column_sums != nullptr && blockIdx.y == 0;
    return true;
  }

  // An entry of the tile's products.
  __device__ __forceinline__ void write(const Product& problem, int row, int column, float value) const {
    const std::int64_t units = problem.units, y = rows.first_unit + row, x = columns.first_unit + column;
    if (y < units && x < units) problem.products[(blockIdx.z * units + y) * units + x] = value;
  }

  // The sums of a side that were asked for; all threads call it. `shares` is [2, kThreads] in shared memory.
  template <class Sums>
  __device__ void write_sums(const Product& problem, const Sums& of_rows, const Sums& of_columns,
                             double* shares) const {
    const std::int64_t offset = static_cast<std::int64_t>(blockIdx.z) * 2 * problem.units;
    if (sums_rows) of_rows.write(problem.row_sums + offset, rows, shares);
    if (sums_columns) of_columns.write(problem.column_sums + offset, columns, shares);
  }
};

inline unsigned count_of(std::int64_t items, std::int64_t each) {
  return static_cast<unsigned>((items + each - 1) / each);
}

inline dim3 grid_of(const ProductProblem& problem, int tile) {
  const unsigned tiles = count_of(problem.units, tile);
  return dim3(tiles, tiles, static_cast<unsigned>(problem.parts));
}

// Whether 16 bytes along the tile's rows can be copied at once.
inline bool in_vectors(const FeatureView& view, const ProductProblem& problem, bool units_adjacent,
                       std::int64_t numbers) {
  const auto aligned = [&](std::int64_t stride, std::int64_t extent) { return extent == 1 || stride % numbers == 0; };
  if (reinterpret_cast<std::uintptr_t>(view.values) % 16 != 0) return false;
  // One sample, of an index, may stand anywhere.
  if (!aligned(view.outer_stride, view.outer_index == nullptr ? problem.outer : 0)) return false;
  if (units_adjacent) {
    return view.unit_stride == 1 && problem.units % numbers == 0 && aligned(view.inner_stride, problem.inner);
  }
  return view.inner_stride == 1 && problem.inner % numbers == 0 && aligned(view.unit_stride, problem.units);
}

// Launches the kernels that a problem calls for: Method::launch<Source, Stored, kUnitsAdjacent>.
template <class Method, class Source>
void launch_product_of(const ProductProblem& problem, Stream stream) {
  constexpr std::int64_t kNumbers = 16 / static_cast<std::int64_t>(sizeof(Source));
  const bool units_adjacent = problem.rows.unit_stride == 1;
  const Product product{problem.rows,
                        problem.columns,
                        problem.outer,
                        problem.units,
                        problem.inner,
                        problem.samples_per_part,
                        problem.products,
                        problem.row_sums,
                        problem.column_sums,
                        0,
                        problem.symmetric,
                        in_vectors(problem.rows, problem, units_adjacent, kNumbers),
                        in_vectors(problem.columns, problem, units_adjacent, kNumbers)};
  if constexpr (sizeof(Source) == 2) {
    units_adjacent ? Method::template launch<Source, Source, true>(product, problem, stream)
                   : Method::template launch<Source, Source, false>(product, problem, stream);
  }
  units_adjacent ? Method::template launch<Source, float, true>(product, problem, stream)
                 : Method::template launch<Source, float, false>(product, problem, stream);
}

template <class Method>
void launch_product(const ProductProblem& problem, Stream stream) {
  switch (problem.dtype) {
    case ScalarType::float16: return launch_product_of<Method, Half>(problem, stream);
    case ScalarType::bfloat16: return launch_product_of<Method, BFloat16>(problem, stream);
    default: return launch_product_of<Method, float>(problem, stream);
  }
}

// The product by wgmma (correlation_wgmma.cu).
void launch_warpgroup_product(const ProductProblem& problem, Stream stream);

}  // namespace mudsc::cuda
