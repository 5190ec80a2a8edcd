// Vectors of doubles of the width of the instruction level, for the dense solver.
#pragma once

#include "assignment_state.hpp"

namespace mudsc::MUDSC_ISA {
namespace {

// One vector of costs as doubles. Intrinsics, because compilers split the conversion into lanes.
inline Lanes widened(const double* costs) { return *reinterpret_cast<const Lanes*>(costs); }
inline Lanes widened(const float* costs) {
#if defined(__AVX512F__)
  return reinterpret_cast<Lanes>(_mm512_maskz_cvtps_pd(0xff, _mm256_load_ps(costs)));
#elif defined(__AVX2__)
  return reinterpret_cast<Lanes>(_mm256_cvtps_pd(_mm_load_ps(costs)));
#elif defined(__SSE2__)
  const __m128i narrow = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(costs));
  return reinterpret_cast<Lanes>(_mm_cvtps_pd(_mm_castsi128_ps(narrow)));
#else
  typedef float Narrow __attribute__((vector_size(kLanes * sizeof(float)), may_alias));
  return __builtin_convertvector(*reinterpret_cast<const Narrow*>(costs), Lanes);
#endif
}

// Bit k is set if lane k is at most `bound`.
inline std::uint64_t lanes_at_most(const Lanes& values, double bound) {
#if defined(__AVX512F__)
  return _mm512_cmp_pd_mask(reinterpret_cast<__m512d>(values), _mm512_set1_pd(bound), _CMP_LE_OQ);
#elif defined(__AVX2__)
  const __m256d passed = _mm256_cmp_pd(reinterpret_cast<__m256d>(values), _mm256_set1_pd(bound), _CMP_LE_OQ);
  return static_cast<std::uint64_t>(_mm256_movemask_pd(passed));
#elif defined(__SSE2__)
  const __m128d passed = _mm_cmple_pd(reinterpret_cast<__m128d>(values), _mm_set1_pd(bound));
  return static_cast<std::uint64_t>(_mm_movemask_pd(passed));
#else
  std::uint64_t bits = 0;
  for (std::int64_t k = 0; k < kLanes; ++k) bits |= static_cast<std::uint64_t>(values[k] <= bound) << k;
  return bits;
#endif
}

// Minimum of each lane. Intrinsics, because compilers make three dependent instructions of compare and select.
inline Lanes minimum(const Lanes& a, const Lanes& b) {
#if defined(__AVX512F__)
  return reinterpret_cast<Lanes>(_mm512_maskz_min_pd(0xff, reinterpret_cast<__m512d>(a), reinterpret_cast<__m512d>(b)));
#elif defined(__AVX2__)
  return reinterpret_cast<Lanes>(_mm256_min_pd(reinterpret_cast<__m256d>(a), reinterpret_cast<__m256d>(b)));
#elif defined(__SSE2__)
  return reinterpret_cast<Lanes>(_mm_min_pd(reinterpret_cast<__m128d>(a), reinterpret_cast<__m128d>(b)));
#else
  return a < b ? a : b;
#endif
}
inline Lanes maximum(const Lanes& a, const Lanes& b) {
#if defined(__AVX512F__)
  return reinterpret_cast<Lanes>(_mm512_maskz_max_pd(0xff, reinterpret_cast<__m512d>(a), reinterpret_cast<__m512d>(b)));
#elif defined(__AVX2__)
  return reinterpret_cast<Lanes>(_mm256_max_pd(reinterpret_cast<__m256d>(a), reinterpret_cast<__m256d>(b)));
#elif defined(__SSE2__)
  return reinterpret_cast<Lanes>(_mm_max_pd(reinterpret_cast<__m128d>(a), reinterpret_cast<__m128d>(b)));
#else
  return a > b ? a : b;
#endif
}

// The minimum over all lanes, in every lane.
inline Lanes broadcast_min(Lanes values) {
  for (std::int64_t step = kLanes / 2; step > 0; step /= 2) {
#if defined(__clang__)
    Lanes other;
    for (std::int64_t k = 0; k < kLanes; ++k) other[k] = values[k ^ step];
#else
    typedef std::int64_t Order __attribute__((vector_size(kLanes * sizeof(std::int64_t))));
    Order order;
    for (std::int64_t k = 0; k < kLanes; ++k) order[k] = k;
    const Lanes other = __builtin_shuffle(values, order ^ step);
#endif
    values = minimum(values, other);
  }
  return values;
}

// Writes one entry of an array of whole vectors. Stores a whole vector, because a vector load after a scalar store
// would stall.
inline void set_entry(double* array, std::int64_t index, double value) {
  typedef std::int64_t Order __attribute__((vector_size(kLanes * sizeof(std::int64_t))));
  Order order;
  for (std::int64_t k = 0; k < kLanes; ++k) order[k] = k;
  const std::int64_t lane = index & (kLanes - 1);
  Lanes& lanes = *reinterpret_cast<Lanes*>(array + index - lane);
  lanes = order == lane ? value - Lanes{} : lanes;
}

}  // namespace
}  // namespace mudsc::MUDSC_ISA
