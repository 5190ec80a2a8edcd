// Finds the smallest entries of `cost - price` in a row, reading the row once.
//
// The entries are divided into groups. A group holds one lane's entries in a run of blocks, so its minimum needs no
// shuffles, and only these minima are stored, and those of parts of four entries. Bisection finds a bound that as many
// groups' minima pass as entries are wanted, and only parts with a minimum below the bound are read again.
// Memory traffic: the row, and the prices, which stay in cache. Blocks are 64 bytes at every instruction level, so that
// all levels list the same entries.
#pragma once

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "kernel.hpp"

namespace mudsc::MUDSC_ISA {
namespace {

// Compilers split vectors wider than the processor's into lanes, so a block is an array of native vectors.
constexpr std::int64_t kVectorsPerBlock = 64 / kVectorBytes;

// Unaligned: vectors in memory have only the alignment of their entries.
template <class Number>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float Type __attribute__((vector_size(kVectorBytes)));
  typedef float Unaligned __attribute__((vector_size(kVectorBytes), may_alias, aligned(4)));
  typedef std::int32_t Bits __attribute__((vector_size(kVectorBytes)));
  static constexpr std::int32_t kMagnitudeBits = 0x7fffffff;
};
template <>
struct VectorOf<double> {
  typedef double Type __attribute__((vector_size(kVectorBytes)));
  typedef double Unaligned __attribute__((vector_size(kVectorBytes), may_alias, aligned(8)));
  typedef std::int64_t Bits __attribute__((vector_size(kVectorBytes)));
  static constexpr std::int64_t kMagnitudeBits = 0x7fffffffffffffff;
};

// Bit k is set if entry k of a block is at most `bound`.
inline std::uint32_t at_most(const float* block, float bound) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(_mm512_loadu_ps(block), _mm512_set1_ps(bound), _CMP_LE_OQ);
#elif defined(__AVX2__)
  const __m256 limit = _mm256_set1_ps(bound);
  const int low = _mm256_movemask_ps(_mm256_cmp_ps(_mm256_loadu_ps(block), limit, _CMP_LE_OQ));
  const int high = _mm256_movemask_ps(_mm256_cmp_ps(_mm256_loadu_ps(block + 8), limit, _CMP_LE_OQ));
  return static_cast<std::uint32_t>(low | high << 8);
#elif defined(__SSE2__)
  int bits = 0;
  for (int k = 0; k < 16; k += 4) {
    bits |= _mm_movemask_ps(_mm_cmple_ps(_mm_loadu_ps(block + k), _mm_set1_ps(bound))) << k;
  }
  return static_cast<std::uint32_t>(bits);
#else
  std::uint32_t bits = 0;
  for (int k = 0; k < 16; ++k) bits |= static_cast<std::uint32_t>(block[k] <= bound) << k;
  return bits;
#endif
}
inline std::uint32_t at_most(const double* block, double bound) {
#if defined(__AVX512F__)
  return _mm512_cmp_pd_mask(_mm512_loadu_pd(block), _mm512_set1_pd(bound), _CMP_LE_OQ);
#elif defined(__AVX2__)
  const __m256d limit = _mm256_set1_pd(bound);
  const int low = _mm256_movemask_pd(_mm256_cmp_pd(_mm256_loadu_pd(block), limit, _CMP_LE_OQ));
  const int high = _mm256_movemask_pd(_mm256_cmp_pd(_mm256_loadu_pd(block + 4), limit, _CMP_LE_OQ));
  return static_cast<std::uint32_t>(low | high << 4);
#elif defined(__SSE2__)
  int bits = 0;
  for (int k = 0; k < 8; k += 2) {
    bits |= _mm_movemask_pd(_mm_cmple_pd(_mm_loadu_pd(block + k), _mm_set1_pd(bound))) << k;
  }
  return static_cast<std::uint32_t>(bits);
#else
  std::uint32_t bits = 0;
  for (int k = 0; k < 8; ++k) bits |= static_cast<std::uint32_t>(block[k] <= bound) << k;
  return bits;
#endif
}

