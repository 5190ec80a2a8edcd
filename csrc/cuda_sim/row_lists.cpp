// The lists of csrc/cuda/assignment_large.cu as plain loops: bitwise the same entries, ties included, at sizes that are
// too large for the simulator.
#include "row_lists.hpp"

#include <algorithm>
#include <limits>
#include <vector>

namespace mudsc::cuda_sim {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

class RowLister {
 public:
  RowLister(const cuda::LargeProblem& problem, const cuda::ListRequest& request, std::int64_t threads)
      : problem_(problem), request_(request), threads_(threads), keys_(problem.columns) {}

  void list(std::int64_t place) {
    const std::int64_t row = request_.rows == nullptr ? place : request_.rows[place];
    const float* const values = static_cast<const float*>(problem_.values) + row * problem_.columns;
    const float sign = problem_.maximize ? -1.0f : 1.0f;
    for (std::int64_t j = 0; j < problem_.columns; ++j) {
      keys_[j] = static_cast<double>(sign * values[j]) - request_.duals[j];
    }
    listed_.clear();
    const double floor = choose(row);
    std::int32_t* const columns = request_.columns + place * request_.capacity;
    float* const costs = request_.costs + place * request_.capacity;
    for (std::size_t k = 0; k < listed_.size(); ++k) {
      columns[k] = listed_[k];
      costs[k] = sign * values[listed_[k]];
    }
    request_.sizes[place] = static_cast<std::int32_t>(listed_.size());
    request_.floors[place] = floor;
  }

 private:
  // Lists columns, and returns a lower bound of the cost of all others.
  double choose(std::int64_t row) {
    if (request_.capacity >= problem_.columns) {
      for (std::int32_t j = 0; j < problem_.columns; ++j) listed_.push_back(j);
      return kInfinity;
    }
    double bound = 0.0;
    if (request_.wanted <= threads_ / 2) {
      bound = bound_of_threads();
      add_up_to(bound, true);
      if (static_cast<std::int64_t>(listed_.size()) <= request_.capacity) return in_order(bound);
      listed_.clear();
    }
    ranked_ = keys_;
    std::nth_element(ranked_.begin(), ranked_.begin() + (request_.wanted - 1), ranked_.end());
    bound = ranked_[request_.wanted - 1];
    add_up_to(bound, false);
    std::int64_t j = row * problem_.columns / problem_.rows;
    for (std::int64_t seen = 0; seen < problem_.columns; ++seen, j = j + 1 < problem_.columns ? j + 1 : 0) {
      if (static_cast<std::int64_t>(listed_.size()) == request_.capacity) break;
      if (keys_[j] == bound) listed_.push_back(static_cast<std::int32_t>(j));
    }
    return in_order(bound);
  }

  // The key of rank `wanted` among the smallest keys of each thread.
  double bound_of_threads() {
    ranked_.assign(threads_, kInfinity);
    for (std::int64_t first = 0; first < problem_.columns; first += threads_) {
      const std::int64_t count = std::min(threads_, problem_.columns - first);
      for (std::int64_t k = 0; k < count; ++k) ranked_[k] = std::min(keys_[first + k], ranked_[k]);
    }
    std::nth_element(ranked_.begin(), ranked_.begin() + (request_.wanted - 1), ranked_.end());
    return ranked_[request_.wanted - 1];
  }

  void add_up_to(double bound, bool inclusive) {
    for (std::int32_t j = 0; j < problem_.columns; ++j) {
      if (keys_[j] < bound || (inclusive && keys_[j] == bound)) listed_.push_back(j);
    }
  }

  double in_order(double bound) {
    std::sort(listed_.begin(), listed_.end(),
              [this](std::int32_t a, std::int32_t b) { return keys_[a] != keys_[b] ? keys_[a] < keys_[b] : a < b; });
    return bound;
  }

  const cuda::LargeProblem& problem_;
  const cuda::ListRequest& request_;
  std::int64_t threads_;
  std::vector<double> keys_, ranked_;
  std::vector<std::int32_t> listed_;
};

}  // namespace

void list_rows(const cuda::LargeProblem& problem, const cuda::ListRequest& request, std::int64_t threads) {
  RowLister lister(problem, request, threads);
  for (std::int64_t place = 0; place < request.count; ++place) lister.list(place);
}

}  // namespace mudsc::cuda_sim
