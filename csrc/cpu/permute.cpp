// Weighted sum of tensors re-indexed along rows and columns of [outer, rows, middle, columns, inner].
//
// Computes  out[o, r, m, k, t] = sum_i weight_i * sum over rows s of r, columns c of k of tensor_i[o, s, m, c, t],
// where a gather gives each output unit one input unit and clusters give it any number, times the clusters' scales.
//
// Memory traffic: one read of each input, one write of the output. A line (the [columns, inner] part of one row)
// is accumulated in float32 (float64 for float64) in cache. Rows that fall into one cluster are added before the
// columns are touched, so the indexed part runs once per line. One model with weight 1 and gathers only is a copy
// of bits: exact for every value, NaN payloads and signed zeros included.
//
// Sums of gathers in float32 and indexed copies of 4-byte entries, the common case, are one fused loop: a block of outputs
// is summed in registers over all models and written past the caches where the result is large; meanwhile the same part
// of the next line is fetched, since indexed reads give the processor's own prefetcher nothing to follow. Copies of rows
// are copies of bytes, of any type.
//
// In place, the lines of one tensor move along the cycles of the row permutation: each is read once and written once.
//
// Columns are indexed from a line that is in cache. Short runs (inner < 16) are expanded to one index per element;
// longer ones are contiguous loops. Of a cluster's columns, the first is part of an indexed pass over all
// clusters (a zero behind the line stands for "none"), the others, few in practice, follow one by one.
//
// Parallel shape: threads take disjoint ranges of output lines; each has its own scratch, no line is shared.
#include "mudsc/permute.hpp"

#include "kernel.hpp"
#include "mudsc/threads.hpp"

#if defined(__SSE__)
#include <immintrin.h>
#endif

namespace mudsc::MUDSC_ISA {
namespace {

// Below this many contiguous elements per unit, one index per element beats a loop per unit.
constexpr std::int64_t kShortRun = 16;
// The same for copies, in bytes: from here on a run is two vectors.
constexpr std::int64_t kShortCopy = 8;
// Elements of a line that are accumulated at a time where columns stay in place: sums remain in the L1 cache.
constexpr std::int64_t kTile = 2048;
// Elements read per thread that outweigh starting it.
constexpr std::int64_t kElementsPerThread = 1 << 18;
// Results of so many bytes bypass the caches: by the time they are read again they would have been evicted.
constexpr std::int64_t kStreamedBytes = 32 << 20;
// Shorter lines are mostly heads and tails that do not fill a vector.
constexpr std::int64_t kLeastStreamedLine = 256;
// Models whose sums stay in registers.
constexpr std::int64_t kFusedModels = 8;

// Input rows of every output row, by model: members[start[k]..start[k + 1]) in increasing order.
class RowMembers {
 public:
  RowMembers(const AxisMap& map, std::int64_t num_models) : map_(map) {
    if (map.kind != UnitMapKind::clusters) return;
    start_ = Buffer<std::int64_t>(num_models * (map.units_out + 1), 0);
    members_ = Buffer<std::int64_t>(num_models * map.units_in);
    for (std::int64_t i = 0; i < num_models; ++i) sort_by_cluster(i);
  }

  // Calls visit(input_row) for each input row of output row `row`.
  template <class Visit>
  void each(std::int64_t model, std::int64_t row, Visit visit) const {
    if (map_.kind == UnitMapKind::identity) {
      visit(row);
    } else if (map_.kind == UnitMapKind::gather) {
      visit(map_.index[model * map_.units_out + row]);
    } else {
      const std::int64_t* const start = start_.data() + model * (map_.units_out + 1);
      const std::int64_t* const members = members_.data() + model * map_.units_in;
      for (std::int64_t e = start[row]; e < start[row + 1]; ++e) visit(members[e]);
    }
  }

 private:
  void sort_by_cluster(std::int64_t model) {
    const std::int64_t* const cluster = map_.index + model * map_.units_in;
    std::int64_t* const start = start_.data() + model * (map_.units_out + 1);
    std::int64_t* const members = members_.data() + model * map_.units_in;
    for (std::int64_t c = 0; c < map_.units_in; ++c) ++start[cluster[c]];
    std::int64_t end = 0;
    for (std::int64_t k = 0; k <= map_.units_out; ++k) start[k] = end += start[k];
    // Placed from the back: each start moves down to where its cluster begins.
    for (std::int64_t c = map_.units_in; c-- > 0;) members[--start[cluster[c]]] = c;
  }

  AxisMap map_;
  Buffer<std::int64_t> start_;
  Buffer<std::int64_t> members_;
};

// Columns in units of `run` contiguous elements: runs shorter than kShortRun are expanded to single elements.
class ColumnIndex {
 public:
  ColumnIndex() = default;
  ColumnIndex(const AxisMap& map, std::int64_t inner, std::int64_t num_models, std::int64_t short_run = kShortRun) {
    const std::int64_t expansion = inner < short_run && map.units_in < (INT32_MAX - 1) / kShortRun ? inner : 1;
    run_ = inner / expansion;
    items_in_ = map.units_in * expansion;
    items_out_ = map.units_out * expansion;
    first_ = Buffer<std::int32_t>(num_models * items_out_);
    if (map.kind == UnitMapKind::gather) {
      for (std::int64_t i = 0; i < num_models; ++i) {
        add_gather(map.index + i * map.units_out, map.units_out, expansion, i);
      }
      return;
    }
    first_.fill(static_cast<std::int32_t>(items_in_));
    extra_start_ = Buffer<std::int64_t>(num_models + 1, 0);
    extras_ = Buffer<Extra>(num_models * items_in_);
    for (std::int64_t i = 0; i < num_models; ++i) {
      extra_start_[i + 1] = extra_start_[i];
      add_clusters(map.index + i * map.units_in, map.units_in, expansion, i);
    }
  }

