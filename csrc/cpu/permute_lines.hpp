// Loops over the entries of one line, in vectors: contiguous and indexed sums, and the sum of a line of each model that
// is written once.
#pragma once

#include "permute_index.hpp"

#if defined(__SSE__)
#include <immintrin.h>
#endif

namespace mudsc::MUDSC_ISA {
namespace {

// Maximum number of models whose sums stay in registers.
constexpr std::int64_t kFusedModels = 8;

// ---- Vectors of float32 bits ----------------------------------------------------------------------------------

constexpr std::int64_t kLanes = kVectorBytes / static_cast<std::int64_t>(sizeof(float));
typedef float Lanes __attribute__((vector_size(kVectorBytes)));
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

// The processor's own conversions if it has them. They keep NaN payloads, so NaN is replaced by that of `narrow`.
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

// Copies kLanes entries of 16 bits of a line of at least two. Gathers read four bytes, so the last entry of the line is
// read as the upper half of the four bytes that end with it.
inline void gather_halves(std::uint16_t* to, const std::uint16_t* line, const std::int32_t* index,
                          std::int64_t items_in) {
#if defined(__AVX512F__)
  const __m512i places = _mm512_loadu_si512(index);
  const __m512i last = _mm512_set1_epi32(static_cast<std::int32_t>(items_in - 1));
  const __mmask16 is_last = _mm512_cmpeq_epi32_mask(places, last);
  const __m512i starts = _mm512_mask_add_epi32(places, is_last, places, _mm512_set1_epi32(-1));
  const __m512i pairs = _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), 0xffff, starts, line, 2);
  const __m512i entries = _mm512_mask_srli_epi32(pairs, is_last, pairs, 16);
  const HalfLanes halves = __builtin_convertvector(reinterpret_cast<LaneBits>(entries), HalfLanes);
  std::memcpy(to, &halves, sizeof halves);
#else
  static_cast<void>(items_in);
  for (std::int64_t v = 0; v < kLanes; ++v) to[v] = line[index[v]];
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

// Number of entries before the first vector that may be streamed.
inline std::int64_t entries_to_alignment(const float* to) {
  const std::uintptr_t beyond = reinterpret_cast<std::uintptr_t>(to) % sizeof(Lanes);
  return beyond == 0 ? 0 : static_cast<std::int64_t>((sizeof(Lanes) - beyond) / sizeof(float));
}

// One output line as the sum of one input line of each model. Unused members are null.
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

// Writes only entries [first, first + count) of the vector at `at`: rewriting streamed entries would fetch them from
// memory.
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
  // A line begins where the previous one ended. Entries before the first and after the last full vector are part of
  // vectors that overlap others.
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
void add_indexed(Accumulator* __restrict to, const Accumulator* __restrict line, const std::int32_t* __restrict index,
                 Accumulator weight, std::int64_t count) {
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
  const ColumnIndex::Extra* const end = columns.extras_end(model);
  if (run == 1) {
    add_indexed(to, line, columns.first(model), weight, columns.items_out());
    for (const ColumnIndex::Extra* e = columns.extras_begin(model); e != end; ++e) to[e->to] += weight * line[e->from];
    return;
  }
  add_runs(to, line, columns, model, weight);
  for (const ColumnIndex::Extra* e = columns.extras_begin(model); e != end; ++e) {
    add_scaled(to + e->to * run, line + e->from * run, weight, run);
  }
}

}  // namespace
}  // namespace mudsc::MUDSC_ISA
