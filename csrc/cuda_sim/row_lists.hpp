// See row_lists.cpp.
#pragma once

#include "mudsc/assignment_cuda.hpp"

namespace mudsc::cuda_sim {

// assignment_list on float32 values, with so many threads in a block.
void list_rows(const cuda::LargeProblem& problem, const cuda::ListRequest& request, std::int64_t threads);

}  // namespace mudsc::cuda_sim
