// Exact linear assignment of many small problems: a block each, by shortest augmenting paths from one row after
// another.
//
// D. F. Crouse, "On implementing 2D rectangular assignment algorithms", IEEE TAES 52 (2016), with its choices between
// equally good assignments; sums are made in its order, so that results are those of csrc/cpu/assignment_dense.hpp for
// problems of up to 128 columns, and of scipy, to the last bit. Duals are double, in which float32 costs are exact.
//
// A step of a path search reads one row, lowers the distances of all open columns and finds the nearest: every thread
// has columns of its own. Up to 160 columns a block is one warp, which needs no barrier of more than its lanes. Memory
// traffic: one read of the matrices, into shared memory if they fit (233 x 233 in float32); else steps and certificate
// read rows from L2. The search's own arrays, 60 bytes a row and column, are always in shared memory.
#include "block.hpp"
#include "mudsc/assignment_cuda.hpp"

namespace mudsc::cuda {
namespace {

constexpr int kWarpColumns = 160;
constexpr int kBlockThreads = block_threads(256, 64);

// Nearest column: the least distance; of several, the largest key.
struct Candidate {
  double distance;
  std::uint32_t key;
};
__device__ __forceinline__ Candidate shuffle_xor(Candidate candidate, int distance) {
  return {__shfl_xor_sync(kWholeWarp, candidate.distance, distance),
          __shfl_xor_sync(kWholeWarp, candidate.key, distance)};
}
struct Nearest {
  __device__ __forceinline__ Candidate operator()(Candidate a, Candidate b) const {
    return a.distance < b.distance || (a.distance == b.distance && a.key > b.key) ? a : b;
  }
};

// What the search of one problem keeps in shared memory.
struct SearchArrays {
  double *v, *distance;                                  // [columns]
  double *u, *tree_distance;                             // [rows]
  std::int32_t *parent, *row_of_column, *open, *place;   // [columns]; open columns in the order that decides ties
  std::int32_t *column_of_row, *tree_row, *tree_column;  // [rows]

  // Returns where the memory behind the arrays begins.
  __device__ __host__ unsigned char* assign_memory(unsigned char* memory, std::int64_t rows, std::int64_t columns) {
    v = reinterpret_cast<double*>(memory);
    distance = v + columns;
    u = distance + columns;
    tree_distance = u + rows;
    parent = reinterpret_cast<std::int32_t*>(tree_distance + rows);
    row_of_column = parent + columns;
    open = row_of_column + columns;
    place = open + columns;
    column_of_row = place + columns;
    tree_row = column_of_row + rows;
    tree_column = tree_row + rows;
    return reinterpret_cast<unsigned char*>(tree_column + rows);
  }
};

std::size_t array_bytes(std::int64_t rows, std::int64_t columns) {
  const std::int64_t bytes = columns * (2 * sizeof(double) + 4 * sizeof(std::int32_t)) +
                             rows * (2 * sizeof(double) + 3 * sizeof(std::int32_t));
  return static_cast<std::size_t>((bytes + 7) / 8 * 8);
}

template <class T, int kThreads>
class BatchSolver {
 public:
  __device__ BatchSolver(const AssignmentProblem& problem, bool in_shared_memory)
      : problem_(problem),
        rows_(static_cast<std::int32_t>(problem.rows)),
        columns_(static_cast<std::int32_t>(problem.columns)),
        thread_(static_cast<std::int32_t>(threadIdx.x)),
        sign_(problem.maximize ? -1.0 : 1.0),
        index_(blockIdx.x),
        values_(static_cast<const T*>(problem.values) + index_ * problem.rows * problem.columns) {
    unsigned char* const behind = s_.assign_memory(dynamic_shared(), rows_, columns_);
    if (!in_shared_memory) return;
    // Rows and columns take whole words, so that the matrix lies at a multiple of four bytes, and at one of eight here.
    T* const copy = reinterpret_cast<T*>(dynamic_shared() + (behind - dynamic_shared() + 7) / 8 * 8);
    for (std::int64_t k = thread_; k < problem.rows * problem.columns; k += kThreads) copy[k] = values_[k];
    values_ = copy;
    barrier();
  }

  __device__ void solve() {
    const AssignmentStatus status = search();
    if (thread_ == 0) problem_.status[index_] = status;
    if (status == AssignmentStatus::optimal) certify();
  }

