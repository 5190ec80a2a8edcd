// The dense passes of one large assignment: each reads rows of the matrix once, a block a row, in coalesced order.
//
//   1. assignment_inspect: the difference between each row's two smallest costs, from which the size of a bid follows,
//      and a hash that finds equal rows (assignment_check_classes compares them): otherwise dead units would outbid one
//      another forever.
//   2. assignment_bid: an auction (D. P. Bertsekas, "The auction algorithm", Annals of Operations Research 14, 1988) in
//      Jacobi rounds, in one cooperative launch that never waits for the host. Every row without a column finds its
//      best and second-best column at the current prices and offers the price that makes both equally good, plus
//      epsilon. The highest offer for a column wins; among equal offers, the first row's. Offers meet in one 64-bit
//      maximum per column, with the price in the high bits and the row in the low ones, so that rounds do not depend on
//      the order of threads. The auction ends when few rows are left: those would take most of the rounds, and a path
//      search on lists assigns them at once.
//   3. assignment_list: the few smallest reduced costs of each row, in double, and a floor that no unlisted entry is
//      below. Each of 256 threads finds its smallest entry; the bound is the one of rank `wanted` among these, and
//      entries up to the bound are listed. Only where more than `capacity` entries qualify, which takes ties, the bound
//      is found by bisection over the whole row.
//   4. assignment_certify: recomputes the row duals over every entry, in double: the proof of optimality.
//
// Memory traffic: passes 1, 4 and the first round read the matrix once; 3 reads a row twice, the second time from L2.
// A later round reads one row per bidder. Prices and duals are read with every row, from L1 and L2.
#include <type_traits>

#include "block.hpp"
#include "mudsc/assignment_cuda.hpp"

namespace mudsc::cuda {
namespace {

constexpr int kThreads = block_threads(256, 64);

template <class T>
struct Rows {
  const T* values;
  std::int64_t rows, columns;
  float sign;  // 1 if values are costs, -1 if they are to be maximized

