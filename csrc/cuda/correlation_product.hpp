// Shared parts of both product kernels (correlation_product.cu, correlation_wgmma.cu): what a block computes, how
// features are loaded into shared memory, per-unit sums, and the split of float32 into TF32.
#pragma once

#include <type_traits>

#include "block.hpp"
#include "mudsc/correlation_cuda.hpp"
#include "tensor_core.hpp"

namespace mudsc::cuda {

// Units per side of a tile. Fewer in the simulator, so that small problems have several tiles.
constexpr int kTile = block_threads(128, 32);
constexpr int kSlabBytes = 128;  // of each unit: 32 or 64 samples

// 16 bytes that are read and written by one instruction. Scalar accesses of a warp, 16 bytes apart, would hit only 8 of
// the 32 banks.
struct alignas(16) Quad {
  float of[4];
};
struct alignas(16) Words {
  std::uint32_t of[4];
};
template <class T>
__device__ __forceinline__ T read_16(const void* from) {
#if defined(__CUDACC__)
  return *static_cast<const T*>(from);
#else
  T value;
  std::memcpy(&value, from, sizeof(T));
  return value;
#endif
}
template <class T>
__device__ __forceinline__ void write_16(void* to, const T& value) {
#if defined(__CUDACC__)
  *static_cast<T*>(to) = value;
#else
  std::memcpy(to, &value, sizeof(T));
#endif
  note_write(to, sizeof(T));
}

// Layout of a tile in shared memory. Rows are padded so that the lanes of a warp access different banks.
template <class T, bool kUnitsAreAdjacent, int kUnitsOfTile>
struct PaddedLayout {
  using Number = T;
  static constexpr bool kUnitsAdjacent = kUnitsAreAdjacent;
  static constexpr int kUnits = kUnitsOfTile;
  static constexpr int kSamples = kSlabBytes / static_cast<int>(sizeof(T));
  static constexpr int kRow = kUnitsAdjacent ? kUnits : kSamples, kRows = kUnitsAdjacent ? kSamples : kUnits;
  static constexpr int kPadBytes = kUnitsAdjacent && sizeof(T) == 4 ? 32 : 16;
  static constexpr int kPad = kPadBytes / static_cast<int>(sizeof(T));
  static constexpr int kStride = kRow + kPad;
  static constexpr int kNumbers = kRows * kStride;
  static constexpr int kPeriod = 1;  // rows this far apart have the same layout, kStride numbers per row apart
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

// Samples of features up to `end`.
struct Samples {
  std::int64_t outer, inner, end;

  __device__ __forceinline__ std::int64_t offset(const FeatureView& view, std::int64_t sample) const {
    const std::uint32_t run = static_cast<std::uint32_t>(sample) / static_cast<std::uint32_t>(inner);
    const std::int64_t place = view.outer_index == nullptr ? run : view.outer_index[run];
    return place * view.outer_stride + (sample - run * inner) * view.inner_stride;
  }
};

// The position of a sample in a model's features. Advancing by a fixed number of samples takes no division.
class Cursor {
 public:
  __device__ Cursor(const FeatureView& view, const Samples& samples, std::int64_t first, int step)
      : index_(view.outer_index),
        outer_(static_cast<std::uint32_t>(samples.outer)),
        inner_(static_cast<std::uint32_t>(samples.inner)),
        outer_stride_(view.outer_stride),
        inner_stride_(view.inner_stride),
        step_runs_(static_cast<std::uint32_t>(step) / inner_),
        step_within_(static_cast<std::uint32_t>(step) % inner_),
        run_(static_cast<std::uint32_t>(first) / inner_),
        within_(static_cast<std::uint32_t>(first) % inner_) {
    offset_ = run_ * outer_stride_ + within_ * inner_stride_;
    step_ = step_runs_ * outer_stride_ + step_within_ * inner_stride_;
    wrap_ = outer_stride_ - inner_ * inner_stride_;
  }

  __device__ __forceinline__ void advance() {
    run_ += step_runs_;
    within_ += step_within_;
    offset_ += step_;
    if (within_ >= inner_) {
      within_ -= inner_;
      ++run_;
      offset_ += wrap_;
    }
  }

  // Offset in elements from the first feature; past the last sample, the offset of some valid sample.
  __device__ __forceinline__ std::int64_t offset() const {
    if (index_ == nullptr) return offset_;
    return (run_ < outer_ ? index_[run_] : 0) * outer_stride_ + within_ * inner_stride_;
  }

