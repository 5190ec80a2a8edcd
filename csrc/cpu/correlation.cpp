// The passes before and after the matrix product of a correlation. The product itself is torch's.
//
// center_features: x - mean(x) in float32 (float64 on request), NaN as 0, with sums in double. Features are read in
// their own layout and dtype, in the order given by the sample indices, so no gathered copy is made; only the centered
// copy is written. Unit-major: a tile of units at a time is read once and centered in cache. Sample-major: the features
// are read twice. If samples are sums of several (clusters), the sums are computed while reading and rounded like a
// stored copy; sample-major, they are read back from where they were written. Threads take disjoint units.
//
// accumulate_comoment: one read of the product, one read and write of the double co-moments. Threads take rows.
//
// correlate: one read of the co-moments, and of the similarity to blend with, one write of the result; its mirror image
// is written from the same tile.
// Threads take rows of tiles.
//
// No sum is split between threads, so results do not depend on their number.
#include "mudsc/correlation.hpp"

#include "kernel.hpp"
#include "mudsc/threads.hpp"

namespace mudsc::MUDSC_ISA {
namespace {

// Number of units that are read together: neighbors share cache lines if a unit's runs are short.
constexpr std::int64_t kUnitTile = 16;
// Number of independent partial sums per unit, so that additions overlap and vectorize.
constexpr std::int64_t kLanes = 16;
constexpr std::int64_t kTile = 32;
// Minimum number of elements worth starting a thread for.
constexpr std::int64_t kElementsPerThread = 1 << 18;

// NaN as 0.
inline float or_zero(float value) {
  const std::uint32_t bits = float_to_bits(value);
  return bits_to_float(chosen((bits & 0x7fffffffu) <= 0x7f800000u, bits, 0u));
}
inline double or_zero(double value) {
  std::uint64_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  bits = chosen((bits & 0x7fffffffffffffffu) <= 0x7ff0000000000000u, bits, std::uint64_t{0});
  std::memcpy(&value, &bits, sizeof bits);
  return value;
}
// Converts to the type in which the sums are computed: float32 to float64 is exact.
template <class Out, class T>
Out number_of(T value) {
  return static_cast<Out>(or_zero(widen(value)));
}

inline double sum_of(const double (&lanes)[kLanes]) {
  double total = 0;
  for (std::int64_t k = 0; k < kLanes; ++k) total += lanes[k];
  return total;
}

template <class Out>
double sum_of_row(const Out* row, std::int64_t count) {
  double lanes[kLanes] = {};
  std::int64_t e = 0;
  for (; e + kLanes <= count; e += kLanes) {
    for (std::int64_t k = 0; k < kLanes; ++k) lanes[k] += static_cast<double>(row[e + k]);
  }
  for (std::int64_t k = 0; e < count; ++e, ++k) lanes[k] += static_cast<double>(row[e]);
  return sum_of(lanes);
}

// Subtracts the mean and returns the sum of squares of the remainder.
template <class Out>
double center_row(Out* row, double mean, std::int64_t count) {
  double lanes[kLanes] = {};
  std::int64_t e = 0;
  for (; e + kLanes <= count; e += kLanes) {
    for (std::int64_t k = 0; k < kLanes; ++k) {
      const Out value = static_cast<Out>(static_cast<double>(row[e + k]) - mean);
      row[e + k] = value;
      lanes[k] += static_cast<double>(value) * static_cast<double>(value);
    }
  }
  for (std::int64_t k = 0; e < count; ++e, ++k) {
    row[e] = static_cast<Out>(static_cast<double>(row[e]) - mean);
    lanes[k] += static_cast<double>(row[e]) * static_cast<double>(row[e]);
  }
  return sum_of(lanes);
}

template <class T, class Out>
void read_run(Out* __restrict to, const T* __restrict from, std::int64_t stride, std::int64_t count) {
  if (stride == 1) {
    for (std::int64_t e = 0; e < count; ++e) to[e] = number_of<Out>(from[e]);
  } else {
    for (std::int64_t e = 0; e < count; ++e) to[e] = number_of<Out>(from[e * stride]);
  }
}

// Sample index[e] at position e. The same part of the next run is prefetched, because the processor sees no pattern.
template <class T, class Out>
void read_indexed(Out* __restrict to, const T* __restrict from, std::int64_t stride,
                  const std::int32_t* __restrict index, std::int64_t count, const T* next) {
  for (std::int64_t e = 0; e < count; e += kLanes) {
    const std::int64_t last = e + kLanes < count ? e + kLanes : count;
    __builtin_prefetch(next + e * stride);
    for (std::int64_t k = e; k < last; ++k) to[k] = number_of<Out>(from[index[k] * stride]);
  }
}

// Without clusters.
inline std::int64_t place(const SampleOrder& order, std::int64_t at) {
  return order.members == nullptr ? at : order.members[at];
}

// ---- Samples that are sums of several members -------------------------------------------------------------------

template <class T>
using SumOf = typename ArithmeticOf<T>::type;

// A sum, rounded to the type of the features.
template <class Out, class T>
Out number_of_sum(SumOf<T> sum) {
  T rounded;
  narrow(sum, rounded);
  return number_of<Out>(rounded);
}

template <bool kFirst, class T>
void add_run(SumOf<T>* __restrict sums, const T* __restrict from, std::int64_t stride, std::int64_t count) {
  if (stride == 1) {
    for (std::int64_t e = 0; e < count; ++e) sums[e] = kFirst ? widen(from[e]) : sums[e] + widen(from[e]);
  } else {
    for (std::int64_t e = 0; e < count; ++e) {
      sums[e] = kFirst ? widen(from[e * stride]) : sums[e] + widen(from[e * stride]);
    }
  }
}

// The samples of an axis that are sums, for one call. An indexed pass reads the first member of every sum; the other
// members, few in practice, are added one by one.
template <class T>
class Clusters {
 public:
  using Sum = SumOf<T>;

