// The lists of rows' least reduced costs that the device made, as the host's search reads them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <memory>
#include <vector>

namespace mudsc::cuda {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Entries are in ascending order of what they cost when they were listed. As duals only fall, they cost no less now:
// whoever looks for the least ends at an entry that already was dearer than what was found.
struct Entry {
  double least;  // cost - dual when it was listed
  float cost;
  std::int32_t column;

  double reduced(const std::vector<double>& duals) const { return static_cast<double>(cost) - duals[column]; }
};

struct BestTwo {
  double first = kInfinity;
  double second = kInfinity;
  const Entry* entry = nullptr;
};

struct List {
  Entry* entries = nullptr;
  std::int32_t size = 0;
  std::int32_t capacity = 0;
  double floor = -kInfinity;  // no unlisted reduced cost is less, now or later

  const Entry* begin() const { return entries; }
  const Entry* end() const { return entries + size; }

  BestTwo best_two(const std::vector<double>& duals) const {
    BestTwo best;
    for (const Entry& entry : *this) {
      if (entry.least >= best.second) break;
      const double reduced = entry.reduced(duals);
      if (reduced < best.first) {
        best = {reduced, best.first, &entry};
      } else if (reduced < best.second) {
        best.second = reduced;
      }
    }
    return best;
  }

  // Whether so many entries are the row's least ones still.
  bool tells(std::int64_t count, const std::vector<double>& duals) const {
    for (const Entry* entry = begin(); entry != end() && count > 0; ++entry) count -= entry->reduced(duals) <= floor;
    return count == 0 || floor == kInfinity;
  }
};

// One list for each row; equal rows share that of the first.
class Lists {
 public:
  explicit Lists(std::int64_t rows) : lists_(rows) {}

  const List& operator[](std::int64_t row) const { return lists_[row]; }

  // Takes the lists of `count` rows, made of the duals of now, `stride` entries apart.
  void set(const std::int32_t* rows, std::int64_t count, std::int64_t stride, const std::int32_t* columns,
           const float* costs, const std::int32_t* sizes, const double* floors, const std::vector<double>& duals) {
    std::int64_t room = 0;
    for (std::int64_t k = 0; k < count; ++k) room += sizes[k] > lists_[rows[k]].capacity ? sizes[k] : 0;
    Entry* next = room > 0 ? allocate(room) : nullptr;
    for (std::int64_t k = 0; k < count; ++k) {
      List& list = lists_[rows[k]];
      if (sizes[k] > list.capacity) {
        list.entries = next;
        list.capacity = sizes[k];
        next += sizes[k];
      }
      list.size = sizes[k];
      list.floor = floors[k];
      fill(list, columns + k * stride, costs + k * stride, duals);
    }
  }

 private:
  Entry* allocate(std::int64_t count) {
    blocks_.emplace_back(new Entry[count]);
    return blocks_.back().get();
  }

  static void fill(List& list, const std::int32_t* columns, const float* costs, const std::vector<double>& duals) {
    bool ascending = true;
    double before = -kInfinity;
    for (std::int32_t k = 0; k < list.size; ++k) {
      Entry& entry = list.entries[k];
      entry.cost = costs[k];
      entry.column = columns[k];
      entry.least = entry.reduced(duals);
      ascending &= before <= entry.least;
      before = entry.least;
    }
    if (ascending) return;
    std::stable_sort(list.entries, list.entries + list.size,
                     [](const Entry& a, const Entry& b) { return a.least < b.least; });
  }

  std::vector<List> lists_;
  std::vector<std::unique_ptr<Entry[]>> blocks_;
};

}  // namespace mudsc::cuda