template <class Number>
class RowScanner {
  using Vector = typename VectorOf<Number>::Type;
  using Unaligned = typename VectorOf<Number>::Unaligned;
  using Bits = typename VectorOf<Number>::Bits;
  static constexpr std::int64_t kVectorLanes = kVectorBytes / static_cast<std::int64_t>(sizeof(Number));
  static constexpr Number kInfinite = static_cast<Number>(__builtin_huge_val());

 public:
  static constexpr std::int64_t kBlock = 64 / static_cast<std::int64_t>(sizeof(Number));

  RowScanner() = default;
  explicit RowScanner(std::int64_t columns)
      : columns_(columns),
        minima_(columns + 2 * kBlock),
        part_minima_(columns + kBlock),
        keys_(columns + kBlock),
        hits_(columns + kBlock),
        parts_(columns / kBlock + 1),
        bits_(columns / kBlock + 1) {}

  // From now on, rows have so many entries, at most as many as the scanner was made for.
  void set_columns(std::int64_t columns) { columns_ = columns; }

  // Reads a row: cost = sign * value. There are about `groups` groups, at most one per entry. The row to be read next is
  // prefetched; if it is not known (null), the row itself, some lines ahead.
  void read(const Number* values, Number sign, const Number* prices, std::int64_t groups, const void* next_row) {
    values_ = values;
    sign_ = sign;
    prices_ = prices;
    const std::int64_t blocks = columns_ / kBlock;
    const std::int64_t lead = next_row != nullptr ? 0 : blocks / 4 < kMaxLead ? blocks / 4 : kMaxLead;
    ahead_ = static_cast<const char*>(next_row != nullptr ? next_row : values) + lead * 64;
    ahead_blocks_ = blocks - lead;
    const std::int64_t run = columns_ / groups > 1 ? columns_ / groups : 1;
    part_ = run < kMaxPartBlocks ? run : kMaxPartBlocks;
    run_ = run / part_ * part_;
    group_count_ = part_count_ = 0;
    // Kept in registers: vectors in memory may be any other object, so members would be loaded and stored for each.
    Bits largest[kVectorsPerBlock] = {};
    for (std::int64_t begin = 0; begin < blocks; begin += run_) {
      read_run(begin, begin + run_ < blocks ? begin + run_ : blocks, largest);
    }
    for (std::int64_t part = 0; part < kVectorsPerBlock; ++part) largest_[part] = largest[part];
    if (columns_ % kBlock != 0) {
      for (std::int64_t k = 0; k < kBlock; ++k) {
        const std::int64_t j = blocks * kBlock + k;
        minima_[group_count_ + k] = j < columns_ ? key(j) : kInfinite;
      }
      group_count_ += kBlock;
    }
  }

  // The largest magnitude in the row; infinite or NaN if an entry is.
  Number largest_magnitude() const {
    auto largest = largest_[0][0];  // bit patterns order like the magnitudes, NaN last
    for (const Bits& part : largest_) {
      for (std::int64_t k = 0; k < kVectorLanes; ++k) largest = part[k] > largest ? part[k] : largest;
    }
    for (std::int64_t j = columns_ / kBlock * kBlock; j < columns_; ++j) {
      const auto bits = magnitude_bits(values_[j]);
      largest = bits > largest ? bits : largest;
    }
    Number result;
    std::memcpy(&result, &largest, sizeof result);
    return result;
  }