  __device__ const T* row(std::int64_t index) const { return values + index * columns; }
};

// The largest and the second largest worth of a row's columns, and the first column of the largest.
struct BestTwo {
  float first, second;
  std::int32_t column;
};
__device__ __forceinline__ BestTwo shuffle_xor(BestTwo best, int distance) {
  return {__shfl_xor_sync(kWholeWarp, best.first, distance), __shfl_xor_sync(kWholeWarp, best.second, distance),
          __shfl_xor_sync(kWholeWarp, best.column, distance)};
}
struct BetterTwo {
  __device__ __forceinline__ BestTwo operator()(BestTwo a, BestTwo b) const {
    const bool swap = b.first > a.first || (b.first == a.first && b.column < a.column);
    const BestTwo high = swap ? b : a, low = swap ? a : b;
    return {high.first, low.first > high.second ? low.first : high.second, high.column};
  }
};

template <class T>
__device__ BestTwo best_two(const Rows<T>& matrix, std::int64_t row, const float* prices) {
  const T* const values = matrix.row(row);
  const BestTwo nothing{-infinity<float>, -infinity<float>, 0x7fffffff};
  BestTwo best = nothing;
  MUDSC_UNROLL_4
  for (std::int64_t j = threadIdx.x; j < matrix.columns; j += kThreads) {
    const float worth = -matrix.sign * widen(values[j]) - prices[j];
    best = BetterTwo()(best, BestTwo{worth, -infinity<float>, static_cast<std::int32_t>(j)});
  }
  return block_combine(best, BetterTwo(), nothing);
}

// S. Vigna's finaliser of splitmix64: every bit of the result depends on every bit of the number.
__device__ __forceinline__ unsigned long long mixed(unsigned long long number) {
  number += 0x9e3779b97f4a7c15ull;
  number = (number ^ number >> 30) * 0xbf58476d1ce4e5b9ull;
  number = (number ^ number >> 27) * 0x94d049bb133111ebull;
  return number ^ number >> 31;
}

struct Maximum {
  __device__ __forceinline__ float operator()(float a, float b) const { return a > b ? a : b; }
};

template <class T>
__global__ void __launch_bounds__(kThreads) inspect_rows(const Rows<T> matrix, const Inspection inspection) {
  const std::int64_t row = blockIdx.x;
  const T* const values = matrix.row(row);
  float largest = 0.0f;
  unsigned long long hash = 0;
  MUDSC_UNROLL_4
  for (std::int64_t j = threadIdx.x; j < matrix.columns; j += kThreads) {
    const float value = widen(values[j]) + 0.0f;  // 0 and -0 are equal
    const float magnitude = fabsf(value);
    hash += mixed(static_cast<unsigned long long>(j) << 32 | __float_as_uint(value));
    largest = magnitude <= largest ? largest : magnitude < infinity<float> ? magnitude : infinity<float>;  // NaN too
  }
  largest = block_combine(largest, Maximum(), 0.0f);
  hash = block_combine(hash, Sum(), 0ull);
  const BestTwo best = best_two(matrix, row, inspection.prices);
  if (threadIdx.x == 0) {
    inspection.magnitudes[row] = largest;
    inspection.gaps[row] = best.first - best.second;
    inspection.hashes[row] = static_cast<std::int64_t>(hash);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) check_classes(const Rows<T> matrix, std::int32_t* class_of_row) {
  const std::int64_t row = blockIdx.x, first = class_of_row[row];
  if (first == row) return;
  const T* const values = matrix.row(row);
  const T* const others = matrix.row(first);
  std::int32_t different = 0;
  MUDSC_UNROLL_4
  for (std::int64_t j = threadIdx.x; j < matrix.columns; j += kThreads) {
    different |= widen(values[j]) != widen(others[j]);
  }
  different = block_combine(different, Sum(), 0);
  if (threadIdx.x == 0 && different != 0) class_of_row[row] = static_cast<std::int32_t>(row);
}

struct BidState {
  Auction auction;
  unsigned long long* offers;    // [2, columns]: of this round and of the next
  std::int32_t* active;          // [2, rows]: rows without a column, of this round and of the next
  std::int32_t* offered_column;  // [rows]: by place among the active
  std::int32_t* row_of_column;   // [columns]
  std::int32_t* active_count;    // [3]: of this round, of the next, and of the one after
};

__device__ __forceinline__ std::int32_t bidder_of(unsigned long long offer) {
  return static_cast<std::int32_t>(0xffffffffu - static_cast<std::uint32_t>(offer));
}

// A block an active row.
template <class T>
__device__ void make_offers(const Rows<T>& matrix, const BidState& state, std::int64_t round, std::int32_t count) {
  const std::int32_t* const active = state.active + round % 2 * matrix.rows;
  unsigned long long* const offers = state.offers + round % 2 * matrix.columns;
  const float epsilon = *state.auction.epsilon;
  for (std::int32_t place = blockIdx.x; place < count; place += gridDim.x) {
    const std::int32_t row = active[place];
    const BestTwo best = best_two(matrix, row, state.auction.prices);
    if (threadIdx.x != 0) continue;
    // A price must rise, however coarse float32 is there.
    const float price = state.auction.prices[best.column];
    const std::uint32_t offered = ordered(price + ((best.first - best.second) + epsilon)), least = ordered(price) + 1;
    const unsigned long long high = offered > least ? offered : least;
    state.offered_column[place] = best.column;
    atomicMax(&offers[best.column], high << 32 | (0xffffffffu - static_cast<std::uint32_t>(row)));
  }
}

// A thread an active row: the winner of a column takes it from the row that had it; whoever has none is active next.
template <class T>
__device__ void award(const Rows<T>& matrix, const BidState& state, std::int64_t round, std::int32_t count) {
  const std::int32_t* const active = state.active + round % 2 * matrix.rows;
  std::int32_t* const next_active = state.active + (round + 1) % 2 * matrix.rows;
  const unsigned long long* const offers = state.offers + round % 2 * matrix.columns;
  unsigned long long* const next_offers = state.offers + (round + 1) % 2 * matrix.columns;
  std::int32_t* const next_count = &state.active_count[(round + 1) % 3];
  const std::int64_t thread = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const std::int64_t threads = static_cast<std::int64_t>(gridDim.x) * kThreads;
  for (std::int64_t place = thread; place < count; place += threads) {
    const std::int32_t row = active[place], column = state.offered_column[place];
    std::int32_t without = row;
    if (bidder_of(offers[column]) == row) {
      without = state.row_of_column[column];
      state.auction.prices[column] = from_ordered(static_cast<std::uint32_t>(offers[column] >> 32));
      state.row_of_column[column] = row;
      state.auction.column_of_row[row] = column;
      if (without >= 0) state.auction.column_of_row[without] = -1;
    }
    if (without >= 0) next_active[atomicAdd(next_count, 1)] = without;
  }
  for (std::int64_t j = thread; j < matrix.columns; j += threads) next_offers[j] = 0;
  if (thread == 0) {
    state.active_count[(round + 2) % 3] = 0;
    state.auction.counts[0] = round + 1;
    state.auction.counts[1] += count;
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 4) bid_in_rounds(const Rows<T> matrix, const BidState state) {
  const std::int64_t thread = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const std::int64_t threads = static_cast<std::int64_t>(gridDim.x) * kThreads;
  for (std::int64_t i = thread; i < matrix.rows; i += threads) state.auction.column_of_row[i] = -1;
  for (std::int64_t j = thread; j < matrix.columns; j += threads) {
    state.row_of_column[j] = -1;
    state.offers[j] = 0;
  }
  if (thread < 3) state.active_count[thread] = 0;
  if (thread < 2) state.auction.counts[thread] = 0;
  if (!(*state.auction.epsilon > 0.0f)) return;
  grid_barrier();
  for (std::int64_t i = thread; i < matrix.rows; i += threads) {
    if (state.auction.class_of_row[i] == i) {
      state.active[atomicAdd(state.active_count, 1)] = static_cast<std::int32_t>(i);
    }
  }
  grid_barrier();
  for (std::int64_t round = 0; round < state.auction.max_rounds; ++round) {
    const std::int32_t count = state.active_count[round % 3];
    if (count <= state.auction.stop || state.auction.counts[1] >= state.auction.max_bids) return;
    make_offers(matrix, state, round, count);
    grid_barrier();
    award(matrix, state, round, count);
    grid_barrier();
  }
}

// Lists one row; a block's work.
template <class T>
class RowLister {
 public:
  __device__ RowLister(const Rows<T>& matrix, const ListRequest& request)
      : matrix_(matrix),
        request_(request),
        capacity_(static_cast<std::int32_t>(request.capacity)),
        place_(blockIdx.x),
        row_(request.rows == nullptr ? place_ : request.rows[place_]),
        values_(matrix.row(row_)),
        keys_(reinterpret_cast<unsigned long long*>(dynamic_shared())),
        columns_(reinterpret_cast<std::int32_t*>(keys_ + request.capacity)) {}

  __device__ void run() {
    if (request_.capacity >= matrix_.columns) return list_all();
    const std::int32_t wanted = static_cast<std::int32_t>(request_.wanted);
    unsigned long long bound = 0;
    if (wanted <= kThreads / 2) {  // of all threads the last is far behind: many entries would pass it
      bound = bound_of_threads(wanted);
      const std::int32_t found = collect(bound);
      if (found <= capacity_) return write(found, bound);
    }
    bound = bound_by_bisection(wanted);
    // Fewer than `wanted` entries are less than the bound; entries equal to it fill the list.
    const std::int32_t less = collect(bound - 1);
    write(fill_with_ties(less, bound), bound);
  }

 private:
  __device__ float cost(std::int64_t column) const { return matrix_.sign * widen(values_[column]); }
  __device__ unsigned long long key(std::int64_t column) const {
    return ordered(static_cast<double>(cost(column)) - request_.duals[column] + 0.0);
  }

  // The one of rank `wanted` among the threads' least keys; as many entries at least do not exceed it.
  __device__ unsigned long long bound_of_threads(std::int32_t wanted) const {
    MUDSC_SHARED(unsigned long long, of_thread, kThreads);
    MUDSC_SHARED(unsigned long long, chosen, 1);
    unsigned long long least = ~0ull;
    MUDSC_UNROLL_4
    for (std::int64_t j = threadIdx.x; j < matrix_.columns; j += kThreads) least = Minimum()(key(j), least);
    of_thread[threadIdx.x] = least;
    __syncthreads();
    std::int32_t rank = 0;
    for (int k = 0; k < kThreads; ++k) {
      rank += of_thread[k] < least || (of_thread[k] == least && k < static_cast<int>(threadIdx.x));
    }
    if (rank == wanted - 1) chosen[0] = least;
    __syncthreads();
    return chosen[0];
  }

  // The key of rank `wanted` in the whole row.
  __device__ unsigned long long bound_by_bisection(std::int32_t wanted) const {
    unsigned long long low = 0, high = ~0ull;  // fewer than `wanted` are below low, at least as many up to high
    while (low < high) {
      const unsigned long long middle = low + (high - low) / 2;
      std::int32_t below = 0;
      for (std::int64_t j = threadIdx.x; j < matrix_.columns; j += kThreads) below += key(j) <= middle;
      if (block_combine(below, Sum(), 0) >= wanted) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    return low;
  }

  // Collects the entries up to `bound`, in any order, and returns how many there are; those beyond the capacity are
  // lost.
  __device__ std::int32_t collect(unsigned long long bound) const {
    MUDSC_SHARED(std::int32_t, found, 1);
    __syncthreads();  // who still reads the count of before
    if (threadIdx.x == 0) found[0] = 0;
    __syncthreads();
    MUDSC_UNROLL_4
    for (std::int64_t j = threadIdx.x; j < matrix_.columns; j += kThreads) {
      const unsigned long long candidate = key(j);
      if (candidate > bound) continue;
      const std::int32_t at = atomicAdd(found, 1);
      if (at >= capacity_) continue;
      keys_[at] = candidate;
      columns_[at] = static_cast<std::int32_t>(j);
    }
    __syncthreads();
    return found[0];
  }

  // Appends entries equal to `bound` until the list is full; returns how many it then has. Rows begin at different
  // places, so that rows full of ties do not all list the same columns.
  __device__ std::int32_t fill_with_ties(std::int32_t size, unsigned long long bound) const {
    MUDSC_SHARED(std::int32_t, filled, 1);
    if (threadIdx.x < kWarp) {
      const std::int32_t lane = static_cast<std::int32_t>(threadIdx.x);
      const std::int64_t start = row_ * matrix_.columns / matrix_.rows;
      for (std::int64_t first = 0; first < matrix_.columns && size < capacity_; first += kWarp) {
        const std::int64_t at = start + first + lane, column = at < matrix_.columns ? at : at - matrix_.columns;
        const bool ties = first + lane < matrix_.columns && key(column) == bound;
        const unsigned all = __ballot_sync(kWholeWarp, ties);
        const std::int32_t place = size + __popc(all & ((1u << lane) - 1));
        if (ties && place < capacity_) {
          keys_[place] = bound;
          columns_[place] = static_cast<std::int32_t>(column);
        }
        size += __popc(all);
      }
      if (lane == 0) filled[0] = size < capacity_ ? size : capacity_;
    }
    __syncthreads();
    return filled[0];
  }

  // Writes the collected entries in ascending order, so that results do not depend on the order of threads.
  __device__ void write(std::int32_t size, unsigned long long floor) const {
    for (std::int32_t k = threadIdx.x; k < size; k += kThreads) {
      std::int32_t rank = 0;
      for (std::int32_t other = 0; other < size; ++other) {
        rank += keys_[other] < keys_[k] || (keys_[other] == keys_[k] && columns_[other] < columns_[k]);
      }
      request_.columns[place_ * capacity_ + rank] = columns_[k];
      request_.costs[place_ * capacity_ + rank] = cost(columns_[k]);
    }
    finish(size, from_ordered(floor));
  }

  __device__ void list_all() const {
    for (std::int64_t j = threadIdx.x; j < matrix_.columns; j += kThreads) {
      request_.columns[place_ * capacity_ + j] = static_cast<std::int32_t>(j);
      request_.costs[place_ * capacity_ + j] = cost(j);
    }
    finish(static_cast<std::int32_t>(matrix_.columns), infinity<double>);
  }

  __device__ void finish(std::int32_t size, double floor) const {
    if (threadIdx.x != 0) return;
    request_.sizes[place_] = size;
    request_.floors[place_] = floor;
  }

  Rows<T> matrix_;
  ListRequest request_;
  std::int32_t capacity_;
  std::int64_t place_, row_;
  const T* values_;
  unsigned long long* keys_;
  std::int32_t* columns_;
};

template <class T>
__global__ void __launch_bounds__(kThreads, 4) list_rows(const Rows<T> matrix, const ListRequest request) {
  RowLister<T>(matrix, request).run();
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    certify_rows(const Rows<T> matrix, const double* duals, const std::int64_t* column_of_row, double* least,
                 double* paired) {
  const std::int64_t row = blockIdx.x;
  const T* const values = matrix.row(row);
  double smallest = infinity<double>;
  MUDSC_UNROLL_4
  for (std::int64_t j = threadIdx.x; j < matrix.columns; j += kThreads) {
    smallest = Minimum()(static_cast<double>(matrix.sign * widen(values[j])) - duals[j], smallest);
  }
  smallest = block_combine(smallest, Minimum(), infinity<double>);
  if (threadIdx.x == 0) {
    least[row] = smallest;
    paired[row] = static_cast<double>(matrix.sign * widen(values[column_of_row[row]]));
  }
}

// Calls body with the matrix in its own type.
template <class Body>
void with_rows(const LargeProblem& problem, const Body& body) {
  const float sign = problem.maximize ? -1.0f : 1.0f;
  switch (problem.type) {
    case ScalarType::float16:
      return body(Rows<Half>{static_cast<const Half*>(problem.values), problem.rows, problem.columns, sign});
    case ScalarType::bfloat16:
      return body(Rows<BFloat16>{static_cast<const BFloat16*>(problem.values), problem.rows, problem.columns, sign});
    case ScalarType::float32:
      return body(Rows<float>{static_cast<const float*>(problem.values), problem.rows, problem.columns, sign});
    case ScalarType::float64: throw LaunchError("assignment", "values must be float32 or smaller");
  }
}

LaunchShape block_per_row(std::int64_t rows, std::size_t shared_bytes) {
  return {dim3(static_cast<unsigned>(rows)), dim3(kThreads), shared_bytes};
}

}  // namespace

void assignment_inspect(const LargeProblem& problem, const Inspection& inspection, Stream stream) {
  with_rows(problem, [&](const auto& rows) {
    launch("assignment_inspect", inspect_rows<std::decay_t<decltype(*rows.values)>>, block_per_row(problem.rows, 0),
           stream, rows, inspection);
  });
}

void assignment_check_classes(const LargeProblem& problem, std::int32_t* class_of_row, Stream stream) {
  with_rows(problem, [&](const auto& rows) {
    launch("assignment_check_classes", check_classes<std::decay_t<decltype(*rows.values)>>,
           block_per_row(problem.rows, 0), stream, rows, class_of_row);
  });
}

std::int64_t assignment_bid_workspace_bytes(const LargeProblem& problem) {
  const std::int64_t words = 3 * problem.rows + problem.columns + 3;
  return 2 * problem.columns * static_cast<std::int64_t>(sizeof(unsigned long long)) +
         words * static_cast<std::int64_t>(sizeof(std::int32_t));
}

void assignment_bid(const LargeProblem& problem, const Auction& auction, void* workspace, Stream stream) {
  BidState state{};
  state.auction = auction;
  state.offers = static_cast<unsigned long long*>(workspace);
  state.active = reinterpret_cast<std::int32_t*>(state.offers + 2 * problem.columns);
  state.offered_column = state.active + 2 * problem.rows;
  state.row_of_column = state.offered_column + problem.rows;
  state.active_count = state.row_of_column + problem.columns;
  with_rows(problem, [&](const auto& rows) {
    launch_cooperative("assignment_bid", bid_in_rounds<std::decay_t<decltype(*rows.values)>>, kThreads, 0, stream, rows,
                       state);
  });
}

void assignment_list(const LargeProblem& problem, const ListRequest& request, Stream stream) {
  const bool all = request.capacity >= problem.columns;
  const std::size_t entry = sizeof(unsigned long long) + sizeof(std::int32_t);
  const std::size_t bytes = all ? 0 : static_cast<std::size_t>(request.capacity) * entry;
  with_rows(problem, [&](const auto& rows) {
    launch("assignment_list", list_rows<std::decay_t<decltype(*rows.values)>>, block_per_row(request.count, bytes),
           stream, rows, request);
  });
}

void assignment_certify(const LargeProblem& problem, const double* duals, const std::int64_t* column_of_row,
                        double* least, double* paired, Stream stream) {
  with_rows(problem, [&](const auto& rows) {
    launch("assignment_certify", certify_rows<std::decay_t<decltype(*rows.values)>>, block_per_row(problem.rows, 0),
           stream, rows, duals, column_of_row, least, paired);
  });
}

}  // namespace mudsc::cuda
