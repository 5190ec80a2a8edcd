// Linear assignment: chooses a solver for the problems of a batch and shares them out to threads.
#include "mudsc/assignment.hpp"

#include "assignment_dense.hpp"
#include "assignment_sparse.hpp"

namespace mudsc::MUDSC_ISA {
namespace {

template <class T>
void solve_range(const AssignmentProblem& problem, std::int64_t begin, std::int64_t end, int threads) {
  if (problem.columns < SparseSolver<T>::kLeastColumns) {
    DenseSolver<T> dense(problem);
    for (std::int64_t index = begin; index < end; ++index) dense.solve(problem, index);
    return;
  }
  SparseSolver<T> sparse(problem);
  for (std::int64_t index = begin; index < end; ++index) {
    if (!sparse.solve(problem, index, threads)) DenseSolver<T>(problem).solve(problem, index);
  }
}

template <class T>
void solve_batch(const AssignmentProblem& problem) {
  // One problem is shared by the threads where that helps; of several, each thread solves some.
  if (problem.batch == 1) return solve_range<T>(problem, 0, 1, problem.threads);
  bool out_of_memory = false;
  auto body = [&](std::int64_t begin, std::int64_t end) {
    try {
      solve_range<T>(problem, begin, end, 1);
    } catch (const OutOfMemory&) {
      __atomic_store_n(&out_of_memory, true, __ATOMIC_RELAXED);
    }
  };
  // A thread is worth starting for about a million entries.
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
