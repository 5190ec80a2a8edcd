// The two smallest reduced costs of a list, which every bid looks for.
//
// A loop over entries guesses most of its branches wrong, so each lane of a vector finds its own two smallest first.
// All levels find the same entries.
#pragma once

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "kernel.hpp"

namespace mudsc::MUDSC_ISA {
namespace {

#if defined(__AVX512F__)

inline __m512d costs_of(__mmask8 lanes, const double* costs) { return _mm512_maskz_loadu_pd(lanes, costs); }
inline __m512d costs_of(__mmask8 lanes, const float* costs) {
  return _mm512_maskz_cvtps_pd(lanes, _mm512_castps512_ps256(_mm512_maskz_loadu_ps(lanes, costs)));
}

#elif defined(__AVX2__)

// All bits of lane k are set if k < `count`.
inline __m256i first_lanes(std::int64_t count) {
  return _mm256_cmpgt_epi64(_mm256_set1_epi64x(count), _mm256_set_epi64x(3, 2, 1, 0));
}
inline __m128i narrowed(__m256i lanes) {
  const __m256i even = _mm256_permutevar8x32_epi32(lanes, _mm256_set_epi32(7, 5, 3, 1, 6, 4, 2, 0));
  return _mm256_castsi256_si128(even);
}
inline __m256d costs_of(__m256i lanes, const double* costs) { return _mm256_maskload_pd(costs, lanes); }
inline __m256d costs_of(__m256i lanes, const float* costs) {
  return _mm256_cvtps_pd(_mm_maskload_ps(costs, narrowed(lanes)));
}

#endif

// Finds the two smallest of `costs[k] - v[columns[k]]`. Returns the place of the smallest, the first of those that tie;
// -1 if none is finite.
template <class Cost>
inline std::int64_t two_smallest(const Cost* costs, const std::int32_t* columns, std::int64_t count, const double* v,
                                 double& first, double& second) {
  constexpr double kInfinite = __builtin_huge_val();
  first = second = kInfinite;
#if defined(__AVX512F__)
  const __m512d infinite = _mm512_set1_pd(kInfinite);
  __m512d firsts = infinite, seconds = infinite;
  __m512i places = _mm512_set1_epi64(-1), place = _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0);
  for (std::int64_t k = 0; k < count; k += 8) {
    const __mmask8 lanes = static_cast<__mmask8>(count - k >= 8 ? 0xff : (1 << (count - k)) - 1);
    const __m256i index = _mm512_castsi512_si256(_mm512_maskz_loadu_epi32(lanes, columns + k));
    const __m512d duals = _mm512_mask_i32gather_pd(infinite, lanes, index, v, sizeof(double));
    const __m512d reduced = _mm512_mask_sub_pd(infinite, lanes, costs_of(lanes, costs + k), duals);
    places = _mm512_mask_mov_epi64(places, _mm512_cmp_pd_mask(reduced, firsts, _CMP_LT_OQ), place);
    seconds = _mm512_min_pd(seconds, _mm512_max_pd(firsts, reduced));
    firsts = _mm512_min_pd(firsts, reduced);
    place = _mm512_add_epi64(place, _mm512_set1_epi64(8));
  }
  first = _mm512_reduce_min_pd(firsts);
  const __mmask8 ties = _mm512_cmp_pd_mask(firsts, _mm512_set1_pd(first), _CMP_EQ_OQ);
  const std::int64_t found = static_cast<std::int64_t>(_mm512_mask_reduce_min_epu64(ties, places));
  const __mmask8 lane = _mm512_mask_cmpeq_epi64_mask(ties, places, _mm512_set1_epi64(found));
  second = _mm512_reduce_min_pd(_mm512_mask_mov_pd(firsts, lane, seconds));
  return found;
#elif defined(__AVX2__)
  const __m256d infinite = _mm256_set1_pd(kInfinite);
  __m256d firsts = infinite, seconds = infinite;
  __m256i places = _mm256_set1_epi64x(-1), place = _mm256_set_epi64x(3, 2, 1, 0);
  for (std::int64_t k = 0; k < count; k += 4) {
    const __m256i lanes = first_lanes(count - k);
    const __m256d wanted = _mm256_castsi256_pd(lanes);
    const __m128i index = _mm_maskload_epi32(columns + k, narrowed(lanes));
    const __m256d duals = _mm256_mask_i32gather_pd(infinite, v, index, wanted, sizeof(double));
    const __m256d reduced = _mm256_blendv_pd(infinite, _mm256_sub_pd(costs_of(lanes, costs + k), duals), wanted);
    const __m256i lower = _mm256_castpd_si256(_mm256_cmp_pd(reduced, firsts, _CMP_LT_OQ));
    places = _mm256_blendv_epi8(places, place, lower);
    seconds = _mm256_min_pd(seconds, _mm256_max_pd(firsts, reduced));
    firsts = _mm256_min_pd(firsts, reduced);
    place = _mm256_add_epi64(place, _mm256_set1_epi64x(4));
  }
  std::int64_t found = -1;
  int lane = 0;
  for (int k = 0; k < 4; ++k) {
    const std::int64_t at = places[k];
    if (firsts[k] < first || (firsts[k] == first && at < found)) {
      first = firsts[k];
      found = at;
      lane = k;
    }
  }
  for (int k = 0; k < 4; ++k) {
    const double other = k == lane ? seconds[k] : firsts[k];
    second = other < second ? other : second;
  }
  return found;
#else
  std::int64_t found = -1;
  for (std::int64_t k = 0; k < count; ++k) {
    const double reduced = static_cast<double>(costs[k]) - v[columns[k]];
    if (reduced < second) {
      if (reduced < first) {
        second = first;
        first = reduced;
        found = k;
      } else {
        second = reduced;
      }
    }
  }
  return found;
#endif
}

}  // namespace
}  // namespace mudsc::MUDSC_ISA