  struct Extra {
    std::int32_t from;
    std::int32_t to;
  };

  std::int64_t run() const { return run_; }
  std::int64_t items_in() const { return items_in_; }
  std::int64_t items_out() const { return items_out_; }
  // One input item for each output item, or items_in() for none.
  const std::int32_t* first(std::int64_t model) const { return first_.data() + model * items_out_; }
  // The other inputs of clusters; gathers have none.
  const Extra* extras_begin(std::int64_t model) const { return extras_.data() + extras_before(model); }
  const Extra* extras_end(std::int64_t model) const { return extras_.data() + extras_before(model + 1); }

 private:
  std::int64_t extras_before(std::int64_t model) const { return extra_start_.size() == 0 ? 0 : extra_start_[model]; }

  void add_gather(const std::int64_t* index, std::int64_t units_out, std::int64_t expansion, std::int64_t model) {
    std::int32_t* const first = first_.data() + model * items_out_;
    for (std::int64_t k = 0; k < units_out; ++k) {
      for (std::int64_t t = 0; t < expansion; ++t) {
        first[k * expansion + t] = static_cast<std::int32_t>(index[k] * expansion + t);
      }
    }
  }

  void add_clusters(const std::int64_t* cluster, std::int64_t units_in, std::int64_t expansion, std::int64_t model) {
    std::int32_t* const first = first_.data() + model * items_out_;
    for (std::int64_t c = 0; c < units_in; ++c) {
      for (std::int64_t t = 0; t < expansion; ++t) {
        const std::int32_t from = static_cast<std::int32_t>(c * expansion + t);
        const std::int32_t to = static_cast<std::int32_t>(cluster[c] * expansion + t);
        if (first[to] == items_in_) {
          first[to] = from;
        } else {
          extras_[extra_start_[model + 1]++] = Extra{from, to};
        }
      }
    }
  }