 private:
  const std::int32_t* index_;
  std::uint32_t outer_, inner_;
  std::int64_t outer_stride_, inner_stride_;
  std::uint32_t step_runs_, step_within_, run_, within_;
  std::int64_t offset_, step_, wrap_;
};

// The magnitude bits of NaN exceed those of infinity, so the addition carries into the sign bit.
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

#if defined(__CUDACC__)
__device__ __forceinline__ __nv_bfloat162 two_zeros(BFloat16) { return __float2bfloat162_rn(0.0f); }
__device__ __forceinline__ __half2 two_zeros(Half) { return __float2half2_rn(0.0f); }
#endif

// Whether any of a thread's numbers is NaN, found for two halves at a time by a maximum that keeps NaN.
template <class T>
struct NanFinder {
#if defined(__CUDACC__)
  using Two = decltype(two_zeros(T{}));
  Two largest = two_zeros(T{});
  __device__ __forceinline__ void look_at(std::uint32_t two) {
    largest = __hmax2_nan(largest, reinterpret_cast<const Two&>(two));
  }
  __device__ __forceinline__ bool found() const { return !__hbeq2(largest, largest); }
#else
  bool any = false;
  void look_at(std::uint32_t two) { any |= without_nan<T>(two) != two; }
  bool found() const { return any; }
#endif
};

// Loads slabs of one side into shared memory, one after another. Each thread fixes the numbers that it copied itself,
// so this needs no barrier: NaN becomes 0, shifts are subtracted, and numbers out of range are 0.
template <class Source, class Place, int kThreads>
class Feeder {
 public:
  using Stored = typename Place::Number;
  static constexpr bool kUnitsAdjacent = Place::kUnitsAdjacent;
  static constexpr int kVector = 16 / static_cast<int>(sizeof(Stored));
  static constexpr bool kAsIs = std::is_same_v<Source, Stored>;

  __device__ Feeder(const Side& side, const Samples& samples, std::int64_t begin)
      : vectors_(kAsIs && side.vectors),
        // With adjacent units, the iterations of a slab advance along its samples; otherwise a slab is one step.
        cursor_(side.view, samples, begin + (kUnitsAdjacent ? across() : along()),
                kUnitsAdjacent ? rows_apart() : Place::kSamples),
        values_(static_cast<const Source*>(side.view.values) +
                (side.first_unit + (kUnitsAdjacent ? along() : across())) * side.view.unit_stride),
        row_step_(kUnitsAdjacent ? 0 : rows_apart() * side.view.unit_stride),
        units_(static_cast<int>(side.units - side.first_unit < Place::kUnits ? side.units - side.first_unit
                                                                             : Place::kUnits)),
        left_(static_cast<int>(samples.end - begin)),
        shift_(side.shift) {}

  // The next slab.
  __device__ __forceinline__ void fetch(Stored* tile, AsyncCopies& copies) {
    vectors_ ? fetch_as<kVector>(tile, copies) : fetch_as<1>(tile, copies);
    left_ -= Place::kSamples;
  }

  // A slab that was fetched, with the number of its samples in range.
  __device__ __forceinline__ void repair(Stored* tile, int inside) const {
    if (vectors_) {
      repair_vectors(tile, inside);
    } else {
      for_each<1>([&](int, int unit, int sample) { repair_number(tile, unit, sample, inside); });
    }
  }

 private:
  // Rows between two iterations of a thread, and the first number of its first iteration: position in the row, and row.
  template <int kNumbers>
  static constexpr int kRowsApart = kThreads / (Place::kRow / kNumbers);
  template <int kNumbers>
  __device__ static __forceinline__ int along() {
    return static_cast<int>(threadIdx.x) % (Place::kRow / kNumbers) * kNumbers;
  }
  template <int kNumbers>
  __device__ static __forceinline__ int across() {
    return static_cast<int>(threadIdx.x) / (Place::kRow / kNumbers);
  }
  __device__ __forceinline__ int rows_apart() const { return vectors_ ? kRowsApart<kVector> : kRowsApart<1>; }
  __device__ __forceinline__ int along() const { return vectors_ ? along<kVector>() : along<1>(); }
  __device__ __forceinline__ int across() const { return vectors_ ? across<kVector>() : across<1>(); }

  template <int kNumbers, class Body>
  __device__ __forceinline__ void for_each(const Body& body) const {
    constexpr int kAlong = Place::kRow / kNumbers, kTurns = Place::kRows / kRowsApart<kNumbers>;
    static_assert(kThreads % kAlong == 0 && Place::kRows % kRowsApart<kNumbers> == 0, "turns fill the tile");
    const auto turn_body = [&](int turn) {
      const int row = across<kNumbers>() + turn * kRowsApart<kNumbers>;
      body(turn, kUnitsAdjacent ? along<kNumbers>() : row, kUnitsAdjacent ? row : along<kNumbers>());
    };
    if constexpr (kNumbers > 1) {
      MUDSC_UNROLL
      for (int turn = 0; turn < kTurns; ++turn) turn_body(turn);
    } else {  // many iterations; unrolling them would use up the registers of the sums
      MUDSC_UNROLL_4
      for (int turn = 0; turn < kTurns; ++turn) turn_body(turn);
    }
  }