 private:
  __device__ static void barrier() {
    if (kThreads == kWarp) {
      __syncwarp();
    } else {
      __syncthreads();
    }
  }
  template <class Item, class Combine>
  __device__ static Item combined(Item item, const Combine& combine, Item identity) {
    return kThreads == kWarp ? warp_combine(item, combine) : block_combine(item, combine, identity);
  }

  __device__ double cost(std::int32_t row, std::int32_t column) const {
    return sign_ * static_cast<double>(widen(values_[static_cast<std::int64_t>(row) * columns_ + column]));
  }

  __device__ AssignmentStatus search() {
    std::int32_t bad = 0;
    for (std::int32_t i = 0; i < rows_; ++i) {
      // False for NaN and for -inf.
      for (std::int32_t j = thread_; j < columns_; j += kThreads) bad |= !(cost(i, j) > -infinity<double>);
    }
    if (combined(bad, Sum(), 0) != 0) return AssignmentStatus::invalid;
    const double* const prices =
        problem_.prices != nullptr && rows_ == columns_ ? problem_.prices + index_ * columns_ : nullptr;
    for (std::int32_t j = thread_; j < columns_; j += kThreads) {
      s_.v[j] = prices == nullptr ? 0.0 : sign_ * prices[j];
      s_.row_of_column[j] = -1;
    }
    for (std::int32_t i = thread_; i < rows_; i += kThreads) s_.column_of_row[i] = -1;
    for (std::int32_t i = 0; i < rows_; ++i) {
      if (!augment(i)) return AssignmentStatus::infeasible;
    }
    return AssignmentStatus::optimal;
  }

  // Grows a shortest path tree from a free row until it meets a free column, then exchanges along the path.
  __device__ bool augment(std::int32_t root) {
    for (std::int32_t j = thread_; j < columns_; j += kThreads) {
      s_.distance[j] = infinity<double>;
      s_.open[j] = columns_ - 1 - j;
      s_.place[j] = columns_ - 1 - j;
    }
    if (thread_ == 0) s_.u[root] = 0.0;
    barrier();
    std::int32_t tree_size = 0, row = root, sink = -1;
    double reached = 0.0;
    for (;;) {
      if (thread_ == 0) {
        s_.tree_row[tree_size] = row;
        s_.tree_distance[tree_size] = reached;
      }
      ++tree_size;
      const Candidate nearest = nearest_column(row, reached);
      if (nearest.distance == infinity<double>) return false;
      reached = nearest.distance;
      const std::int32_t place =
          static_cast<std::int32_t>(nearest.key >> 31 ? nearest.key & 0x7fffffffu : 0x7fffffffu - nearest.key);
      const std::int32_t column = s_.open[place];
      if (s_.row_of_column[column] < 0) {
        sink = column;
        break;
      }
      row = s_.row_of_column[column];
      barrier();  // all have read what thread 0 changes now
      if (thread_ == 0) close(column, place, tree_size);
      barrier();
    }
    barrier();  // the tree is written
    for (std::int32_t k = thread_; k < tree_size; k += kThreads) {
      s_.u[s_.tree_row[k]] += reached - s_.tree_distance[k];
      if (k + 1 < tree_size) s_.v[s_.tree_column[k]] -= reached - s_.tree_distance[k + 1];
    }
    if (thread_ == 0) exchange(root, sink);
    barrier();
    return true;
  }

  // Takes a column out of the open ones; the last takes its place.
  __device__ void close(std::int32_t column, std::int32_t place, std::int32_t tree_size) {
    s_.tree_column[tree_size - 1] = column;
    s_.distance[column] = -infinity<double>;
    const std::int32_t last = s_.open[columns_ - tree_size];
    s_.open[place] = last;
    s_.place[last] = place;
  }

  __device__ void exchange(std::int32_t root, std::int32_t sink) {
    for (std::int32_t column = sink;;) {
      const std::int32_t row = s_.parent[column], next = s_.column_of_row[row];
      s_.row_of_column[column] = row;
      s_.column_of_row[row] = column;
      if (row == root) return;
      column = next;
    }
  }