  Clusters() = default;
  Clusters(const SampleOrder& order, std::int64_t samples)
      : order_(order), samples_(samples), first_(samples, 0), factor_(samples) {
    std::int64_t extras = 0;
    for (std::int64_t k = 0; k < samples; ++k) extras += members_of(k) > 1 ? members_of(k) - 1 : 0;
    extras_ = Buffer<Extra>(extras);
    extras = 0;
    for (std::int64_t k = 0; k < samples; ++k) {
      const std::int32_t begin = order.starts[k], end = order.starts[k + 1];
      // For an empty sum, some member is read and multiplied by zero.
      if (begin < end) first_[k] = order.members[begin];
      factor_[k] = begin == end ? Sum(0) : order.scale == nullptr ? Sum(1) : static_cast<Sum>(order.scale[k]);
      for (std::int32_t e = begin + 1; e < end; ++e) {
        extras_[extras++] = Extra{order.members[e], static_cast<std::int32_t>(k)};
      }
    }
  }

  // Writes the sums of a run along this axis to `to`, and prefetches the same part of the next run.
  template <class Out>
  void sum_along(Out* __restrict to, Sum* __restrict sums, const T* __restrict from, std::int64_t stride,
                 const T* next) const {
    const std::int32_t* const __restrict first = first_.data();
    const Sum* const __restrict factor = factor_.data();
    for (std::int64_t e = 0; e < samples_; e += kLanes) {
      const std::int64_t last = e + kLanes < samples_ ? e + kLanes : samples_;
      __builtin_prefetch(next + e * stride);
      for (std::int64_t k = e; k < last; ++k) sums[k] = widen(from[first[k] * stride]);
    }
    for (const Extra* e = extras_.data(); e != extras_.data() + extras_.size(); ++e) {
      sums[e->to] += widen(from[e->from * stride]);
    }
    for (std::int64_t k = 0; k < samples_; ++k) to[k] = number_of_sum<Out, T>(sums[k] * factor[k]);
  }