  std::int64_t run_ = 1;
  std::int64_t items_in_ = 0;
  std::int64_t items_out_ = 0;
  Buffer<std::int32_t> first_;
  Buffer<Extra> extras_;
  Buffer<std::int64_t> extra_start_;
};

// ---- Vectors of float32 bits ----------------------------------------------------------------------------------

#if defined(__AVX512F__)
constexpr std::int64_t kLanes = 16;
#elif defined(__AVX2__)
constexpr std::int64_t kLanes = 8;
#else
constexpr std::int64_t kLanes = 4;
#endif
typedef float Lanes __attribute__((vector_size(kLanes * sizeof(float))));
// Outputs summed at a time: four vectors hide the latency of indexed loads.
constexpr std::int64_t kBlock = 4 * kLanes;

inline Lanes load_lanes(const float* from) {
  Lanes lanes;
  std::memcpy(&lanes, from, sizeof lanes);
  return lanes;
}

// ---- Vectors of halves ----------------------------------------------------------------------------------------

template <class T>
constexpr bool kIsHalf = false;
template <>
constexpr bool kIsHalf<Half> = true;
template <>
constexpr bool kIsHalf<BFloat16> = true;

typedef std::uint32_t LaneBits __attribute__((vector_size(kLanes * sizeof(float))));
typedef std::uint16_t HalfLanes __attribute__((vector_size(kLanes * sizeof(std::uint16_t))));

inline Lanes load_lanes(const BFloat16* from) {
  HalfLanes halves;
  std::memcpy(&halves, from, sizeof halves);
  return reinterpret_cast<Lanes>(__builtin_convertvector(halves, LaneBits) << 16);
}

inline void store_lanes(Lanes lanes, BFloat16* to) {
  const LaneBits bits = reinterpret_cast<LaneBits>(lanes);
  const LaneBits is_nan = reinterpret_cast<LaneBits>(lanes != lanes);
  const LaneBits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const HalfLanes halves = __builtin_convertvector((is_nan & 0x7fc0u) | (~is_nan & rounded), HalfLanes);
  std::memcpy(to, &halves, sizeof halves);
}

// The processor's own conversions where it has them; its NaN keep their payload, so they are made the one of `narrow`.
inline Lanes load_lanes(const Half* from) {
#if defined(__AVX512F__)
  return reinterpret_cast<Lanes>(
      _mm512_mask_cvtph_ps(_mm512_setzero_ps(), 0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
#elif defined(__F16C__)
  return reinterpret_cast<Lanes>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#else
  return Lanes{widen(from[0]), widen(from[1]), widen(from[2]), widen(from[3])};
#endif
}

inline void store_lanes(Lanes lanes, Half* to) {
#if defined(__AVX512F__) || defined(__F16C__)
  const LaneBits bits = reinterpret_cast<LaneBits>(lanes);
  const LaneBits is_nan = reinterpret_cast<LaneBits>(lanes != lanes);
  const LaneBits quiet = (is_nan & ((bits & 0x80000000u) | 0x7fc00000u)) | (~is_nan & bits);
#if defined(__AVX512F__)
  const __m256i halves = _mm512_mask_cvtps_ph(_mm256_setzero_si256(), 0xffff, reinterpret_cast<__m512>(quiet), 0);
#else
  const __m128i halves = _mm256_cvtps_ph(reinterpret_cast<__m256>(quiet), 0);
#endif
  std::memcpy(to, &halves, sizeof halves);
#else
  for (std::int64_t v = 0; v < kLanes; ++v) narrow(lanes[v], to[v]);
#endif
}

// ---- Loops over contiguous elements -------------------------------------------------------------------------

// Halves are converted a vector at a time.

template <class T, class Accumulator>
void assign_scaled(Accumulator* __restrict to, const T* __restrict from, Accumulator weight, std::int64_t count) {
  std::int64_t e = 0;
  if constexpr (kIsHalf<T>) {
    for (; e + kLanes <= count; e += kLanes) {
      const Lanes lanes = weight * load_lanes(from + e);
      std::memcpy(to + e, &lanes, sizeof lanes);
    }
  }
  for (; e < count; ++e) to[e] = weight * widen(from[e]);
}

template <class T, class Accumulator>
void add_scaled(Accumulator* __restrict to, const T* __restrict from, Accumulator weight, std::int64_t count) {
  std::int64_t e = 0;
  if constexpr (kIsHalf<T>) {
    for (; e + kLanes <= count; e += kLanes) {
      const Lanes lanes = load_lanes(to + e) + weight * load_lanes(from + e);
      std::memcpy(to + e, &lanes, sizeof lanes);
    }
  }
  for (; e < count; ++e) to[e] += weight * widen(from[e]);
}

template <class T, class Accumulator>
void store(T* __restrict to, const Accumulator* __restrict from, Accumulator scale, std::int64_t count) {
  std::int64_t e = 0;
  if constexpr (kIsHalf<T>) {
    for (; e + kLanes <= count; e += kLanes) store_lanes(load_lanes(from + e) * scale, to + e);
  }
  for (; e < count; ++e) narrow(from[e] * scale, to[e]);
}

template <class T, class Accumulator>
void store_by_column(T* __restrict to, const Accumulator* __restrict from, const Accumulator* __restrict column_scale,
                     Accumulator scale, std::int64_t count) {
  for (std::int64_t e = 0; e < count; ++e) narrow(from[e] * (scale * column_scale[e]), to[e]);
}

// ---- Gathers and sums of float32 lines ------------------------------------------------------------------------

inline Lanes gather_lanes(const float* line, const std::int32_t* index) {
#if defined(__AVX512F__)
  // Masked with all ones: the plain form reads an undefined vector, which gcc warns of.
  return reinterpret_cast<Lanes>(
      _mm512_mask_i32gather_ps(_mm512_setzero_ps(), 0xffff, _mm512_loadu_si512(index), line, sizeof(float)));
#elif defined(__AVX2__)
  const __m256i places = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(index));
  return reinterpret_cast<Lanes>(_mm256_i32gather_ps(line, places, sizeof(float)));
#else
  return Lanes{line[index[0]], line[index[1]], line[index[2]], line[index[3]]};
#endif
}

// Writes past the caches; `to` is a multiple of the vector's size.
inline void stream_lanes(float* to, Lanes lanes) {
#if defined(__AVX512F__)
  _mm512_stream_ps(to, reinterpret_cast<__m512>(lanes));
#elif defined(__AVX2__)
  _mm256_stream_ps(to, reinterpret_cast<__m256>(lanes));
#elif defined(__SSE__)
  _mm_stream_ps(to, reinterpret_cast<__m128>(lanes));
#else
  std::memcpy(to, &lanes, sizeof lanes);
#endif
}

// Makes streamed writes visible before the thread ends.
inline void finish_streams() {
#if defined(__SSE__)
  _mm_sfence();
#endif
}

inline void store_lanes(Lanes lanes, float* to) { std::memcpy(to, &lanes, sizeof lanes); }

template <bool streamed>
inline void write_lanes(Lanes lanes, float* to) {
  if (streamed) {
    stream_lanes(to, lanes);
  } else {
    store_lanes(lanes, to);
  }
}

// Entries up to where vectors may be streamed.
inline std::int64_t entries_to_alignment(const float* to) {
  const std::uintptr_t beyond = reinterpret_cast<std::uintptr_t>(to) % sizeof(Lanes);
  return beyond == 0 ? 0 : static_cast<std::int64_t>((sizeof(Lanes) - beyond) / sizeof(float));
}

// One output line as the sum of one input line of each model. Members that do not apply are null.
struct FusedLine {
  std::int64_t num_models;
  const float* weights;              // null: one model, copied bit for bit
  const float* lines[kFusedModels];  // [items_in]
  const float* next[kFusedModels];   // the lines of the following output line, to be fetched
  const std::int32_t* index[kFusedModels];
  std::int64_t items_in;
  std::int64_t items_out;
};

template <bool indexed, bool weighted, int vectors, bool streamed>
inline void write_vectors(const FusedLine& line, std::int64_t at, float* out) {
  Lanes sums[vectors] = {};
  for (std::int64_t i = 0; i < line.num_models; ++i) {
    if (line.next[i] != nullptr && at + vectors * kLanes <= line.items_in) {
      for (std::int64_t e = 0; e < vectors * kLanes; e += 16) __builtin_prefetch(line.next[i] + at + e);
    }
    for (int v = 0; v < vectors; ++v) {
      const Lanes lanes = indexed ? gather_lanes(line.lines[i], line.index[i] + at + v * kLanes)
                                  : load_lanes(line.lines[i] + at + v * kLanes);
      if (!weighted) {
        sums[v] = lanes;
      } else if (i == 0) {
        sums[v] = lanes * line.weights[i];
      } else {
        sums[v] += lanes * line.weights[i];
      }
    }
  }
  for (int v = 0; v < vectors; ++v) write_lanes<streamed>(sums[v], out + at + v * kLanes);
}

// Writes `count` entries of the vector at `at`, from its entry `first` on, and nothing else: to write again what was
// streamed would fetch it from memory.
template <bool indexed, bool weighted>
inline void write_part(const FusedLine& line, std::int64_t at, std::int64_t first, std::int64_t count, float* out) {
  float vector[kLanes];
  write_vectors<indexed, weighted, 1, false>(line, at, vector - at);
  std::memcpy(out + at + first, vector + first, static_cast<std::size_t>(count) * sizeof(float));
}

template <bool indexed, bool weighted>
inline void write_one(const FusedLine& line, std::int64_t e, float* out) {
  const std::int64_t from = indexed ? line.index[0][e] : e;
  if (!weighted) {
    std::memcpy(out + e, line.lines[0] + from, sizeof(float));
    return;
  }
  float sum = line.lines[0][from] * line.weights[0];
  for (std::int64_t i = 1; i < line.num_models; ++i) {
    sum += line.lines[i][indexed ? line.index[i][e] : e] * line.weights[i];
  }
  out[e] = sum;
}

template <bool indexed, bool weighted, bool streamed>
void write_line(const FusedLine& line, float* out) {
  if (line.items_out < kLanes) {
    for (std::int64_t e = 0; e < line.items_out; ++e) write_one<indexed, weighted>(line, e, out);
    return;
  }
  // A line begins wherever the one before ended: what does not fill a vector, before the first that may be streamed and
  // behind the last, is part of a vector that overlaps it.
  std::int64_t e = streamed ? entries_to_alignment(out) : 0;
  if (e > 0) write_part<indexed, weighted>(line, 0, 0, e, out);
  for (; e + kBlock <= line.items_out; e += kBlock) {
    write_vectors<indexed, weighted, kBlock / kLanes, streamed>(line, e, out);
  }
  for (; e + kLanes <= line.items_out; e += kLanes) write_vectors<indexed, weighted, 1, streamed>(line, e, out);
  const std::int64_t left = line.items_out - e;
  if (streamed) {
    write_part<indexed, weighted>(line, line.items_out - kLanes, kLanes - left, left, out);
  } else if (left > 0) {
    write_vectors<indexed, weighted, 1, false>(line, line.items_out - kLanes, out);
  }
}

template <bool streamed>
void write_line(const FusedLine& line, float* out) {
  const bool indexed = line.index[0] != nullptr;
  if (line.weights == nullptr) {
    write_line<true, false, streamed>(line, out);
  } else if (indexed) {
    write_line<true, true, streamed>(line, out);
  } else {
    write_line<false, true, streamed>(line, out);
  }
}

// ---- Indexed loops ------------------------------------------------------------------------------------------

template <class Accumulator>
void add_indexed(Accumulator* __restrict to, const Accumulator* __restrict line,
                 const std::int32_t* __restrict index, Accumulator weight, std::int64_t count) {
  for (std::int64_t e = 0; e < count; ++e) to[e] += weight * line[index[e]];
}

template <class Accumulator>
void add_runs(Accumulator* to, const Accumulator* line, const ColumnIndex& columns, std::int64_t model,
              Accumulator weight) {
  const std::int64_t run = columns.run();
  const std::int32_t* const first = columns.first(model);
  for (std::int64_t k = 0; k < columns.items_out(); ++k) {
    if (first[k] < columns.items_in()) add_scaled(to + k * run, line + first[k] * run, weight, run);
  }
}

// Adds one model's line to the sums. For single elements, line[items_in] is a zero.
template <class Accumulator>
void add_line(Accumulator* to, const Accumulator* line, const ColumnIndex& columns, std::int64_t model,
              Accumulator weight) {
  const std::int64_t run = columns.run();
  if (run == 1) {
    add_indexed(to, line, columns.first(model), weight, columns.items_out());
  } else {
    add_runs(to, line, columns, model, weight);
  }
  for (const ColumnIndex::Extra* e = columns.extras_begin(model); e != columns.extras_end(model); ++e) {
    for (std::int64_t t = 0; t < run; ++t) to[e->to * run + t] += weight * line[e->from * run + t];
  }
}

// ---- Lines --------------------------------------------------------------------------------------------------

template <class T>
class Merge {
 public:
  using Accumulator = typename ArithmeticOf<T>::type;

  explicit Merge(const PermuteProblem& problem) : problem_(problem), rows_(problem.rows, problem.num_models) {}

  // Columns stay in place: lines are added tile by tile.
  void run_rows() const {
    const std::int64_t length = problem_.columns.units_in * problem_.inner;
    auto body = [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t line = begin; line < end; ++line) {
        for (std::int64_t at = 0; at < length; at += kTile) {
          merge_tile(line, at, length - at < kTile ? length - at : kTile);
        }
      }
    };
    parallel_for(problem_.threads, num_lines(), lines_per_thread(length), body);
  }

  void run_columns() const {
    const ColumnIndex columns(problem_.columns, problem_.inner, problem_.num_models);
    const std::int64_t line_in = problem_.columns.units_in * problem_.inner;
    const std::int64_t line_out = problem_.columns.units_out * problem_.inner;
    const Buffer<Accumulator> column_scale = expanded_scale(line_out);
    const std::int64_t scratch_size = (line_in + 1 + line_out + 15) / 16 * 16;
    Buffer<Accumulator> scratch(problem_.threads * scratch_size);
    std::int64_t threads_started = 0;
    auto body = [&](std::int64_t begin, std::int64_t end) {
      const std::int64_t thread = __atomic_fetch_add(&threads_started, 1, __ATOMIC_RELAXED);
      Accumulator* const sums = scratch.data() + thread * scratch_size;
      Accumulator* const line = sums + line_out;
      line[line_in] = 0;
      for (std::int64_t l = begin; l < end; ++l) merge_line(l, columns, column_scale, sums, line);
    };
    parallel_for(problem_.threads, num_lines(), lines_per_thread(line_in), body);
  }

 private:
  std::int64_t num_lines() const { return problem_.outer * problem_.rows.units_out * problem_.middle; }

  std::int64_t lines_per_thread(std::int64_t length) const {
    return 1 + kElementsPerThread / (1 + length * problem_.num_models);
  }

  Accumulator row_scale(std::int64_t line) const {
    if (problem_.rows.scale == nullptr) return 1;
    return static_cast<Accumulator>(problem_.rows.scale[line / problem_.middle % problem_.rows.units_out]);
  }

  Buffer<Accumulator> expanded_scale(std::int64_t line_out) const {
    if (problem_.columns.scale == nullptr) return Buffer<Accumulator>();
    Buffer<Accumulator> scale(line_out);
    for (std::int64_t e = 0; e < line_out; ++e) {
      scale[e] = static_cast<Accumulator>(problem_.columns.scale[e / problem_.inner]);
    }
    return scale;
  }

  // Calls visit(input line) for every input line of model `model` that output line `line` sums.
  template <class Visit>
  void each_input_line(std::int64_t model, std::int64_t line, Visit visit) const {
    const std::int64_t m = line % problem_.middle;
    const std::int64_t row = line / problem_.middle % problem_.rows.units_out;
    const std::int64_t o = line / problem_.middle / problem_.rows.units_out;
    const T* const tensor = static_cast<const T*>(problem_.tensors[model]);
    const std::int64_t length = problem_.columns.units_in * problem_.inner;
    rows_.each(model, row, [&](std::int64_t input_row) {
      visit(tensor + ((o * problem_.rows.units_in + input_row) * problem_.middle + m) * length);
    });
  }

  void merge_tile(std::int64_t line, std::int64_t at, std::int64_t count) const {
    Accumulator sums[kTile];
    bool empty = true;
    for (std::int64_t i = 0; i < problem_.num_models; ++i) {
      const Accumulator weight = static_cast<Accumulator>(problem_.weights[i]);
      each_input_line(i, line, [&](const T* input) {
        if (empty) {
          assign_scaled(sums, input + at, weight, count);
        } else {
          add_scaled(sums, input + at, weight, count);
        }
        empty = false;
      });
    }
    if (empty) {
      for (std::int64_t e = 0; e < count; ++e) sums[e] = 0;
    }
    T* const out = static_cast<T*>(problem_.out) + line * problem_.columns.units_out * problem_.inner + at;
    store(out, sums, row_scale(line), count);
  }

  // Returns the sum of a model's input lines, in `scratch` where it is not an input line itself; null if none.
  const Accumulator* gathered_line(std::int64_t model, std::int64_t line, Accumulator* scratch) const {
    const std::int64_t length = problem_.columns.units_in * problem_.inner;
    const T* only = nullptr;
    std::int64_t count = 0;
    each_input_line(model, line, [&](const T* input) {
      if (count == 0) {
        only = input;
      } else {
        if (count == 1) assign_scaled(scratch, only, Accumulator(1), length);
        add_scaled(scratch, input, Accumulator(1), length);
      }
      ++count;
    });
    if (count == 0) return nullptr;
    if (count > 1) return scratch;
    assign_scaled(scratch, only, Accumulator(1), length);
    return scratch;
  }

  void merge_line(std::int64_t line, const ColumnIndex& columns, const Buffer<Accumulator>& column_scale,
                  Accumulator* sums, Accumulator* scratch) const {
    const std::int64_t length = problem_.columns.units_out * problem_.inner;
    for (std::int64_t e = 0; e < length; ++e) sums[e] = 0;
    for (std::int64_t i = 0; i < problem_.num_models; ++i) {
      const Accumulator* const input = gathered_line(i, line, scratch);
      if (input != nullptr) add_line(sums, input, columns, i, static_cast<Accumulator>(problem_.weights[i]));
    }
    T* const out = static_cast<T*>(problem_.out) + line * length;
    if (column_scale.size() > 0) {
      store_by_column(out, sums, column_scale.data(), row_scale(line), length);
    } else {
      store(out, sums, row_scale(line), length);
    }
  }

  PermuteProblem problem_;
  RowMembers rows_;
};

// ---- Gathers of 4-byte entries -------------------------------------------------------------------------------

inline std::int64_t num_lines(const PermuteProblem& problem) {
  return problem.outer * problem.rows.units_out * problem.middle;
}

inline bool gathers(const PermuteProblem& problem) {
  return problem.rows.kind != UnitMapKind::clusters && problem.columns.kind != UnitMapKind::clusters;
}

inline bool is_copy(const PermuteProblem& problem) {
  return problem.num_models == 1 && problem.weights[0] == 1.0 && gathers(problem);
}

// Copies of float32 that are not of single entries; those of runs are fused where the result is streamed.
inline bool is_copy_of_runs(const PermuteProblem& problem) {
  if (!is_copy(problem)) return false;
  if (problem.columns.kind == UnitMapKind::identity) return true;
  return problem.inner > 1 && num_lines(problem) * problem.columns.units_out * problem.inner * 4 < kStreamedBytes;
}

// Long runs of columns are left to copies of runs; other gathers of float32 are fused.
inline bool is_fused(const PermuteProblem& problem) {
  return gathers(problem) && problem.num_models <= kFusedModels &&
         (problem.columns.kind == UnitMapKind::identity ||
          (problem.inner < kShortRun && problem.columns.units_in < (INT32_MAX - 1) / kShortRun));
}

// Walks the lines of the result in order, and says which input lines each is made of: without a division per line.
template <class T>
class LineSources {
 public:
  LineSources(const PermuteProblem& problem, std::int64_t line)
      : tensors_(problem.tensors),
        index_(problem.rows.kind == UnitMapKind::gather ? problem.rows.index : nullptr),
        items_(problem.columns.units_in * problem.inner),
        rows_in_(problem.rows.units_in),
        rows_out_(problem.rows.units_out),
        middles_(problem.middle),
        middle_(line % middles_),
        row_(line / middles_ % rows_out_),
        outer_(line / middles_ / rows_out_) {}