  // Lowers the distances of open columns through `row`. Of several nearest columns the last free one in the order of
  // `open` is chosen, or else the first.
  __device__ Candidate nearest_column(std::int32_t row, double reached) {
    const double dual = s_.u[row];
    Candidate nearest{infinity<double>, 0};
    for (std::int32_t j = thread_; j < columns_; j += kThreads) {
      double distance = s_.distance[j];
      if (distance == -infinity<double>) continue;
      const double through = ((reached + cost(row, j)) - dual) - s_.v[j];
      if (through < distance) {
        distance = through;
        s_.distance[j] = through;
        s_.parent[j] = row;
      }
      const std::uint32_t place = static_cast<std::uint32_t>(s_.place[j]);
      const std::uint32_t key = s_.row_of_column[j] < 0 ? 0x80000000u | place : 0x7fffffffu - place;
      nearest = Nearest()(nearest, Candidate{distance, key});
    }
    return combined(nearest, Nearest(), Candidate{infinity<double>, 0});
  }

  // Recomputes row duals from the column duals over every entry, a warp a row; then objective and gap, summed in the
  // order of the rows.
  __device__ void certify() {
    for (std::int32_t i = thread_ / kWarp; i < rows_; i += kThreads / kWarp) {
      double least = infinity<double>;
      for (std::int32_t j = thread_ % kWarp; j < columns_; j += kWarp) least = Minimum()(cost(i, j) - s_.v[j], least);
      least = warp_combine(least, Minimum());
      if (thread_ % kWarp == 0) s_.u[i] = least;
    }
    barrier();
    if (thread_ == 0) {
      double objective = 0.0, slack = 0.0;
      for (std::int32_t i = 0; i < rows_; ++i) {
        const double matched = cost(i, s_.column_of_row[i]);
        objective += matched;
        slack += matched - s_.v[s_.column_of_row[i]] - s_.u[i];
      }
      problem_.objective[index_] = sign_ * objective;
      problem_.gap[index_] = slack;
    }
    for (std::int32_t i = thread_; i < rows_; i += kThreads) {
      problem_.column_of_row[index_ * rows_ + i] = s_.column_of_row[i];
      problem_.row_duals[index_ * rows_ + i] = sign_ * s_.u[i];
    }
    for (std::int32_t j = thread_; j < columns_; j += kThreads) {
      problem_.column_duals[index_ * columns_ + j] = sign_ * s_.v[j] + 0.0;
    }
  }

  AssignmentProblem problem_;
  std::int32_t rows_, columns_, thread_;
  double sign_;
  std::int64_t index_;
  const T* values_;
  SearchArrays s_;
};

template <class T, int kThreads>
__global__ void __launch_bounds__(kThreads, kThreads == kWarp ? 16 : 2)
    assignment_batch_kernel(const AssignmentProblem problem, bool in_shared_memory) {
  BatchSolver<T, kThreads>(problem, in_shared_memory).solve();
}

// Static shared memory of the kernel.
constexpr std::size_t kReservedShared = 1024;

template <class T>
void run(const AssignmentProblem& problem, Stream stream) {
  const std::size_t arrays = array_bytes(problem.rows, problem.columns);
  const std::size_t whole = arrays + static_cast<std::size_t>(problem.rows * problem.columns) * sizeof(T);
  const bool in_shared_memory = whole + kReservedShared <= shared_memory_limit("assignment_batch", stream);
  const std::size_t bytes = in_shared_memory ? whole : arrays;
  const dim3 blocks(static_cast<unsigned>(problem.batch));
  if (problem.columns <= kWarpColumns) {
    launch("assignment_batch", assignment_batch_kernel<T, kWarp>, {blocks, dim3(kWarp), bytes}, stream, problem,
           in_shared_memory);
  } else {
    launch("assignment_batch", assignment_batch_kernel<T, kBlockThreads>, {blocks, dim3(kBlockThreads), bytes}, stream,
           problem, in_shared_memory);
  }
}

}  // namespace

bool assignment_batch_fits(const AssignmentProblem& problem, Stream stream) {
  return array_bytes(problem.rows, problem.columns) + kReservedShared <=
         shared_memory_limit("assignment_batch", stream);
}

void assignment_batch(const AssignmentProblem& problem, Stream stream) {
  switch (problem.type) {
    case ScalarType::float16: return run<Half>(problem, stream);
    case ScalarType::bfloat16: return run<BFloat16>(problem, stream);
    case ScalarType::float32: return run<float>(problem, stream);
    case ScalarType::float64: return run<double>(problem, stream);
  }
}

}  // namespace mudsc::cuda