  // Lists about `wanted` of the row's smallest entries, at most `room`, by calling list(column). Returns a lower bound
  // of all unlisted entries. Of entries that tie for the last place any may be listed: the search begins at `start`,
  // given as a fraction of the row.
  template <class List>
  Number list_smallest(std::int64_t wanted, std::int64_t room, double start, const List& list) {
    const Rank rank = find_rank(minima_.data(), group_count_, wanted);
    if (rank.passed > 2 * room) {
      return list_tied(rank, room, start, min_above(minima_.data(), group_count_, rank.bound), list);
    }
    // No entry outside these groups is at most the bound.
    Number floor = rank.bound;
    const std::int64_t hit_count = collect(rank.bound, start);
    Number cut = rank.bound;
    if (hit_count > room) {
      std::int64_t padded_count = hit_count;
      for (; padded_count % kBlock != 0; ++padded_count) keys_[padded_count] = kInfinite;
      cut = find_rank(keys_.data(), padded_count, wanted < room ? wanted : room).bound;
    }
    std::int64_t listed = 0;
    for (std::int64_t k = 0; k < hit_count; ++k) {
      if (keys_[k] <= cut && listed < room) {
        list(static_cast<std::int64_t>(hits_[k]));
        ++listed;
      } else {
        floor = keys_[k] < floor ? keys_[k] : floor;
      }
    }
    return floor;
  }

  // Calls visit(column) for the entries of groups whose minimum is at most `bound`, until it returns false.
  template <class Visit>
  void visit(Number bound, double start, const Visit& visit) const {
    const std::int64_t body = columns_ / kBlock * kBlock, run = run_ * kBlock, runs = group_count_ / kBlock;
    const std::int64_t first = static_cast<std::int64_t>(start * static_cast<double>(runs));
    for (std::int64_t turn = 0; turn < runs; ++turn) {
      const std::int64_t at = first + turn < runs ? first + turn : first + turn - runs;
      std::uint32_t bits = at_most(minima_.data() + at * kBlock, bound);
      // The last run may be a remainder of less than a block.
      const std::int64_t begin = at * run < body ? at * run : body;
      const std::int64_t end = begin == body ? columns_ : begin + run < body ? begin + run : body;
      for (; bits != 0; bits &= bits - 1) {
        for (std::int64_t j = begin + __builtin_ctz(bits); j < end; j += kBlock) {
          if (!visit(j)) return;
        }
      }
    }
  }

  // A bound that at least `wanted` items pass, and a lower one that fewer pass.
  struct Rank {
    Number bound;
    Number below;
    std::int64_t passed;
  };

  // Halvings before the next item is tried, and total steps; stopping early only lets more items pass.
  static constexpr int kHalvings = 8;
  static constexpr int kBisections = 54;

  // At most 1.5 times `wanted` items pass the bound, unless they tie. `count` is a multiple of kBlock; infinite items
  // are ignored.
  static Rank find_rank(const Number* items, std::int64_t count, std::int64_t wanted) {
    Vector lows[kVectorsPerBlock], highs[kVectorsPerBlock];
    for (std::int64_t part = 0; part < kVectorsPerBlock; ++part) {
      lows[part] = kInfinite - Vector{};
      highs[part] = -lows[part];
    }
    for (std::int64_t k = 0; k < count; k += kBlock) {
      for (std::int64_t part = 0; part < kVectorsPerBlock; ++part) {
        const Vector item = *reinterpret_cast<const Unaligned*>(items + k + part * kVectorLanes);
        const Vector finite = item < kInfinite ? item : -kInfinite - Vector{};
        lows[part] = item < lows[part] ? item : lows[part];
        highs[part] = finite > highs[part] ? finite : highs[part];
      }
    }
    const Number least = min_of(lows);
    Number most = -kInfinite;
    for (const Vector& part : highs) {
      for (std::int64_t k = 0; k < kVectorLanes; ++k) most = part[k] > most ? part[k] : most;
    }
    Rank rank{least, -kInfinite, count_at_most(items, count, least)};
    if (rank.passed >= wanted) return rank;
    rank = Rank{most, least, count_at_most(items, count, most)};
    for (int step = 0; step < kBisections && rank.passed > wanted + wanted / 2; ++step) {
      // Halving the range soon separates items unless they tie; then the next item is the bound. If that is not enough,
      // items differ by orders of magnitude, and more halvings follow.
      const bool halve = step % (kHalvings + 1) != kHalvings;
      const Number middle = halve ? rank.below + (rank.bound - rank.below) / 2 : min_above(items, count, rank.below);
      if (!(middle > rank.below && middle <= rank.bound)) break;
      const std::int64_t passed = count_at_most(items, count, middle);
      if (passed < wanted) {
        rank.below = middle;
      } else {
        rank.bound = middle;
        rank.passed = passed;
        if (!halve) break;
      }
    }
    return rank;
  }