  const T* of(std::int64_t model) const {
    const std::int64_t row = index_ != nullptr ? index_[model * rows_out_ + row_] : row_;
    return static_cast<const T*>(tensors_[model]) + ((outer_ * rows_in_ + row) * middles_ + middle_) * items_;
  }

  void advance() {
    if (++middle_ < middles_) return;
    middle_ = 0;
    if (++row_ < rows_out_) return;
    row_ = 0;
    ++outer_;
  }

 private:
  // What lines depend on is held by value: as far as a compiler knows, each line that is written may change the problem.
  const void* const* tensors_;
  const std::int64_t* index_;
  std::int64_t items_, rows_in_, rows_out_, middles_;
  std::int64_t middle_, row_, outer_;
};

inline bool is_streamed(const PermuteProblem& problem, std::int64_t bytes_per_line) {
  return num_lines(problem) * bytes_per_line >= kStreamedBytes && bytes_per_line >= kLeastStreamedLine;
}

template <bool streamed>
void merge_fused_lines(const PermuteProblem& problem, const FusedLine& shape) {
  auto body = [&](std::int64_t begin, std::int64_t end) {
    FusedLine line = shape;
    LineSources<float> sources(problem, begin);
    for (std::int64_t i = 0; i < problem.num_models; ++i) line.next[i] = sources.of(i);
    for (std::int64_t l = begin; l < end; ++l) {
      sources.advance();
      for (std::int64_t i = 0; i < problem.num_models; ++i) {
        line.lines[i] = line.next[i];
        line.next[i] = l + 1 < end ? sources.of(i) : nullptr;
      }
      write_line<streamed>(line, static_cast<float*>(problem.out) + l * shape.items_out);
    }
    if (streamed) finish_streams();
  };
  parallel_for(problem.threads, num_lines(problem), 1 + kElementsPerThread / (1 + shape.items_out), body);
}

void merge_fused(const PermuteProblem& problem) {
  const bool in_place = problem.columns.kind == UnitMapKind::identity;
  const ColumnIndex columns = in_place ? ColumnIndex() : ColumnIndex(problem.columns, problem.inner, problem.num_models);
  const bool copied = is_copy(problem);
  float weights[kFusedModels];
  for (std::int64_t i = 0; i < problem.num_models; ++i) weights[i] = static_cast<float>(problem.weights[i]);
  FusedLine shape{problem.num_models, copied ? nullptr : weights, {}, {}, {},
                  problem.columns.units_in * problem.inner, problem.columns.units_out * problem.inner};
  for (std::int64_t i = 0; !in_place && i < problem.num_models; ++i) shape.index[i] = columns.first(i);
  if (is_streamed(problem, shape.items_out * 4)) {
    merge_fused_lines<true>(problem, shape);
  } else {
    merge_fused_lines<false>(problem, shape);
  }
}

// Halves whose columns are gathered: the lines of all models are widened in order, then summed as those of float32 are.
template <class T>
void merge_fused_halves(const PermuteProblem& problem) {
  const ColumnIndex columns(problem.columns, problem.inner, problem.num_models);
  float weights[kFusedModels];
  for (std::int64_t i = 0; i < problem.num_models; ++i) weights[i] = static_cast<float>(problem.weights[i]);
  FusedLine shape{problem.num_models, weights, {}, {}, {}, columns.items_in(), columns.items_out()};
  for (std::int64_t i = 0; i < problem.num_models; ++i) shape.index[i] = columns.first(i);
  const std::int64_t scratch_size = (problem.num_models * shape.items_in + shape.items_out + 15) / 16 * 16;
  Buffer<float> scratch(problem.threads * scratch_size);
  std::int64_t threads_started = 0;
  auto body = [&](std::int64_t begin, std::int64_t end) {
    const std::int64_t thread = __atomic_fetch_add(&threads_started, 1, __ATOMIC_RELAXED);
    float* const sums = scratch.data() + thread * scratch_size;
    float* const widened = sums + shape.items_out;
    FusedLine line = shape;
    for (std::int64_t i = 0; i < problem.num_models; ++i) line.lines[i] = widened + i * shape.items_in;
    LineSources<T> sources(problem, begin);
    for (std::int64_t l = begin; l < end; ++l, sources.advance()) {
      for (std::int64_t i = 0; i < problem.num_models; ++i) {
        assign_scaled(widened + i * shape.items_in, sources.of(i), 1.0f, shape.items_in);
      }
      write_line<true, true, false>(line, sums);
      store(static_cast<T*>(problem.out) + l * shape.items_out, sums, 1.0f, shape.items_out);
    }
  };
  parallel_for(problem.threads, num_lines(problem), 1 + kElementsPerThread / (1 + shape.items_out), body);
}

// ---- Pure gathers: copies of bits -----------------------------------------------------------------------------

template <class Bits>
void copy_indexed(Bits* __restrict to, const Bits* __restrict line, const std::int32_t* __restrict index,
                  std::int64_t count) {
  for (std::int64_t e = 0; e < count; ++e) to[e] = line[index[e]];
}

// Copies runs of at least `vector` bytes and at most two of them as two vectors, which overlap.
template <std::size_t vector, class Index>
void copy_as_two(char* to, const char* from, const Index* index, std::size_t run, std::int64_t count) {
  for (std::int64_t k = 0; k < count; ++k, to += run) {
    const char* const begin = from + static_cast<std::size_t>(index[k]) * run;
    char head[vector], tail[vector];
    std::memcpy(head, begin, vector);
    std::memcpy(tail, begin + run - vector, vector);
    std::memcpy(to, head, vector);
    std::memcpy(to + run - vector, tail, vector);
  }
}

// Copies run index[k] of `from` to run k of `to`; a run is `run` bytes.
template <class Index>
void copy_runs(char* to, const char* from, const Index* index, std::size_t run, std::int64_t count) {
  if (run >= 8 && run <= 16) return copy_as_two<8>(to, from, index, run, count);
  if (run >= 16 && run <= 32) return copy_as_two<16>(to, from, index, run, count);
  if (run >= 32 && run <= 64) return copy_as_two<32>(to, from, index, run, count);
  if (run >= 64 && run <= 128) return copy_as_two<64>(to, from, index, run, count);
  if (run >= 128 && run <= 256) return copy_as_two<128>(to, from, index, run, count);
  for (std::int64_t k = 0; k < count; ++k) {
    std::memcpy(to + static_cast<std::size_t>(k) * run, from + static_cast<std::size_t>(index[k]) * run, run);
  }
}

// Copies a line past the caches, and fetches the one that is copied next.
inline void stream_line(char* to, const char* from, const char* next, std::int64_t bytes) {
  constexpr std::int64_t kVector = sizeof(Lanes);
  const auto stream = [&](std::int64_t at) {
    Lanes lanes;
    std::memcpy(&lanes, from + at, sizeof lanes);
    stream_lanes(reinterpret_cast<float*>(to + at), lanes);
  };
  // Where a line begins and ends within a vector, only its own bytes: to write again what was streamed would fetch it.
  std::int64_t at = -static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(to)) & (kVector - 1);
  std::memcpy(to, from, static_cast<std::size_t>(at));
  for (; at + 4 * kVector <= bytes; at += 4 * kVector) {
    for (std::int64_t ahead = 0; ahead < 4 * kVector; ahead += 64) __builtin_prefetch(next + at + ahead);
    for (std::int64_t v = 0; v < 4; ++v) stream(at + v * kVector);
  }
  for (; at + kVector <= bytes; at += kVector) stream(at);
  std::memcpy(to + at, from + at, static_cast<std::size_t>(bytes - at));
}

// The same as copy_runs, past the caches; no index is the identity.
inline void stream_runs(char* to, const char* from, const std::int64_t* index, std::int64_t run, std::int64_t count) {
  const auto line = [&](std::int64_t k) { return from + (index == nullptr ? k : index[k]) * run; };
  for (std::int64_t k = 0; k < count; ++k) stream_line(to + k * run, line(k), line(k + 1 < count ? k + 1 : k), run);
  finish_streams();
}

// Rows of [outer, rows, bytes].
void copy_rows(const PermuteProblem& problem, std::int64_t bytes) {
  const std::int64_t* const index = problem.rows.kind == UnitMapKind::gather ? problem.rows.index : nullptr;
  const std::int64_t rows_in = problem.rows.units_in, rows_out = problem.rows.units_out;
  const bool streamed = is_streamed(problem, bytes);
  auto body = [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t l = begin; l < end;) {
      const std::int64_t outer = l / rows_out, row = l % rows_out;
      const std::int64_t count = rows_out - row < end - l ? rows_out - row : end - l;
      char* const to = static_cast<char*>(problem.out) + l * bytes;
      const char* const slice = static_cast<const char*>(problem.tensors[0]) + outer * rows_in * bytes;
      const char* const from = index == nullptr ? slice + row * bytes : slice;
      if (streamed) {
        stream_runs(to, from, index == nullptr ? nullptr : index + row, bytes, count);
      } else if (index == nullptr) {
        std::memcpy(to, from, static_cast<std::size_t>(count * bytes));
      } else {
        copy_runs(to, from, index + row, static_cast<std::size_t>(bytes), count);
      }
      l += count;
    }
  };
  parallel_for(problem.threads, num_lines(problem), 1 + kElementsPerThread / (1 + bytes / 4), body);
}

