// Weighted sum of tensors re-indexed along rows and columns of [outer, rows, middle, columns, inner].
//
// Computes out[o, r, m, k, t] = sum_i weight_i * sum over rows s of r, columns c of k of tensor_i[o, s, m, c, t]. A
// gather maps one input unit to each output unit; clusters map any number, multiplied by the clusters' scales.
//
// Memory traffic: one read of each input, one write of the output. A line (the [columns, inner] part of one row) is
// accumulated in float32 (float64 for float64) in cache. Rows of one cluster are added before columns are indexed, so
// the indexed part runs once per line. One model with weight 1 and gathers only is a bitwise copy: exact for every
// value, including NaN payloads and signed zeros.
//
// Sums of gathers in float32 and indexed copies of 4-byte entries, the common case, are one fused loop: a block of
// outputs is summed in registers over all models; large results are written past the caches. The same part of the next
// line is prefetched, since the hardware prefetcher cannot follow indexed reads. Copies of rows are byte copies, for
// any type.
//
// In place, the lines of one tensor move along the cycles of the row permutation; each is read once and written once.
//
// Columns are indexed from a line that is in cache. Short runs (inner < 16) are expanded to one index per element;
// longer ones are contiguous loops. An indexed pass reads the first column of every cluster (a zero after the line
// represents "none"); the other columns, few in practice, are added one by one.
//
// Parallel shape: threads take disjoint ranges of output lines; each has its own scratch memory.
#include "mudsc/permute.hpp"

#include "mudsc/threads.hpp"
#include "permute_lines.hpp"

namespace mudsc::MUDSC_ISA {
namespace {

// Minimum run length in bytes for copying a run as two vectors; shorter runs are split into single elements.
constexpr std::int64_t kShortCopy = 8;
// Elements of a line that are accumulated at a time where columns stay in place: sums remain in the L1 cache.
constexpr std::int64_t kTile = 2048;
// Minimum number of elements read per thread to outweigh starting it.
constexpr std::int64_t kElementsPerThread = 1 << 18;
// Results of at least this many bytes bypass the caches: they would be evicted before they are read again.
constexpr std::int64_t kStreamedBytes = 32 << 20;
// Shorter lines are mostly heads and tails that do not fill a vector.
constexpr std::int64_t kLeastStreamedLine = 256;

// ---- Lines --------------------------------------------------------------------------------------------------

inline std::int64_t num_lines(const PermuteProblem& problem) {
  return problem.outer * problem.rows.units_out * problem.middle;
}

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
    parallel_for(problem_.threads, num_lines(problem_), lines_per_thread(length), body);
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
    parallel_for(problem_.threads, num_lines(problem_), lines_per_thread(line_in), body);
  }

 private:
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

  // Returns the sum of a model's input lines: a pointer to the line if there is only one, else to `scratch`; null if
  // there is none.
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

inline bool gathers(const PermuteProblem& problem) {
  return problem.rows.kind != UnitMapKind::clusters && problem.columns.kind != UnitMapKind::clusters;
}

inline bool is_copy(const PermuteProblem& problem) {
  return problem.num_models == 1 && problem.weights[0] == 1.0 && gathers(problem);
}

// Gathers of float32 runs, which are fused if the result is streamed.
inline bool is_copy_of_runs(const PermuteProblem& problem) {
  if (!is_copy(problem)) return false;
  if (problem.columns.kind == UnitMapKind::identity) return true;
  return problem.inner > 1 && num_lines(problem) * problem.columns.units_out * problem.inner * 4 < kStreamedBytes;
}

// Long runs of columns use run copies; other gathers of float32 are fused.
inline bool is_fused(const PermuteProblem& problem) {
  return gathers(problem) && problem.num_models <= kFusedModels &&
         (problem.columns.kind == UnitMapKind::identity ||
          (problem.inner < kShortRun && problem.columns.units_in < (INT32_MAX - 1) / kShortRun));
}

// Walks the lines of the result in order and yields the input lines of each, without a division per line.
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
  // Holds its data by value, because the compiler must assume that writing a line may change the problem.
  const void* const* tensors_;
  const std::int64_t* index_;
  std::int64_t items_, rows_in_, rows_out_, middles_;
  std::int64_t middle_, row_, outer_;
};

inline bool is_streamed(const PermuteProblem& problem, std::int64_t bytes_per_line) {
  return num_lines(problem) * bytes_per_line >= kStreamedBytes && bytes_per_line >= kLeastStreamedLine;
}