  // Writes the sums of sample k, along a run across this axis, to `sums`. Its members are `member_stride` apart.
  void sum_across(Sum* __restrict sums, std::int64_t k, const T* from, std::int64_t member_stride, std::int64_t stride,
                  std::int64_t count) const {
    add_run<true>(sums, from + first_[k] * member_stride, stride, count);
    for (std::int32_t e = order_.starts[k] + 1; e < order_.starts[k + 1]; ++e) {
      add_run<false>(sums, from + order_.members[e] * member_stride, stride, count);
    }
    const Sum factor = factor_[k];
    for (std::int64_t e = 0; e < count; ++e) sums[e] *= factor;
  }

 private:
  struct Extra {
    std::int32_t from, to;
  };

  std::int64_t members_of(std::int64_t k) const { return order_.starts[k + 1] - order_.starts[k]; }

  SampleOrder order_{};
  std::int64_t samples_ = 0;
  Buffer<std::int32_t> first_;
  Buffer<Sum> factor_;
  Buffer<Extra> extras_;
};

// Sums of the axis that has clusters.
template <class T>
struct Sums {
  explicit Sums(const CenterProblem& p) {
    if (p.outer_order.starts != nullptr) outer = Clusters<T>(p.outer_order, p.outer);
    if (p.inner_order.starts != nullptr) inner = Clusters<T>(p.inner_order, p.inner);
    any = p.outer_order.starts != nullptr || p.inner_order.starts != nullptr;
  }