template <class Bits>
void copy_columns(const PermuteProblem& problem) {
  const ColumnIndex columns(problem.columns, problem.inner, 1, kShortCopy / static_cast<std::int64_t>(sizeof(Bits)));
  const std::size_t run = static_cast<std::size_t>(columns.run()) * sizeof(Bits);
  const std::int64_t line_out = problem.columns.units_out * problem.inner;
  auto body = [&](std::int64_t begin, std::int64_t end) {
    LineSources<Bits> sources(problem, begin);
    for (std::int64_t l = begin; l < end; ++l, sources.advance()) {
      Bits* const to = static_cast<Bits*>(problem.out) + l * line_out;
      if (columns.run() == 1) {
        copy_indexed(to, sources.of(0), columns.first(0), line_out);
      } else {
        copy_runs(reinterpret_cast<char*>(to), reinterpret_cast<const char*>(sources.of(0)), columns.first(0), run,
                  columns.items_out());
      }
    }
  };
  parallel_for(problem.threads, num_lines(problem), 1 + kElementsPerThread / (1 + line_out), body);
}

template <class Bits>
void copy_gathered(const PermuteProblem& problem) {
  if (problem.columns.kind != UnitMapKind::identity) {
    copy_columns<Bits>(problem);
  } else {
    copy_rows(problem, problem.columns.units_in * problem.inner * static_cast<std::int64_t>(sizeof(Bits)));
  }
}

