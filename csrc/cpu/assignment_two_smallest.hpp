// The two smallest reduced costs of a list, which every bid looks for.
//
// A loop over entries guesses most of its branches wrong, so each lane of a vector finds its own two smallest first.
// All levels find the same entries.
#pragma once

#include "assignment_vectors.hpp"

namespace mudsc::MUDSC_ISA {
namespace {

// One vector of `costs[k] - v[columns[k]]`; infinite in lanes from `count` on, which are not read.
#if defined(__AVX512F__)
inline __m512d costs_in(__mmask8 lanes, const double* costs) { return _mm512_maskz_loadu_pd(lanes, costs); }
inline __m512d costs_in(__mmask8 lanes, const float* costs) {
  return _mm512_maskz_cvtps_pd(lanes, _mm256_maskz_loadu_ps(lanes, costs));
}
template <class Cost>
inline Lanes reduced_costs(const Cost* costs, const std::int32_t* columns, std::int64_t count, const double* v) {
  const __mmask8 lanes = static_cast<__mmask8>(count >= kLanes ? 0xff : (1 << count) - 1);
  const __m512d infinite = _mm512_set1_pd(kInfinity);
  const __m256i places = _mm256_maskz_loadu_epi32(lanes, columns);
  const __m512d duals = _mm512_mask_i32gather_pd(infinite, lanes, places, v, sizeof(double));
  return reinterpret_cast<Lanes>(_mm512_mask_sub_pd(infinite, lanes, costs_in(lanes, costs), duals));
}
#elif defined(__AVX2__)
inline __m256d costs_in(__m256i lanes, __m128i, const double* costs) { return _mm256_maskload_pd(costs, lanes); }
inline __m256d costs_in(__m256i, __m128i lanes, const float* costs) {
  return _mm256_cvtps_pd(_mm_maskload_ps(costs, lanes));
}
template <class Cost>
inline Lanes reduced_costs(const Cost* costs, const std::int32_t* columns, std::int64_t count, const double* v) {
  const __m128i lanes = _mm_cmpgt_epi32(_mm_set1_epi32(static_cast<int>(count)), _mm_set_epi32(3, 2, 1, 0));
  const __m256i wide_lanes = _mm256_cvtepi32_epi64(lanes);
  const __m256d infinite = _mm256_set1_pd(kInfinity), wanted = _mm256_castsi256_pd(wide_lanes);
  const __m128i places = _mm_maskload_epi32(columns, lanes);
  const __m256d duals = _mm256_mask_i32gather_pd(infinite, v, places, wanted, sizeof(double));
  const __m256d reduced = _mm256_sub_pd(costs_in(wide_lanes, lanes, costs), duals);
  return reinterpret_cast<Lanes>(_mm256_blendv_pd(infinite, reduced, wanted));
}
#endif

// Finds the two smallest of `count` reduced costs `costs[k] - v[columns[k]]`, which must not be infinite. Returns the
// place of the smallest, the first of those that tie; -1 if there is none.
template <class Cost>
inline std::int64_t two_smallest(const Cost* costs, const std::int32_t* columns, std::int64_t count, const double* v,
                                 double& first, double& second) {
  first = second = kInfinity;
  if (count == 0) return -1;
#if defined(__AVX2__)
  const Lanes infinite = kInfinity - Lanes{};
  Lanes firsts = infinite, seconds = infinite, places = infinite, place;  // places are whole numbers
  for (std::int64_t k = 0; k < kLanes; ++k) place[k] = static_cast<double>(k);
  for (std::int64_t k = 0; k < count; k += kLanes) {
    const Lanes reduced = reduced_costs(costs + k, columns + k, count - k, v);
    places = reduced < firsts ? place : places;
    seconds = minimum(seconds, maximum(firsts, reduced));
    firsts = minimum(firsts, reduced);
    place += static_cast<double>(kLanes);
  }
  const Lanes least = broadcast_min(firsts), found = broadcast_min(firsts == least ? places : infinite);
  first = least[0];
  second = broadcast_min(places == found ? seconds : firsts)[0];
  return static_cast<std::int64_t>(found[0]);
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