  // `count` is a multiple of kBlock.
  static Number min_above(const Number* items, std::int64_t count, Number bound) {
    Vector lows[kVectorsPerBlock];
    for (Vector& part : lows) part = kInfinite - Vector{};
    for (std::int64_t k = 0; k < count; k += kBlock) {
      for (std::int64_t part = 0; part < kVectorsPerBlock; ++part) {
        const Vector item = *reinterpret_cast<const Unaligned*>(items + k + part * kVectorLanes);
        const Vector above = item > bound ? item : kInfinite - Vector{};
        lows[part] = above < lows[part] ? above : lows[part];
      }
    }
    return min_of(lows);
  }

 private:
  // Writes the entries that are at most `bound` to keys_ and hits_ and returns their number.
  std::int64_t collect(Number bound, double start) {
    const std::int64_t blocks = columns_ / kBlock, runs = (blocks + run_ - 1) / run_;
    const std::int64_t first = static_cast<std::int64_t>(start * static_cast<double>(runs)) * (run_ / part_);
    // Appends without branches, which would be unpredictable. First collects the parts with hits.
    std::int64_t noted = 0;
    const auto note = [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t part = begin; part < end; ++part) {
        const std::uint32_t bits = at_most(part_minima_.data() + part * kBlock, bound);
        parts_[noted] = static_cast<std::int32_t>(part);
        bits_[noted] = bits;
        noted += bits != 0;
      }
    };
    note(first, part_count_);
    note(0, first < part_count_ ? first : part_count_);
    std::int64_t hit_count = 0;
    for (std::int64_t k = 0; k < noted; ++k) {
      const std::int64_t begin = parts_[k] * part_, end = begin + part_ < blocks ? begin + part_ : blocks;
      for (std::uint32_t bits = bits_[k]; bits != 0; bits &= bits - 1) {
        const std::int64_t lane = __builtin_ctz(bits);
        for (std::int64_t block = begin; block < end; ++block) {
          const std::int64_t column = block * kBlock + lane;
          const Number found = key(column);
          hits_[hit_count] = static_cast<std::int32_t>(column);
          keys_[hit_count] = found;
          hit_count += found <= bound;
        }
      }
    }
    for (std::int64_t j = blocks * kBlock; j < columns_; ++j) {
      if (key(j) > bound) continue;
      hits_[hit_count] = static_cast<std::int32_t>(j);
      keys_[hit_count++] = key(j);
    }
    return hit_count;
  }

  static auto magnitude_bits(Number value) {
    decltype(VectorOf<Number>::kMagnitudeBits + 0) bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits & VectorOf<Number>::kMagnitudeBits;
  }

  Number key(std::int64_t column) const { return sign_ * values_[column] - prices_[column]; }

  void read_run(std::int64_t begin, std::int64_t end, Bits (&largest)[kVectorsPerBlock]) {
    const Number* const values = values_;
    const Number* const prices = prices_;
    const Number sign = sign_;
    const char* const ahead = ahead_;
    const std::int64_t ahead_blocks = ahead_blocks_;
    const std::int64_t part_blocks = part_;
    Vector least[kVectorsPerBlock];
    for (Vector& lanes : least) lanes = kInfinite - Vector{};
    while (begin < end) {
      const std::int64_t part_end = begin + part_blocks < end ? begin + part_blocks : end;
      Vector least_of_part[kVectorsPerBlock];
      for (Vector& lanes : least_of_part) lanes = kInfinite - Vector{};
      // Into L2: L1 has no room for two rows. Where nothing is left, the first lines again, which costs nothing.
      const char* const lines = ahead + (begin < ahead_blocks ? begin : 0) * 64;
      for (std::int64_t k = 0; begin < part_end; ++begin, ++k) {
        __builtin_prefetch(lines + k * 64, 0, 2);
        for (std::int64_t at = 0; at < kVectorsPerBlock; ++at) {
          const std::int64_t j = begin * kBlock + at * kVectorLanes;
          const Vector entries = *reinterpret_cast<const Unaligned*>(values + j);
          const Bits magnitudes = reinterpret_cast<Bits>(entries) & VectorOf<Number>::kMagnitudeBits;
          largest[at] = magnitudes > largest[at] ? magnitudes : largest[at];
          const Vector keys = entries * sign - *reinterpret_cast<const Unaligned*>(prices + j);
          least_of_part[at] = keys < least_of_part[at] ? keys : least_of_part[at];
        }
      }
      store(least_of_part, part_minima_.data() + part_count_++ * kBlock);
      for (std::int64_t k = 0; k < kVectorsPerBlock; ++k) {
        least[k] = least_of_part[k] < least[k] ? least_of_part[k] : least[k];
      }
    }
    store(least, minima_.data() + group_count_);
    group_count_ += kBlock;
  }

  static void store(const Vector (&block)[kVectorsPerBlock], Number* out) {
    for (std::int64_t k = 0; k < kVectorsPerBlock; ++k) {
      *reinterpret_cast<Unaligned*>(out + k * kVectorLanes) = block[k];
    }
  }

  static std::int64_t count_at_most(const Number* items, std::int64_t count, Number bound) {
    std::int64_t passed = 0;
    for (std::int64_t k = 0; k < count; k += kBlock) passed += __builtin_popcount(at_most(items + k, bound));
    return passed;
  }

  static Number min_of(const Vector (&lows)[kVectorsPerBlock]) {
    Number least = kInfinite;
    for (const Vector& part : lows) {
      for (std::int64_t k = 0; k < kVectorLanes; ++k) least = part[k] < least ? part[k] : least;
    }
    return least;
  }

  // list_smallest where many entries tie for the last places; does not look at all of them. `floor` is the smallest
  // minimum of the groups that do not pass.
  template <class List>
  Number list_tied(const Rank& rank, std::int64_t room, double start, Number floor, const List& list) {
    std::int64_t listed = 0;
    const auto list_between = [&](Number above, Number bound, std::int64_t column) {
      const Number entry = key(column);
      if (entry <= above) return;
      if (entry <= bound && listed < room) {
        list(column);
        ++listed;
      } else {
        floor = entry < floor ? entry : floor;
      }
    };
    visit(rank.below, start, [&](std::int64_t column) {
      list_between(-kInfinite, rank.below, column);
      return true;
    });
    visit(rank.bound, start, [&](std::int64_t column) {
      list_between(rank.below, rank.bound, column);
      return listed < room;
    });
    // Entries not looked at are above rank.below and at least their group's minimum.
    const Number unseen = min_above(minima_.data(), group_count_, rank.below);
    return unseen < floor ? unseen : floor;
  }

  // By how many cache lines at most prefetching runs ahead in a row. The processor does not look beyond a page.
  static constexpr std::int64_t kMaxLead = 64;

  // Blocks in a part of a run, at most: entries of a part of a group.
  static constexpr std::int64_t kMaxPartBlocks = 4;

  // Blocks in a run and in a part of it; minima of groups; parts.
  std::int64_t columns_ = 0, run_ = 1, part_ = 1, group_count_ = 0, part_count_ = 0;
  // What is prefetched while the row is read, and how many blocks of it.
  const char* ahead_ = nullptr;
  std::int64_t ahead_blocks_ = 0;
  const Number* values_ = nullptr;
  const Number* prices_ = nullptr;
  Number sign_ = 1;
  Bits largest_[kVectorsPerBlock] = {};
  Buffer<Number> minima_, part_minima_, keys_;
  Buffer<std::int32_t> hits_, parts_;
  Buffer<std::uint32_t> bits_;
};

}  // namespace
}  // namespace mudsc::MUDSC_ISA