template <class T, class Bits>
void run(const PermuteProblem& problem) {
  if (is_copy(problem)) {
    copy_gathered<Bits>(problem);
  } else if (problem.columns.kind == UnitMapKind::identity) {
    Merge<T>(problem).run_rows();
  } else {
    Merge<T>(problem).run_columns();
  }
}

template <class T, class Bits>
void run_halves(const PermuteProblem& problem) {
  if (!is_copy(problem) && is_fused(problem) && problem.columns.kind == UnitMapKind::gather) {
    merge_fused_halves<T>(problem);
  } else {
    run<T, Bits>(problem);
  }
}

// ---- In place --------------------------------------------------------------------------------------------------

// The lines of one tensor, in the order in which they can move: along the cycles of the row permutation, cycle after
// cycle, the same in every slice (outer, middle). Line k of the order takes what line k + 1 held; the last of a cycle
// takes the first. Threads move disjoint runs of this order. What a run needs of lines that other runs overwrite, the
// first line of the next run and the first of the cycle that its own beginning lies in, is saved before any starts.
template <class Bits>
class MoveInPlace {
 public:
  explicit MoveInPlace(const PermuteProblem& problem)
      : problem_(problem),
        columns_(problem.columns.kind == UnitMapKind::gather ? ColumnIndex(problem.columns, problem.inner, 1)
                                                             : ColumnIndex()),
        line_(problem.columns.units_in * problem.inner),
        rows_(problem.rows.units_in),
        order_(rows_),
        start_(rows_) {
    follow_cycles();
  }

