#include "mudsc/threads.hpp"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace mudsc {
namespace {

// A waiting worker first spins this many times (about ten microseconds), then starts to yield the processor.
constexpr int kPauses = 300;
// Number of yields before a worker sleeps.
constexpr int kYields = 100;

inline void wait_a_little(int turn) {
  if (turn >= kPauses) return std::this_thread::yield();
#if defined(__SSE2__)
  _mm_pause();
#endif
}

}  // namespace

void parallel_ranges(int threads, std::int64_t count, std::int64_t grain,
                     void (*body)(void* context, std::int64_t begin, std::int64_t end), void* context) {
  if (count <= 0) return;
  const std::int64_t most = (count + std::max<std::int64_t>(grain, 1) - 1) / std::max<std::int64_t>(grain, 1);
  const std::int64_t parts = std::max<std::int64_t>(1, std::min<std::int64_t>(threads, most));
  const auto bound = [&](std::int64_t part) { return count / parts * part + std::min(count % parts, part); };

  std::vector<std::thread> workers;
  workers.reserve(static_cast<std::size_t>(parts - 1));
  std::int64_t started = 1;
  try {
    for (; started < parts; ++started) workers.emplace_back(body, context, bound(started), bound(started + 1));
  } catch (const std::system_error&) {
    // No more threads can be created: the caller does the remaining work.
  }
  body(context, 0, bound(1));
  if (started < parts) body(context, bound(started), count);
  for (std::thread& worker : workers) worker.join();
}

struct Team::State {
  // Odd while a phase is open. A worker enters a phase by incrementing `busy` and checking that the phase is still
  // open. The caller closes the phase and waits until no worker is busy, so nobody reads the members below while they
  // change.
  alignas(64) std::atomic<std::uint64_t> phase{0};
  std::int64_t count = 0, grain = 1;
  void (*body)(void*, std::int64_t, std::int64_t, int) = nullptr;
  void* context = nullptr;
  alignas(64) std::atomic<std::int64_t> next{0};  // first item that no member has taken
  alignas(64) std::atomic<int> busy{0};
  alignas(64) std::atomic<int> sleeping{0};
  std::atomic<bool> ending{false};
  std::mutex mutex;
  std::condition_variable wake;
  std::vector<std::thread> workers;

  void work(int member) {
    for (;;) {
      const std::int64_t begin = next.fetch_add(grain, std::memory_order_relaxed);
      if (begin >= count) return;
      body(context, begin, std::min(begin + grain, count), member);
    }
  }

  void serve(int member) {
    std::uint64_t done = 0;
    const auto called = [&] {
      const std::uint64_t now = phase.load();
      return ending.load() || (now % 2 == 1 && now != done);
    };
    for (;;) {
      for (int turn = 0; turn < kPauses + kYields && !called(); ++turn) wait_a_little(turn);
      if (!called()) {
        std::unique_lock<std::mutex> lock(mutex);
        sleeping.fetch_add(1);
        wake.wait(lock, called);
        sleeping.fetch_sub(1);
      }
      if (ending.load()) return;
      const std::uint64_t now = phase.load();
      busy.fetch_add(1);
      if (now % 2 == 1 && phase.load() == now) {
        work(member);
        done = now;
      }
      busy.fetch_sub(1);
    }
  }

  void wake_sleepers() {
    if (sleeping.load() == 0) return;
    {
      const std::lock_guard<std::mutex> lock(mutex);
    }
    wake.notify_all();
  }
};

Team::Team(int threads) : state_(nullptr) {
  if (threads <= 1) return;
  auto state = std::make_unique<State>();
  state->workers.reserve(static_cast<std::size_t>(threads - 1));
  try {
    for (int member = 1; member < threads; ++member) {
      state->workers.emplace_back([shared = state.get(), member] { shared->serve(member); });
    }
  } catch (const std::system_error&) {
    // No more threads can be created: the existing ones do the work.
  }
  state_ = state.release();
}

Team::~Team() {
  if (state_ == nullptr) return;
  state_->ending.store(true);
  state_->wake_sleepers();
  for (std::thread& worker : state_->workers) worker.join();
  delete state_;
}

int Team::size() const { return state_ == nullptr ? 1 : static_cast<int>(state_->workers.size()) + 1; }

void Team::run_ranges(std::int64_t count, std::int64_t grain,
                      void (*body)(void* context, std::int64_t begin, std::int64_t end, int member), void* context) {
  if (count <= 0) return;
  if (state_ == nullptr || count <= grain) return body(context, 0, count, 0);
  State& state = *state_;
  state.count = count;
  state.grain = std::max<std::int64_t>(grain, 1);
  state.body = body;
  state.context = context;
  state.next.store(0, std::memory_order_relaxed);
  state.phase.fetch_add(1);
  state.wake_sleepers();
  state.work(0);
  state.phase.fetch_add(1);
  for (int turn = 0; state.busy.load() != 0; ++turn) wait_a_little(std::min(turn, kPauses));
}

}  // namespace mudsc
