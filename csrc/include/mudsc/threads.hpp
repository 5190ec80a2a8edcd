// Fork-join parallelism for kernels.
#pragma once

#include <cstdint>

namespace mudsc {

// Calls body(context, begin, end) on disjoint ranges that cover [0, count), on at most `threads` threads, the
// caller's among them, and returns when all are done. Ranges hold at least `grain` items, so small work stays on
// the caller. Bodies must not throw.
//
// Threads are started per call (about 20 us each) rather than pooled: no state survives a call, so fork() and
// interpreter shutdown are safe; kernels ask for threads only where the work is milliseconds.
void parallel_ranges(int threads, std::int64_t count, std::int64_t grain,
                     void (*body)(void* context, std::int64_t begin, std::int64_t end), void* context);

// The same for a callable object.
template <class Body>
inline void parallel_for(int threads, std::int64_t count, std::int64_t grain, Body& body) {
  parallel_ranges(
      threads, count, grain,
      [](void* context, std::int64_t begin, std::int64_t end) { (*static_cast<Body*>(context))(begin, end); }, &body);
}

// A team of threads for many short parallel phases of a few microseconds each. Between phases the threads spin briefly,
// then sleep. They are joined at the end.
//
// Results must not depend on which member runs an item: members take items as they become free.
class Team {
 public:
  // At most `threads` members, including the calling thread; fewer if the system cannot create more.
  explicit Team(int threads);
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;
  ~Team();

  // The number of members; 1 is the caller alone.
  int size() const;

  // Calls body(context, begin, end, member) on disjoint ranges of `grain` items, or less, that cover [0, count), and
  // returns when all are done. 0 <= member < size(), one range at a time each; the caller is member 0. Bodies must not
  // throw. To be called by the thread that made the team, and not from a body.
  void run_ranges(std::int64_t count, std::int64_t grain,
                  void (*body)(void* context, std::int64_t begin, std::int64_t end, int member), void* context);

  // The same for a callable object.
  template <class Body>
  void run(std::int64_t count, std::int64_t grain, Body& body) {
    run_ranges(
        count, grain,
        [](void* context, std::int64_t begin, std::int64_t end, int member) {
          (*static_cast<Body*>(context))(begin, end, member);
        },
        &body);
  }

 private:
  struct State;
  State* state_;  // null for the caller alone
};

}  // namespace mudsc
