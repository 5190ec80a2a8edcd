// The sources of each output: the input rows of every output row, and the columns of a line.
#pragma once

#include "kernel.hpp"
#include "mudsc/permute.hpp"

namespace mudsc::MUDSC_ISA {
namespace {

// Below this many contiguous elements per unit, one index per element beats a loop per unit.
constexpr std::int64_t kShortRun = 16;

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
    // Filled from the back: each start moves down to the beginning of its cluster.
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

}  // namespace
}  // namespace mudsc::MUDSC_ISA
