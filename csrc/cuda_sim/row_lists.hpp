// See row_lists.cpp.
#pragma once

#include "mudsc/assignment_cuda.hpp"

namespace mudsc::cuda_sim {

// assignment_list on float32 values, with the given number of threads per block.
void list_rows(const cuda::LargeProblem& problem, const cuda::ListRequest& request, std::int64_t threads);

}  // namespace mudsc::cuda_sim
