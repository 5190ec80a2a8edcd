// Sorting and selection without std, whose inline functions must not enter a kernel (see kernel.hpp).
#pragma once

#include "kernel.hpp"

namespace mudsc::MUDSC_ISA {
namespace {

constexpr double kInfinity = __builtin_huge_val();

// Heap sort: no recursion, no extra memory, bounded by n log n.
template <class Less>
inline void sort(std::int64_t* items, std::int64_t count, const Less& less) {
  const auto sift = [&](std::int64_t root, std::int64_t end) {
    for (;;) {
      std::int64_t child = 2 * root + 1;
      if (child >= end) return;
      if (child + 1 < end && less(items[child], items[child + 1])) ++child;
      if (!less(items[root], items[child])) return;
      const std::int64_t item = items[root];
      items[root] = items[child];
      items[child] = item;
      root = child;
    }
  };
  for (std::int64_t root = count / 2; root-- > 0;) sift(root, count);
  for (std::int64_t end = count; end-- > 1;) {
    const std::int64_t item = items[0];
    items[0] = items[end];
    items[end] = item;
    sift(0, end);
  }
}
inline void sort_ascending(std::int64_t* items, std::int64_t count) {
  sort(items, count, [](std::int64_t a, std::int64_t b) { return a < b; });
}

// Returns the item of rank `rank` (from 0), partially sorting the items: Hoare's selection. Items must not be NaN.
template <class Number>
inline Number select_rank(Number* items, std::int64_t count, std::int64_t rank) {
  std::int64_t low = 0, high = count - 1;
  while (low < high) {
    const Number pivot = items[low + (high - low) / 2];
    std::int64_t i = low, j = high;
    while (i <= j) {
      while (items[i] < pivot) ++i;
      while (pivot < items[j]) --j;
      if (i <= j) {
        const Number item = items[i];
        items[i++] = items[j];
        items[j--] = item;
      }
    }
    if (rank <= j) {
      high = j;
    } else if (rank >= i) {
      low = i;
    } else {
      break;
    }
  }
  return items[rank];
}

}  // namespace
}  // namespace mudsc::MUDSC_ISA