  Clusters<T> outer, inner;
  bool any;
};

template <class T, class Out>
void store_sums(Out* __restrict to, const SumOf<T>* __restrict sums, std::int64_t count) {
  for (std::int64_t e = 0; e < count; ++e) to[e] = number_of_sum<Out, T>(sums[e]);
}

// The samples of one unit and one place of the outer axis.
template <class T, class Out>
void read_samples(const CenterProblem& p, const Sums<T>& clusters, SumOf<T>* sums, const T* unit, std::int64_t o,
                  Out* to) {
  if (p.outer_order.starts != nullptr) {
    clusters.outer.sum_across(sums, o, unit, p.outer_stride, p.inner_stride, p.inner);
    return store_sums<T>(to, sums, p.inner);
  }
  const T* const from = unit + place(p.outer_order, o) * p.outer_stride;
  if (p.inner_order.starts != nullptr) {
    clusters.inner.sum_along(to, sums, from, p.inner_stride, from + p.unit_stride);
  } else if (p.inner_order.members != nullptr) {
    read_indexed(to, from, p.inner_stride, p.inner_order.members, p.inner, from + p.unit_stride);
  } else {
    read_run(to, from, p.inner_stride, p.inner);
  }
}

template <class T, class Out>
void center_unit_major(const CenterProblem& p, const Sums<T>& clusters, std::int64_t begin, std::int64_t end) {
  const std::int64_t samples = p.outer * p.inner;
  const T* const features = static_cast<const T*>(p.features);
  Out* const centered = static_cast<Out*>(p.centered);
  Buffer<SumOf<T>> sums(clusters.any ? p.inner : 0);
  for (std::int64_t first = begin; first < end; first += kUnitTile) {
    const std::int64_t last = first + kUnitTile < end ? first + kUnitTile : end;
    for (std::int64_t o = 0; o < p.outer; ++o) {
      for (std::int64_t unit = first; unit < last; ++unit) {
        read_samples(p, clusters, sums.data(), features + unit * p.unit_stride, o,
                     centered + unit * samples + o * p.inner);
      }
    }
    for (std::int64_t unit = first; unit < last; ++unit) {
      Out* const row = centered + unit * samples;
      p.mean[unit] = sum_of_row(row, samples) / static_cast<double>(samples);
      p.squares[unit] = center_row(row, p.mean[unit], samples);
    }
  }
}

// Adds one sample of some units to their sums.
template <class T, class Out>
void add_sample(const T* __restrict from, std::int64_t units, double* __restrict sums) {
  for (std::int64_t unit = 0; unit < units; ++unit) sums[unit] += static_cast<double>(number_of<Out>(from[unit]));
}

template <class T, class Out>
void center_sample(const T* __restrict from, std::int64_t units, const double* __restrict mean, Out* __restrict to,
                   double* __restrict squares) {
  for (std::int64_t unit = 0; unit < units; ++unit) {
    const Out value = static_cast<Out>(static_cast<double>(number_of<Out>(from[unit])) - mean[unit]);
    to[unit] = value;
    squares[unit] += static_cast<double>(value) * static_cast<double>(value);
  }
}

// The same if the sample is already stored where it will be centered.
template <class Out>
void center_sum(Out* __restrict to, std::int64_t units, const double* __restrict mean, double* __restrict squares) {
  for (std::int64_t unit = 0; unit < units; ++unit) {
    const Out value = static_cast<Out>(static_cast<double>(to[unit]) - mean[unit]);
    to[unit] = value;
    squares[unit] += static_cast<double>(value) * static_cast<double>(value);
  }
}

template <class T, class Out>
void center_sample_major(const CenterProblem& p, const Sums<T>& clusters, std::int64_t begin, std::int64_t end) {
  const std::int64_t samples = p.outer * p.inner, units = end - begin;
  const T* const features = static_cast<const T*>(p.features) + begin;
  Out* const centered = static_cast<Out*>(p.centered) + begin;
  double* const mean = p.mean + begin;
  double* const squares = p.squares + begin;
  auto sample = [&](std::int64_t o, std::int64_t i) {
    return features + place(p.outer_order, o) * p.outer_stride + place(p.inner_order, i) * p.inner_stride;
  };
  Buffer<SumOf<T>> sums(clusters.any ? units : 0);
  auto sum_sample = [&](std::int64_t o, std::int64_t i, Out* to) {
    if (p.outer_order.starts != nullptr) {
      clusters.outer.sum_across(sums.data(), o, features + i * p.inner_stride, p.outer_stride, 1, units);
    } else {
      clusters.inner.sum_across(sums.data(), i, features + o * p.outer_stride, p.inner_stride, 1, units);
    }
    store_sums<T>(to, sums.data(), units);
  };
  for (std::int64_t unit = 0; unit < units; ++unit) mean[unit] = squares[unit] = 0;
  for (std::int64_t o = 0; o < p.outer; ++o) {
    for (std::int64_t i = 0; i < p.inner; ++i) {
      if (clusters.any) {
        Out* const to = centered + (o * p.inner + i) * p.units;
        sum_sample(o, i, to);
        add_sample<Out, Out>(to, units, mean);
      } else {
        add_sample<T, Out>(sample(o, i), units, mean);
      }
    }
  }
  for (std::int64_t unit = 0; unit < units; ++unit) mean[unit] /= static_cast<double>(samples);
  for (std::int64_t o = 0; o < p.outer; ++o) {
    for (std::int64_t i = 0; i < p.inner; ++i) {
      Out* const to = centered + (o * p.inner + i) * p.units;
      if (clusters.any) {
        center_sum(to, units, mean, squares);
      } else {
        center_sample<T, Out>(sample(o, i), units, mean, to, squares);
      }
    }
  }
}

template <class T, class Out>
void center(const CenterProblem& problem) {
  const Sums<T> clusters(problem);
  auto body = [&](std::int64_t begin, std::int64_t end) {
    if (problem.unit_major) {
      center_unit_major<T, Out>(problem, clusters, begin, end);
    } else {
      center_sample_major<T, Out>(problem, clusters, begin, end);
    }
  };
  const std::int64_t samples = problem.outer * problem.inner;
  parallel_for(problem.threads, problem.units, kUnitTile + kElementsPerThread / (1 + samples), body);
}

template <class T>
void center_to(const CenterProblem& problem) {
  if (problem.centered_dtype == ScalarType::float64) {
    center<T, double>(problem);
  } else {
    center<T, float>(problem);
  }
}

template <class T>
void accumulate(const AccumulateProblem& p) {
  auto body = [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t r = begin; r < end; ++r) {
      const T* const __restrict product = static_cast<const T*>(p.product) + r * p.units;
      double* const __restrict comoment = p.comoment + r * p.units;
      const double* const __restrict column_shift = p.column_shift;
      const double shift = p.row_shift[r];
      for (std::int64_t c = 0; c < p.units; ++c) {
        comoment[c] += static_cast<double>(product[c]) + shift * column_shift[c];
      }
    }
  };
  parallel_for(p.threads, p.rows, 1 + kElementsPerThread / p.units, body);
}

// float64 results are written directly, others through float32.
inline void round_to(double value, double& out) { out = value; }
template <class T>
void round_to(double value, T& out) {
  narrow(static_cast<float>(value), out);
}

// The two formulas of torch.lerp, from `from` to `to`: exact at both ends.
template <class Number>
Number blend(Number from, Number to, Number balance) {
  return balance < Number(0.5) ? from + balance * (to - from) : to - (to - from) * (Number(1) - balance);
}

// Columns [begin, end) of a row, blended with those of another similarity.
template <class T>
void blend_row(T* __restrict out, const T* __restrict other, double balance, std::int64_t begin, std::int64_t end) {
  using Number = typename ArithmeticOf<T>::type;
  const Number share = static_cast<Number>(balance);
  for (std::int64_t c = begin; c < end; ++c) narrow(blend<Number>(widen(other[c]), widen(out[c]), share), out[c]);
}

// One row of a tile: quotients of columns [begin, end).
template <class T>
void correlate_row(const CorrelateProblem& p, std::int64_t r, std::int64_t begin, std::int64_t end, T* __restrict out) {
  const double* const __restrict comoment = p.comoment + r * p.units;
  const double* const __restrict column_deviation = p.column_deviation;
  const double row_deviation = p.row_deviation[r];
  for (std::int64_t c = begin; c < end; ++c) {
    const double deviations = row_deviation * column_deviation[c];
    round_to(comoment[c] / (p.count * (deviations > p.eps ? deviations : p.eps)), out[c]);
  }
  if (p.other != nullptr) {
    blend_row(out, static_cast<const T*>(p.other) + r * p.other_stride, p.balance, begin, end);
  }
}

template <class T>
void correlate_rows(const CorrelateProblem& p, std::int64_t begin, std::int64_t end) {
  T* const out = static_cast<T*>(p.out);
  T* const mirror = static_cast<T*>(p.mirror);
  const bool symmetric = out == mirror;
  for (std::int64_t at = symmetric ? begin : 0; at < p.units; at += kTile) {
    const std::int64_t to = at + kTile < p.units ? at + kTile : p.units;
    for (std::int64_t r = begin; r < end; ++r) {
      correlate_row(p, r, symmetric && r > at ? r : at, to, out + r * p.row_stride);
    }
    if (mirror == nullptr) continue;
    for (std::int64_t c = at; c < to; ++c) {
      const std::int64_t rows = symmetric && c < end ? c : end;
      for (std::int64_t r = begin; r < rows; ++r) mirror[c * p.row_stride + r] = out[r * p.row_stride + c];
    }
  }
}

template <class T>
void correlate_all(const CorrelateProblem& p) {
  auto body = [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t tile = begin; tile < end; ++tile) {
      const std::int64_t last = (tile + 1) * kTile < p.units ? (tile + 1) * kTile : p.units;
      correlate_rows<T>(p, tile * kTile, last);
    }
  };
  parallel_for(p.threads, (p.units + kTile - 1) / kTile, 1 + kElementsPerThread / (kTile * p.units), body);
}

}  // namespace

void center_features(const CenterProblem& problem) {
  switch (problem.dtype) {
    case ScalarType::float16: return center_to<Half>(problem);
    case ScalarType::bfloat16: return center_to<BFloat16>(problem);
    case ScalarType::float32: return center_to<float>(problem);
    case ScalarType::float64: return center<double, double>(problem);
  }
}

void accumulate_comoment(const AccumulateProblem& problem) {
  if (problem.product_dtype == ScalarType::float64) {
    accumulate<double>(problem);
  } else {
    accumulate<float>(problem);
  }
}

void correlate(const CorrelateProblem& problem) {
  switch (problem.dtype) {
    case ScalarType::float16: return correlate_all<Half>(problem);
    case ScalarType::bfloat16: return correlate_all<BFloat16>(problem);
    case ScalarType::float32: return correlate_all<float>(problem);
    case ScalarType::float64: return correlate_all<double>(problem);
  }
}

}  // namespace mudsc::MUDSC_ISA
