// Assignment of a matrix that is computed from features. A file of its own, so that it compiles beside assignment.cpp.
#include "assignment_pairwise.hpp"
#include "assignment_sparse.hpp"
#include "mudsc/assignment.hpp"

namespace mudsc::MUDSC_ISA {

bool pairwise_assignment(const PairwiseProblem& problem) {
  return SparseSolver<PairwiseRows>(problem).solve(problem, 0, problem.threads);
}

}  // namespace mudsc::MUDSC_ISA