  void run() const {
    const std::int64_t lines = problem_.outer * problem_.middle * rows_;
    const std::int64_t grain = 1 + kElementsPerThread / (1 + line_);
    const std::int64_t most = (lines + grain - 1) / grain;
    const std::int64_t runs = most < problem_.threads ? most : problem_.threads;
    const auto bound = [&](std::int64_t run) { return lines / runs * run + (lines % runs < run ? lines % runs : run); };
    // Of each run: its first line, the first of that line's cycle, the first of the cycle it is in.
    Buffer<Bits> saved((runs + 1) * 3 * line_);
    const auto scratch = [&](std::int64_t run, std::int64_t which) { return saved.data() + (run * 3 + which) * line_; };
    for (std::int64_t run = 0; run < runs; ++run) {
      copy(scratch(run, 0), address(bound(run)));
      copy(scratch(run, 1), address(first_of_cycle(bound(run))));
    }
    auto body = [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t run = begin; run < end; ++run) {
        move(bound(run), bound(run + 1), scratch(run + 1, 0), scratch(run, 1), scratch(run, 2));
      }
    };
    parallel_for(problem_.threads, runs, 1, body);
  }

 private:
  void follow_cycles() {
    Buffer<std::uint8_t> done(rows_, 0);
    std::int64_t count = 0;
    for (std::int64_t first = 0; first < rows_; ++first) {
      if (done[first]) continue;
      const std::int64_t begin = count;
      std::int64_t row = first;
      do {
        done[row] = 1;
        order_[count] = row;
        start_[count++] = begin;
        row = problem_.rows.kind == UnitMapKind::gather ? problem_.rows.index[row] : row;
      } while (row != first);
    }
  }

  // The first place of the cycle that place k of the whole order is in.
  std::int64_t first_of_cycle(std::int64_t k) const { return k / rows_ * rows_ + start_[k % rows_]; }

  bool ends_cycle(std::int64_t k) const {
    const std::int64_t within = k % rows_;
    return within + 1 == rows_ || start_[within + 1] == within + 1;
  }

  Bits* address(std::int64_t k) const {
    const std::int64_t slice = k / rows_, o = slice / problem_.middle, m = slice % problem_.middle;
    return static_cast<Bits*>(problem_.out) + ((o * rows_ + order_[k % rows_]) * problem_.middle + m) * line_;
  }

  void copy(Bits* to, const Bits* from) const { std::memcpy(to, from, static_cast<std::size_t>(line_) * sizeof(Bits)); }

  void move(std::int64_t begin, std::int64_t end, const Bits* next_run, const Bits* cycle_before, Bits* cycle) const {
    for (std::int64_t k = begin; k < end; ++k) {
      const std::int64_t first = first_of_cycle(k);
      if (first == k) copy(cycle, address(k));
      if (ends_cycle(k)) {
        write(address(k), first < begin ? cycle_before : cycle);
      } else {
        write(address(k), k + 1 == end ? next_run : address(k + 1));
      }
    }
  }

  void write(Bits* to, const Bits* from) const {
    const std::int64_t run = columns_.run();
    if (columns_.items_out() == 0) {
      copy(to, from);
    } else if (run == 1) {
      const std::int32_t* const index = columns_.first(0);
      for (std::int64_t e = 0; e < line_; ++e) to[e] = from[index[e]];
    } else {
      for (std::int64_t k = 0; k < columns_.items_out(); ++k) {
        std::memcpy(to + k * run, from + columns_.first(0)[k] * run, static_cast<std::size_t>(run) * sizeof(Bits));
      }
    }
  }

  const PermuteProblem& problem_;
  ColumnIndex columns_;
  std::int64_t line_;
  std::int64_t rows_;
  Buffer<std::int64_t> order_;
  Buffer<std::int64_t> start_;
};

