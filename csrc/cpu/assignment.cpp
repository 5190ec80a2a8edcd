// Linear assignment: chooses a solver for each problem of a batch and distributes the problems over threads.
#include "mudsc/assignment.hpp"

#include "assignment_dense.hpp"
#include "assignment_sparse.hpp"

namespace mudsc::MUDSC_ISA {
namespace {

// Whether most pairs share one cost, the highest of their row: forbidden pairs with one large cost, or boxes that mostly
// do not overlap. Samples a few rows that are not constant.
template <class T>
bool has_background(const AssignmentProblem& problem, std::int64_t index) {
  constexpr std::int64_t kRows = 8, kMinShare = 2;
  const std::int64_t columns = problem.columns, step = problem.rows / kRows + 1;
  const T* const values = static_cast<const T*>(problem.values) + index * problem.rows * columns;
  const auto sign = static_cast<typename ArithmeticOf<T>::type>(problem.maximize ? -1 : 1);
  std::int64_t varied = 0, with_background = 0;
  for (std::int64_t i = 0; i < problem.rows; i += step) {
    const T* const row = values + i * columns;
    auto highest = sign * widen(row[0]), lowest = highest;
    for (std::int64_t j = 1; j < columns; ++j) {
      const auto cost = sign * widen(row[j]);
      highest = cost > highest ? cost : highest;
      lowest = cost < lowest ? cost : lowest;
    }
    if (!(lowest < highest)) continue;
    std::int64_t equal = 0;
    for (std::int64_t j = 0; j < columns; ++j) equal += sign * widen(row[j]) == highest;
    ++varied;
    with_background += kMinShare * equal > columns;
  }
  return varied > 0 && with_background == varied;
}

// With a background, lists are faster from this many columns on.
constexpr std::int64_t kMinColumnsWithBackground = 224;

template <class T>
void solve_range(const AssignmentProblem& problem, std::int64_t begin, std::int64_t end, int threads) {
  if (problem.columns < SparseSolver<T>::kMinColumns) {
    DenseSolver<T> dense(problem);
    for (std::int64_t index = begin; index < end; ++index) {
      const bool background = problem.columns > DenseSolver<T>::kMaxInOrder && has_background<T>(problem, index);
      const bool on_lists = background && problem.columns >= kMinColumnsWithBackground;
      if (!on_lists || !SparseSolver<T>(problem).solve(problem, index, threads)) {
        dense.solve(problem, index, background);
      }
    }
    return;
  }
  SparseSolver<T> sparse(problem);
  for (std::int64_t index = begin; index < end; ++index) {
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