  // Position of an iteration's numbers in a tile.
  template <int kNumbers>
  __device__ __forceinline__ int place(int turn, int unit, int sample) const {
    if constexpr (kRowsApart<kNumbers> % Place::kPeriod == 0) {
      constexpr int kStep = kRowsApart<kNumbers> * Place::kStride;
      return kUnitsAdjacent ? Place::at(along<kNumbers>(), across<kNumbers>()) + turn * kStep
                            : Place::at(across<kNumbers>(), along<kNumbers>()) + turn * kStep;
    } else {
      return Place::at(unit, sample);
    }
  }

  template <int kNumbers>
  __device__ __forceinline__ void fetch_as(Stored* tile, AsyncCopies& copies) {
    const Source* row = values_ + cursor_.offset();
    for_each<kNumbers>([&](int turn, int unit, int sample) {
      const bool is_inside = unit < units_ && sample < left_;
      Stored* const to = tile + place<kNumbers>(turn, unit, sample);
      const Source* const from = is_inside ? row : values_;
      if constexpr (kNumbers > 1) {
        copies.template copy<16>(to, from, is_inside);
      } else if constexpr (kAsIs && sizeof(Source) == 4) {
        copies.template copy<4>(to, from, is_inside);
      } else {
        if constexpr (kAsIs) {
          *to = is_inside ? *from : Stored{0};
        } else {
          *to = is_inside ? widen(*from) : 0.0f;
        }
        note_write(to, sizeof(Stored));
      }
      if constexpr (kUnitsAdjacent) {
        cursor_.advance();
        row = values_ + cursor_.offset();
      } else {
        row += row_step_;
      }
    });
    if constexpr (!kUnitsAdjacent) cursor_.advance();
  }

  // A vector of samples is entirely in range or entirely out of range.
  __device__ __forceinline__ void repair_vectors(Stored* tile, int inside) const {
    if constexpr (sizeof(Stored) == 4) {
      for_each<kVector>([&](int turn, int unit, int sample) {
        Stored* const numbers = tile + place<kVector>(turn, unit, sample);
        Quad quad = read_16<Quad>(numbers);
        MUDSC_UNROLL
        for (int k = 0; k < kVector; ++k) {
          const float value = quad.of[k] == quad.of[k] ? quad.of[k] : 0.0f;
          quad.of[k] = sample < inside ? value - shift_[kUnitsAdjacent ? unit + k : unit] : 0.0f;
        }
        write_16(numbers, quad);
      });
    } else {
      NanFinder<Stored> finder;
      for_each<kVector>([&](int turn, int unit, int sample) {
        const Words words = read_16<Words>(tile + place<kVector>(turn, unit, sample));
        MUDSC_UNROLL
        for (int k = 0; k < 4; ++k) finder.look_at(words.of[k]);
      });
      if (!finder.found()) return;
      for_each<kVector>([&](int turn, int unit, int sample) {
        Stored* const numbers = tile + place<kVector>(turn, unit, sample);
        Words words = read_16<Words>(numbers);
        MUDSC_UNROLL
        for (int k = 0; k < 4; ++k) words.of[k] = without_nan<Stored>(words.of[k]);
        write_16(numbers, words);
      });
    }
  }

  __device__ __forceinline__ void repair_number(Stored* tile, int unit, int sample, int inside) const {
    Stored* const number = tile + Place::at(unit, sample);
    if constexpr (sizeof(Stored) == 4) {
      // Shifts of units out of range are 0.
      const float value = *number == *number ? *number : 0.0f;
      *number = sample < inside ? value - shift_[unit] : 0.0f;
    } else {
      number->bits = static_cast<std::uint16_t>(without_nan<Stored>(number->bits));
    }
    note_write(number, sizeof(Stored));
  }

  bool vectors_;
  Cursor cursor_;
  const Source* values_;
  std::int64_t row_step_;
  int units_, left_;
  const float* shift_;
};

__device__ __forceinline__ std::uint32_t round_to_tf32(float value) {
  return (__float_as_uint(value) + 0x1000u) & 0xffffe000u;
}

// big + small equals the value up to a relative error of 2^-22; both are TF32.
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
      // Units eight apart start at different samples, because their rows begin in the same bank.
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

// A problem in the form that the kernel takes.
struct Product {
  FeatureView rows, columns;
  std::int64_t outer, units, inner, samples_per_part;
  float* products;
  double* row_sums;
  double* column_sums;
  int stages;
  bool symmetric, row_vectors, column_vectors;
};
// The work of one block: the products of two sides over its samples and, if it was selected for that, the sums of a
// side.
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
    // For half formats, one of two kernels handles the tile.
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

  // The requested sums of a side. All threads call it. `shares` is [2, kThreads] in shared memory.
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
  // A single sample that is read through an index may be anywhere.
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