// Data that all lines share. `weights` has room for kFusedModels entries and lives as long as the result; every line is
// gathered.
FusedLine fused_line(const PermuteProblem& problem, const ColumnIndex* columns, float* weights) {
  FusedLine line{problem.num_models,
                 weights,
                 {},
                 {},
                 {},
                 problem.columns.units_in * problem.inner,
                 problem.columns.units_out * problem.inner};
  for (std::int64_t i = 0; i < problem.num_models; ++i) {
    weights[i] = static_cast<float>(problem.weights[i]);
    if (columns != nullptr) line.index[i] = columns->first(i);
  }
  return line;
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
  const ColumnIndex columns =
      in_place ? ColumnIndex() : ColumnIndex(problem.columns, problem.inner, problem.num_models);
  float weights[kFusedModels];
  FusedLine shape = fused_line(problem, in_place ? nullptr : &columns, weights);
  if (is_copy(problem)) shape.weights = nullptr;
  if (is_streamed(problem, shape.items_out * 4)) {
    merge_fused_lines<true>(problem, shape);
  } else {
    merge_fused_lines<false>(problem, shape);
  }
}

// Half types with gathered columns: the lines of all models are first widened, then summed like float32 lines.
template <class T>
void merge_fused_halves(const PermuteProblem& problem) {
  const ColumnIndex columns(problem.columns, problem.inner, problem.num_models);
  float weights[kFusedModels];
  const FusedLine shape = fused_line(problem, &columns, weights);
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

// ---- Pure gathers: bitwise copies -----------------------------------------------------------------------------

// Copies entry index[e] of a line of `items_in` entries to entry e.
template <class Bits>
void copy_indexed(Bits* __restrict to, const Bits* __restrict line, const std::int32_t* __restrict index,
                  std::int64_t items_in, std::int64_t count) {
  std::int64_t e = 0;
  if constexpr (sizeof(Bits) == 2) {
    for (; e + kLanes <= count && items_in > 1; e += kLanes) gather_halves(to + e, line, index + e, items_in);
  }
  for (; e < count; ++e) to[e] = line[index[e]];
}

// Copies runs of one to two vectors' length as two overlapping vectors.
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

// Copies a line past the caches and prefetches the next one.
inline void stream_line(char* to, const char* from, const char* next, std::int64_t bytes) {
  constexpr std::int64_t kVector = sizeof(Lanes);
  const auto stream = [&](std::int64_t at) {
    Lanes lanes;
    std::memcpy(&lanes, from + at, sizeof lanes);
    stream_lanes(reinterpret_cast<float*>(to + at), lanes);
  };
  // If a line begins or ends within a vector, only its own bytes are written: rewriting streamed bytes would fetch them
  // again.
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
        copy_indexed(to, sources.of(0), columns.first(0), columns.items_in(), line_out);
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

// The lines of one tensor in the order in which they can move: along the cycles of the row permutation, cycle by cycle,
// the same in every slice (outer, middle). Line k of the order is overwritten by line k + 1; the last line of a cycle
// by its first. Threads move disjoint runs of this order. Lines that a run needs but other runs overwrite are saved
// before any run starts: the first line of the next run, and the first line of the cycle in which the run begins.
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
    // For each run: its first line, the first of that line's cycle, the first of the cycle it is in.
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

  // The first position of the cycle that contains position k of the whole order.
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

std::int64_t bytes_of(const PermuteProblem& problem) { return kScalarBytes[static_cast<int>(problem.dtype)]; }

}  // namespace

void permute_merge(const PermuteProblem& problem) {
  const bool empty = problem.outer == 0 || problem.rows.units_out == 0 || problem.middle == 0 ||
                     problem.columns.units_out == 0 || problem.inner == 0;
  if (empty) return;
  const bool is_float = problem.dtype == ScalarType::float32;
  if (problem.out_is_new) {
    const std::int64_t bytes_per_line = problem.columns.units_out * problem.inner * bytes_of(problem);
    prefer_huge_pages(problem.out, num_lines(problem) * bytes_per_line);
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
  switch (bytes_of(problem)) {
    case 2: return MoveInPlace<std::uint16_t>(problem).run();
    case 4: return MoveInPlace<std::uint32_t>(problem).run();
    default: return MoveInPlace<std::uint64_t>(problem).run();
  }
}

}  // namespace mudsc::MUDSC_ISA