std::int64_t bytes_of(ScalarType dtype) {
  return dtype == ScalarType::float64 ? 8 : dtype == ScalarType::float32 ? 4 : 2;
}

}  // namespace

void permute_merge(const PermuteProblem& problem) {
  const bool empty = problem.outer == 0 || problem.rows.units_out == 0 || problem.middle == 0 ||
                     problem.columns.units_out == 0 || problem.inner == 0;
  if (empty) return;
  const bool is_float = problem.dtype == ScalarType::float32;
  if (problem.out_is_new) {
    const std::int64_t lines = problem.outer * problem.rows.units_out * problem.middle;
    prefer_huge_pages(problem.out, lines * problem.columns.units_out * problem.inner * bytes_of(problem.dtype));
  }
  if (is_float && is_fused(problem) && !is_copy_of_runs(problem)) return merge_fused(problem);
  switch (problem.dtype) {
    case ScalarType::float16: return run_halves<Half, std::uint16_t>(problem);
    case ScalarType::bfloat16: return run_halves<BFloat16, std::uint16_t>(problem);
    case ScalarType::float32: return run<float, std::uint32_t>(problem);
    case ScalarType::float64: return run<double, std::uint64_t>(problem);
  }
}

void permute_in_place(const PermuteProblem& problem) {
  if (problem.outer * problem.rows.units_in * problem.middle * problem.columns.units_in * problem.inner == 0) return;
  switch (bytes_of(problem.dtype)) {
    case 2: return MoveInPlace<std::uint16_t>(problem).run();
    case 4: return MoveInPlace<std::uint32_t>(problem).run();
    default: return MoveInPlace<std::uint64_t>(problem).run();
  }
}

}  // namespace mudsc::MUDSC_ISA
