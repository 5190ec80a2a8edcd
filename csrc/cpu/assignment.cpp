// Linear assignment: chooses a solver for each problem of a batch and distributes the problems over threads.
#include "mudsc/assignment.hpp"

#include "assignment_dense.hpp"
#include "assignment_sparse.hpp"
#include "assignment_two_valued.hpp"

namespace mudsc::MUDSC_ISA {
namespace {

template <class T>
using Sparse = SparseSolver<MatrixRows<T>>;

// What a sample of rows shows of a problem.
struct Sample {
  bool background = false;  // nearly all pairs share one cost, the highest of their row: forbidden pairs with one large
                            // cost, or boxes that mostly do not overlap
  bool two_valued = false;  // all pairs have one of two costs, and several in some row the lower one
};

template <class T>
Sample sample_rows(const AssignmentProblem& problem, std::int64_t index) {
  constexpr std::int64_t kRows = 8, kMaxOthersShare = 16;
  const std::int64_t columns = problem.columns, step = problem.rows / kRows + 1;
  const T* const values = static_cast<const T*>(problem.values) + index * problem.rows * columns;
  using Number = typename ArithmeticOf<T>::type;
  const auto sign = static_cast<Number>(problem.maximize ? -1 : 1);
  Number low = 0, high = 0;  // of the first row that is not constant
  bool varied = false, background = true, two_valued = true, several = false;
  for (std::int64_t i = 0; i < problem.rows && (background || two_valued); i += step) {
    const T* const row = values + i * columns;
    auto highest = sign * widen(row[0]), lowest = highest;
    for (std::int64_t j = 1; j < columns; ++j) {
      const auto cost = sign * widen(row[j]);
      highest = cost > highest ? cost : highest;
      lowest = cost < lowest ? cost : lowest;
    }
    if (!(lowest < highest)) continue;
    if (!varied) low = lowest, high = highest;
    varied = true;
    std::int64_t at_highest = 0, at_lowest = 0;
    for (std::int64_t j = 0; j < columns; ++j) {
      const auto cost = sign * widen(row[j]);
      at_highest += cost == highest;
      at_lowest += cost == lowest;
    }
    background &= kMaxOthersShare * (columns - at_highest) <= columns;
    two_valued &= at_highest + at_lowest == columns && lowest == low && highest == high &&
                  TwoValuedSolver<T>::kMaxLowShare * at_lowest <= columns;
    several |= at_lowest > 1;
  }
  return Sample{varied && background, varied && two_valued && several};
}

template <class T>
void solve_range(const AssignmentProblem& problem, std::int64_t begin, std::int64_t end, int threads);

// Solves a matrix that is transposed in memory: on lists, or else as a copy.
template <class T>
void solve_transposed(const AssignmentProblem& problem, int threads) {
  const std::int64_t rows = problem.rows, columns = problem.columns;
  if (columns >= Sparse<T>::kMinColumns && Sparse<T>(problem).solve(problem, 0, threads)) return;
  const T* const values = static_cast<const T*>(problem.values);
  Buffer<T> copy(rows * columns);
  for (std::int64_t j = 0; j < columns; ++j) {
    for (std::int64_t i = 0; i < rows; ++i) copy[i * columns + j] = values[j * rows + i];
  }
  AssignmentProblem plain = problem;
  plain.values = copy.data();
  plain.transposed = false;
  solve_range<T>(plain, 0, 1, threads);
}

// Tries to solve a float64 problem with costs copied as float32, which takes half the memory traffic: integers, for
// example, are the same in both. The arithmetic is, too, because duals are double. False if float32 does not hold them,
// which the first cost usually tells before anything is allocated, and for small problems.
bool solve_narrowed(const AssignmentProblem& problem, std::int64_t index, bool background) {
  if (problem.columns <= DenseSolver<double>::kMaxInOrder) return false;
  const double first = static_cast<const double*>(problem.values)[index * problem.rows * problem.columns];
  if (static_cast<double>(static_cast<float>(first)) != first) return false;
  DenseSolver<double, float>(problem).solve(problem, index, background);
  return problem.status[index] != AssignmentStatus::invalid;
}

template <class T>
void solve_range(const AssignmentProblem& problem, std::int64_t begin, std::int64_t end, int threads) {
  if (problem.transposed) return solve_transposed<T>(problem, threads);
  const auto sample_of = [&](std::int64_t index) {
    return problem.columns > DenseSolver<T>::kMaxInOrder ? sample_rows<T>(problem, index) : Sample{};
  };
  if (problem.columns < Sparse<T>::kMinColumns) {
    DenseSolver<T> dense(problem);
    for (std::int64_t index = begin; index < end; ++index) {
      const Sample sample = sample_of(index);
      if (sample.two_valued && TwoValuedSolver<T>(problem).solve(problem, index)) continue;
      if constexpr (sizeof(T) == sizeof(double)) {
        if (solve_narrowed(problem, index, sample.background)) continue;
      }
      dense.solve(problem, index, sample.background);
    }
    return;
  }
  Sparse<T> sparse(problem);
  for (std::int64_t index = begin; index < end; ++index) {
    if (sample_of(index).two_valued && TwoValuedSolver<T>(problem).solve(problem, index)) continue;
    if (!sparse.solve(problem, index, threads)) DenseSolver<T>(problem).solve(problem, index);
  }
}

template <class T>
void solve_batch(const AssignmentProblem& problem) {
  // The threads share a single problem; of several problems, each thread solves some.
  if (problem.batch == 1) return solve_range<T>(problem, 0, 1, problem.threads);
  bool out_of_memory = false;
  auto body = [&](std::int64_t begin, std::int64_t end) {
    try {
      solve_range<T>(problem, begin, end, 1);
    } catch (const OutOfMemory&) {
      __atomic_store_n(&out_of_memory, true, __ATOMIC_RELAXED);
    }
  };
  // Starting a thread pays off for about a million entries.
  const std::int64_t entries = problem.rows * problem.columns;
  parallel_for(problem.threads, problem.batch, (1 << 20) / (entries + 1) + 1, body);
  if (out_of_memory) throw OutOfMemory{};
}

}  // namespace

void linear_assignment(const AssignmentProblem& problem) {
  switch (problem.type) {
    case ScalarType::float16: return solve_batch<Half>(problem);
    case ScalarType::bfloat16: return solve_batch<BFloat16>(problem);
    case ScalarType::float32: return solve_batch<float>(problem);
    case ScalarType::float64: return solve_batch<double>(problem);
  }
}

}  // namespace mudsc::MUDSC_ISA
